// Filters that take each item by an attribute, a test or another filter.
#include <algorithm>
#include <utility>

#include "common/status_macros.h"
#include "fmt/format.h"
#include "model/jinja_arguments.h"
#include "model/jinja_builtins.h"
#include "model/jinja_interpreter.h"
#include "model/jinja_operations.h"
#include "model/jinja_path.h"
#include "model/jinja_text.h"

namespace antiphon::model::jinja {
namespace {

// What map and select go through: jinja2 asks for the truth first, so none is an empty sequence.
absl::StatusOr<std::vector<Value>> Candidates(Interpreter& in, const Value& self) {
  if (!Truthy(self)) return std::vector<Value>();
  return Items(in.heap(), self);
}

// Takes the first positional argument away.
Value TakeFirst(Args& args) {
  Value out = std::move(args.positional.front());
  args.positional.erase(args.positional.begin());
  return out;
}

Result Map(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const std::vector<Value> items, Candidates(in, self));
  std::vector<Value> out;
  if (args.positional.empty()) {
    ASSIGN_OR_RETURN(const Bound bound, Bound::Of("map", args, {"attribute", "default"}, 1));
    for (const Value& item : items) {
      ASSIGN_OR_RETURN(Value value, FollowPath(in, item, bound[0]));
      if (value.is(Kind::kUndefined) && bound.passed(1)) value = bound[1];
      out.push_back(std::move(value));
    }
    return in.heap().Once(std::move(out));
  }
  const Value name = TakeFirst(args);
  if (!name.is(Kind::kString)) return Error("map requires a filter argument");
  for (const Value& item : items) {
    if (!in.heap().Spend(1)) return in.heap().Check();
    Args each = args;
    ASSIGN_OR_RETURN(Value value, in.ApplyFilter(name.text(), item, each));
    out.push_back(std::move(value));
  }
  return in.heap().Once(std::move(out));
}

// select, reject, selectattr and rejectattr.
template <bool keep, bool by_attribute>
Result Select(Interpreter& in, const Value& self, Args& args) {
  Value path = Value::None();
  if (by_attribute) {
    if (args.positional.empty()) return Error("Missing parameter for attribute name");
    path = TakeFirst(args);
  }
  Value test = Value::None();
  if (!args.positional.empty()) {
    test = TakeFirst(args);
    if (!test.is(Kind::kString)) return Error("the test must be named by a string");
  }
  ASSIGN_OR_RETURN(const std::vector<Value> items, Candidates(in, self));
  std::vector<Value> out;
  for (const Value& item : items) {
    if (!in.heap().Spend(1)) return in.heap().Check();
    Value subject = item;
    if (by_attribute) {
      ASSIGN_OR_RETURN(subject, FollowPath(in, item, path));
    }
    bool holds = Truthy(subject);
    if (test.is(Kind::kString)) {
      Args each = args;
      ASSIGN_OR_RETURN(holds, in.ApplyTest(test.text(), subject, each));
    }
    if (holds == keep) out.push_back(item);
  }
  return in.heap().Once(std::move(out));
}

Result Sort(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound,
                   Bound::Of("sort", args, {"reverse", "case_sensitive", "attribute"}));
  ASSIGN_OR_RETURN(const std::vector<Value> items, Items(in.heap(), self));
  std::vector<SortEntry> entries;
  // Several attributes, separated by commas, order like a tuple of them.
  std::vector<Value> paths;
  if (bound.has(2) && bound[2].is(Kind::kString)) {
    std::string_view rest = bound[2].text();
    for (;;) {
      const size_t comma = rest.find(',');
      paths.push_back(in.heap().Str(rest.substr(0, comma)));
      if (comma == std::string_view::npos) break;
      rest.remove_prefix(comma + 1);
    }
  } else if (bound.has(2)) {
    paths.push_back(bound[2]);
  }
  const bool case_sensitive = bound.Flag(1, false);
  for (const Value& item : items) {
    std::vector<Value> keys;
    for (const Value& path : paths) {
      ASSIGN_OR_RETURN(const Value value, FollowPath(in, item, path));
      keys.push_back(SortKey(in.heap(), value, case_sensitive));
    }
    entries.push_back({paths.empty() ? SortKey(in.heap(), item, case_sensitive)
                                     : in.heap().Tuple(std::move(keys)),
                       item});
  }
  RETURN_IF_ERROR(SortEntries(in.heap(), bound.Flag(0, false), &entries));
  std::vector<Value> out;
  for (SortEntry& entry : entries) out.push_back(std::move(entry.value));
  return in.heap().List(std::move(out));
}

Result Unique(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("unique", args, {"case_sensitive", "attribute"}));
  ASSIGN_OR_RETURN(const std::vector<Value> items, Items(in.heap(), self));
  const Value seen = in.heap().NewDict();
  std::vector<Value> out;
  for (const Value& item : items) {
    Value key = item;
    if (bound.has(1)) {
      ASSIGN_OR_RETURN(key, FollowPath(in, item, bound[1]));
    }
    key = SortKey(in.heap(), key, bound.Flag(0, false));
    const size_t before = seen.as<Dict>().size();
    RETURN_IF_ERROR(in.heap().SetItem(seen.as<Dict>(), key, Value::None()));
    if (seen.as<Dict>().size() != before) out.push_back(item);
  }
  return in.heap().Once(std::move(out));
}

