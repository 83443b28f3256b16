// Methods of lists, tuples and dictionaries. Those that change their object do so in place, as in
// Python: Hugging Face's sandbox refuses them, other runtimes do not, and some models use them.
#include <algorithm>

#include "common/status_macros.h"
#include "fmt/format.h"
#include "model/jinja_arguments.h"
#include "model/jinja_builtins.h"
#include "model/jinja_interpreter.h"
#include "model/jinja_operations.h"

namespace antiphon::model::jinja {
namespace {

Result Append(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("append", args, {"item"}, 1));
  in.heap().Append(self.as<Sequence>(), bound[0]);
  return Value::None();
}

Result Extend(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("extend", args, {"iterable"}, 1));
  ASSIGN_OR_RETURN(const std::vector<Value> items, Items(in.heap(), bound[0]));
  for (const Value& item : items) in.heap().Append(self.as<Sequence>(), item);
  return Value::None();
}

Result Insert(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("insert", args, {"index", "item"}, 2));
  ASSIGN_OR_RETURN(int64_t at, bound.Integer(0, 0));
  std::vector<Value>& items = self.as<Sequence>().items;
  const auto size = static_cast<int64_t>(items.size());
  if (!in.heap().Spend(items.size() / 8)) return in.heap().Check();
  in.heap().Append(self.as<Sequence>(), bound[1]);
  at = std::clamp<int64_t>(at < 0 ? at + size : at, 0, size);
  std::rotate(items.begin() + at, items.end() - 1, items.end());
  return Value::None();
}

Result ListPop(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("pop", args, {"index"}));
  ASSIGN_OR_RETURN(int64_t at, bound.Integer(0, -1));
  std::vector<Value>& items = self.as<Sequence>().items;
  const auto size = static_cast<int64_t>(items.size());
  if (size == 0) return Error("pop from empty list");
  if (at < 0) at += size;
  if (at < 0 || at >= size) return Error("pop index out of range");
  if (!in.heap().Spend(static_cast<uint64_t>(size - at) / 8)) return in.heap().Check();
  Value out = items[static_cast<size_t>(at)];
  items.erase(items.begin() + at);
  return out;
}

Result ListRemove(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("remove", args, {"item"}, 1));
  std::vector<Value>& items = self.as<Sequence>().items;
  for (size_t i = 0; i < items.size(); ++i) {
    ASSIGN_OR_RETURN(const bool same, Equal(in.heap(), items[i], bound[0]));
    if (!same) continue;
    const Value dying = std::move(items[i]);
    items.erase(items.begin() + static_cast<ptrdiff_t>(i));
    return Value::None();
  }
  return Error("list.remove(x): x not in list");
}

Result ListClear(Interpreter&, const Value& self, Args&) {
  const std::vector<Value> dying = std::move(self.as<Sequence>().items);
  self.as<Sequence>().items.clear();
  return Value::None();
}

Result ListReverse(Interpreter& in, const Value& self, Args&) {
  std::vector<Value>& items = self.as<Sequence>().items;
  if (!in.heap().Spend(items.size() / 8)) return in.heap().Check();
  std::reverse(items.begin(), items.end());
  return Value::None();
}

Result ListCopy(Interpreter& in, const Value& self, Args&) {
  ASSIGN_OR_RETURN(std::vector<Value> items, Items(in.heap(), self));
  return in.heap().List(std::move(items));
}

Result ItemIndex(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("index", args, {"item"}, 1));
  const std::vector<Value>& items = self.as<Sequence>().items;
  for (size_t i = 0; i < items.size(); ++i) {
    ASSIGN_OR_RETURN(const bool same, Equal(in.heap(), items[i], bound[0]));
    if (same) return Value::Integer(static_cast<Int>(i));
  }
  return Error("the value is not in the list");
}

Result ItemCount(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("count", args, {"item"}, 1));
  Int count = 0;
  for (const Value& item : self.as<Sequence>().items) {
    ASSIGN_OR_RETURN(const bool same, Equal(in.heap(), item, bound[0]));
    count += same;
  }
  return Value::Integer(count);
}

