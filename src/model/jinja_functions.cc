// Global functions, and the methods of what they make.
#include "common/status_macros.h"
#include "fmt/format.h"
#include "model/jinja_arguments.h"
#include "model/jinja_builtins.h"
#include "model/jinja_format.h"
#include "model/jinja_interpreter.h"
#include "model/jinja_operations.h"
#include "model/jinja_print.h"

namespace antiphon::model::jinja {
namespace {

Result RaiseException(Interpreter& in, const Value&, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("raise_exception", args, {"message"}, 1));
  ASSIGN_OR_RETURN(std::string message, ToStr(in.heap(), bound[0]));
  return in.Raise(std::move(message));
}

Result StrftimeNow(Interpreter& in, const Value&, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("strftime_now", args, {"format"}, 1));
  ASSIGN_OR_RETURN(const std::string format, bound.Text(0, ""));
  // No directive grows its two characters to more than 32.
  RETURN_IF_ERROR(in.heap().Room(format.size() * 16));
  if (!in.heap().Spend(format.size())) return in.heap().Check();
  return in.heap().Str(Strftime(format, in.now()));
}

// What dict() and namespace() have in common.
absl::Status Fill(Interpreter& in, Args& args, Dict& out) {
  if (args.positional.size() > 1) return Error("expected at most 1 positional argument");
  if (!args.positional.empty()) {
    const Value& source = args.positional[0];
    if (source.is(Kind::kDict)) {
      for (const auto& [key, value] : source.as<Dict>().entries) {
        RETURN_IF_ERROR(in.heap().SetItem(out, key, value));
      }
    } else {
      if (source.is(Kind::kUndefined)) return UndefinedError(source);
      ASSIGN_OR_RETURN(const std::vector<Value> pairs, Items(in.heap(), source));
      for (const Value& pair : pairs) {
        ASSIGN_OR_RETURN(const std::vector<Value> parts, Items(in.heap(), pair));
        if (parts.size() != 2) return Error("a dictionary needs pairs of key and value");
        RETURN_IF_ERROR(in.heap().SetItem(out, parts[0], parts[1]));
      }
    }
  }
  for (auto& [name, value] : args.named) {
    RETURN_IF_ERROR(in.heap().SetItem(out, in.heap().Str(name), std::move(value)));
  }
  return absl::OkStatus();
}

Result MakeDict(Interpreter& in, const Value&, Args& args) {
  Value out = in.heap().NewDict();
  RETURN_IF_ERROR(Fill(in, args, out.as<Dict>()));
  return out;
}

Result MakeNamespace(Interpreter& in, const Value&, Args& args) {
  Value out(Kind::kNamespace, in.heap().New<Dict>());
  RETURN_IF_ERROR(Fill(in, args, out.as<Dict>()));
  return out;
}

Result MakeRange(Interpreter& in, const Value&, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("range", args, {"start", "stop", "step"}, 1));
  for (size_t i = 0; i < args.positional.size(); ++i) {
    if (bound[i].is(Kind::kUndefined)) return UndefinedError(bound[i]);
  }
  ASSIGN_OR_RETURN(const int64_t first, bound.Integer(0, 0));
  ASSIGN_OR_RETURN(const int64_t second, bound.Integer(1, first));
  ASSIGN_OR_RETURN(const int64_t step, bound.Integer(2, 1));
  if (step == 0) return Error("range() arg 3 must not be zero");
  const int64_t start = bound.passed(1) ? first : 0;
  const Int distance = Int{second} - start;
  Int size = 0;
  if (step > 0 && distance > 0) size = (distance - 1) / step + 1;
  if (step < 0 && distance < 0) size = (-distance - 1) / -Int{step} + 1;
  // As jinja2's sandbox.
  constexpr int kRangeMax = 100'000;
  if (size > kRangeMax) {
    return absl::ResourceExhaustedError(
        fmt::format("range too big: at most {} numbers", kRangeMax));
  }
  auto* range = in.heap().New<Range>();
  range->start = start;
  range->stop = bound.passed(1) ? second : first;
  range->step = step;
  range->size = static_cast<int64_t>(size);
  return Value(Kind::kRange, range);
}

Result MakeJoiner(Interpreter& in, const Value&, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("joiner", args, {"sep"}));
  auto* joiner = in.heap().New<Joiner>();
  Value out(Kind::kJoiner, joiner);
  joiner->separator = bound.passed(0) ? bound[0] : in.heap().Str(", ");
  return out;
}

Result MakeCycler(Interpreter& in, const Value&, Args& args) {
  if (args.positional.empty()) return Error("at least one item has to be provided");
  if (!args.named.empty()) return Error("cycler() takes no keyword arguments");
  auto* cycler = in.heap().New<Cycler>();
  cycler->items = std::move(args.positional);
  in.heap().Charge(*cycler, cycler->items.size() * sizeof(Value));
  return Value(Kind::kCycler, cycler);
}

Result CyclerNext(Interpreter&, const Value& self, Args&) {
  Cycler& cycler = self.as<Cycler>();
  const size_t at = cycler.position;
  cycler.position = (at + 1) % cycler.items.size();
  return cycler.items[at];
}

Result CyclerReset(Interpreter&, const Value& self, Args&) {
  self.as<Cycler>().position = 0;
  return Value::None();
}

Result LoopCycle(Interpreter&, const Value& self, Args& args) {
  if (args.positional.empty()) return Error("no items for cycling given");
  return args.positional[self.as<Loop>().index0 % args.positional.size()];
}

Result LoopChanged(Interpreter& in, const Value& self, Args& args) {
  Loop& loop = self.as<Loop>();
  const Value now = in.heap().Tuple(std::move(args.positional));
  if (loop.has_changed_before) {
    ASSIGN_OR_RETURN(const bool same, Equal(in.heap(), now, loop.changed_before));
    if (same) return Value::Bool(false);
  }
  loop.has_changed_before = true;
  loop.changed_before = now;
  return Value::Bool(true);
}

constexpr NamedNative kFunctions[] = {
    {"raise_exception", RaiseException},
    {"strftime_now", StrftimeNow},
    {"namespace", MakeNamespace},
    {"dict", MakeDict},
    {"range", MakeRange},
    {"joiner", MakeJoiner},
    {"cycler", MakeCycler},
};
constexpr NamedNative kCyclerMethods[] = {{"next", CyclerNext}, {"reset", CyclerReset}};
constexpr NamedNative kLoopMethods[] = {{"cycle", LoopCycle}, {"changed", LoopChanged}};

}  // namespace

absl::Span<const NamedNative> Functions() { return kFunctions; }
absl::Span<const NamedNative> CyclerMethods() { return kCyclerMethods; }
absl::Span<const NamedNative> LoopMethods() { return kLoopMethods; }

}  // namespace antiphon::model::jinja
