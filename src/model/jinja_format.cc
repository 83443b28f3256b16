#include "model/jinja_format.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <optional>

#include "common/status_macros.h"
#include "fmt/format.h"
#include "model/jinja_interpreter.h"
#include "model/jinja_operations.h"
#include "model/jinja_print.h"
#include "model/jinja_text.h"

namespace antiphon::model::jinja {
namespace {

constexpr int64_t kWidthMax = 1 << 20;
constexpr int64_t kPrecisionMax = 200;

struct Spec {
  std::string fill = " ";
  char align = '\0';  // < > ^ =
  char sign = '-';
  bool alternate = false;
  int64_t width = 0;
  char grouping = '\0';
  int64_t precision = -1;
  char type = '\0';
};

bool Digit(char c) { return c >= '0' && c <= '9'; }

absl::StatusOr<int64_t> ReadNumber(std::string_view text, size_t* at) {
  int64_t value = 0;
  while (*at < text.size() && Digit(text[*at])) {
    value = value * 10 + (text[(*at)++] - '0');
    if (value > kWidthMax) return Error("a width or precision in a format is too large");
  }
  return value;
}

std::string Pad(std::string_view text, const Spec& spec, char default_align) {
  const auto length = static_cast<int64_t>(CodePoints(text));
  if (length >= spec.width) return std::string(text);
  const int64_t missing = spec.width - length;
  const char align = spec.align != '\0' ? spec.align : default_align;
  const int64_t left = align == '<' ? 0 : align == '^' ? missing / 2 : missing;
  const auto fill = [&](int64_t count) {
    std::string out;
    for (int64_t i = 0; i < count; ++i) out += spec.fill;
    return out;
  };
  if (align == '=') {
    const size_t sign = !text.empty() && (text[0] == '-' || text[0] == '+' || text[0] == ' ');
    return std::string(text.substr(0, sign)) + fill(missing) + std::string(text.substr(sign));
  }
  return fill(left) + std::string(text) + fill(missing - left);
}

std::string Grouped(std::string digits, char separator) {
  if (separator == '\0') return digits;
  size_t whole = 0;
  while (whole < digits.size() && Digit(digits[whole])) ++whole;
  for (size_t at = whole; at > 3;) {
    at -= 3;
    digits.insert(at, 1, separator);
  }
  return digits;
}

std::string Signed(bool negative, const Spec& spec, std::string digits) {
  if (negative) return "-" + digits;
  return spec.sign == '-' ? digits : spec.sign + digits;
}

absl::StatusOr<std::string> FormatInteger(Int value, const Spec& spec) {
  const bool negative = value < 0;
  unsigned __int128 rest =
      negative ? -static_cast<unsigned __int128>(value) : static_cast<unsigned __int128>(value);
  if (spec.type == 'c') {
    if (negative || rest > 0x10ffff || (rest >= 0xd800 && rest < 0xe000)) {
      return Error("%c arg not in range(0x110000)");
    }
    std::string out;
    AppendUtf8(static_cast<uint32_t>(rest), &out);
    return Pad(out, spec, '<');
  }
  const char lower = static_cast<char>(spec.type | 0x20);
  const unsigned base = lower == 'x' ? 16 : lower == 'o' ? 8 : lower == 'b' ? 2 : 10;
  std::string digits;
  do {
    digits.push_back((spec.type == 'X' ? "0123456789ABCDEF"
                                       : "0123456789abcdef")[static_cast<size_t>(rest % base)]);
    rest /= base;
  } while (rest != 0);
  while (static_cast<int64_t>(digits.size()) < std::min(spec.precision, kPrecisionMax)) {
    digits.push_back('0');
  }
  std::reverse(digits.begin(), digits.end());
  digits = Grouped(std::move(digits), spec.grouping);
  if (spec.alternate && base != 10) digits = fmt::format("0{}{}", spec.type, digits);
  return Pad(Signed(negative, spec, std::move(digits)), spec, '>');
}

absl::StatusOr<std::string> FormatFloat(double value, Spec spec) {
  if (spec.precision > kPrecisionMax) return Error("a precision in a format is too large");
  const bool negative = std::signbit(value) && !std::isnan(value);
  const double size = std::fabs(value);
  std::string digits;
  if (!std::isfinite(value)) {
    digits = std::isnan(value) ? "nan" : "inf";
  } else if (spec.type == '\0' && spec.precision < 0) {
    digits = FloatText(size);
  } else {
    const bool percent = spec.type == '%';
    const char type = percent ? 'f' : spec.type == '\0' ? 'g' : spec.type;
    const int precision = spec.precision < 0 ? 6 : static_cast<int>(spec.precision);
    const std::string format = fmt::format("%{}.*{}", spec.alternate ? "#" : "", type);
    const double shown = percent ? size * 100 : size;
    const int length = std::snprintf(nullptr, 0, format.c_str(), precision, shown);
    digits.resize(static_cast<size_t>(length) + 1);
    std::snprintf(digits.data(), digits.size(), format.c_str(), precision, shown);
    digits.pop_back();
    if (percent) digits += '%';
  }
  digits = Grouped(std::move(digits), spec.grouping);
  return Pad(Signed(negative, spec, std::move(digits)), spec, '>');
}

absl::StatusOr<std::string> Apply(Heap& heap, const Value& value, const Spec& spec) {
  RETURN_IF_ERROR(heap.Room(static_cast<size_t>(spec.width) * spec.fill.size()));
  if (!heap.SpendText(static_cast<size_t>(spec.width))) return heap.Check();
  static constexpr std::string_view kFloatTypes = "eEfFgG%";
  static constexpr std::string_view kIntTypes = "dxXobcn";
  const bool as_float = spec.type != '\0' && kFloatTypes.find(spec.type) != kFloatTypes.npos;
  const bool as_int = spec.type != '\0' && kIntTypes.find(spec.type) != kIntTypes.npos;
  if (value.is(Kind::kInt) || (value.is(Kind::kBool) && (as_int || as_float))) {
    if (as_float) return FormatFloat(value.real(), spec);
    if (as_int || spec.type == '\0') return FormatInteger(value.integer(), spec);
  } else if (value.is(Kind::kFloat)) {
    if (as_float || spec.type == '\0') return FormatFloat(value.real(), spec);
  } else if (spec.type == '\0' || spec.type == 's') {
    ASSIGN_OR_RETURN(std::string text, ToStr(heap, value));
    if (spec.precision >= 0) {
      text.resize(ByteOffset(text, static_cast<size_t>(spec.precision)));
    }
    return Pad(text, spec, '<');
  }
  return Error(
      fmt::format("unknown format code '{}' for object of type '{}'", spec.type, TypeName(value)));
}

absl::StatusOr<Spec> ReadSpec(std::string_view text) {
  Spec spec;
  const auto is_align = [](char c) { return c == '<' || c == '>' || c == '^' || c == '='; };
  size_t at = 0;
  if (!text.empty()) {
    const size_t fill = FrontBytes(text);
    if (fill < text.size() && is_align(text[fill])) {
      spec.fill = std::string(text.substr(0, fill));
      spec.align = text[fill];
      at = fill + 1;
    } else if (is_align(text[0])) {
      spec.align = text[0];
      at = 1;
    }
  }
  const auto take = [&](std::string_view set) {
    if (at >= text.size() || set.find(text[at]) == std::string_view::npos) return '\0';
    return text[at++];
  };
  if (const char sign = take("+- ")) spec.sign = sign;
  spec.alternate = take("#") != '\0';
  if (take("0") != '\0' && spec.align == '\0') {
    spec.fill = "0";
    spec.align = '=';
  }
  ASSIGN_OR_RETURN(spec.width, ReadNumber(text, &at));
  spec.grouping = take(",_");
  if (take(".") != '\0') {
    ASSIGN_OR_RETURN(spec.precision, ReadNumber(text, &at));
  }
  if (at < text.size()) spec.type = text[at++];
  if (at != text.size()) return Error("invalid format specifier");
  return spec;
}

// Finds the value of a replacement field like `0.name[key]`.
class FieldReader {
 public:
  FieldReader(Interpreter& in, const Args& args) : in_(in), args_(args) {}

