// Walks the syntax tree of one template for one rendering. Not thread-safe; lives as long as the
// rendering. The template must outlive it.
#ifndef ANTIPHON_MODEL_JINJA_INTERPRETER_H_
#define ANTIPHON_MODEL_JINJA_INTERPRETER_H_

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "model/chat_template.h"
#include "model/jinja_arguments.h"
#include "model/jinja_ast.h"
#include "model/jinja_value.h"
#include "model/json_value.h"

namespace antiphon::model::jinja {

// The interpreter's own recursion for each level of macro calls that the limits allow: a macro's
// body, its loops and conditions and the expressions in them. So a rendering needs about
// limits.depth * kFramesPerCall kilobytes of stack.
inline constexpr int kFramesPerCall = 16;

// The variables of a macro, loop iteration or block; names are searched outwards.
struct Scope : Object {
  using Object::Object;
  void Clear() override;
  const Value* Find(NameId name) const;
  void Set(NameId name, Value value);

  Ref<Scope> parent;
  std::vector<std::pair<NameId, Value>> variables;
};

struct Macro : Object {
  using Object::Object;
  void Clear() override { scope = Ref<Scope>(); }
  const MacroBody* body = nullptr;
  Ref<Scope> scope;  // where it was defined
};

// The variable `loop`.
struct Loop : Object {
  using Object::Object;
  void Clear() override;
  const Stmt* statement = nullptr;
  Ref<Scope> scope;  // around the loop
  std::vector<Value> items;
  size_t index0 = 0;
  int depth0 = 0;
  bool has_changed_before = false;
  Value changed_before = Value::None();  // last arguments of loop.changed()
};

class Interpreter {
 public:
  Interpreter(const Template& tree, Heap& heap, absl::Time now, const TemplateLimits& limits);

  // As ChatTemplate::Render.
  absl::StatusOr<std::string> Run(const JsonObject& context);

  // For builtins.
  Heap& heap() { return heap_; }
  absl::Time now() const { return now_; }
  Result Call(const Value& callee, Args& args);
  Result ApplyFilter(std::string_view name, const Value& self, Args& args);
  absl::StatusOr<bool> ApplyTest(std::string_view name, const Value& self, Args& args);
  Result Attribute(const Value& value, std::string_view name);
  Result Item(const Value& value, const Value& key);
  // JSON as a value of this rendering.
  Result Import(const Json& json, int depth = 0);
  // The error of raise_exception: its message reaches the caller without a line.
  absl::Status Raise(std::string message);

 private:
  enum class Flow { kNext, kBreak, kContinue };
  using FlowOr = absl::StatusOr<Flow>;
  using ScopeRef = Ref<Scope>;

  // jinja_interpreter.cc: statements.
  FlowOr Run(const Body& body, const ScopeRef& scope);
  FlowOr Execute(const Stmt& stmt, const ScopeRef& scope);
  FlowOr ExecuteOne(const Stmt& stmt, const ScopeRef& scope);
  FlowOr ExecuteIf(const Stmt& stmt, const ScopeRef& scope);
  FlowOr RunLoop(const Stmt& stmt, const Value& iterable, const ScopeRef& scope, int depth0);
  absl::StatusOr<bool> Admits(const Stmt& stmt, const Value& item, const ScopeRef& inner);
  FlowOr ExecuteSetBlock(const Stmt& stmt, const ScopeRef& scope);
  FlowOr ExecuteWith(const Stmt& stmt, const ScopeRef& scope);
  absl::Status ExecuteCall(const Stmt& stmt, const ScopeRef& scope);
  absl::Status Assign(const Expr& target, Value value, const ScopeRef& scope);
  absl::Status Emit(const Value& value);
  // What `body` writes, as a string.
  Result Capture(const Body& body, const ScopeRef& scope);
  Result CallMacro(const Macro& macro, Args& args);
  Result CallLoop(const Loop& loop, Args& args);
  Value MakeMacro(const MacroBody& body, const ScopeRef& scope);
  ScopeRef Inner(const ScopeRef& scope);

  absl::Status WithLine(absl::Status status) const;

  // jinja_expressions.cc.
  Result Evaluate(const Expr& expr, const ScopeRef& scope);
  Result EvaluateOne(const Expr& expr, const ScopeRef& scope);
  Result EvaluateName(const Expr& expr, const ScopeRef& scope);
  Result EvaluateItems(const Expr& expr, const ScopeRef& scope);
  Result EvaluateDict(const Expr& expr, const ScopeRef& scope);
  Result EvaluateLogic(const Expr& expr, const ScopeRef& scope);
  Result EvaluateBinary(const Expr& expr, const ScopeRef& scope);
  Result EvaluateCompare(const Expr& expr, const ScopeRef& scope);
  Result EvaluateConcat(const Expr& expr, const ScopeRef& scope);
  Result EvaluateConditional(const Expr& expr, const ScopeRef& scope);
  Result EvaluateSubscript(const Expr& expr, const ScopeRef& scope);
  Result EvaluateSlice(const Expr& expr, const ScopeRef& scope);
  Result EvaluateCall(const Expr& expr, const ScopeRef& scope);
  // `input` replaces the missing operand of a filter block.
  Result EvaluateFilter(const Expr& expr, const ScopeRef& scope, const Value* input);
  Result EvaluateTest(const Expr& expr, const ScopeRef& scope);
  absl::StatusOr<Args> EvaluateArguments(const CallArguments& arguments, const ScopeRef& scope);
  absl::StatusOr<bool> CompareOnce(Operator op, const Value& a, const Value& b);
  Result LoopAttribute(const Value& value, std::string_view name);
  const Value& Constant(const Expr& expr);

  const Template& tree_;
  Heap& heap_;
  const absl::Time now_;
  const TemplateLimits& limits_;
  std::vector<Value> constants_;  // by slot; none until first used
  NameId loop_name_ = -1;
  NameId caller_name_ = -1;
  NameId varargs_name_ = -1;
  NameId kwargs_name_ = -1;
  std::string* out_ = nullptr;  // where statements write
  size_t pending_bytes_ = 0;    // in all outputs that are being written
  int calls_ = 0;               // macros and recursive loops that run
  int depth_ = 0;               // of the interpreter's own recursion
  int error_line_ = 0;          // of the innermost node that failed
  bool raised_ = false;
};

}  // namespace antiphon::model::jinja

#endif  // ANTIPHON_MODEL_JINJA_INTERPRETER_H_
