#include "model/jinja_parser.h"

#include <algorithm>
#include <utility>

#include "common/status_macros.h"
#include "fmt/format.h"
#include "model/jinja_text.h"

namespace antiphon::model::jinja {
namespace {

std::string Describe(const Token& token) {
  switch (token.kind) {
    case Token::Kind::kData:
      return "text";
    case Token::Kind::kVariableBegin:
      return "'{{'";
    case Token::Kind::kVariableEnd:
      return "'}}'";
    case Token::Kind::kBlockBegin:
      return "'{%'";
    case Token::Kind::kBlockEnd:
      return "'%}'";
    case Token::Kind::kEnd:
      return "end of template";
    case Token::Kind::kString:
      return "a string";
    case Token::Kind::kInteger:
    case Token::Kind::kFloat:
      return "a number";
    case Token::Kind::kName:
    case Token::Kind::kOperator:
      return fmt::format("'{}'", token.text);
  }
  return "token";
}

StmtPtr NewStmt(Stmt::Kind kind, int line) {
  auto out = std::make_unique<Stmt>();
  out->kind = kind;
  out->line = line;
  return out;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Template>> Parser::Run() {
  ASSIGN_OR_RETURN(template_->body, ParseBody({}));
  return std::move(template_);
}

absl::Status Parser::Unexpected(std::string_view expected) const {
  return SyntaxError(Current().line,
                     fmt::format("expected {}, got {}", expected, Describe(Current())));
}

bool Parser::SkipOperator(std::string_view symbol) {
  if (!Current().IsOperator(symbol)) return false;
  Next();
  return true;
}

bool Parser::SkipName(std::string_view name) {
  if (!Current().IsName(name)) return false;
  Next();
  return true;
}

absl::Status Parser::ExpectOperator(std::string_view symbol) {
  if (SkipOperator(symbol)) return absl::OkStatus();
  return Unexpected(fmt::format("'{}'", symbol));
}

absl::StatusOr<std::string> Parser::ExpectName() {
  if (Current().kind != Token::Kind::kName) return Unexpected("a name");
  std::string name = Current().text;
  Next();
  return name;
}

absl::Status Parser::ExpectBlockEnd() {
  if (Current().kind != Token::Kind::kBlockEnd) return Unexpected("'%}'");
  Next();
  return absl::OkStatus();
}

NameId Parser::Intern(const std::string& name) {
  if (name == "varargs") mentions_.varargs = true;
  if (name == "kwargs") mentions_.kwargs = true;
  if (name == "caller") mentions_.caller = true;
  if (name == "loop") mentions_.loop = true;
  const auto [at, is_new] = ids_.emplace(name, static_cast<NameId>(template_->names.size()));
  if (is_new) template_->names.push_back(name);
  return at->second;
}

// Reads up to a tag named in `ends` and leaves that name as the current token; with no ends, up to
// the end of the template.
absl::StatusOr<Body> Parser::ParseBody(std::initializer_list<std::string_view> ends) {
  const Nested nested(&depth_);
  if (depth_ > kNestingMax) return SyntaxError(Current().line, "statements are nested too deeply");
  Body body;
  for (;;) {
    const int line = Current().line;
    switch (Current().kind) {
      case Token::Kind::kEnd: {
        if (ends.size() == 0) return body;
        return SyntaxError(line, fmt::format("unexpected end of template, expected '{{% {} %}}'",
                                             *(ends.end() - 1)));
      }
      case Token::Kind::kData: {
        auto data = NewStmt(Stmt::Kind::kData, line);
        data->text = Current().text;
        body.push_back(std::move(data));
        Next();
        break;
      }
      case Token::Kind::kVariableBegin: {
        Next();
        auto print = NewStmt(Stmt::Kind::kPrint, line);
        ASSIGN_OR_RETURN(print->value, ParseTuple({}));
        if (Current().kind != Token::Kind::kVariableEnd) return Unexpected("'}}'");
        Next();
        body.push_back(std::move(print));
        break;
      }
      default: {
        Next();  // kBlockBegin: nothing else can stand here
        const std::string& tag = Current().text;
        if (Current().kind == Token::Kind::kName &&
            std::find(ends.begin(), ends.end(), tag) != ends.end()) {
          return body;
        }
        ASSIGN_OR_RETURN(StmtPtr statement, ParseStatement());
        body.push_back(std::move(statement));
      }
    }
  }
}

Parser::StmtOr Parser::ParseStatement() {
  const int line = Current().line;
  ASSIGN_OR_RETURN(const std::string tag, ExpectName());
  if (tag == "if") return ParseIf(line);
  if (tag == "for") return ParseFor(line);
  if (tag == "set") return ParseSet(line);
  if (tag == "macro") return ParseMacro(line);
  if (tag == "call") return ParseCallBlock(line);
  if (tag == "filter") return ParseFilterBlock(line);
  if (tag == "with") return ParseWith(line);
  if (tag == "generation") {
    RETURN_IF_ERROR(ExpectBlockEnd());
    auto out = NewStmt(Stmt::Kind::kScope, line);
    ASSIGN_OR_RETURN(out->body, ParseBody({"endgeneration"}));
    Next();
    RETURN_IF_ERROR(ExpectBlockEnd());
    return out;
  }
  if (tag == "do" || tag == "print") {
    auto out = NewStmt(tag == "do" ? Stmt::Kind::kDo : Stmt::Kind::kPrint, line);
    ASSIGN_OR_RETURN(out->value, ParseTuple({}));
    RETURN_IF_ERROR(ExpectBlockEnd());
    return out;
  }
  if (tag == "break" || tag == "continue") {
    if (loops_ == 0) return SyntaxError(line, fmt::format("'{}' outside of a loop", tag));
    RETURN_IF_ERROR(ExpectBlockEnd());
    return NewStmt(tag == "break" ? Stmt::Kind::kBreak : Stmt::Kind::kContinue, line);
  }
  if (tag.starts_with("end") || tag == "else" || tag == "elif") {
    return SyntaxError(line, fmt::format("'{}' without a beginning", tag));
  }
  return SyntaxError(line, fmt::format("unknown tag '{}'", tag));
}

Parser::StmtOr Parser::ParseIf(int line) {
  auto out = NewStmt(Stmt::Kind::kIf, line);
  for (;;) {
    ASSIGN_OR_RETURN(ExprPtr condition, ParseTuple({.conditional = false}));
    RETURN_IF_ERROR(ExpectBlockEnd());
    ASSIGN_OR_RETURN(Body body, ParseBody({"elif", "else", "endif"}));
    out->branches.emplace_back(std::move(condition), std::move(body));
    if (SkipName("elif")) continue;
    if (SkipName("else")) {
      RETURN_IF_ERROR(ExpectBlockEnd());
      ASSIGN_OR_RETURN(out->otherwise, ParseBody({"endif"}));
    }
    Next();
    RETURN_IF_ERROR(ExpectBlockEnd());
    return out;
  }
}

Parser::StmtOr Parser::ParseFor(int line) {
  auto out = NewStmt(Stmt::Kind::kFor, line);
  ASSIGN_OR_RETURN(out->target, ParseTarget({.end_name = "in"}));
  if (Names(*out->target, "loop")) return SyntaxError(line, "cannot assign to 'loop'");
  if (!SkipName("in")) return Unexpected("'in'");
  ASSIGN_OR_RETURN(out->value, ParseTuple({.conditional = false, .end_name = "recursive"}));
  if (SkipName("if")) {
    ASSIGN_OR_RETURN(out->condition, ParseExpression());
  }
  out->recursive = SkipName("recursive");
  RETURN_IF_ERROR(ExpectBlockEnd());
  const bool outer_loop = std::exchange(mentions_.loop, false);
  ++loops_;
  auto body = ParseBody({"else", "endfor"});
  --loops_;
  ASSIGN_OR_RETURN(out->body, std::move(body));
  out->uses_loop = mentions_.loop || out->recursive;
  mentions_.loop |= outer_loop;
  if (SkipName("else")) {
    RETURN_IF_ERROR(ExpectBlockEnd());
    ASSIGN_OR_RETURN(out->otherwise, ParseBody({"endfor"}));
  }
  Next();
  RETURN_IF_ERROR(ExpectBlockEnd());
  return out;
}

Parser::StmtOr Parser::ParseSet(int line) {
  auto out = NewStmt(Stmt::Kind::kSet, line);
  ASSIGN_OR_RETURN(out->target, ParseTarget({.namespace_targets = true}));
  if (SkipOperator("=")) {
    ASSIGN_OR_RETURN(out->value, ParseTuple({}));
    RETURN_IF_ERROR(ExpectBlockEnd());
    return out;
  }
  out->kind = Stmt::Kind::kSetBlock;
  if (Current().IsOperator("|")) {
    ASSIGN_OR_RETURN(out->value, ParseFilters(nullptr, false));
  }
  RETURN_IF_ERROR(ExpectBlockEnd());
  ASSIGN_OR_RETURN(out->body, ParseBody({"endset"}));
  Next();
  RETURN_IF_ERROR(ExpectBlockEnd());
  return out;
}

Parser::ExprOr Parser::ParseTarget(TupleRules rules) {
  rules.targets_only = true;
  ASSIGN_OR_RETURN(ExprPtr target, ParseTuple(rules));
  RETURN_IF_ERROR(CheckTarget(*target));
  return target;
}

bool Parser::Names(const Expr& target, std::string_view name) const {
  if (target.kind == Expr::Kind::kName) {
    return template_->names[static_cast<size_t>(target.name)] == name;
  }
  return std::any_of(target.items.begin(), target.items.end(),
                     [&](const ExprPtr& item) { return Names(*item, name); });
}

absl::Status Parser::CheckTarget(const Expr& target) const {
  switch (target.kind) {
    case Expr::Kind::kNamespaceAttribute:
      return absl::OkStatus();
    case Expr::Kind::kName:
      return absl::OkStatus();
    case Expr::Kind::kTuple: {
      for (const ExprPtr& item : target.items) RETURN_IF_ERROR(CheckTarget(*item));
      return absl::OkStatus();
    }
    default:
      return SyntaxError(target.line, "cannot assign to this expression");
  }
}

absl::Status Parser::ParseSignature(MacroBody* macro) {
  RETURN_IF_ERROR(ExpectOperator("("));
  while (!SkipOperator(")")) {
    if (!macro->parameters.empty()) RETURN_IF_ERROR(ExpectOperator(","));
    Parameter parameter;
    ASSIGN_OR_RETURN(parameter.text, ExpectName());
    parameter.name = Intern(parameter.text);
    if (SkipOperator("=")) {
      ASSIGN_OR_RETURN(parameter.fallback, ParseExpression());
    } else if (!macro->parameters.empty() && macro->parameters.back().fallback != nullptr) {
      return SyntaxError(Current().line, fmt::format("parameter '{}' without a default follows one "
                                                     "with a default",
                                                     parameter.text));
    }
    macro->parameters.push_back(std::move(parameter));
  }
  return absl::OkStatus();
}

absl::Status Parser::ParseMacroBody(std::string_view end, MacroBody* macro) {
  const Mentions outer = std::exchange(mentions_, {});
  const int loops = std::exchange(loops_, 0);
  auto body = ParseBody({end});
  loops_ = loops;
  ASSIGN_OR_RETURN(macro->body, std::move(body));
  macro->uses_varargs = mentions_.varargs;
  macro->uses_kwargs = mentions_.kwargs;
  macro->uses_caller = mentions_.caller;
  const bool loop = mentions_.loop || outer.loop;
  mentions_ = outer;
  mentions_.loop = loop;
  Next();
  return ExpectBlockEnd();
}

Parser::StmtOr Parser::ParseMacro(int line) {
  auto out = NewStmt(Stmt::Kind::kMacro, line);
  out->macro = std::make_unique<MacroBody>();
  ASSIGN_OR_RETURN(out->macro->name, ExpectName());
  out->target = New(Expr::Kind::kName);
  out->target->name = Intern(out->macro->name);
  RETURN_IF_ERROR(ParseSignature(out->macro.get()));
  RETURN_IF_ERROR(ExpectBlockEnd());
  RETURN_IF_ERROR(ParseMacroBody("endmacro", out->macro.get()));
  return out;
}

Parser::StmtOr Parser::ParseCallBlock(int line) {
  auto out = NewStmt(Stmt::Kind::kCall, line);
  out->macro = std::make_unique<MacroBody>();
  out->macro->name = "caller";
  if (Current().IsOperator("(")) RETURN_IF_ERROR(ParseSignature(out->macro.get()));
  ASSIGN_OR_RETURN(out->value, ParseExpression());
  if (out->value->kind != Expr::Kind::kCall) return SyntaxError(line, "expected a call");
  RETURN_IF_ERROR(ExpectBlockEnd());
  RETURN_IF_ERROR(ParseMacroBody("endcall", out->macro.get()));
  return out;
}

Parser::StmtOr Parser::ParseFilterBlock(int line) {
  auto out = NewStmt(Stmt::Kind::kFilter, line);
  ASSIGN_OR_RETURN(out->value, ParseFilters(nullptr, true));
  RETURN_IF_ERROR(ExpectBlockEnd());
  ASSIGN_OR_RETURN(out->body, ParseBody({"endfilter"}));
  Next();
  RETURN_IF_ERROR(ExpectBlockEnd());
  return out;
}

Parser::StmtOr Parser::ParseWith(int line) {
  auto out = NewStmt(Stmt::Kind::kWith, line);
  while (Current().kind != Token::Kind::kBlockEnd) {
    if (!out->bindings.empty()) RETURN_IF_ERROR(ExpectOperator(","));
    auto target = New(Expr::Kind::kName);
    ASSIGN_OR_RETURN(const std::string name, ExpectName());
    target->name = Intern(name);
    RETURN_IF_ERROR(CheckTarget(*target));
    RETURN_IF_ERROR(ExpectOperator("="));
    ASSIGN_OR_RETURN(ExprPtr value, ParseExpression());
    out->bindings.emplace_back(std::move(target), std::move(value));
  }
  RETURN_IF_ERROR(ExpectBlockEnd());
  ASSIGN_OR_RETURN(out->body, ParseBody({"endwith"}));
  Next();
  RETURN_IF_ERROR(ExpectBlockEnd());
  return out;
}

}  // namespace antiphon::model::jinja