  Result Read(std::string_view field) {
    const size_t end = std::min(field.find_first_of(".["), field.size());
    ASSIGN_OR_RETURN(Value value, First(field.substr(0, end)));
    field.remove_prefix(end);
    while (!field.empty()) {
      if (field[0] == '.') {
        const size_t stop = std::min(field.find_first_of(".[", 1), field.size());
        ASSIGN_OR_RETURN(value, in_.Attribute(value, field.substr(1, stop - 1)));
        field.remove_prefix(stop);
        continue;
      }
      const size_t close = field.find(']');
      if (field[0] != '[' || close == std::string_view::npos) {
        return Error("malformed field in a format string");
      }
      const std::string_view key = field.substr(1, close - 1);
      size_t at = 0;
      ASSIGN_OR_RETURN(const int64_t number, ReadNumber(key, &at));
      const bool is_number = !key.empty() && at == key.size();
      ASSIGN_OR_RETURN(value,
                       in_.Item(value, is_number ? Value::Integer(number) : in_.heap().Str(key)));
      field.remove_prefix(close + 1);
    }
    return value;
  }

 private:
  Result First(std::string_view name) {
    if (name.empty()) return Positional(next_++);
    if (Digit(name[0])) {
      size_t at = 0;
      ASSIGN_OR_RETURN(const int64_t index, ReadNumber(name, &at));
      return Positional(static_cast<size_t>(index));
    }
    for (const auto& [key, value] : args_.named) {
      if (key == name) return value;
    }
    return Error(fmt::format("the format needs an argument '{}'", name));
  }

