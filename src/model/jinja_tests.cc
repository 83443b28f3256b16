// The tests that follow `is`.
#include "common/status_macros.h"
#include "fmt/format.h"
#include "model/jinja_arguments.h"
#include "model/jinja_builtins.h"
#include "model/jinja_interpreter.h"
#include "model/jinja_operations.h"
#include "model/jinja_print.h"
#include "model/jinja_text.h"

namespace antiphon::model::jinja {
namespace {

template <Kind kind>
Result IsKind(Interpreter&, const Value& self, Args&) {
  return Value::Bool(self.is(kind));
}

Result IsDefined(Interpreter&, const Value& self, Args&) {
  return Value::Bool(!self.is(Kind::kUndefined));
}
Result IsTrue(Interpreter&, const Value& self, Args&) {
  return Value::Bool(self.is(Kind::kBool) && self.boolean());
}
Result IsFalse(Interpreter&, const Value& self, Args&) {
  return Value::Bool(self.is(Kind::kBool) && !self.boolean());
}
Result IsNumber(Interpreter&, const Value& self, Args&) { return Value::Bool(self.numeric()); }
Result IsIterableTest(Interpreter&, const Value& self, Args&) {
  return Value::Bool(IsIterable(self) || self.is(Kind::kLoop));
}
// Has a length and can be subscripted.
Result IsSequence(Interpreter&, const Value& self, Args&) {
  return Value::Bool(Length(self).has_value() && !self.is(Kind::kIterator));
}
Result IsCallable(Interpreter&, const Value& self, Args&) {
  return Value::Bool(self.is(Kind::kFunction) || self.is(Kind::kMacro) || self.is(Kind::kJoiner) ||
                     self.is(Kind::kLoop) || self.is(Kind::kUndefined));
}

Result IsDivisibleBy(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("divisibleby", args, {"num"}, 1));
  ASSIGN_OR_RETURN(const Value rest, Arithmetic(in.heap(), Operator::kModulo, self, bound[0]));
  return Value::Bool(!Truthy(rest));
}

template <int remainder>
Result HasParity(Interpreter& in, const Value& self, Args&) {
  ASSIGN_OR_RETURN(const Value rest,
                   Arithmetic(in.heap(), Operator::kModulo, self, Value::Integer(2)));
  ASSIGN_OR_RETURN(const bool same, Equal(in.heap(), rest, Value::Integer(remainder)));
  return Value::Bool(same);
}

Result IsEqual(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("eq", args, {"other"}, 1));
  ASSIGN_OR_RETURN(const bool same, Equal(in.heap(), self, bound[0]));
  return Value::Bool(same);
}

Result IsNotEqual(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Value same, IsEqual(in, self, args));
  return Value::Bool(!same.boolean());
}

template <bool less, bool equal>
Result HasOrder(Interpreter& in, const Value& self, Args& args) {
  constexpr std::string_view kSymbol = less ? (equal ? "<=" : "<") : (equal ? ">=" : ">");
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of(kSymbol, args, {"other"}, 1));
  ASSIGN_OR_RETURN(const auto order, Compare(in.heap(), self, bound[0], kSymbol));
  return Value::Bool((less ? order < 0 : order > 0) || (equal && order == 0));
}

Result IsIn(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("in", args, {"seq"}, 1));
  ASSIGN_OR_RETURN(const bool contained, Contains(in.heap(), bound[0], self));
  return Value::Bool(contained);
}

// Identity: of objects by reference, of small values by kind and value.
Result IsSameAs(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("sameas", args, {"other"}, 1));
  const Value& other = bound[0];
  if (self.kind() != other.kind()) return Value::Bool(false);
  if (self.object() != nullptr && !self.is(Kind::kString)) {
    return Value::Bool(self.object() == other.object());
  }
  ASSIGN_OR_RETURN(const bool same, Equal(in.heap(), self, other));
  return Value::Bool(same);
}

template <bool upper>
Result HasCase(Interpreter& in, const Value& self, Args&) {
  ASSIGN_OR_RETURN(const std::string text, ToStr(in.heap(), self));
  bool cased = false;
  for (std::string_view rest = text; !rest.empty(); rest.remove_prefix(FrontBytes(rest))) {
    const uint32_t c = Front(rest);
    if (upper ? IsLower(c) : IsUpper(c)) return Value::Bool(false);
    cased |= upper ? IsUpper(c) : IsLower(c);
  }
  return Value::Bool(cased);
}

Result IsEscaped(Interpreter&, const Value& self, Args&) {
  return Value::Bool(self.is(Kind::kString) && self.as<String>().markup);
}

Result NamesFilter(Interpreter&, const Value& self, Args&) {
  return Value::Bool(self.is(Kind::kString) && FindFilter(self.text()) != nullptr);
}
Result NamesTest(Interpreter&, const Value& self, Args&) {
  return Value::Bool(self.is(Kind::kString) && FindTest(self.text()) != nullptr);
}

constexpr NamedNative kTests[] = {
    {"defined", IsDefined},
    {"undefined", IsKind<Kind::kUndefined>},
    {"none", IsKind<Kind::kNone>},
    {"boolean", IsKind<Kind::kBool>},
    {"true", IsTrue},
    {"false", IsFalse},
    {"integer", IsKind<Kind::kInt>},
    {"float", IsKind<Kind::kFloat>},
    {"number", IsNumber},
    {"string", IsKind<Kind::kString>},
    {"mapping", IsKind<Kind::kDict>},
    {"iterable", IsIterableTest},
    {"sequence", IsSequence},
    {"callable", IsCallable},
    {"divisibleby", IsDivisibleBy},
    {"odd", HasParity<1>},
    {"even", HasParity<0>},
    {"eq", IsEqual},
    {"==", IsEqual},
    {"equalto", IsEqual},
    {"ne", IsNotEqual},
    {"!=", IsNotEqual},
    {"lt", HasOrder<true, false>},
    {"<", HasOrder<true, false>},
    {"lessthan", HasOrder<true, false>},
    {"le", HasOrder<true, true>},
    {"<=", HasOrder<true, true>},
    {"gt", HasOrder<false, false>},
    {">", HasOrder<false, false>},
    {"greaterthan", HasOrder<false, false>},
    {"ge", HasOrder<false, true>},
    {">=", HasOrder<false, true>},
    {"in", IsIn},
    {"sameas", IsSameAs},
    {"lower", HasCase<false>},
    {"upper", HasCase<true>},
    {"escaped", IsEscaped},
    {"filter", NamesFilter},
    {"test", NamesTest},
};

}  // namespace

absl::Span<const NamedNative> Tests() { return kTests; }

}  // namespace antiphon::model::jinja
