#include "common/status_macros.h"
#include "fmt/format.h"
#include "model/jinja_builtins.h"
#include "model/jinja_interpreter.h"
#include "model/jinja_operations.h"
#include "model/jinja_print.h"
#include "model/jinja_text.h"

namespace antiphon::model::jinja {
Result Interpreter::Evaluate(const Expr& expr, const ScopeRef& scope) {
  Result out = Value::None();
  ++depth_;
  if (!heap_.Spend(1)) {
    out = heap_.Check();
  } else if (depth_ > limits_.depth * kFramesPerCall) {
    out = absl::ResourceExhaustedError("the template nests too deeply");
  } else {
    out = EvaluateOne(expr, scope);
  }
  --depth_;
  if (!out.ok() && error_line_ == 0) error_line_ = expr.line;
  return out;
}

Result Interpreter::EvaluateOne(const Expr& expr, const ScopeRef& scope) {
  switch (expr.kind) {
    case Expr::Kind::kNone:
      return Value::None();
    case Expr::Kind::kBool:
      return Value::Bool(expr.integer != 0);
    case Expr::Kind::kInt:
      return Value::Integer(expr.integer);
    case Expr::Kind::kFloat:
      return Value::Float(expr.real);
    case Expr::Kind::kString:
      return Constant(expr);
    case Expr::Kind::kName:
      return EvaluateName(expr, scope);
    case Expr::Kind::kList:
    case Expr::Kind::kTuple:
      return EvaluateItems(expr, scope);
    case Expr::Kind::kDict:
      return EvaluateDict(expr, scope);
    case Expr::Kind::kNot:
    case Expr::Kind::kNegate:
    case Expr::Kind::kPlus:
    case Expr::Kind::kAnd:
    case Expr::Kind::kOr:
      return EvaluateLogic(expr, scope);
    case Expr::Kind::kBinary:
      return EvaluateBinary(expr, scope);
    case Expr::Kind::kCompare:
      return EvaluateCompare(expr, scope);
    case Expr::Kind::kConcat:
      return EvaluateConcat(expr, scope);
    case Expr::Kind::kConditional:
      return EvaluateConditional(expr, scope);
    case Expr::Kind::kAttribute: {
      ASSIGN_OR_RETURN(const Value value, Evaluate(*expr.items[0], scope));
      return Attribute(value, expr.text);
    }
    case Expr::Kind::kSubscript:
      return EvaluateSubscript(expr, scope);
    case Expr::Kind::kSlice:
      return EvaluateSlice(expr, scope);
    case Expr::Kind::kCall:
      return EvaluateCall(expr, scope);
    case Expr::Kind::kFilter:
      return EvaluateFilter(expr, scope, nullptr);
    case Expr::Kind::kTest:
      return EvaluateTest(expr, scope);
    case Expr::Kind::kNamespaceAttribute:
      break;
  }
  return Error("this expression has no value");
}

const Value& Interpreter::Constant(const Expr& expr) {
  Value& constant = constants_[static_cast<size_t>(expr.slot)];
  if (constant.is(Kind::kNone)) constant = heap_.Str(expr.text);
  return constant;
}

Result Interpreter::EvaluateName(const Expr& expr, const ScopeRef& scope) {
  if (const Value* found = scope->Find(expr.name)) return *found;
  const std::string& name = tree_.names[static_cast<size_t>(expr.name)];
  if (const NamedNative* function = FindFunction(name)) {
    return heap_.NewFunction(function->name, function->native, Value::None());
  }
  return heap_.Undefined(fmt::format("'{}' is undefined", name));
}

Result Interpreter::EvaluateItems(const Expr& expr, const ScopeRef& scope) {
  std::vector<Value> items;
  for (const ExprPtr& item : expr.items) {
    ASSIGN_OR_RETURN(Value value, Evaluate(*item, scope));
    items.push_back(std::move(value));
  }
  return expr.kind == Expr::Kind::kList ? heap_.List(std::move(items))
                                        : heap_.Tuple(std::move(items));
}

Result Interpreter::EvaluateDict(const Expr& expr, const ScopeRef& scope) {
  Value dict = heap_.NewDict();
  for (size_t i = 0; i < expr.items.size(); i += 2) {
    ASSIGN_OR_RETURN(const Value key, Evaluate(*expr.items[i], scope));
    ASSIGN_OR_RETURN(Value value, Evaluate(*expr.items[i + 1], scope));
    RETURN_IF_ERROR(heap_.SetItem(dict.as<Dict>(), key, std::move(value)));
  }
  return dict;
}

Result Interpreter::EvaluateLogic(const Expr& expr, const ScopeRef& scope) {
  ASSIGN_OR_RETURN(Value value, Evaluate(*expr.items[0], scope));
  switch (expr.kind) {
    case Expr::Kind::kNot:
      return Value::Bool(!Truthy(value));
    case Expr::Kind::kNegate:
      return Negate(value);
    case Expr::Kind::kPlus:
      return Arithmetic(heap_, Operator::kAdd, Value::Integer(0), value);
    case Expr::Kind::kAnd:
      return Truthy(value) ? Evaluate(*expr.items[1], scope) : value;
    default:
      return Truthy(value) ? value : Evaluate(*expr.items[1], scope);
  }
}

Result Interpreter::EvaluateBinary(const Expr& expr, const ScopeRef& scope) {
  ASSIGN_OR_RETURN(const Value left, Evaluate(*expr.items[0], scope));
  ASSIGN_OR_RETURN(const Value right, Evaluate(*expr.items[1], scope));
  if (expr.operators[0] == Operator::kModulo && left.is(Kind::kString)) {
    // "..." % values, as the `format` filter does it.
    Args args;
    if (right.is(Kind::kTuple)) {
      args.positional = right.as<Sequence>().items;
    } else {
      args.positional = {right};
    }
    return ApplyFilter("format", left, args);
  }
  return Arithmetic(heap_, expr.operators[0], left, right);
}

absl::StatusOr<bool> Interpreter::CompareOnce(Operator op, const Value& a, const Value& b) {
  switch (op) {
    case Operator::kEqual:
      return Equal(heap_, a, b);
    case Operator::kNotEqual: {
      ASSIGN_OR_RETURN(const bool same, Equal(heap_, a, b));
      return !same;
    }
    case Operator::kIn:
      return Contains(heap_, b, a);
    case Operator::kNotIn: {
      ASSIGN_OR_RETURN(const bool contained, Contains(heap_, b, a));
      return !contained;
    }
    case Operator::kLess: {
      ASSIGN_OR_RETURN(const auto order, Compare(heap_, a, b, "<"));
      return order < 0;
    }
    case Operator::kLessEqual: {
      ASSIGN_OR_RETURN(const auto order, Compare(heap_, a, b, "<="));
      return order <= 0;
    }
    case Operator::kGreater: {
      ASSIGN_OR_RETURN(const auto order, Compare(heap_, a, b, ">"));
      return order > 0;
    }
    default: {
      ASSIGN_OR_RETURN(const auto order, Compare(heap_, a, b, ">="));
      return order >= 0;
    }
  }
}

Result Interpreter::EvaluateCompare(const Expr& expr, const ScopeRef& scope) {
  ASSIGN_OR_RETURN(Value left, Evaluate(*expr.items[0], scope));
  for (size_t i = 0; i < expr.operators.size(); ++i) {
    ASSIGN_OR_RETURN(Value right, Evaluate(*expr.items[i + 1], scope));
    ASSIGN_OR_RETURN(const bool holds, CompareOnce(expr.operators[i], left, right));
    if (!holds) return Value::Bool(false);
    left = std::move(right);
  }
  return Value::Bool(true);
}

Result Interpreter::EvaluateConcat(const Expr& expr, const ScopeRef& scope) {
  std::string text;
  for (const ExprPtr& item : expr.items) {
    ASSIGN_OR_RETURN(const Value value, Evaluate(*item, scope));
    RETURN_IF_ERROR(AppendStr(heap_, value, &text));
  }
  return heap_.Str(std::move(text));
}

Result Interpreter::EvaluateConditional(const Expr& expr, const ScopeRef& scope) {
  ASSIGN_OR_RETURN(const Value condition, Evaluate(*expr.items[1], scope));
  if (Truthy(condition)) return Evaluate(*expr.items[0], scope);
  if (expr.items[2] != nullptr) return Evaluate(*expr.items[2], scope);
  return heap_.Undefined(
      fmt::format("the inline if-expression on line {} evaluated to false and "
                  "no else section was defined",
                  expr.line));
}

Result Interpreter::EvaluateSubscript(const Expr& expr, const ScopeRef& scope) {
  ASSIGN_OR_RETURN(const Value value, Evaluate(*expr.items[0], scope));
  ASSIGN_OR_RETURN(const Value key, Evaluate(*expr.items[1], scope));
  return Item(value, key);
}

Result Interpreter::Item(const Value& value, const Value& key) {
  if (!key.is(Kind::kString) || value.is(Kind::kUndefined)) return Subscript(heap_, value, key);
  if (value.is(Kind::kDict)) {
    if (const Value* found = value.as<Dict>().Find(key)) return *found;
  }
  return Attribute(value, key.text());
}

Result Interpreter::EvaluateSlice(const Expr& expr, const ScopeRef& scope) {
  ASSIGN_OR_RETURN(const Value value, Evaluate(*expr.items[0], scope));
  Value bounds[3] = {Value::None(), Value::None(), Value::None()};
  for (size_t i = 0; i < 3; ++i) {
    if (expr.items[i + 1] == nullptr) continue;
    ASSIGN_OR_RETURN(bounds[i], Evaluate(*expr.items[i + 1], scope));
  }
  return SliceOf(heap_, value, bounds[0], bounds[1], bounds[2]);
}

absl::StatusOr<Args> Interpreter::EvaluateArguments(const CallArguments& arguments,
                                                    const ScopeRef& scope) {
  Args args;
  for (const ExprPtr& expr : arguments.positional) {
    ASSIGN_OR_RETURN(Value value, Evaluate(*expr, scope));
    args.positional.push_back(std::move(value));
  }
  for (const auto& [name, expr] : arguments.named) {
    ASSIGN_OR_RETURN(Value value, Evaluate(*expr, scope));
    args.named.emplace_back(name, std::move(value));
  }
  if (arguments.star != nullptr) {
    ASSIGN_OR_RETURN(const Value values, Evaluate(*arguments.star, scope));
    ASSIGN_OR_RETURN(std::vector<Value> items, Items(heap_, values));
    args.positional.insert(args.positional.end(), items.begin(), items.end());
  }
  if (arguments.star_star != nullptr) {
    ASSIGN_OR_RETURN(const Value values, Evaluate(*arguments.star_star, scope));
    if (!values.is(Kind::kDict)) return Error("argument after ** must be a mapping");
    for (const auto& [key, value] : values.as<Dict>().entries) {
      if (!key.is(Kind::kString)) return Error("keywords must be strings");
      args.named.emplace_back(key.text(), value);
    }
  }
  return args;
}

Result Interpreter::EvaluateCall(const Expr& expr, const ScopeRef& scope) {
  ASSIGN_OR_RETURN(const Value callee, Evaluate(*expr.items[0], scope));
  ASSIGN_OR_RETURN(Args args, EvaluateArguments(*expr.arguments, scope));
  return Call(callee, args);
}

Result Interpreter::Call(const Value& callee, Args& args) {
  switch (callee.kind()) {
    case Kind::kFunction: {
      const Function& function = callee.as<Function>();
      return function.native(*this, function.self, args);
    }
    case Kind::kMacro:
      return CallMacro(callee.as<Macro>(), args);
    case Kind::kLoop:
      return CallLoop(callee.as<Loop>(), args);
    case Kind::kJoiner: {
      Joiner& joiner = callee.as<Joiner>();
      if (std::exchange(joiner.used, true)) return joiner.separator;
      return heap_.Str("");
    }
    case Kind::kUndefined:
      return UndefinedError(callee);
    default:
      return Error(fmt::format("'{}' object is not callable", TypeName(callee)));
  }
}

Result Interpreter::EvaluateFilter(const Expr& expr, const ScopeRef& scope, const Value* input) {
  Value self = Value::None();
  const ExprPtr& operand = expr.items[0];
  if (operand == nullptr) {
    if (input != nullptr) self = *input;
  } else if (input != nullptr && operand->kind == Expr::Kind::kFilter) {
    ASSIGN_OR_RETURN(self, EvaluateFilter(*operand, scope, input));
  } else {
    ASSIGN_OR_RETURN(self, Evaluate(*operand, scope));
  }
  ASSIGN_OR_RETURN(Args args, EvaluateArguments(*expr.arguments, scope));
  Result out = ApplyFilter(expr.text, self, args);
  if (!out.ok() && error_line_ == 0) error_line_ = expr.line;
  return out;
}

Result Interpreter::ApplyFilter(std::string_view name, const Value& self, Args& args) {
  const NamedNative* filter = FindFilter(name);
  if (filter == nullptr) return Error(fmt::format("no filter named '{}'", name));
  return filter->native(*this, self, args);
}

Result Interpreter::EvaluateTest(const Expr& expr, const ScopeRef& scope) {
  ASSIGN_OR_RETURN(const Value self, Evaluate(*expr.items[0], scope));
  ASSIGN_OR_RETURN(Args args, EvaluateArguments(*expr.arguments, scope));
  ASSIGN_OR_RETURN(const bool holds, ApplyTest(expr.text, self, args));
  return Value::Bool(holds);
}

absl::StatusOr<bool> Interpreter::ApplyTest(std::string_view name, const Value& self, Args& args) {
  const NamedNative* test = FindTest(name);
  if (test == nullptr) return Error(fmt::format("no test named '{}'", name));
  ASSIGN_OR_RETURN(const Value out, test->native(*this, self, args));
  return Truthy(out);
}

Result Interpreter::Attribute(const Value& value, std::string_view name) {
  if (value.is(Kind::kUndefined)) return UndefinedError(value);
  if (value.is(Kind::kNamespace)) {
    if (const Value* found = value.as<Dict>().Find(name)) return *found;
  } else if (const NamedNative* method = FindMethod(value.kind(), name)) {
    return heap_.NewFunction(method->name, method->native, value);
  } else if (value.is(Kind::kDict)) {
    if (const Value* found = value.as<Dict>().Find(name)) return *found;
  } else if (value.is(Kind::kLoop)) {
    return LoopAttribute(value, name);
  } else if (value.is(Kind::kCycler) && name == "current") {
    const Cycler& cycler = value.as<Cycler>();
    return cycler.items[cycler.position];
  } else if (value.is(Kind::kMacro) && name == "name") {
    return heap_.Str(value.as<Macro>().body->name);
  }
  return heap_.Undefined(
      fmt::format("'{}' has no attribute {}",
                  value.is(Kind::kNone) ? "None" : fmt::format("{} object", TypeName(value)),
                  Quoted(name.substr(0, 100))));
}

Result Interpreter::LoopAttribute(const Value& value, std::string_view name) {
  const Loop& loop = value.as<Loop>();
  const auto size = static_cast<Int>(loop.items.size());
  const auto index0 = static_cast<Int>(loop.index0);
  if (name == "index") return Value::Integer(index0 + 1);
  if (name == "index0") return Value::Integer(index0);
  if (name == "revindex") return Value::Integer(size - index0);
  if (name == "revindex0") return Value::Integer(size - index0 - 1);
  if (name == "first") return Value::Bool(index0 == 0);
  if (name == "last") return Value::Bool(index0 + 1 == size);
  if (name == "length") return Value::Integer(size);
  if (name == "depth") return Value::Integer(loop.depth0 + 1);
  if (name == "depth0") return Value::Integer(loop.depth0);
  if (name == "previtem") {
    if (index0 == 0) return heap_.Undefined("there is no previous item");
    return loop.items[loop.index0 - 1];
  }
  if (name == "nextitem") {
    if (index0 + 1 == size) return heap_.Undefined("there is no next item");
    return loop.items[loop.index0 + 1];
  }
  return heap_.Undefined(
      fmt::format("'LoopContext object' has no attribute {}", Quoted(name.substr(0, 100))));
}

}  // namespace antiphon::model::jinja