  Result Positional(size_t index) const {
    if (index < args_.positional.size()) return args_.positional[index];
    return Error(fmt::format("replacement index {} out of range for positional args", index));
  }

  Interpreter& in_;
  const Args& args_;
  size_t next_ = 0;
};

constexpr const char* kDays[] = {"Sunday",   "Monday", "Tuesday", "Wednesday",
                                 "Thursday", "Friday", "Saturday"};
constexpr const char* kMonths[] = {"January",   "February", "March",    "April",
                                   "May",       "June",     "July",     "August",
                                   "September", "October",  "November", "December"};

// A number of at least `width` digits.
std::string Digits(int64_t value, int width, char flag, char padding = '0') {
  if (flag == '-') return fmt::format("{}", value);
  std::string out = fmt::format("{}", value);
  while (static_cast<int>(out.size()) < width) out.insert(out.begin(), padding);
  return out;
}

std::string Directive(char directive, char flag, absl::TimeZone zone, absl::Time time) {
  const absl::TimeZone::CivilInfo local = zone.At(time);
  const absl::CivilSecond& c = local.cs;
  const int weekday = (static_cast<int>(absl::GetWeekday(c)) + 1) % 7;  // Sunday is 0
  const int year_day = absl::GetYearDay(c);
  // A week belongs to the year of its Thursday (ISO 8601).
  const absl::CivilDay thursday = absl::CivilDay(c) + 3 - (weekday + 6) % 7;
  const int hour12 = (c.hour() + 11) % 12 + 1;
  switch (directive) {
    case 'a':
      return std::string(kDays[weekday]).substr(0, 3);
    case 'A':
      return kDays[weekday];
    case 'b':
    case 'h':
      return std::string(kMonths[c.month() - 1]).substr(0, 3);
    case 'B':
      return kMonths[c.month() - 1];
    case 'c':
      return Strftime("%a %b %e %H:%M:%S %Y", time);
    case 'C':
      return Digits(c.year() / 100, 2, flag);
    case 'd':
      return Digits(c.day(), 2, flag);
    case 'D':
    case 'x':
      return Strftime("%m/%d/%y", time);
    case 'e':
      return Digits(c.day(), 2, flag, ' ');
    case 'F':
      return Strftime("%Y-%m-%d", time);
    case 'f':
      return Digits(absl::ToInt64Microseconds(local.subsecond), 6, '0');
    case 'G':
      return fmt::format("{}", thursday.year());
    case 'H':
      return Digits(c.hour(), 2, flag);
    case 'I':
      return Digits(hour12, 2, flag);
    case 'j':
      return Digits(year_day, 3, flag);
    case 'k':
      return Digits(c.hour(), 2, flag, ' ');
    case 'l':
      return Digits(hour12, 2, flag, ' ');
    case 'm':
      return Digits(c.month(), 2, flag);
    case 'M':
      return Digits(c.minute(), 2, flag);
    case 'n':
      return "\n";
    case 'p':
      return c.hour() < 12 ? "AM" : "PM";
    case 'r':
      return Strftime("%I:%M:%S %p", time);
    case 'R':
      return Strftime("%H:%M", time);
    case 's':
      return fmt::format("{}", absl::ToUnixSeconds(time));
    case 'S':
      return Digits(c.second(), 2, flag);
    case 't':
      return "\t";
    case 'T':
    case 'X':
      return Strftime("%H:%M:%S", time);
    case 'u':
      return fmt::format("{}", weekday == 0 ? 7 : weekday);
    case 'U':
      return Digits((year_day + 6 - weekday) / 7, 2, flag);
    case 'V':
      return Digits((absl::GetYearDay(thursday) - 1) / 7 + 1, 2, flag);
    case 'w':
      return fmt::format("{}", weekday);
    case 'W':
      return Digits((year_day + 6 - (weekday + 6) % 7) / 7, 2, flag);
    case 'y':
      return Digits(c.year() % 100, 2, flag);
    case 'Y':
      return fmt::format("{}", c.year());
    // datetime.now() knows no zone.
    case 'z':
    case 'Z':
      return "";
    case '%':
      return "%";
    default:
      return flag == '\0' ? std::string{'%', directive} : std::string{'%', flag, directive};
  }
}

}  // namespace

absl::StatusOr<std::string> PercentFormat(Interpreter& in, std::string_view format,
                                          const Args& args) {
  std::string out;
  size_t next = 0;
  bool used_names = false;
  for (size_t at = 0; at < format.size();) {
    if (format[at] != '%') {
      const size_t end = std::min(format.find('%', at), format.size());
      out += format.substr(at, end - at);
      at = end;
      continue;
    }
    ++at;
    std::optional<Value> value;
    if (at < format.size() && format[at] == '(') {
      const size_t close = format.find(')', at);
      if (close == std::string_view::npos) return Error("incomplete format key");
      const std::string_view name = format.substr(at + 1, close - at - 1);
      for (const auto& [key, named] : args.named) {
        if (key == name) value = named;
      }
      if (!value.has_value() && args.positional.size() == 1 && args.positional[0].is(Kind::kDict)) {
        if (const Value* found = args.positional[0].as<Dict>().Find(name)) value = *found;
      }
      if (!value.has_value()) return Error(fmt::format("the format needs a value for '{}'", name));
      used_names = true;
      at = close + 1;
    }
    Spec spec;
    for (; at < format.size(); ++at) {
      const char flag = format[at];
      if (flag == '-') {
        spec.align = '<';
        spec.fill = " ";
      } else if (flag == '0') {
        if (spec.align == '\0') {
          spec.fill = "0";
          spec.align = '=';
        }
      } else if (flag == '+' || (flag == ' ' && spec.sign != '+')) {
        spec.sign = flag;
      } else if (flag == '#') {
        spec.alternate = true;
      } else if (flag != ' ') {
        break;
      }
    }
    ASSIGN_OR_RETURN(spec.width, ReadNumber(format, &at));
    if (at < format.size() && format[at] == '.') {
      ++at;
      ASSIGN_OR_RETURN(spec.precision, ReadNumber(format, &at));
    }
    if (at >= format.size()) return Error("incomplete format");
    char type = format[at++];
    if (type == '%') {
      out += '%';
      continue;
    }
    if (!value.has_value()) {
      if (next >= args.positional.size()) return Error("not enough arguments for format string");
      value = args.positional[next++];
    }
    if (type == 'i' || type == 'u') type = 'd';
    spec.type = type;
    if (type == 's' || type == 'r' || type == 'a') {
      std::string text;
      RETURN_IF_ERROR(type == 's' ? AppendStr(in.heap(), *value, &text)
                                  : AppendRepr(in.heap(), *value, &text));
      spec.type = 's';
      if (spec.align == '=') spec.align = '>';
      if (spec.align == '\0') spec.align = '>';
      if (spec.fill == "0") spec.fill = " ";
      value = in.heap().Str(std::move(text));
    } else if (type == 'd' && value->is(Kind::kFloat) && std::isfinite(value->real()) &&
               std::fabs(value->real()) < 1e37) {
      value = Value::Integer(static_cast<Int>(value->real()));
    } else if (type == 'c' && value->is(Kind::kString) && value->as<String>().length == 1) {
      spec.type = 's';
    } else if (!value->numeric()) {
      return Error(fmt::format("%{} format: a number is required, not {}", type, TypeName(*value)));
    }
    ASSIGN_OR_RETURN(const std::string text, Apply(in.heap(), *value, spec));
    RETURN_IF_ERROR(in.heap().Room(out.size() + text.size()));
    out += text;
  }
  if (!used_names && next < args.positional.size() &&
      !(args.positional.size() == 1 && args.positional[0].is(Kind::kDict))) {
    return Error("not all arguments converted during string formatting");
  }
  return out;
}

absl::StatusOr<std::string> StrFormat(Interpreter& in, std::string_view format, const Args& args) {
  std::string out;
  FieldReader reader(in, args);
  for (size_t at = 0; at < format.size();) {
    const char c = format[at];
    if (c != '{' && c != '}') {
      const size_t end = std::min(format.find_first_of("{}", at), format.size());
      out += format.substr(at, end - at);
      at = end;
      continue;
    }
    if (at + 1 < format.size() && format[at + 1] == c) {
      out += c;
      at += 2;
      continue;
    }
    if (c == '}') return Error("single '}' encountered in format string");
    const size_t close = format.find('}', at);
    if (close == std::string_view::npos) return Error("expected '}' before end of string");
    std::string_view field = format.substr(at + 1, close - at - 1);
    at = close + 1;
    if (field.find('{') != std::string_view::npos) {
      return Error("fields nested in a format specification are not supported");
    }
    std::string_view spec_text;
    if (const size_t colon = field.find(':'); colon != std::string_view::npos) {
      spec_text = field.substr(colon + 1);
      field = field.substr(0, colon);
    }
    bool repr = false;
    if (const size_t mark = field.find('!'); mark != std::string_view::npos) {
      const std::string_view conversion = field.substr(mark + 1);
      if (conversion != "r" && conversion != "s") return Error("unknown conversion in a format");
      repr = conversion == "r";
      field = field.substr(0, mark);
    }
    ASSIGN_OR_RETURN(Value value, reader.Read(field));
    if (repr) {
      std::string text;
      RETURN_IF_ERROR(AppendRepr(in.heap(), value, &text));
      value = in.heap().Str(std::move(text));
    }
    ASSIGN_OR_RETURN(const Spec spec, ReadSpec(spec_text));
    ASSIGN_OR_RETURN(const std::string text, Apply(in.heap(), value, spec));
    RETURN_IF_ERROR(in.heap().Room(out.size() + text.size()));
    out += text;
  }
  return out;
}

std::string Strftime(std::string_view format, absl::Time time) {
  const absl::TimeZone zone = absl::LocalTimeZone();
  std::string out;
  for (size_t at = 0; at < format.size(); ++at) {
    if (format[at] != '%' || at + 1 == format.size()) {
      out += format[at];
      continue;
    }
    char flag = '\0';
    if (format[at + 1] == '-' && at + 2 < format.size()) {
      flag = '-';
      ++at;
    }
    out += Directive(format[++at], flag, zone, time);
  }
  return out;
}

}  // namespace antiphon::model::jinja
