// Filters on whole sequences and dictionaries.
#include <algorithm>

#include "common/status_macros.h"
#include "fmt/format.h"
#include "model/jinja_arguments.h"
#include "model/jinja_builtins.h"
#include "model/jinja_interpreter.h"
#include "model/jinja_operations.h"
#include "model/jinja_path.h"
#include "model/jinja_print.h"
#include "model/jinja_text.h"

namespace antiphon::model::jinja {
namespace {

Result LengthFilter(Interpreter&, const Value& self, Args& args) {
  RETURN_IF_ERROR(Bound::Of("length", args, {}).status());
  const std::optional<Int> length = Length(self);
  if (!length.has_value()) {
    return Error(fmt::format("object of type '{}' has no len()", TypeName(self)));
  }
  return Value::Integer(*length);
}

Result Default(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("default", args, {"default_value", "boolean"}));
  const bool use = self.is(Kind::kUndefined) || (bound.Flag(1, false) && !Truthy(self));
  if (!use) return self;
  return bound.passed(0) ? bound[0] : in.heap().Str("");
}

Result ListFilter(Interpreter& in, const Value& self, Args& args) {
  RETURN_IF_ERROR(Bound::Of("list", args, {}).status());
  ASSIGN_OR_RETURN(std::vector<Value> items, Items(in.heap(), self));
  return in.heap().List(std::move(items));
}

Result First(Interpreter& in, const Value& self, Args&) {
  if (self.is(Kind::kIterator) && !self.as<Iterator>().is_view) {
    Iterator& iterator = self.as<Iterator>();
    if (iterator.position < iterator.items.size()) return iterator.items[iterator.position++];
    return in.heap().Undefined("No first item, sequence was empty.");
  }
  ASSIGN_OR_RETURN(std::vector<Value> items, Items(in.heap(), self));
  if (items.empty()) return in.heap().Undefined("No first item, sequence was empty.");
  return std::move(items.front());
}

Result Last(Interpreter& in, const Value& self, Args&) {
  if (self.is(Kind::kIterator) && !self.as<Iterator>().is_view) {
    return Error("'generator' object is not reversible");
  }
  ASSIGN_OR_RETURN(std::vector<Value> items, Items(in.heap(), self));
  if (items.empty()) return in.heap().Undefined("No last item, sequence was empty.");
  return std::move(items.back());
}

Result Reverse(Interpreter& in, const Value& self, Args&) {
  ASSIGN_OR_RETURN(std::vector<Value> items, Items(in.heap(), self));
  std::reverse(items.begin(), items.end());
  if (!self.is(Kind::kString)) return in.heap().Once(std::move(items));
  std::string out;
  for (const Value& item : items) out += item.text();
  return in.heap().Str(std::move(out));
}

Result JoinFilter(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("join", args, {"d", "attribute"}));
  ASSIGN_OR_RETURN(const std::vector<Value> items, Items(in.heap(), self));
  std::string separator;
  if (bound.passed(0)) {
    ASSIGN_OR_RETURN(separator, ToStr(in.heap(), bound[0]));
  }
  std::string out;
  bool first = true;
  for (const Value& item : items) {
    if (!first) {
      RETURN_IF_ERROR(in.heap().Room(out.size() + separator.size()));
      out += separator;
    }
    first = false;
    if (bound.has(1)) {
      ASSIGN_OR_RETURN(const Value part, FollowPath(in, item, bound[1]));
      RETURN_IF_ERROR(AppendStr(in.heap(), part, &out));
    } else {
      RETURN_IF_ERROR(AppendStr(in.heap(), item, &out));
    }
  }
  return in.heap().Str(std::move(out));
}

Result ItemsFilter(Interpreter& in, const Value& self, Args&) {
  std::vector<Value> pairs;
  if (self.is(Kind::kDict)) {
    for (const auto& [key, value] : self.as<Dict>().entries) {
      pairs.push_back(in.heap().Tuple({key, value}));
    }
  } else if (!self.is(Kind::kUndefined)) {
    return Error("Can only get item pairs from a mapping.");
  }
  return in.heap().Once(std::move(pairs));
}