template <bool least>
Result Extreme(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("min", args, {"case_sensitive", "attribute"}));
  ASSIGN_OR_RETURN(const std::vector<Value> items, Items(in.heap(), self));
  if (items.empty()) return in.heap().Undefined("No aggregated item, sequence was empty.");
  Value best_key;
  Value best;
  for (size_t i = 0; i < items.size(); ++i) {
    Value key = items[i];
    if (bound.has(1)) {
      ASSIGN_OR_RETURN(key, FollowPath(in, items[i], bound[1]));
    }
    key = SortKey(in.heap(), key, bound.Flag(0, false));
    if (i > 0) {
      ASSIGN_OR_RETURN(const auto order, Compare(in.heap(), key, best_key, least ? "<" : ">"));
      if (least ? !(order < 0) : !(order > 0)) continue;
    }
    best_key = std::move(key);
    best = items[i];
  }
  return best;
}

Result Sum(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("sum", args, {"attribute", "start"}));
  ASSIGN_OR_RETURN(const std::vector<Value> items, Items(in.heap(), self));
  Value total = bound.passed(1) ? bound[1] : Value::Integer(0);
  if (total.is(Kind::kString)) return Error("sum() can't sum strings");
  for (const Value& item : items) {
    if (!in.heap().Spend(1)) return in.heap().Check();
    Value part = item;
    if (bound.has(0)) {
      ASSIGN_OR_RETURN(part, FollowPath(in, item, bound[0]));
    }
    ASSIGN_OR_RETURN(total, Arithmetic(in.heap(), Operator::kAdd, total, part));
  }
  return total;
}

Result GroupBy(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound,
                   Bound::Of("groupby", args, {"attribute", "default", "case_sensitive"}, 1));
  ASSIGN_OR_RETURN(const std::vector<Value> items, Items(in.heap(), self));
  std::vector<SortEntry> entries;
  const auto key_of = [&](const Value& item) -> Result {
    ASSIGN_OR_RETURN(Value key, FollowPath(in, item, bound[0]));
    if (key.is(Kind::kUndefined) && bound.passed(1)) key = bound[1];
    return key;
  };
  for (const Value& item : items) {
    ASSIGN_OR_RETURN(const Value key, key_of(item));
    entries.push_back({SortKey(in.heap(), key, bound.Flag(2, false)), item});
  }
  RETURN_IF_ERROR(SortEntries(in.heap(), false, &entries));
  std::vector<Value> groups;
  for (size_t at = 0; at < entries.size();) {
    std::vector<Value> members{entries[at].value};
    size_t end = at + 1;
    for (; end < entries.size(); ++end) {
      ASSIGN_OR_RETURN(const bool same, Equal(in.heap(), entries[at].key, entries[end].key));
      if (!same) break;
      members.push_back(entries[end].value);
    }
    ASSIGN_OR_RETURN(const Value name, key_of(entries[at].value));
    groups.push_back(in.heap().Tuple({name, in.heap().List(std::move(members))}));
    at = end;
  }
  return in.heap().List(std::move(groups));
}

constexpr NamedNative kFilters[] = {
    {"map", Map},
    {"select", Select<true, false>},
    {"reject", Select<false, false>},
    {"selectattr", Select<true, true>},
    {"rejectattr", Select<false, true>},
    {"sort", Sort},
    {"unique", Unique},
    {"min", Extreme<true>},
    {"max", Extreme<false>},
    {"sum", Sum},
    {"groupby", GroupBy},
};

}  // namespace

absl::Span<const NamedNative> SelectionFilters() { return kFilters; }

Result FollowPath(Interpreter& in, const Value& item, const Value& path) {
  if (!path.is(Kind::kString)) return in.Item(item, path);
  Value value = item;
  std::string_view rest = path.text();
  for (;;) {
    const size_t dot = rest.find('.');
    const std::string_view part = rest.substr(0, dot);
    const bool number = !part.empty() && part.size() < 18 &&
                        part.find_first_not_of("0123456789") == std::string_view::npos;
    Int index = 0;
    if (number) {
      for (char c : part) index = index * 10 + (c - '0');
    }
    if (!in.heap().Spend(1)) return in.heap().Check();
    ASSIGN_OR_RETURN(value, in.Item(value, number ? Value::Integer(index) : in.heap().Str(part)));
    if (dot == std::string_view::npos) return value;
    rest.remove_prefix(dot + 1);
  }
}

Value SortKey(Heap& heap, const Value& value, bool case_sensitive) {
  if (case_sensitive || !value.is(Kind::kString)) return value;
  heap.SpendText(value.text().size() * 8);
  return heap.Str(Lower(value.text()));
}

absl::Status SortEntries(Heap& heap, bool reverse, std::vector<SortEntry>* entries) {
  absl::Status failure;
  // Reversing before and after keeps equal entries in their order.
  if (reverse) std::reverse(entries->begin(), entries->end());
  std::stable_sort(entries->begin(), entries->end(), [&](const SortEntry& a, const SortEntry& b) {
    if (!failure.ok()) return false;
    const auto order = Compare(heap, a.key, b.key);
    if (!order.ok()) {
      failure = order.status();
      return false;
    }
    return *order < 0;
  });
  if (reverse) std::reverse(entries->begin(), entries->end());
  return failure;
}

}  // namespace antiphon::model::jinja
