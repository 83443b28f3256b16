// Filters on numbers.
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "common/status_macros.h"
#include "fmt/format.h"
#include "model/jinja_arguments.h"
#include "model/jinja_builtins.h"
#include "model/jinja_interpreter.h"
#include "model/jinja_operations.h"
#include "model/jinja_text.h"

namespace antiphon::model::jinja {
namespace {

// Python's int(text, base), without the error; underscores between digits are allowed.
bool ReadInteger(std::string_view text, int base, Int* out) {
  text = Strip(text, Side::kBoth);
  const bool negative = text.starts_with('-');
  if (negative || text.starts_with('+')) text.remove_prefix(1);
  const auto prefixed = [&](char marker) {
    return text.size() > 2 && text[0] == '0' && (text[1] | 0x20) == marker;
  };
  if ((base == 16 && prefixed('x')) || (base == 8 && prefixed('o')) ||
      (base == 2 && prefixed('b'))) {
    text.remove_prefix(2);
  }
  if (text.empty() || text.front() == '_' || text.back() == '_') return false;
  Int value = 0;
  for (char c : text) {
    if (c == '_') continue;
    const char lower = static_cast<char>(c | 0x20);
    const int digit = c >= '0' && c <= '9'           ? c - '0'
                      : lower >= 'a' && lower <= 'z' ? lower - 'a' + 10
                                                     : 99;
    if (digit >= base || __builtin_mul_overflow(value, Int{base}, &value) ||
        __builtin_add_overflow(value, Int{digit}, &value)) {
      return false;
    }
  }
  *out = negative ? -value : value;
  return true;
}

// Python's float(text), without the error.
bool ReadFloat(std::string_view text, double* out) {
  const std::string plain(Strip(text, Side::kBoth));
  if (plain.empty()) return false;
  // strtod also takes hexadecimal numbers, which Python does not.
  if (plain.find_first_of("xXpP(") != std::string::npos) return false;
  char* end = nullptr;
  *out = std::strtod(plain.c_str(), &end);
  return end == plain.c_str() + plain.size();
}

Result Truncated(double value, const Value& fallback) {
  if (!std::isfinite(value)) return fallback;
  if (std::fabs(value) > 1e38) return Error("integer result beyond 128 bits");
  return Value::Integer(static_cast<Int>(value));
}

Result ToInt(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("int", args, {"default", "base"}));
  const Value fallback = bound.passed(0) ? bound[0] : Value::Integer(0);
  ASSIGN_OR_RETURN(const int64_t base, bound.Integer(1, 10));
  if (base < 2 || base > 36) return Error("int(): base must be between 2 and 36");
  if (self.integral()) return Value::Integer(self.integer());
  if (self.is(Kind::kFloat)) return Truncated(self.real(), fallback);
  if (self.is(Kind::kUndefined)) return UndefinedError(self);
  if (!self.is(Kind::kString)) return fallback;
  if (!in.heap().SpendText(self.text().size() * 8)) return in.heap().Check();
  Int integer = 0;
  if (ReadInteger(self.text(), static_cast<int>(base), &integer)) return Value::Integer(integer);
  double real = 0;
  if (ReadFloat(self.text(), &real)) return Truncated(real, fallback);
  return fallback;
}

Result ToFloat(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("float", args, {"default"}));
  if (self.numeric()) return Value::Float(self.real());
  if (self.is(Kind::kUndefined)) return UndefinedError(self);
  double real = 0;
  if (self.is(Kind::kString)) {
    if (!in.heap().SpendText(self.text().size() * 8)) return in.heap().Check();
    if (ReadFloat(self.text(), &real)) return Value::Float(real);
  }
  return bound.passed(0) ? bound[0] : Value::Float(0);
}

Result Abs(Interpreter&, const Value& self, Args&) {
  if (self.is(Kind::kFloat)) return Value::Float(std::fabs(self.real()));
  if (self.integral()) {
    return self.integer() < 0 ? Negate(self) : Result(Value::Integer(self.integer()));
  }
  if (self.is(Kind::kUndefined)) return UndefinedError(self);
  return Error(fmt::format("bad operand type for abs(): '{}'", TypeName(self)));
}

// Correctly rounded decimal digits, ties to even, as Python's round().
double RoundDigits(double value, int64_t precision) {
  if (!std::isfinite(value) || precision > 300) return value;
  if (precision < 0) {
    const double unit = std::pow(10.0, static_cast<double>(std::min<int64_t>(-precision, 308)));
    return std::nearbyint(value / unit) * unit;
  }
  return std::strtod(fmt::format("{:.{}f}", value, precision).c_str(), nullptr);
}

Result Round(Interpreter&, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("round", args, {"precision", "method"}));
  ASSIGN_OR_RETURN(const int64_t precision, bound.Integer(0, 0));
  ASSIGN_OR_RETURN(const std::string method, bound.Text(1, "common"));
  if (self.is(Kind::kUndefined)) return UndefinedError(self);
  if (!self.numeric()) {
    return Error(fmt::format("type {} doesn't define __round__ method", TypeName(self)));
  }
  if (method == "common") {
    if (self.integral() && precision >= 0) return Value::Integer(self.integer());
    const double rounded = RoundDigits(self.real(), precision);
    if (self.integral()) return Truncated(rounded, Value::Integer(0));
    return Value::Float(rounded);
  }
  if (method != "ceil" && method != "floor") return Error("method must be common, ceil or floor");
  const double unit = std::pow(10.0, static_cast<double>(precision));
  const double scaled = self.real() * unit;
  return Value::Float((method == "ceil" ? std::ceil(scaled) : std::floor(scaled)) / unit);
}

constexpr NamedNative kFilters[] = {
    {"int", ToInt}, {"float", ToFloat}, {"abs", Abs}, {"round", Round}};

}  // namespace

absl::Span<const NamedNative> NumberFilters() { return kFilters; }

}  // namespace antiphon::model::jinja