Result DictSort(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound,
                   Bound::Of("dictsort", args, {"case_sensitive", "by", "reverse"}));
  ASSIGN_OR_RETURN(const std::string by, bound.Text(1, "key"));
  if (by != "key" && by != "value") return Error("dictsort(): 'by' must be \"key\" or \"value\"");
  if (self.is(Kind::kUndefined)) return UndefinedError(self);
  if (!self.is(Kind::kDict)) {
    return Error(fmt::format("'{}' object has no attribute 'items'", TypeName(self)));
  }
  std::vector<SortEntry> entries;
  for (const auto& [key, value] : self.as<Dict>().entries) {
    const Value& chosen = by == "key" ? key : value;
    entries.push_back(
        {SortKey(in.heap(), chosen, bound.Flag(0, false)), in.heap().Tuple({key, value})});
  }
  RETURN_IF_ERROR(SortEntries(in.heap(), bound.Flag(2, false), &entries));
  std::vector<Value> pairs;
  for (SortEntry& entry : entries) pairs.push_back(std::move(entry.value));
  return in.heap().List(std::move(pairs));
}

Result Batch(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("batch", args, {"linecount", "fill_with"}, 1));
  ASSIGN_OR_RETURN(const int64_t size, bound.Integer(0, 1));
  if (size < 1) return Error("batch(): linecount must be at least 1");
  ASSIGN_OR_RETURN(const std::vector<Value> items, Items(in.heap(), self));
  std::vector<Value> batches;
  for (size_t at = 0; at < items.size();) {
    const size_t end = at + std::min(static_cast<size_t>(size), items.size() - at);
    std::vector<Value> batch(items.begin() + static_cast<ptrdiff_t>(at),
                             items.begin() + static_cast<ptrdiff_t>(end));
    if (bound.has(1) && batch.size() < static_cast<size_t>(size)) {
      RETURN_IF_ERROR(in.heap().Room(static_cast<size_t>(size) * sizeof(Value)));
      batch.resize(static_cast<size_t>(size), bound[1]);
    }
    batches.push_back(in.heap().List(std::move(batch)));
    at = end;
  }
  return in.heap().Once(std::move(batches));
}

Result SliceFilter(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("slice", args, {"slices", "fill_with"}, 1));
  ASSIGN_OR_RETURN(const int64_t wanted, bound.Integer(0, 1));
  if (wanted < 1) return Error("slice(): slices must be at least 1");
  RETURN_IF_ERROR(
      in.heap().Room(static_cast<size_t>(std::min<int64_t>(wanted, 1LL << 40)) * sizeof(Sequence)));
  ASSIGN_OR_RETURN(const std::vector<Value> items, Items(in.heap(), self));
  const auto count = static_cast<size_t>(wanted);
  const size_t per_slice = items.size() / count;
  const size_t with_extra = items.size() % count;
  std::vector<Value> slices;
  size_t at = 0;
  for (size_t i = 0; i < count; ++i) {
    const size_t end = at + per_slice + (i < with_extra ? 1 : 0);
    std::vector<Value> slice(items.begin() + static_cast<ptrdiff_t>(at),
                             items.begin() + static_cast<ptrdiff_t>(end));
    if (bound.has(1) && i >= with_extra && with_extra > 0) slice.push_back(bound[1]);
    slices.push_back(in.heap().List(std::move(slice)));
    if (!in.heap().Spend(1)) return in.heap().Check();
    at = end;
  }
  return in.heap().Once(std::move(slices));
}

Result AttributeFilter(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("attr", args, {"name"}, 1));
  ASSIGN_OR_RETURN(const std::string name, bound.Text(0, ""));
  // Unlike `.`, `attr` never looks at keys.
  if (self.is(Kind::kDict) && FindMethod(Kind::kDict, name) == nullptr) {
    return in.heap().Undefined(fmt::format("'dict object' has no attribute {}", Quoted(name)));
  }
  return in.Attribute(self, name);
}

constexpr NamedNative kFilters[] = {
    {"length", LengthFilter}, {"count", LengthFilter},   {"default", Default},
    {"d", Default},           {"list", ListFilter},      {"first", First},
    {"last", Last},           {"reverse", Reverse},      {"join", JoinFilter},
    {"items", ItemsFilter},   {"dictsort", DictSort},    {"batch", Batch},
    {"slice", SliceFilter},   {"attr", AttributeFilter},
};

}  // namespace

absl::Span<const NamedNative> SequenceFilters() { return kFilters; }

}  // namespace antiphon::model::jinja
