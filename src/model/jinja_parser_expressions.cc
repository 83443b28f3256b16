// Expressions, in the order of their precedence from weak to strong.
#include <algorithm>
#include <utility>

#include "common/status_macros.h"
#include "fmt/format.h"
#include "model/jinja_parser.h"

namespace antiphon::model::jinja {

ExprPtr Parser::New(Expr::Kind kind) const {
  auto out = std::make_unique<Expr>();
  out->kind = kind;
  out->line = Current().line;
  return out;
}

Parser::ExprOr Parser::Done(ExprPtr expr) const {
  int depth = 0;
  const auto see = [&](const ExprPtr& child) {
    if (child != nullptr) depth = std::max(depth, child->depth);
  };
  for (const ExprPtr& item : expr->items) see(item);
  if (expr->arguments != nullptr) {
    for (const ExprPtr& item : expr->arguments->positional) see(item);
    for (const auto& [name, item] : expr->arguments->named) see(item);
    see(expr->arguments->star);
    see(expr->arguments->star_star);
  }
  expr->depth = depth + 1;
  if (expr->depth > kNestingMax) {
    return SyntaxError(expr->line, "the expression is nested too deeply");
  }
  return expr;
}

Parser::ExprOr Parser::Binary(Expr::Kind kind, ExprPtr left, ExprPtr right) const {
  auto out = New(kind);
  out->line = left->line;
  out->items.push_back(std::move(left));
  out->items.push_back(std::move(right));
  return Done(std::move(out));
}

Parser::ExprOr Parser::ParseExpression(bool conditional) {
  const Nested nested(&depth_);
  if (depth_ > kNestingMax) {
    return SyntaxError(Current().line, "the expression is nested too deeply");
  }
  return conditional ? ParseConditional() : ParseOr();
}

Parser::ExprOr Parser::ParseConditional() {
  ASSIGN_OR_RETURN(ExprPtr expr, ParseOr());
  while (SkipName("if")) {
    auto out = New(Expr::Kind::kConditional);
    ASSIGN_OR_RETURN(ExprPtr condition, ParseOr());
    ExprPtr otherwise;
    if (SkipName("else")) {
      ASSIGN_OR_RETURN(otherwise, ParseExpression());
    }
    out->items.push_back(std::move(expr));
    out->items.push_back(std::move(condition));
    out->items.push_back(std::move(otherwise));
    ASSIGN_OR_RETURN(expr, Done(std::move(out)));
  }
  return expr;
}

Parser::ExprOr Parser::ParseOr() {
  ASSIGN_OR_RETURN(ExprPtr left, ParseAnd());
  while (SkipName("or")) {
    ASSIGN_OR_RETURN(ExprPtr right, ParseAnd());
    ASSIGN_OR_RETURN(left, Binary(Expr::Kind::kOr, std::move(left), std::move(right)));
  }
  return left;
}

Parser::ExprOr Parser::ParseAnd() {
  ASSIGN_OR_RETURN(ExprPtr left, ParseNot());
  while (SkipName("and")) {
    ASSIGN_OR_RETURN(ExprPtr right, ParseNot());
    ASSIGN_OR_RETURN(left, Binary(Expr::Kind::kAnd, std::move(left), std::move(right)));
  }
  return left;
}

Parser::ExprOr Parser::ParseNot() {
  if (!Current().IsName("not")) return ParseCompare();
  const Nested nested(&depth_);
  if (depth_ > kNestingMax) return SyntaxError(Current().line, "'not' is nested too deeply");
  auto out = New(Expr::Kind::kNot);
  Next();
  ASSIGN_OR_RETURN(ExprPtr operand, ParseNot());
  out->items.push_back(std::move(operand));
  return Done(std::move(out));
}

Parser::ExprOr Parser::ParseCompare() {
  static constexpr std::pair<std::string_view, Operator> kOperators[] = {
      {"==", Operator::kEqual},     {"!=", Operator::kNotEqual}, {"<", Operator::kLess},
      {"<=", Operator::kLessEqual}, {">", Operator::kGreater},   {">=", Operator::kGreaterEqual}};
  ASSIGN_OR_RETURN(ExprPtr first, ParseSum());
  ExprPtr out;
  for (;;) {
    const Operator* found = nullptr;
    Operator in = Operator::kIn;
    if (Current().kind == Token::Kind::kOperator) {
      for (const auto& [symbol, op] : kOperators) {
        if (Current().text == symbol) found = &op;
      }
      if (found != nullptr) Next();
    } else if (SkipName("in")) {
      found = &in;
    } else if (Current().IsName("not") && Ahead().IsName("in")) {
      in = Operator::kNotIn;
      found = &in;
      Next();
      Next();
    }
    if (found == nullptr) break;
    if (out == nullptr) {
      out = New(Expr::Kind::kCompare);
      out->items.push_back(std::move(first));
    }
    out->operators.push_back(*found);
    ASSIGN_OR_RETURN(ExprPtr right, ParseSum());
    out->items.push_back(std::move(right));
  }
  if (out == nullptr) return first;
  return Done(std::move(out));
}

Parser::ExprOr Parser::ParseSum() {
  ASSIGN_OR_RETURN(ExprPtr left, ParseConcat());
  for (;;) {
    const bool add = Current().IsOperator("+");
    if (!add && !Current().IsOperator("-")) return left;
    Next();
    ASSIGN_OR_RETURN(ExprPtr right, ParseConcat());
    ASSIGN_OR_RETURN(left, Binary(Expr::Kind::kBinary, std::move(left), std::move(right)));
    left->operators.push_back(add ? Operator::kAdd : Operator::kSubtract);
  }
}

Parser::ExprOr Parser::ParseConcat() {
  ASSIGN_OR_RETURN(ExprPtr first, ParseProduct());
  if (!Current().IsOperator("~")) return first;
  auto out = New(Expr::Kind::kConcat);
  out->items.push_back(std::move(first));
  while (SkipOperator("~")) {
    ASSIGN_OR_RETURN(ExprPtr item, ParseProduct());
    out->items.push_back(std::move(item));
  }
  return Done(std::move(out));
}

Parser::ExprOr Parser::ParseProduct() {
  static constexpr std::pair<std::string_view, Operator> kOperators[] = {
      {"*", Operator::kMultiply},
      {"/", Operator::kDivide},
      {"//", Operator::kFloorDivide},
      {"%", Operator::kModulo}};
  ASSIGN_OR_RETURN(ExprPtr left, ParsePower());
  for (;;) {
    const Operator* found = nullptr;
    for (const auto& [symbol, op] : kOperators) {
      if (Current().IsOperator(symbol)) found = &op;
    }
    if (found == nullptr) return left;
    Next();
    ASSIGN_OR_RETURN(ExprPtr right, ParsePower());
    ASSIGN_OR_RETURN(left, Binary(Expr::Kind::kBinary, std::move(left), std::move(right)));
    left->operators.push_back(*found);
  }
}

// Left associative, as in Jinja2 (not as in Python).
Parser::ExprOr Parser::ParsePower() {
  ASSIGN_OR_RETURN(ExprPtr left, ParseUnary());
  while (SkipOperator("**")) {
    ASSIGN_OR_RETURN(ExprPtr right, ParseUnary());
    ASSIGN_OR_RETURN(left, Binary(Expr::Kind::kBinary, std::move(left), std::move(right)));
    left->operators.push_back(Operator::kPower);
  }
  return left;
}

Parser::ExprOr Parser::ParseUnary(bool with_filter) {
  ExprPtr expr;
  if (Current().IsOperator("-") || Current().IsOperator("+")) {
    const Nested nested(&depth_);
    if (depth_ > kNestingMax) return SyntaxError(Current().line, "signs are nested too deeply");
    auto out = New(Current().IsOperator("-") ? Expr::Kind::kNegate : Expr::Kind::kPlus);
    Next();
    ASSIGN_OR_RETURN(ExprPtr operand, ParseUnary(false));
    out->items.push_back(std::move(operand));
    ASSIGN_OR_RETURN(expr, Done(std::move(out)));
  } else {
    ASSIGN_OR_RETURN(expr, ParsePrimary());
  }
  ASSIGN_OR_RETURN(expr, ParsePostfix(std::move(expr)));
  if (!with_filter) return expr;
  return ParseFiltersAndTests(std::move(expr));
}

Parser::ExprOr Parser::ParsePrimary() {
  const Token& token = Current();
  switch (token.kind) {
    case Token::Kind::kName: {
      auto out = New(Expr::Kind::kName);
      if (token.text == "true" || token.text == "True" || token.text == "false" ||
          token.text == "False") {
        out->kind = Expr::Kind::kBool;
        out->integer = token.text[0] == 't' || token.text[0] == 'T';
      } else if (token.text == "none" || token.text == "None") {
        out->kind = Expr::Kind::kNone;
      } else {
        out->name = Intern(token.text);
      }
      Next();
      return out;
    }
    case Token::Kind::kString: {
      auto out = New(Expr::Kind::kString);
      for (; Current().kind == Token::Kind::kString; Next()) out->text += Current().text;
      out->slot = template_->slots++;
      return out;
    }
    case Token::Kind::kInteger:
    case Token::Kind::kFloat: {
      auto out = New(token.kind == Token::Kind::kInteger ? Expr::Kind::kInt : Expr::Kind::kFloat);
      out->integer = token.integer;
      out->real = token.real;
      Next();
      return out;
    }
    case Token::Kind::kOperator: {
      if (token.text == "(") {
        Next();
        ASSIGN_OR_RETURN(ExprPtr out, ParseTuple({.explicit_parentheses = true}));
        RETURN_IF_ERROR(ExpectOperator(")"));
        return out;
      }
      if (token.text == "[") return ParseList();
      if (token.text == "{") return ParseDict();
      break;
    }
    default:
      break;
  }
  return Unexpected("an expression");
}

Parser::ExprOr Parser::ParseTuple(TupleRules rules) {
  const Nested nested(&depth_);
  if (depth_ > kNestingMax) {
    return SyntaxError(Current().line, "the expression is nested too deeply");
  }
  const auto parse_one = [&]() -> ExprOr {
    if (!rules.targets_only) return ParseExpression(rules.conditional);
    if (rules.namespace_targets && Current().kind == Token::Kind::kName &&
        Ahead().IsOperator(".")) {
      auto out = New(Expr::Kind::kNamespaceAttribute);
      out->name = Intern(Current().text);
      Next();
      Next();
      ASSIGN_OR_RETURN(out->text, ExpectName());
      return out;
    }
    if (Current().IsOperator("(")) {
      Next();
      TupleRules inner = rules;
      inner.explicit_parentheses = true;
      inner.end_name = "";
      ASSIGN_OR_RETURN(ExprPtr out, ParseTuple(inner));
      RETURN_IF_ERROR(ExpectOperator(")"));
      return out;
    }
    return ParsePrimary();
  };
  const auto at_end = [&] {
    return Current().kind == Token::Kind::kVariableEnd ||
           Current().kind == Token::Kind::kBlockEnd || Current().IsOperator(")") ||
           (!rules.end_name.empty() && Current().IsName(rules.end_name));
  };
  auto tuple = New(Expr::Kind::kTuple);
  bool is_tuple = false;
  for (;;) {
    if (at_end()) break;
    ASSIGN_OR_RETURN(ExprPtr item, parse_one());
    tuple->items.push_back(std::move(item));
    if (!SkipOperator(",")) break;
    is_tuple = true;
  }
  if (!is_tuple) {
    if (!tuple->items.empty()) return std::move(tuple->items[0]);
    if (!rules.explicit_parentheses) return Unexpected("an expression");
  }
  return Done(std::move(tuple));
}

Parser::ExprOr Parser::ParseList() {
  auto out = New(Expr::Kind::kList);
  Next();
  while (!SkipOperator("]")) {
    if (!out->items.empty()) {
      RETURN_IF_ERROR(ExpectOperator(","));
      if (SkipOperator("]")) break;
    }
    ASSIGN_OR_RETURN(ExprPtr item, ParseExpression());
    out->items.push_back(std::move(item));
  }
  return Done(std::move(out));
}

Parser::ExprOr Parser::ParseDict() {
  auto out = New(Expr::Kind::kDict);
  Next();
  while (!SkipOperator("}")) {
    if (!out->items.empty()) {
      RETURN_IF_ERROR(ExpectOperator(","));
      if (SkipOperator("}")) break;
    }
    ASSIGN_OR_RETURN(ExprPtr key, ParseExpression());
    RETURN_IF_ERROR(ExpectOperator(":"));
    ASSIGN_OR_RETURN(ExprPtr value, ParseExpression());
    out->items.push_back(std::move(key));
    out->items.push_back(std::move(value));
  }
  return Done(std::move(out));
}

Parser::ExprOr Parser::ParsePostfix(ExprPtr expr) {
  for (;;) {
    if (Current().IsOperator(".") || Current().IsOperator("[")) {
      ASSIGN_OR_RETURN(expr, ParseSubscript(std::move(expr)));
    } else if (Current().IsOperator("(")) {
      auto call = New(Expr::Kind::kCall);
      ASSIGN_OR_RETURN(call->arguments, ParseArguments());
      call->items.push_back(std::move(expr));
      ASSIGN_OR_RETURN(expr, Done(std::move(call)));
    } else {
      return expr;
    }
  }
}

Parser::ExprOr Parser::ParseSubscript(ExprPtr expr) {
  auto out = New(Expr::Kind::kSubscript);
  out->items.push_back(std::move(expr));
  if (SkipOperator(".")) {
    if (Current().kind == Token::Kind::kName) {
      out->kind = Expr::Kind::kAttribute;
      out->text = Current().text;
      Next();
      return Done(std::move(out));
    }
    if (Current().kind != Token::Kind::kInteger) return Unexpected("a name or number after '.'");
    ASSIGN_OR_RETURN(ExprPtr index, ParsePrimary());
    out->items.push_back(std::move(index));
    return Done(std::move(out));
  }
  Next();
  ExprPtr bounds[3];
  bool is_slice = false;
  for (int i = 0;;) {
    if (Current().IsOperator(":") && i < 2) {
      is_slice = true;
      ++i;
      Next();
    } else if (Current().IsOperator("]")) {
      break;
    } else if (bounds[i] == nullptr) {
      ASSIGN_OR_RETURN(bounds[i], ParseExpression());
    } else if (!is_slice && Current().IsOperator(",")) {
      // x[a, b] subscripts with a tuple.
      auto tuple = New(Expr::Kind::kTuple);
      tuple->items.push_back(std::move(bounds[0]));
      while (SkipOperator(",")) {
        ASSIGN_OR_RETURN(ExprPtr item, ParseExpression());
        tuple->items.push_back(std::move(item));
      }
      ASSIGN_OR_RETURN(bounds[0], Done(std::move(tuple)));
    } else {
      return Unexpected("']'");
    }
  }
  if (!is_slice && bounds[0] == nullptr) return Unexpected("an expression");
  Next();
  if (is_slice) out->kind = Expr::Kind::kSlice;
  for (int i = 0; i < (is_slice ? 3 : 1); ++i) out->items.push_back(std::move(bounds[i]));
  return Done(std::move(out));
}

Parser::ExprOr Parser::ParseFiltersAndTests(ExprPtr expr) {
  for (;;) {
    if (Current().IsOperator("|")) {
      ASSIGN_OR_RETURN(expr, ParseFilters(std::move(expr), false));
    } else if (Current().IsName("is")) {
      ASSIGN_OR_RETURN(expr, ParseTest(std::move(expr)));
    } else if (Current().IsOperator("(")) {
      ASSIGN_OR_RETURN(expr, ParsePostfix(std::move(expr)));
    } else {
      return expr;
    }
  }
}

// `first_is_inline`: the first filter stands without '|', as in filter blocks.
Parser::ExprOr Parser::ParseFilters(ExprPtr expr, bool first_is_inline) {
  while (first_is_inline || Current().IsOperator("|")) {
    if (!first_is_inline) Next();
    first_is_inline = false;
    auto out = New(Expr::Kind::kFilter);
    ASSIGN_OR_RETURN(out->text, ExpectName());
    while (SkipOperator(".")) {
      ASSIGN_OR_RETURN(const std::string part, ExpectName());
      out->text += "." + part;
    }
    out->arguments = std::make_unique<CallArguments>();
    if (Current().IsOperator("(")) {
      ASSIGN_OR_RETURN(out->arguments, ParseArguments());
    }
    out->items.push_back(std::move(expr));
    ASSIGN_OR_RETURN(expr, Done(std::move(out)));
  }
  return expr;
}

Parser::ExprOr Parser::ParseTest(ExprPtr expr) {
  auto out = New(Expr::Kind::kTest);
  Next();
  const bool negated = SkipName("not");
  ASSIGN_OR_RETURN(out->text, ExpectName());
  out->arguments = std::make_unique<CallArguments>();
  const Token& token = Current();
  const bool is_literal = token.kind == Token::Kind::kName || token.kind == Token::Kind::kString ||
                          token.kind == Token::Kind::kInteger ||
                          token.kind == Token::Kind::kFloat || token.IsOperator("[") ||
                          token.IsOperator("{");
  static constexpr std::string_view kNotArguments[] = {"else", "or", "and", "if"};
  const bool ends = std::any_of(std::begin(kNotArguments), std::end(kNotArguments),
                                [&](std::string_view name) { return token.IsName(name); });
  if (token.IsOperator("(")) {
    ASSIGN_OR_RETURN(out->arguments, ParseArguments());
  } else if (is_literal && !ends) {
    if (token.IsName("is")) return SyntaxError(token.line, "tests with 'is' cannot be chained");
    ASSIGN_OR_RETURN(ExprPtr argument, ParsePrimary());
    ASSIGN_OR_RETURN(argument, ParsePostfix(std::move(argument)));
    out->arguments->positional.push_back(std::move(argument));
  }
  out->items.push_back(std::move(expr));
  ASSIGN_OR_RETURN(ExprPtr test, Done(std::move(out)));
  if (!negated) return test;
  auto inverse = New(Expr::Kind::kNot);
  inverse->items.push_back(std::move(test));
  return Done(std::move(inverse));
}

absl::StatusOr<std::unique_ptr<CallArguments>> Parser::ParseArguments() {
  auto out = std::make_unique<CallArguments>();
  RETURN_IF_ERROR(ExpectOperator("("));
  bool first = true;
  while (!SkipOperator(")")) {
    if (!first) {
      RETURN_IF_ERROR(ExpectOperator(","));
      if (SkipOperator(")")) break;
    }
    first = false;
    if (SkipOperator("**")) {
      if (out->star_star != nullptr) return Unexpected("')'");
      ASSIGN_OR_RETURN(out->star_star, ParseExpression());
    } else if (SkipOperator("*")) {
      if (out->star != nullptr || out->star_star != nullptr) return Unexpected("an argument");
      ASSIGN_OR_RETURN(out->star, ParseExpression());
    } else if (Current().kind == Token::Kind::kName && Ahead().IsOperator("=")) {
      if (out->star_star != nullptr) return Unexpected("')'");
      std::string name = Current().text;
      Next();
      Next();
      ASSIGN_OR_RETURN(ExprPtr value, ParseExpression());
      out->named.emplace_back(std::move(name), std::move(value));
    } else {
      if (!out->named.empty() || out->star != nullptr || out->star_star != nullptr) {
        return SyntaxError(Current().line, "a positional argument follows a keyword argument");
      }
      ASSIGN_OR_RETURN(ExprPtr value, ParseExpression());
      out->positional.push_back(std::move(value));
    }
  }
  return out;
}

}  // namespace antiphon::model::jinja
