// The syntax tree. Immutable after parsing and shared by renderings. Its depth is limited by the
// parser, so that recursion over it is bounded.
#ifndef ANTIPHON_MODEL_JINJA_AST_H_
#define ANTIPHON_MODEL_JINJA_AST_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "model/jinja_value.h"

namespace antiphon::model::jinja {

// Names of variables are numbered by the parser; Template::names has the text.
using NameId = int;

struct Expr;
struct Stmt;
using ExprPtr = std::unique_ptr<Expr>;
using StmtPtr = std::unique_ptr<Stmt>;
using Body = std::vector<StmtPtr>;

struct CallArguments {
  std::vector<ExprPtr> positional;
  std::vector<std::pair<std::string, ExprPtr>> named;
  ExprPtr star;       // *expression
  ExprPtr star_star;  // **expression
};

enum class Operator : uint8_t {
  kAdd,
  kSubtract,
  kMultiply,
  kDivide,
  kFloorDivide,
  kModulo,
  kPower,
  kEqual,
  kNotEqual,
  kLess,
  kLessEqual,
  kGreater,
  kGreaterEqual,
  kIn,
  kNotIn,
};

struct Expr {
  enum class Kind : uint8_t {
    kNone,
    kBool,
    kInt,
    kFloat,   // integer / real
    kString,  // text; slot numbers the constant
    kName,    // name
    kList,
    kTuple,  // items
    kDict,   // items: key, value, key, value, ...
    kNot,
    kNegate,
    kPlus,  // items[0]
    kAnd,
    kOr,                  // items[0], items[1]
    kBinary,              // operators[0] on items[0], items[1]
    kCompare,             // items[0] operators[0] items[1] operators[1] items[2] ...
    kConcat,              // all items
    kConditional,         // items[0] if items[1] else items[2] (may be null)
    kAttribute,           // items[0].text
    kSubscript,           // items[0][items[1]]
    kSlice,               // items[0][items[1]:items[2]:items[3]], each bound may be null
    kCall,                // items[0](arguments)
    kFilter,              // items[0] | text(arguments); items[0] is null in filter blocks
    kTest,                // items[0] is text(arguments)
    kNamespaceAttribute,  // name.text, only as a target of assignment
  };

  Kind kind;
  int line;
  int depth = 1;  // of the tree below, for the parser's limit
  NameId name = -1;
  int slot = -1;
  Int integer = 0;
  double real = 0;
  std::string text;
  std::vector<ExprPtr> items;
  std::vector<Operator> operators;
  std::unique_ptr<CallArguments> arguments;
};

struct Parameter {
  NameId name;
  std::string text;
  ExprPtr fallback;  // null: none
};

// What `macro` and `call` define.
struct MacroBody {
  std::string name;
  std::vector<Parameter> parameters;
  Body body;
  bool uses_varargs = false;
  bool uses_kwargs = false;
  bool uses_caller = false;
};

struct Stmt {
  enum class Kind : uint8_t {
    kData,      // text; slot numbers the constant
    kPrint,     // value
    kIf,        // branches; otherwise
    kFor,       // target in value [if condition] [recursive]: body; otherwise
    kSet,       // target = value
    kSetBlock,  // target, value = filters or null, body
    kMacro,     // target (a name), macro
    kCall,      // value = the call, macro = the caller
    kFilter,    // value = filters, body
    kScope,     // body (generation)
    kWith,      // branches' conditions hold the values, targets the names; body
    kDo,        // value
    kBreak,
    kContinue,
  };

  Kind kind;
  int line;
  std::string text;
  ExprPtr target;
  ExprPtr value;
  ExprPtr condition;
  std::vector<std::pair<ExprPtr, Body>> branches;
  std::vector<std::pair<ExprPtr, ExprPtr>> bindings;  // kWith: name, value
  Body body;
  Body otherwise;
  std::unique_ptr<MacroBody> macro;
  bool recursive = false;
  bool uses_loop = false;  // the body mentions `loop`
};

struct Template {
  Body body;
  std::vector<std::string> names;
  int slots = 0;
};

}  // namespace antiphon::model::jinja

#endif  // ANTIPHON_MODEL_JINJA_AST_H_
