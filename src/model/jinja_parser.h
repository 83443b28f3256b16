// Tokens to syntax tree: the grammar of Jinja2 with the loopcontrols and do extensions and Hugging
// Face's generation tag. Templates that load other templates (extends, include, import, block) are
// refused.
#ifndef ANTIPHON_MODEL_JINJA_PARSER_H_
#define ANTIPHON_MODEL_JINJA_PARSER_H_

#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "model/jinja_ast.h"
#include "model/jinja_lexer.h"

namespace antiphon::model::jinja {

// Deepest nesting of expressions and statements; more is INVALID_ARGUMENT.
inline constexpr int kNestingMax = 200;

class Parser {
 public:
  explicit Parser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  // INVALID_ARGUMENT with the line. Call once.
  absl::StatusOr<std::unique_ptr<Template>> Run();

 private:
  using ExprOr = absl::StatusOr<ExprPtr>;
  using StmtOr = absl::StatusOr<StmtPtr>;

  // What a tuple may look like where it stands.
  struct TupleRules {
    bool targets_only = false;  // names, attributes and tuples of them
    bool conditional = true;    // `a if b else c` allowed at the top
    bool explicit_parentheses = false;
    bool namespace_targets = false;
    std::string_view end_name = "";  // a name that ends it
  };

  // jinja_parser.cc: statements.
  absl::StatusOr<Body> ParseBody(std::initializer_list<std::string_view> ends);
  StmtOr ParseStatement();
  StmtOr ParseIf(int line);
  StmtOr ParseFor(int line);
  StmtOr ParseSet(int line);
  StmtOr ParseMacro(int line);
  StmtOr ParseCallBlock(int line);
  StmtOr ParseFilterBlock(int line);
  StmtOr ParseWith(int line);
  absl::Status ParseSignature(MacroBody* macro);
  absl::Status ParseMacroBody(std::string_view end, MacroBody* macro);
  ExprOr ParseTarget(TupleRules rules);
  absl::Status CheckTarget(const Expr& target) const;
  bool Names(const Expr& target, std::string_view name) const;
  absl::Status ExpectBlockEnd();

  // jinja_parser_expressions.cc.
  ExprOr ParseExpression(bool conditional = true);
  ExprOr ParseConditional();
  ExprOr ParseOr();
  ExprOr ParseAnd();
  ExprOr ParseNot();
  ExprOr ParseCompare();
  ExprOr ParseSum();
  ExprOr ParseConcat();
  ExprOr ParseProduct();
  ExprOr ParsePower();
  ExprOr ParseUnary(bool with_filter = true);
  ExprOr ParsePrimary();
  ExprOr ParsePostfix(ExprPtr expr);
  ExprOr ParseFiltersAndTests(ExprPtr expr);
  ExprOr ParseFilters(ExprPtr expr, bool first_is_inline);
  ExprOr ParseTest(ExprPtr expr);
  ExprOr ParseSubscript(ExprPtr expr);
  ExprOr ParseTuple(TupleRules rules);
  ExprOr ParseList();
  ExprOr ParseDict();
  absl::StatusOr<std::unique_ptr<CallArguments>> ParseArguments();

  const Token& Current() const { return tokens_[at_]; }
  const Token& Ahead() const { return tokens_[std::min(at_ + 1, tokens_.size() - 1)]; }
  void Next() { at_ += at_ + 1 < tokens_.size() ? 1 : 0; }
  bool SkipOperator(std::string_view symbol);
  bool SkipName(std::string_view name);
  absl::Status ExpectOperator(std::string_view symbol);
  absl::StatusOr<std::string> ExpectName();
  absl::Status Unexpected(std::string_view expected) const;

  ExprPtr New(Expr::Kind kind) const;
  // Fills in the depth; fails when it passes the limit.
  ExprOr Done(ExprPtr expr) const;
  ExprOr Binary(Expr::Kind kind, ExprPtr left, ExprPtr right) const;
  NameId Intern(const std::string& name);

  // Counts recursion of the parser itself.
  struct Nested {
    explicit Nested(int* depth) : depth(depth) { ++*depth; }
    ~Nested() { --*depth; }
    int* depth;
  };

  // Names that the enclosing macro or loop mentions.
  struct Mentions {
    bool varargs = false;
    bool kwargs = false;
    bool caller = false;
    bool loop = false;
  };

  std::vector<Token> tokens_;
  size_t at_ = 0;
  int depth_ = 0;
  int loops_ = 0;
  Mentions mentions_;
  std::unique_ptr<Template> template_ = std::make_unique<Template>();
  absl::flat_hash_map<std::string, NameId> ids_;
};

}  // namespace antiphon::model::jinja

#endif  // ANTIPHON_MODEL_JINJA_PARSER_H_