Result Keys(Interpreter& in, const Value& self, Args& args) {
  RETURN_IF_ERROR(Bound::Of("keys", args, {}).status());
  ASSIGN_OR_RETURN(std::vector<Value> keys, Items(in.heap(), self));
  return in.heap().View(std::move(keys));
}

Result Values(Interpreter& in, const Value& self, Args& args) {
  RETURN_IF_ERROR(Bound::Of("values", args, {}).status());
  std::vector<Value> values;
  for (const auto& [key, value] : self.as<Dict>().entries) values.push_back(value);
  return in.heap().View(std::move(values));
}

Result DictItems(Interpreter& in, const Value& self, Args& args) {
  RETURN_IF_ERROR(Bound::Of("items", args, {}).status());
  std::vector<Value> pairs;
  for (const auto& [key, value] : self.as<Dict>().entries) {
    pairs.push_back(in.heap().Tuple({key, value}));
  }
  if (!in.heap().Spend(pairs.size() / 8)) return in.heap().Check();
  return in.heap().View(std::move(pairs));
}

absl::Status CheckKey(const Value& key) {
  if (Hashable(key)) return absl::OkStatus();
  return Error(fmt::format("unhashable type: '{}'", TypeName(key)));
}

Result Get(Interpreter&, const Value& self, Args& args) {
  // dict.get takes no keyword arguments.
  if (!args.named.empty()) return Error("get() takes no keyword arguments");
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("get", args, {"key", "default"}, 1));
  RETURN_IF_ERROR(CheckKey(bound[0]));
  if (const Value* found = self.as<Dict>().Find(bound[0])) return *found;
  return bound.passed(1) ? bound[1] : Value::None();
}

Result DictPop(Interpreter&, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("pop", args, {"key", "default"}, 1));
  RETURN_IF_ERROR(CheckKey(bound[0]));
  if (const Value* found = self.as<Dict>().Find(bound[0])) {
    Value out = *found;
    self.as<Dict>().Erase(bound[0]);
    return out;
  }
  if (bound.passed(1)) return bound[1];
  return Error("pop(): no such key");
}

Result Update(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Value other, FindFunction("dict")->native(in, Value::None(), args));
  for (const auto& [key, value] : other.as<Dict>().entries) {
    RETURN_IF_ERROR(in.heap().SetItem(self.as<Dict>(), key, value));
  }
  return Value::None();
}

Result SetDefault(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("setdefault", args, {"key", "default"}, 1));
  RETURN_IF_ERROR(CheckKey(bound[0]));
  if (const Value* found = self.as<Dict>().Find(bound[0])) return *found;
  Value value = bound.passed(1) ? bound[1] : Value::None();
  RETURN_IF_ERROR(in.heap().SetItem(self.as<Dict>(), bound[0], value));
  return value;
}

Result DictCopy(Interpreter& in, const Value& self, Args&) {
  Value out = in.heap().NewDict();
  for (const auto& [key, value] : self.as<Dict>().entries) {
    RETURN_IF_ERROR(in.heap().SetItem(out.as<Dict>(), key, value));
  }
  return out;
}

Result DictClear(Interpreter&, const Value& self, Args&) {
  const auto dying = std::move(self.as<Dict>().entries);
  self.as<Dict>().Clear();
  return Value::None();
}

constexpr NamedNative kListMethods[] = {
    {"append", Append},       {"extend", Extend},   {"insert", Insert}, {"pop", ListPop},
    {"remove", ListRemove},   {"clear", ListClear}, {"copy", ListCopy}, {"index", ItemIndex},
    {"reverse", ListReverse}, {"count", ItemCount},
};
constexpr NamedNative kTupleMethods[] = {{"index", ItemIndex}, {"count", ItemCount}};
constexpr NamedNative kDictMethods[] = {
    {"keys", Keys},     {"values", Values},   {"items", DictItems},
    {"get", Get},       {"pop", DictPop},     {"setdefault", SetDefault},
    {"copy", DictCopy}, {"clear", DictClear}, {"update", Update},
};

}  // namespace

absl::Span<const NamedNative> ListMethods() { return kListMethods; }
absl::Span<const NamedNative> TupleMethods() { return kTupleMethods; }
absl::Span<const NamedNative> DictMethods() { return kDictMethods; }

}  // namespace antiphon::model::jinja
