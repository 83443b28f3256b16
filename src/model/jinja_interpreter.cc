#include "model/jinja_interpreter.h"

#include <algorithm>

#include "common/status_macros.h"
#include "fmt/format.h"
#include "model/jinja_operations.h"
#include "model/jinja_print.h"

namespace antiphon::model::jinja {
void Scope::Clear() {
  parent = Ref<Scope>();
  variables.clear();
}

const Value* Scope::Find(NameId name) const {
  for (const Scope* scope = this; scope != nullptr; scope = scope->parent.get()) {
    for (const auto& [id, value] : scope->variables) {
      if (id == name) return &value;
    }
  }
  return nullptr;
}

void Scope::Set(NameId name, Value value) {
  for (auto& [id, old] : variables) {
    if (id == name) {
      old = std::move(value);
      return;
    }
  }
  variables.emplace_back(name, std::move(value));
  heap->Charge(*this, sizeof(variables[0]));
}

void Loop::Clear() {
  scope = Ref<Scope>();
  items.clear();
  changed_before = Value::None();
}

Interpreter::Interpreter(const Template& tree, Heap& heap, absl::Time now,
                         const TemplateLimits& limits)
    : tree_(tree),
      heap_(heap),
      now_(now),
      limits_(limits),
      constants_(static_cast<size_t>(tree.slots), Value::None()) {
  for (size_t i = 0; i < tree.names.size(); ++i) {
    const auto id = static_cast<NameId>(i);
    if (tree.names[i] == "loop") loop_name_ = id;
    if (tree.names[i] == "caller") caller_name_ = id;
    if (tree.names[i] == "varargs") varargs_name_ = id;
    if (tree.names[i] == "kwargs") kwargs_name_ = id;
  }
}

absl::StatusOr<std::string> Interpreter::Run(const JsonObject& context) {
  const ScopeRef root(heap_.New<Scope>());
  for (size_t i = 0; i < tree_.names.size(); ++i) {
    const Json* found = context.if_contains(tree_.names[i]);
    if (found == nullptr) continue;
    ASSIGN_OR_RETURN(Value value, Import(*found, 0));
    root->Set(static_cast<NameId>(i), std::move(value));
  }
  std::string out;
  out_ = &out;
  const FlowOr flow = Run(tree_.body, root);
  if (!flow.ok()) return WithLine(flow.status());
  return out;
}

absl::Status Interpreter::WithLine(absl::Status status) const {
  if (raised_ || error_line_ == 0) return status;
  const absl::string_view message = status.message();
  return absl::Status(status.code(), fmt::format("line {}: {}", error_line_,
                                                 std::string_view(message.data(), message.size())));
}

absl::Status Interpreter::Raise(std::string message) {
  raised_ = true;
  return Error(std::move(message));
}

Result Interpreter::Import(const Json& json, int depth) {
  if (depth > kDataDepthMax) return Error("the context is nested too deeply");
  if (!heap_.Spend(1)) return heap_.Check();
  switch (json.kind()) {
    case boost::json::kind::null:
      return Value::None();
    case boost::json::kind::bool_:
      return Value::Bool(*json.if_bool());
    case boost::json::kind::int64:
      return Value::Integer(*json.if_int64());
    case boost::json::kind::uint64:
      return Value::Integer(*json.if_uint64());
    case boost::json::kind::double_:
      return Value::Float(*json.if_double());
    case boost::json::kind::string: {
      const boost::json::string& text = *json.if_string();
      return heap_.Str(std::string_view(text.data(), text.size()));
    }
    case boost::json::kind::array: {
      std::vector<Value> items;
      for (const Json& item : *json.if_array()) {
        ASSIGN_OR_RETURN(Value value, Import(item, depth + 1));
        items.push_back(std::move(value));
      }
      return heap_.List(std::move(items));
    }
    case boost::json::kind::object: {
      Value dict = heap_.NewDict();
      for (const auto& entry : *json.if_object()) {
        ASSIGN_OR_RETURN(Value value, Import(entry.value(), depth + 1));
        const Value key = heap_.Str(std::string_view(entry.key().data(), entry.key().size()));
        RETURN_IF_ERROR(heap_.SetItem(dict.as<Dict>(), key, std::move(value)));
      }
      return dict;
    }
  }
  return Value::None();
}

Interpreter::ScopeRef Interpreter::Inner(const ScopeRef& scope) {
  ScopeRef inner(heap_.New<Scope>());
  inner->parent = scope;
  return inner;
}

Interpreter::FlowOr Interpreter::Run(const Body& body, const ScopeRef& scope) {
  for (const StmtPtr& stmt : body) {
    ASSIGN_OR_RETURN(const Flow flow, Execute(*stmt, scope));
    if (flow != Flow::kNext) return flow;
  }
  return Flow::kNext;
}

Interpreter::FlowOr Interpreter::Execute(const Stmt& stmt, const ScopeRef& scope) {
  FlowOr out = Flow::kNext;
  ++depth_;
  if (!heap_.Spend(1)) {
    out = heap_.Check();
  } else if (depth_ > limits_.depth * kFramesPerCall) {
    out = absl::ResourceExhaustedError("the template nests too deeply");
  } else {
    out = ExecuteOne(stmt, scope);
  }
  --depth_;
  if (!out.ok() && error_line_ == 0) error_line_ = stmt.line;
  return out;
}

Interpreter::FlowOr Interpreter::ExecuteOne(const Stmt& stmt, const ScopeRef& scope) {
  switch (stmt.kind) {
    case Stmt::Kind::kData: {
      if (!heap_.SpendText(stmt.text.size())) return heap_.Check();
      out_->append(stmt.text);
      pending_bytes_ += stmt.text.size();
      RETURN_IF_ERROR(Emit(Value()));
      return Flow::kNext;
    }
    case Stmt::Kind::kPrint: {
      ASSIGN_OR_RETURN(const Value value, Evaluate(*stmt.value, scope));
      RETURN_IF_ERROR(Emit(value));
      return Flow::kNext;
    }
    case Stmt::Kind::kIf:
      return ExecuteIf(stmt, scope);
    case Stmt::Kind::kFor: {
      ASSIGN_OR_RETURN(const Value iterable, Evaluate(*stmt.value, scope));
      return RunLoop(stmt, iterable, scope, 0);
    }
    case Stmt::Kind::kSet: {
      ASSIGN_OR_RETURN(Value value, Evaluate(*stmt.value, scope));
      RETURN_IF_ERROR(Assign(*stmt.target, std::move(value), scope));
      return Flow::kNext;
    }
    case Stmt::Kind::kSetBlock:
      return ExecuteSetBlock(stmt, scope);
    case Stmt::Kind::kMacro:
      scope->Set(stmt.target->name, MakeMacro(*stmt.macro, scope));
      return Flow::kNext;
    case Stmt::Kind::kCall:
      RETURN_IF_ERROR(ExecuteCall(stmt, scope));
      return Flow::kNext;
    case Stmt::Kind::kFilter: {
      ASSIGN_OR_RETURN(const Value text, Capture(stmt.body, Inner(scope)));
      ASSIGN_OR_RETURN(const Value value, EvaluateFilter(*stmt.value, scope, &text));
      RETURN_IF_ERROR(Emit(value));
      return Flow::kNext;
    }
    case Stmt::Kind::kScope:
      return Run(stmt.body, Inner(scope));
    case Stmt::Kind::kWith:
      return ExecuteWith(stmt, scope);
    case Stmt::Kind::kDo: {
      const Result ignored = Evaluate(*stmt.value, scope);
      if (!ignored.ok()) return ignored.status();
      return Flow::kNext;
    }
    case Stmt::Kind::kBreak:
      return Flow::kBreak;
    case Stmt::Kind::kContinue:
      return Flow::kContinue;
  }
  return Flow::kNext;
}

absl::Status Interpreter::Emit(const Value& value) {
  const size_t before = out_->size();
  RETURN_IF_ERROR(AppendStr(heap_, value, out_));
  pending_bytes_ += out_->size() - before;
  if (pending_bytes_ > limits_.output_bytes) {
    return absl::ResourceExhaustedError(
        fmt::format("the template writes more than {} bytes", limits_.output_bytes));
  }
  return absl::OkStatus();
}

Interpreter::FlowOr Interpreter::ExecuteIf(const Stmt& stmt, const ScopeRef& scope) {
  for (const auto& [condition, body] : stmt.branches) {
    ASSIGN_OR_RETURN(const Value value, Evaluate(*condition, scope));
    if (Truthy(value)) return Run(body, scope);
  }
  return Run(stmt.otherwise, scope);
}

absl::StatusOr<bool> Interpreter::Admits(const Stmt& stmt, const Value& item,
                                         const ScopeRef& inner) {
  RETURN_IF_ERROR(Assign(*stmt.target, item, inner));
  if (stmt.condition == nullptr) return true;
  ASSIGN_OR_RETURN(const Value admitted, Evaluate(*stmt.condition, inner));
  return Truthy(admitted);
}

Interpreter::FlowOr Interpreter::RunLoop(const Stmt& stmt, const Value& iterable,
                                         const ScopeRef& scope, int depth0) {
  ASSIGN_OR_RETURN(std::vector<Value> items, Items(heap_, iterable));
  // With `loop` in sight its length must be known, so the condition is asked first; otherwise it
  // sees what the body has done, as in Python.
  const bool filter_first = stmt.uses_loop && stmt.condition != nullptr;
  if (filter_first) {
    std::vector<Value> admitted;
    for (Value& item : items) {
      ASSIGN_OR_RETURN(const bool admits, Admits(stmt, item, Inner(scope)));
      if (admits) admitted.push_back(std::move(item));
    }
    items = std::move(admitted);
  }
  Ref<Loop> loop;
  if (stmt.uses_loop) {
    loop = Ref<Loop>(heap_.New<Loop>());
    loop->statement = &stmt;
    loop->scope = scope;
    loop->items = items;
    loop->depth0 = depth0;
    heap_.Charge(*loop, items.size() * sizeof(Value));
  }
  bool entered = false;
  for (size_t i = 0; i < items.size(); ++i) {
    const ScopeRef inner = Inner(scope);
    if (filter_first || stmt.condition == nullptr) {
      RETURN_IF_ERROR(Assign(*stmt.target, items[i], inner));
    } else {
      ASSIGN_OR_RETURN(const bool admits, Admits(stmt, items[i], inner));
      if (!admits) continue;
    }
    if (loop) {
      loop->index0 = i;
      if (loop_name_ >= 0) inner->Set(loop_name_, Value(Kind::kLoop, loop.get()));
    }
    entered = true;
    ASSIGN_OR_RETURN(const Flow flow, Run(stmt.body, inner));
    if (flow == Flow::kBreak) break;
  }
  if (entered) return Flow::kNext;
  return Run(stmt.otherwise, Inner(scope));
}

Interpreter::FlowOr Interpreter::ExecuteSetBlock(const Stmt& stmt, const ScopeRef& scope) {
  ASSIGN_OR_RETURN(Value value, Capture(stmt.body, Inner(scope)));
  if (stmt.value != nullptr) {
    ASSIGN_OR_RETURN(value, EvaluateFilter(*stmt.value, scope, &value));
  }
  RETURN_IF_ERROR(Assign(*stmt.target, std::move(value), scope));
  return Flow::kNext;
}

Interpreter::FlowOr Interpreter::ExecuteWith(const Stmt& stmt, const ScopeRef& scope) {
  const ScopeRef inner = Inner(scope);
  for (const auto& [name, expr] : stmt.bindings) {
    ASSIGN_OR_RETURN(Value value, Evaluate(*expr, scope));
    RETURN_IF_ERROR(Assign(*name, std::move(value), inner));
  }
  return Run(stmt.body, inner);
}

absl::Status Interpreter::ExecuteCall(const Stmt& stmt, const ScopeRef& scope) {
  ASSIGN_OR_RETURN(const Value callee, Evaluate(*stmt.value->items[0], scope));
  ASSIGN_OR_RETURN(Args args, EvaluateArguments(*stmt.value->arguments, scope));
  args.named.emplace_back("caller", MakeMacro(*stmt.macro, scope));
  ASSIGN_OR_RETURN(const Value text, Call(callee, args));
  return Emit(text);
}

absl::Status Interpreter::Assign(const Expr& target, Value value, const ScopeRef& scope) {
  if (target.kind == Expr::Kind::kName) {
    scope->Set(target.name, std::move(value));
    return absl::OkStatus();
  }
  if (target.kind == Expr::Kind::kNamespaceAttribute) {
    const Value* space = scope->Find(target.name);
    if (space == nullptr || !space->is(Kind::kNamespace)) {
      return Error("cannot assign attribute on non-namespace object");
    }
    const Value holder = *space;
    return heap_.SetItem(holder.as<Dict>(), heap_.Str(target.text), std::move(value));
  }
  if (!IsIterable(value)) {
    return Error(fmt::format("cannot unpack non-iterable {} object", TypeName(value)));
  }
  ASSIGN_OR_RETURN(std::vector<Value> items, Items(heap_, value));
  if (items.size() != target.items.size()) {
    return Error(
        fmt::format("expected {} values to unpack, got {}", target.items.size(), items.size()));
  }
  for (size_t i = 0; i < items.size(); ++i) {
    RETURN_IF_ERROR(Assign(*target.items[i], std::move(items[i]), scope));
  }
  return absl::OkStatus();
}

Value Interpreter::MakeMacro(const MacroBody& body, const ScopeRef& scope) {
  auto* macro = heap_.New<Macro>();
  macro->body = &body;
  macro->scope = scope;
  return Value(Kind::kMacro, macro);
}

Result Interpreter::Capture(const Body& body, const ScopeRef& scope) {
  std::string text;
  std::string* const outer = std::exchange(out_, &text);
  const FlowOr flow = Run(body, scope);
  out_ = outer;
  pending_bytes_ -= std::min(pending_bytes_, text.size());
  if (!flow.ok()) return flow.status();
  return heap_.Str(std::move(text));
}

Result Interpreter::CallMacro(const Macro& macro, Args& args) {
  const MacroBody& body = *macro.body;
  const ScopeRef scope = Inner(macro.scope);
  size_t used = 0;
  for (const Parameter& parameter : body.parameters) {
    const auto named = std::find_if(args.named.begin(), args.named.end(), [&](const auto& entry) {
      return entry.first == parameter.text;
    });
    if (used < args.positional.size()) {
      scope->Set(parameter.name, std::move(args.positional[used++]));
    } else if (named != args.named.end()) {
      scope->Set(parameter.name, std::move(named->second));
      args.named.erase(named);
    } else if (parameter.fallback != nullptr) {
      ASSIGN_OR_RETURN(Value value, Evaluate(*parameter.fallback, scope));
      scope->Set(parameter.name, std::move(value));
    } else {
      scope->Set(parameter.name,
                 heap_.Undefined(fmt::format("parameter '{}' was not provided", parameter.text)));
    }
  }
  if (body.uses_varargs) {
    scope->Set(varargs_name_, heap_.Tuple({args.positional.begin() + static_cast<ptrdiff_t>(used),
                                           args.positional.end()}));
  } else if (used < args.positional.size()) {
    return Error(fmt::format("macro '{}' takes not more than {} argument(s)", body.name,
                             body.parameters.size()));
  }
  if (body.uses_caller &&
      scope->variables.end() ==
          std::find_if(scope->variables.begin(), scope->variables.end(),
                       [&](const auto& v) { return v.first == caller_name_; })) {
    const auto caller = std::find_if(args.named.begin(), args.named.end(),
                                     [](const auto& entry) { return entry.first == "caller"; });
    if (caller != args.named.end()) {
      scope->Set(caller_name_, std::move(caller->second));
      args.named.erase(caller);
    } else {
      scope->Set(caller_name_, heap_.Undefined("No caller defined"));
    }
  }
  if (body.uses_kwargs) {
    const Value kwargs = heap_.NewDict();
    for (auto& [name, value] : args.named) {
      RETURN_IF_ERROR(heap_.SetItem(kwargs.as<Dict>(), heap_.Str(name), std::move(value)));
    }
    scope->Set(kwargs_name_, kwargs);
  } else if (!args.named.empty()) {
    return Error(
        fmt::format("macro '{}' takes no keyword argument '{}'", body.name, args.named[0].first));
  }
  if (calls_ >= limits_.depth) {
    return absl::ResourceExhaustedError(
        fmt::format("macro calls nest deeper than {}", limits_.depth));
  }
  ++calls_;
  Result out = Capture(body.body, scope);
  --calls_;
  return out;
}

Result Interpreter::CallLoop(const Loop& loop, Args& args) {
  if (!loop.statement->recursive) {
    return Error("the loop must have the 'recursive' marker to be called recursively");
  }
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("loop", args, {"iterable"}, 1));
  if (calls_ >= limits_.depth) {
    return absl::ResourceExhaustedError(
        fmt::format("recursive loops nest deeper than {}", limits_.depth));
  }
  ++calls_;
  std::string text;
  std::string* const outer = std::exchange(out_, &text);
  const FlowOr flow = RunLoop(*loop.statement, bound[0], loop.scope, loop.depth0 + 1);
  out_ = outer;
  pending_bytes_ -= std::min(pending_bytes_, text.size());
  --calls_;
  if (!flow.ok()) return flow.status();
  return heap_.Str(std::move(text));
}

}  // namespace antiphon::model::jinja
