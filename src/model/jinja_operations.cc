#include "model/jinja_operations.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "common/status_macros.h"
#include "fmt/format.h"
#include "model/jinja_text.h"

namespace antiphon::model::jinja {
namespace {

std::partial_ordering CompareNumbers(const Value& a, const Value& b) {
  if (a.integral() && b.integral()) return a.integer() <=> b.integer();
  return a.real() <=> b.real();
}

bool IsSequence(const Value& value) { return value.is(Kind::kList) || value.is(Kind::kTuple); }

absl::StatusOr<bool> EqualItems(Heap& heap, const Sequence& a, const Sequence& b, int depth) {
  if (a.items.size() != b.items.size()) return false;
  for (size_t i = 0; i < a.items.size(); ++i) {
    ASSIGN_OR_RETURN(const bool same, Equal(heap, a.items[i], b.items[i], depth + 1));
    if (!same) return false;
  }
  return true;
}

absl::StatusOr<bool> EqualDicts(Heap& heap, const Dict& a, const Dict& b, int depth) {
  if (a.size() != b.size()) return false;
  for (const auto& [key, value] : a.entries) {
    if (!heap.Spend(1)) return heap.Check();
    const Value* other = b.Find(key);
    if (other == nullptr) return false;
    ASSIGN_OR_RETURN(const bool same, Equal(heap, value, *other, depth + 1));
    if (!same) return false;
  }
  return true;
}

absl::Status Unsupported(std::string_view symbol, const Value& a, const Value& b) {
  if (a.is(Kind::kUndefined)) return UndefinedError(a);
  if (b.is(Kind::kUndefined)) return UndefinedError(b);
  return Error(fmt::format("unsupported operand type(s) for {}: '{}' and '{}'", symbol, TypeName(a),
                           TypeName(b)));
}

absl::Status Overflow() { return Error("integer result beyond 128 bits"); }

std::string_view Symbol(Operator op) {
  switch (op) {
    case Operator::kAdd:
      return "+";
    case Operator::kSubtract:
      return "-";
    case Operator::kMultiply:
      return "*";
    case Operator::kDivide:
      return "/";
    case Operator::kFloorDivide:
      return "//";
    case Operator::kModulo:
      return "%";
    case Operator::kPower:
      return "**";
    default:
      return "?";
  }
}

Result FloatArithmetic(Operator op, double a, double b) {
  switch (op) {
    case Operator::kAdd:
      return Value::Float(a + b);
    case Operator::kSubtract:
      return Value::Float(a - b);
    case Operator::kMultiply:
      return Value::Float(a * b);
    case Operator::kPower: {
      if (a == 0 && b < 0) return Error("0.0 cannot be raised to a negative power");
      const double power = std::pow(a, b);
      if (std::isnan(power) && !std::isnan(a) && !std::isnan(b)) {
        return Error("a negative number cannot be raised to a fractional power");
      }
      if (std::isinf(power) && std::isfinite(a) && std::isfinite(b)) {
        return Error("the power is out of range");
      }
      return Value::Float(power);
    }
    default:
      break;
  }
  if (b == 0) return Error(op == Operator::kModulo ? "modulo by zero" : "division by zero");
  if (op == Operator::kDivide) return Value::Float(a / b);
  // Python's remainder has the sign of the divisor.
  double remainder = std::fmod(a, b);
  if (remainder != 0 && (remainder < 0) != (b < 0)) remainder += b;
  if (op == Operator::kModulo) {
    return Value::Float(remainder == 0 ? std::copysign(0.0, b) : remainder);
  }
  return Value::Float(std::round((a - remainder) / b));
}

Result IntPower(Int base, Int exponent) {
  Int out = 1;
  while (exponent > 0) {
    if ((exponent & 1) != 0 && __builtin_mul_overflow(out, base, &out)) return Overflow();
    exponent >>= 1;
    if (exponent > 0 && __builtin_mul_overflow(base, base, &base)) return Overflow();
  }
  return Value::Integer(out);
}

Result IntArithmetic(Operator op, Int a, Int b) {
  constexpr Int kMinimum = Int{1} << 126 << 1;
  Int out = 0;
  switch (op) {
    case Operator::kAdd:
      if (__builtin_add_overflow(a, b, &out)) return Overflow();
      return Value::Integer(out);
    case Operator::kSubtract:
      if (__builtin_sub_overflow(a, b, &out)) return Overflow();
      return Value::Integer(out);
    case Operator::kMultiply:
      if (__builtin_mul_overflow(a, b, &out)) return Overflow();
      return Value::Integer(out);
    case Operator::kPower:
      if (b >= 0) return IntPower(a, b);
      return FloatArithmetic(op, static_cast<double>(a), static_cast<double>(b));
    case Operator::kDivide:
      return FloatArithmetic(op, static_cast<double>(a), static_cast<double>(b));
    default:
      break;
  }
  if (b == 0) {
    return Error(op == Operator::kModulo ? "integer modulo by zero" : "integer division by zero");
  }
  if (a == kMinimum && b == -1) return Overflow();
  Int quotient = a / b;
  Int remainder = a % b;
  if (remainder != 0 && (remainder < 0) != (b < 0)) {
    remainder += b;
    --quotient;
  }
  return Value::Integer(op == Operator::kModulo ? remainder : quotient);
}

Result Repeat(Heap& heap, const Value& value, Int times) {
  if (times < 0) times = 0;
  constexpr Int kMany = Int{1} << 40;
  if (times > kMany) times = kMany;
  const auto count = static_cast<size_t>(times);
  if (value.is(Kind::kString)) {
    const std::string& text = value.text();
    RETURN_IF_ERROR(heap.Room(text.size() * std::min<size_t>(count, kMany)));
    if (text.empty()) return heap.Str("");
    std::string out;
    out.reserve(text.size() * count);
    for (size_t i = 0; i < count; ++i) out += text;
    return heap.Str(std::move(out));
  }
  const std::vector<Value>& items = value.as<Sequence>().items;
  RETURN_IF_ERROR(heap.Room(items.size() * count * sizeof(Value)));
  std::vector<Value> out;
  if (!items.empty()) {
    out.reserve(items.size() * count);
    for (size_t i = 0; i < count; ++i) out.insert(out.end(), items.begin(), items.end());
  }
  return value.is(Kind::kList) ? heap.List(std::move(out)) : heap.Tuple(std::move(out));
}

Result AddTexts(Heap& heap, const Value& a, const Value& b) {
  const bool markup_a = a.as<String>().markup;
  const bool markup_b = b.as<String>().markup;
  RETURN_IF_ERROR(heap.Room(a.text().size() + b.text().size()));
  if (!markup_a && !markup_b) return heap.Str(a.text() + b.text());
  return heap.Markup((markup_a ? a.text() : HtmlEscaped(a.text())) +
                     (markup_b ? b.text() : HtmlEscaped(b.text())));
}

// Python's slice indices for a sequence of `length` items.
struct SliceBounds {
  int64_t start;
  int64_t step;
  int64_t count;
};

absl::StatusOr<SliceBounds> Bounds(int64_t length, const Value& start, const Value& stop,
                                   const Value& step) {
  const auto bound = [](const Value& value, int64_t fallback) -> Int {
    if (value.is(Kind::kNone)) return Int{fallback};
    return value.integral() ? value.integer() : Int{fallback};
  };
  constexpr Int kFar = std::numeric_limits<int64_t>::max() / 4;
  Int by = bound(step, 1);
  if (by == 0) return Error("slice step cannot be zero");
  by = std::clamp<Int>(by, -kFar, kFar);
  const auto clip = [&](Int at) -> int64_t {
    at = std::clamp<Int>(at, -kFar, kFar);
    if (at < 0) at += length;
    const Int low = by < 0 ? -1 : 0;
    const Int high = by < 0 ? length - 1 : length;
    return static_cast<int64_t>(std::clamp<Int>(at, low, std::max(low, high)));
  };
  int64_t from = by < 0 ? length - 1 : 0;
  int64_t to = by < 0 ? -1 : length;
  if (start.integral()) from = clip(start.integer());
  if (stop.integral()) to = clip(stop.integer());
  const auto stride = static_cast<int64_t>(by);
  int64_t count = 0;
  if (stride > 0 && from < to) count = (to - from - 1) / stride + 1;
  if (stride < 0 && from > to) count = (from - to - 1) / -stride + 1;
  return SliceBounds{from, stride, count};
}

std::optional<size_t> Index(Int index, size_t size) {
  if (index < 0) index += static_cast<Int>(size);
  if (index < 0 || index >= static_cast<Int>(size)) return std::nullopt;
  return static_cast<size_t>(index);
}

}  // namespace

absl::Status Error(std::string message) { return absl::InvalidArgumentError(std::move(message)); }

absl::Status UndefinedError(const Value& undefined) {
  if (undefined.object() == nullptr) return Error("an undefined value is used");
  return Error(undefined.as<String>().text);
}

bool Truthy(const Value& value) {
  switch (value.kind()) {
    case Kind::kUndefined:
    case Kind::kNone:
      return false;
    case Kind::kBool:
      return value.boolean();
    case Kind::kInt:
      return value.integer() != 0;
    case Kind::kFloat:
      return value.real() != 0;
    case Kind::kString:
      return !value.text().empty();
    case Kind::kList:
    case Kind::kTuple:
      return !value.as<Sequence>().items.empty();
    case Kind::kDict:
      return value.as<Dict>().size() != 0;
    case Kind::kRange:
      return value.as<Range>().size != 0;
    case Kind::kIterator:
      return !value.as<Iterator>().is_view || !value.as<Iterator>().items.empty();
    default:
      return true;
  }
}

absl::StatusOr<bool> Equal(Heap& heap, const Value& a, const Value& b, int depth) {
  if (depth > kDataDepthMax) return Error("values are nested too deeply to compare");
  if (!heap.Spend(1)) return heap.Check();
  if (a.numeric() && b.numeric()) return CompareNumbers(a, b) == 0;
  if (a.kind() != b.kind()) return false;
  if (a.is(Kind::kUndefined) || a.is(Kind::kNone)) return true;
  if (a.object() == b.object()) return true;
  switch (a.kind()) {
    case Kind::kString:
      if (!heap.SpendText(std::min(a.text().size(), b.text().size()))) return heap.Check();
      return a.text() == b.text();
    case Kind::kList:
    case Kind::kTuple:
      return EqualItems(heap, a.as<Sequence>(), b.as<Sequence>(), depth);
    case Kind::kDict:
      return EqualDicts(heap, a.as<Dict>(), b.as<Dict>(), depth);
    case Kind::kRange: {
      const Range& left = a.as<Range>();
      const Range& right = b.as<Range>();
      return left.size == right.size && (left.size == 0 || left.start == right.start) &&
             (left.size < 2 || left.step == right.step);
    }
    default:
      return false;
  }
}

absl::StatusOr<std::partial_ordering> Compare(Heap& heap, const Value& a, const Value& b,
                                              std::string_view symbol, int depth) {
  if (depth > kDataDepthMax) return Error("values are nested too deeply to compare");
  if (!heap.Spend(1)) return heap.Check();
  if (a.numeric() && b.numeric()) return CompareNumbers(a, b);
  if (a.is(Kind::kString) && b.is(Kind::kString)) {
    if (!heap.SpendText(std::min(a.text().size(), b.text().size()))) return heap.Check();
    // The order of UTF-8 bytes is the order of code points.
    return a.text().compare(b.text()) <=> 0;
  }
  if (IsSequence(a) && a.kind() == b.kind()) {
    const std::vector<Value>& left = a.as<Sequence>().items;
    const std::vector<Value>& right = b.as<Sequence>().items;
    for (size_t i = 0; i < std::min(left.size(), right.size()); ++i) {
      ASSIGN_OR_RETURN(const bool same, Equal(heap, left[i], right[i], depth + 1));
      if (!same) return Compare(heap, left[i], right[i], symbol, depth + 1);
    }
    return left.size() <=> right.size();
  }
  if (a.is(Kind::kUndefined)) return UndefinedError(a);
  if (b.is(Kind::kUndefined)) return UndefinedError(b);
  return Error(fmt::format("'{}' not supported between instances of '{}' and '{}'", symbol,
                           TypeName(a), TypeName(b)));
}

absl::StatusOr<bool> Contains(Heap& heap, const Value& container, const Value& item) {
  switch (container.kind()) {
    case Kind::kString:
      if (!item.is(Kind::kString)) {
        return Error(
            fmt::format("'in <string>' requires string as left operand, not {}", TypeName(item)));
      }
      if (!heap.SpendText(container.text().size())) return heap.Check();
      return Find(container.text(), item.text()) != std::string_view::npos;
    case Kind::kDict:
      if (!Hashable(item)) return Error(fmt::format("unhashable type: '{}'", TypeName(item)));
      return container.as<Dict>().Find(item) != nullptr;
    case Kind::kRange: {
      if (!item.numeric()) return false;
      const Range& range = container.as<Range>();
      if (!item.integral() &&
          (item.real() != std::floor(item.real()) || std::fabs(item.real()) > 1e18)) {
        return false;
      }
      const Int offset =
          (item.integral() ? item.integer() : static_cast<Int>(item.real())) - range.start;
      return offset % range.step == 0 && offset / range.step >= 0 &&
             offset / range.step < range.size;
    }
    default:
      break;
  }
  if (!IsIterable(container)) {
    return Error(fmt::format("argument of type '{}' is not iterable", TypeName(container)));
  }
  ASSIGN_OR_RETURN(const std::vector<Value> items, Items(heap, container));
  for (const Value& other : items) {
    ASSIGN_OR_RETURN(const bool same, Equal(heap, other, item));
    if (same) return true;
  }
  return false;
}

bool IsIterable(const Value& value) {
  switch (value.kind()) {
    case Kind::kUndefined:
    case Kind::kString:
    case Kind::kList:
    case Kind::kTuple:
    case Kind::kDict:
    case Kind::kRange:
    case Kind::kIterator:
      return true;
    default:
      return false;
  }
}

absl::StatusOr<std::vector<Value>> Items(Heap& heap, const Value& iterable) {
  const std::optional<Int> length = Length(iterable);
  if (length.has_value()) {
    RETURN_IF_ERROR(heap.Room(static_cast<size_t>(*length) * sizeof(Value)));
    if (!heap.Spend(static_cast<uint64_t>(*length / 8))) return heap.Check();
  }
  std::vector<Value> out;
  switch (iterable.kind()) {
    case Kind::kUndefined:
      return out;
    case Kind::kString: {
      std::string_view rest = iterable.text();
      RETURN_IF_ERROR(heap.Room(iterable.as<String>().length * (sizeof(String) + sizeof(Value))));
      while (!rest.empty()) {
        const size_t bytes = FrontBytes(rest);
        out.push_back(heap.Str(rest.substr(0, bytes)));
        rest.remove_prefix(bytes);
      }
      return out;
    }
    case Kind::kList:
    case Kind::kTuple:
      return iterable.as<Sequence>().items;
    case Kind::kDict:
      for (const auto& [key, value] : iterable.as<Dict>().entries) out.push_back(key);
      return out;
    case Kind::kRange: {
      const Range& range = iterable.as<Range>();
      for (int64_t i = 0; i < range.size; ++i) {
        out.push_back(Value::Integer(range.start + i * range.step));
      }
      return out;
    }
    case Kind::kIterator: {
      Iterator& iterator = iterable.as<Iterator>();
      if (iterator.is_view) return iterator.items;
      const size_t from = std::exchange(iterator.position, iterator.items.size());
      out.assign(iterator.items.begin() + static_cast<ptrdiff_t>(from), iterator.items.end());
      return out;
    }
    default:
      return Error(fmt::format("'{}' object is not iterable", TypeName(iterable)));
  }
}

std::optional<Int> Length(const Value& value) {
  switch (value.kind()) {
    case Kind::kUndefined:
      return 0;
    case Kind::kString:
      return value.as<String>().length;
    case Kind::kList:
    case Kind::kTuple:
      return value.as<Sequence>().items.size();
    case Kind::kDict:
      return value.as<Dict>().size();
    case Kind::kRange:
      return value.as<Range>().size;
    case Kind::kIterator:
      if (!value.as<Iterator>().is_view) return std::nullopt;
      return value.as<Iterator>().items.size();
    default:
      return std::nullopt;
  }
}

std::string_view Slice(const String& text, size_t from, size_t to) {
  const std::string_view bytes = text.text;
  if (text.length == bytes.size()) return bytes.substr(from, to - from);
  const size_t start = ByteOffset(bytes, from);
  return bytes.substr(start, ByteOffset(bytes.substr(start), to - from));
}

Result Arithmetic(Heap& heap, Operator op, const Value& a, const Value& b) {
  if (a.integral() && b.integral()) return IntArithmetic(op, a.integer(), b.integer());
  if (a.numeric() && b.numeric()) return FloatArithmetic(op, a.real(), b.real());
  if (op == Operator::kAdd && a.kind() == b.kind()) {
    if (a.is(Kind::kString)) return AddTexts(heap, a, b);
    if (IsSequence(a)) {
      const std::vector<Value>& left = a.as<Sequence>().items;
      const std::vector<Value>& right = b.as<Sequence>().items;
      RETURN_IF_ERROR(heap.Room((left.size() + right.size()) * sizeof(Value)));
      std::vector<Value> items = left;
      items.insert(items.end(), right.begin(), right.end());
      return a.is(Kind::kList) ? heap.List(std::move(items)) : heap.Tuple(std::move(items));
    }
  }
  if (op == Operator::kMultiply) {
    const auto repeatable = [](const Value& v) { return v.is(Kind::kString) || IsSequence(v); };
    if (repeatable(a) && b.integral()) return Repeat(heap, a, b.integer());
    if (repeatable(b) && a.integral()) return Repeat(heap, b, a.integer());
  }
  if (op == Operator::kAdd && a.is(Kind::kString) && !b.is(Kind::kUndefined)) {
    return Error(fmt::format("can only concatenate str (not \"{}\") to str", TypeName(b)));
  }
  return Unsupported(Symbol(op), a, b);
}

Result Negate(const Value& value) {
  if (value.integral()) return IntArithmetic(Operator::kSubtract, 0, value.integer());
  if (value.is(Kind::kFloat)) return Value::Float(-value.real());
  if (value.is(Kind::kUndefined)) return UndefinedError(value);
  return Error(fmt::format("bad operand type for unary -: '{}'", TypeName(value)));
}

Result Subscript(Heap& heap, const Value& value, const Value& key) {
  switch (value.kind()) {
    case Kind::kUndefined:
      return UndefinedError(value);
    case Kind::kDict: {
      if (!Hashable(key)) break;
      const Value* found = value.as<Dict>().Find(key);
      if (found != nullptr) return *found;
      break;
    }
    case Kind::kList:
    case Kind::kTuple: {
      if (!key.integral()) break;
      const std::vector<Value>& items = value.as<Sequence>().items;
      const auto index = Index(key.integer(), items.size());
      if (index.has_value()) return items[*index];
      break;
    }
    case Kind::kString: {
      if (!key.integral()) break;
      const String& text = value.as<String>();
      const auto index = Index(key.integer(), text.length);
      if (!index.has_value()) break;
      if (text.length != text.text.size() && !heap.SpendText(text.text.size() * 4)) {
        return heap.Check();
      }
      return heap.Str(Slice(text, *index, *index + 1));
    }
    case Kind::kRange: {
      if (!key.integral()) break;
      const Range& range = value.as<Range>();
      const auto index = Index(key.integer(), static_cast<size_t>(range.size));
      if (index.has_value()) {
        return Value::Integer(range.start + static_cast<int64_t>(*index) * range.step);
      }
      break;
    }
    default:
      break;
  }
  if (key.is(Kind::kString)) {
    return heap.Undefined(fmt::format("'{} object' has no attribute {}", TypeName(value),
                                      Quoted(key.text().substr(0, 100))));
  }
  if (key.numeric()) {
    return heap.Undefined(
        fmt::format("{} object has no element {}", TypeName(value),
                    key.integral() ? fmt::format("{}", key.integer()) : FloatText(key.real())));
  }
  return heap.Undefined(
      fmt::format("{} object has no element of type {}", TypeName(value), TypeName(key)));
}

Result SliceOf(Heap& heap, const Value& value, const Value& start, const Value& stop,
               const Value& step) {
  if (value.is(Kind::kUndefined)) return UndefinedError(value);
  const bool sliceable = value.is(Kind::kString) || value.is(Kind::kRange) || IsSequence(value);
  const auto bad_bound = [](const Value& v) { return !v.integral() && !v.is(Kind::kNone); };
  if (!sliceable || bad_bound(start) || bad_bound(stop) || bad_bound(step)) {
    return heap.Undefined(fmt::format("'{}' object cannot be sliced so", TypeName(value)));
  }
  const auto length = static_cast<int64_t>(*Length(value));
  ASSIGN_OR_RETURN(const SliceBounds bounds, Bounds(length, start, stop, step));
  const auto at = [&](int64_t i) { return static_cast<size_t>(bounds.start + i * bounds.step); };
  if (value.is(Kind::kString)) {
    const String& text = value.as<String>();
    if (!heap.SpendText(text.text.size())) return heap.Check();
    if (bounds.step == 1 || bounds.count == 0) {
      const auto from = static_cast<size_t>(bounds.start);
      return heap.Str(bounds.count == 0
                          ? std::string_view()
                          : Slice(text, from, from + static_cast<size_t>(bounds.count)));
    }
    if (!heap.SpendText(text.text.size() * 4)) return heap.Check();
    std::vector<std::string_view> points;
    RETURN_IF_ERROR(heap.Room(text.length * sizeof(std::string_view)));
    for (std::string_view rest = text.text; !rest.empty();) {
      const size_t bytes = FrontBytes(rest);
      points.push_back(rest.substr(0, bytes));
      rest.remove_prefix(bytes);
    }
    std::string out;
    for (int64_t i = 0; i < bounds.count; ++i) out += points[at(i)];
    return heap.Str(std::move(out));
  }
  if (value.is(Kind::kRange)) {
    const Range& range = value.as<Range>();
    auto* out = heap.New<Range>();
    out->start = range.start + bounds.start * range.step;
    out->step = bounds.count > 1 ? range.step * bounds.step : 1;
    out->size = bounds.count;
    out->stop = out->start + out->size * out->step;
    return Value(Kind::kRange, out);
  }
  const std::vector<Value>& items = value.as<Sequence>().items;
  RETURN_IF_ERROR(heap.Room(static_cast<size_t>(bounds.count) * sizeof(Value)));
  std::vector<Value> out;
  for (int64_t i = 0; i < bounds.count; ++i) out.push_back(items[at(i)]);
  return value.is(Kind::kList) ? heap.List(std::move(out)) : heap.Tuple(std::move(out));
}

}  // namespace antiphon::model::jinja
