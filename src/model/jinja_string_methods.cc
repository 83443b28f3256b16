// Methods of strings.
#include <algorithm>

#include "common/status_macros.h"
#include "fmt/format.h"
#include "model/jinja_arguments.h"
#include "model/jinja_builtins.h"
#include "model/jinja_format.h"
#include "model/jinja_interpreter.h"
#include "model/jinja_operations.h"
#include "model/jinja_print.h"
#include "model/jinja_text.h"

namespace antiphon::model::jinja {
namespace {

template <std::string (*transform)(std::string_view)>
Result Transform(Interpreter& in, const Value& self, Args& args) {
  RETURN_IF_ERROR(Bound::Of("method", args, {}).status());
  if (!in.heap().SpendText(self.text().size() * 8)) return in.heap().Check();
  RETURN_IF_ERROR(in.heap().Room(self.text().size() * 2));
  return in.heap().Str(transform(self.text()));
}

template <Side side>
Result StripMethod(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("strip", args, {"chars"}));
  if (!in.heap().SpendText(self.text().size())) return in.heap().Check();
  if (!bound.has(0)) return in.heap().Str(Strip(self.text(), side));
  ASSIGN_OR_RETURN(const std::string chars, bound.Text(0, ""));
  // Each character stripped is looked for in the whole set.
  if (!in.heap().Spend(self.text().size() / 64 * (1 + chars.size() / 16))) {
    return in.heap().Check();
  }
  const std::string_view set = chars;
  return in.heap().Str(Strip(self.text(), side, &set));
}

Result SplitOnSpace(Interpreter& in, std::string_view text, int64_t splits_max, bool from_right) {
  std::vector<Value> parts;
  text = Strip(text, from_right ? Side::kRight : Side::kLeft);
  while (!text.empty()) {
    if (splits_max >= 0 && static_cast<int64_t>(parts.size()) == splits_max) {
      parts.push_back(in.heap().Str(text));
      break;
    }
    size_t end = 0;
    if (from_right) {
      // The end of the last white space; `text` does not end with any.
      for (size_t at = 0; at < text.size();) {
        const bool space = IsSpace(Front(text.substr(at)));
        at += FrontBytes(text.substr(at));
        if (space) end = at;
      }
      if (!in.heap().SpendText(text.size() * 8)) return in.heap().Check();
      parts.push_back(in.heap().Str(text.substr(end)));
      text = Strip(text.substr(0, end), Side::kRight);
    } else {
      while (end < text.size() && !IsSpace(Front(text.substr(end)))) {
        end += FrontBytes(text.substr(end));
      }
      parts.push_back(in.heap().Str(text.substr(0, end)));
      text = Strip(text.substr(end), Side::kLeft);
    }
    if (!in.heap().Spend(1)) return in.heap().Check();
  }
  if (from_right) std::reverse(parts.begin(), parts.end());
  return in.heap().List(std::move(parts));
}

Result SplitFromRight(Interpreter& in, std::string_view text, std::string_view separator,
                      int64_t splits_max) {
  // Of all places where it can be split the last ones count, found from the right.
  const std::string mirrored(text.rbegin(), text.rend());
  const std::string needle(separator.rbegin(), separator.rend());
  std::vector<Value> parts;
  size_t from = 0;
  while (splits_max < 0 || static_cast<int64_t>(parts.size()) < splits_max) {
    const size_t at = Find(mirrored, needle, from);
    if (at == std::string_view::npos) break;
    if (!in.heap().Spend(1)) return in.heap().Check();
    parts.push_back(in.heap().Str(text.substr(text.size() - at, at - from)));
    from = at + needle.size();
  }
  parts.push_back(in.heap().Str(text.substr(0, text.size() - from)));
  std::reverse(parts.begin(), parts.end());
  return in.heap().List(std::move(parts));
}

template <bool from_right>
Result Split(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("split", args, {"sep", "maxsplit"}));
  ASSIGN_OR_RETURN(const int64_t splits_max, bound.Integer(1, -1));
  const std::string_view text = self.text();
  if (!in.heap().SpendText(text.size())) return in.heap().Check();
  if (!bound.has(0)) return SplitOnSpace(in, text, splits_max, from_right);
  ASSIGN_OR_RETURN(const std::string separator, bound.Text(0, ""));
  if (separator.empty()) return Error("empty separator");
  if (from_right && !in.heap().SpendText(text.size() * 4)) return in.heap().Check();
  if (from_right && splits_max >= 0) return SplitFromRight(in, text, separator, splits_max);
  std::vector<Value> parts;
  size_t from = 0;
  while (splits_max < 0 || static_cast<int64_t>(parts.size()) < splits_max) {
    const size_t at = Find(text, separator, from);
    if (at == std::string_view::npos) break;
    if (!in.heap().Spend(1)) return in.heap().Check();
    parts.push_back(in.heap().Str(text.substr(from, at - from)));
    from = at + separator.size();
  }
  parts.push_back(in.heap().Str(text.substr(from)));
  return in.heap().List(std::move(parts));
}

Result SplitLines(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("splitlines", args, {"keepends"}));
  const bool keep = bound.Flag(0, false);
  const std::string_view text = self.text();
  std::vector<Value> lines;
  const auto is_break = [](uint32_t c) {
    return (c >= 0x0a && c <= 0x0d) || (c >= 0x1c && c <= 0x1e) || c == 0x85 || c == 0x2028 ||
           c == 0x2029;
  };
  if (!in.heap().SpendText(text.size() * 4)) return in.heap().Check();
  size_t start = 0;
  for (size_t at = 0; at < text.size();) {
    const uint32_t c = Front(text.substr(at));
    size_t next = at + FrontBytes(text.substr(at));
    if (is_break(c)) {
      if (c == '\r' && next < text.size() && text[next] == '\n') ++next;
      lines.push_back(in.heap().Str(text.substr(start, (keep ? next : at) - start)));
      if (!in.heap().Spend(1)) return in.heap().Check();
      start = next;
    }
    at = next;
  }
  if (start < text.size()) lines.push_back(in.heap().Str(text.substr(start)));
  return in.heap().List(std::move(lines));
}

// Limits of a search in code points, as of a slice, to bytes; nothing when they exclude all.
absl::StatusOr<std::string_view> Window(Interpreter& in, const Value& self, const Bound& bound,
                                        size_t first, size_t* offset) {
  const String& text = self.as<String>();
  const auto length = static_cast<int64_t>(text.length);
  int64_t from = 0;
  int64_t to = length;
  if (bound.has(first)) {
    ASSIGN_OR_RETURN(from, bound.Integer(first, 0));
  }
  if (bound.has(first + 1)) {
    ASSIGN_OR_RETURN(to, bound.Integer(first + 1, length));
  }
  if (!in.heap().SpendText(text.text.size())) return in.heap().Check();
  if (from > length) {
    *offset = std::string::npos;
    return std::string_view();
  }
  from = std::max<int64_t>(from < 0 ? from + length : from, 0);
  to = std::clamp<int64_t>(to < 0 ? to + length : to, 0, length);
  *offset = static_cast<size_t>(from);
  if (from > to) {
    *offset = std::string::npos;
    return std::string_view();
  }
  return Slice(text, static_cast<size_t>(from), static_cast<size_t>(to));
}

template <bool from_start>
Result StartsOrEndsWith(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of(from_start ? "startswith" : "endswith", args,
                                                {"prefix", "start", "end"}, 1));
  size_t offset = 0;
  ASSIGN_OR_RETURN(const std::string_view text, Window(in, self, bound, 1, &offset));
  std::vector<Value> options{bound[0]};
  if (bound[0].is(Kind::kTuple)) options = bound[0].as<Sequence>().items;
  for (const Value& option : options) {
    if (!option.is(Kind::kString)) {
      return Error(fmt::format("{} first arg must be str or a tuple of str, not {}",
                               from_start ? "startswith" : "endswith", TypeName(option)));
    }
    if (!in.heap().SpendText(option.text().size())) return in.heap().Check();
    if (offset == std::string::npos) continue;
    if (from_start ? text.starts_with(option.text()) : text.ends_with(option.text())) {
      return Value::Bool(true);
    }
  }
  return Value::Bool(false);
}

template <bool last, bool must>
Result FindMethod(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("find", args, {"sub", "start", "end"}, 1));
  ASSIGN_OR_RETURN(const std::string part, bound.Text(0, ""));
  size_t offset = 0;
  ASSIGN_OR_RETURN(const std::string_view text, Window(in, self, bound, 1, &offset));
  size_t at = std::string::npos;
  if (last && !in.heap().SpendText(text.size() * 4)) return in.heap().Check();
  if (offset != std::string::npos) at = last ? FindLast(text, part) : Find(text, part);
  if (at == std::string::npos) {
    if (must) return Error("substring not found");
    return Value::Integer(-1);
  }
  return Value::Integer(static_cast<Int>(offset + CodePoints(text.substr(0, at))));
}

Result Count(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("count", args, {"sub", "start", "end"}, 1));
  ASSIGN_OR_RETURN(const std::string part, bound.Text(0, ""));
  size_t offset = 0;
  ASSIGN_OR_RETURN(const std::string_view text, Window(in, self, bound, 1, &offset));
  if (offset == std::string::npos) return Value::Integer(0);
  if (part.empty()) return Value::Integer(static_cast<Int>(CodePoints(text)) + 1);
  Int count = 0;
  for (size_t at = Find(text, part); at != std::string::npos;
       at = Find(text, part, at + part.size())) {
    ++count;
  }
  return Value::Integer(count);
}

Result Replace(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("replace", args, {"old", "new", "count"}, 2));
  for (size_t i = 0; i < 2; ++i) {
    if (!bound[i].is(Kind::kString)) {
      return Error(
          fmt::format("replace() argument {} must be str, not {}", i + 1, TypeName(bound[i])));
    }
  }
  return in.ApplyFilter("replace", self, args);
}

Result JoinMethod(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("join", args, {"iterable"}, 1));
  if (bound[0].is(Kind::kUndefined)) return UndefinedError(bound[0]);
  ASSIGN_OR_RETURN(const std::vector<Value> items, Items(in.heap(), bound[0]));
  std::string out;
  for (size_t i = 0; i < items.size(); ++i) {
    if (!items[i].is(Kind::kString)) {
      return Error(
          fmt::format("sequence item {}: expected str instance, {} found", i, TypeName(items[i])));
    }
    if (i > 0) RETURN_IF_ERROR(AppendStr(in.heap(), self, &out));
    RETURN_IF_ERROR(AppendStr(in.heap(), items[i], &out));
  }
  return in.heap().Str(std::move(out));
}

Result FormatMethod(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(std::string text, StrFormat(in, self.text(), args));
  return in.heap().Str(std::move(text));
}

template <char align>
Result Justify(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("justify", args, {"width", "fillchar"}, 1));
  ASSIGN_OR_RETURN(const int64_t width, bound.Integer(0, 0));
  ASSIGN_OR_RETURN(const std::string fill, bound.Text(1, " "));
  if (CodePoints(fill) != 1) return Error("the fill character must be exactly one character long");
  const auto length = static_cast<int64_t>(self.as<String>().length);
  if (width <= length) return self;
  const int64_t missing = width - length;
  RETURN_IF_ERROR(in.heap().Room(static_cast<size_t>(missing) * fill.size()));
  // As CPython's str.center.
  const int64_t left = align == '<'   ? 0
                       : align == '>' ? missing
                                      : missing / 2 + (missing & width & 1);
  std::string out;
  for (int64_t i = 0; i < left; ++i) out += fill;
  out += self.text();
  for (int64_t i = left; i < missing; ++i) out += fill;
  return in.heap().Str(std::move(out));
}

Result ZeroFill(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("zfill", args, {"width"}, 1));
  ASSIGN_OR_RETURN(const int64_t width, bound.Integer(0, 0));
  const auto length = static_cast<int64_t>(self.as<String>().length);
  if (width <= length) return self;
  RETURN_IF_ERROR(in.heap().Room(static_cast<size_t>(width - length)));
  std::string out = self.text();
  const size_t sign = !out.empty() && (out[0] == '-' || out[0] == '+');
  out.insert(sign, static_cast<size_t>(width - length), '0');
  return in.heap().Str(std::move(out));
}

template <bool prefix>
Result Remove(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("remove", args, {"part"}, 1));
  ASSIGN_OR_RETURN(const std::string part, bound.Text(0, ""));
  std::string_view text = self.text();
  if (prefix && text.starts_with(part)) text.remove_prefix(part.size());
  if (!prefix && text.ends_with(part)) text.remove_suffix(part.size());
  return in.heap().Str(text);
}

template <bool last>
Result Partition(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("partition", args, {"sep"}, 1));
  ASSIGN_OR_RETURN(const std::string separator, bound.Text(0, ""));
  if (separator.empty()) return Error("empty separator");
  Heap& heap = in.heap();
  const std::string_view text = self.text();
  if (!heap.SpendText(text.size() * (last ? 4 : 1))) return heap.Check();
  const size_t at = last ? FindLast(text, separator) : Find(text, separator);
  if (at == std::string::npos) {
    return last ? heap.Tuple({heap.Str(""), heap.Str(""), self})
                : heap.Tuple({self, heap.Str(""), heap.Str("")});
  }
  return heap.Tuple({heap.Str(text.substr(0, at)), heap.Str(separator),
                     heap.Str(text.substr(at + separator.size()))});
}

// True when there is at least one character and all are in the class.
template <bool (*in_class)(uint32_t)>
Result IsAll(Interpreter& in, const Value& self, Args&) {
  if (!in.heap().SpendText(self.text().size() * 8)) return in.heap().Check();
  std::string_view rest = self.text();
  if (rest.empty()) return Value::Bool(false);
  for (; !rest.empty(); rest.remove_prefix(FrontBytes(rest))) {
    if (!in_class(Front(rest))) return Value::Bool(false);
  }
  return Value::Bool(true);
}

template <bool upper>
Result HasCase(Interpreter& in, const Value& self, Args&) {
  Args none;
  ASSIGN_OR_RETURN(const bool holds, in.ApplyTest(upper ? "upper" : "lower", self, none));
  return Value::Bool(holds);
}

Result IsAscii(Interpreter&, const Value& self, Args&) {
  return Value::Bool(std::all_of(self.text().begin(), self.text().end(),
                                 [](char c) { return static_cast<uint8_t>(c) < 0x80; }));
}

constexpr NamedNative kMethods[] = {
    {"upper", Transform<Upper>},
    {"lower", Transform<Lower>},
    {"casefold", Transform<Lower>},
    {"title", Transform<Title>},
    {"capitalize", Transform<Capitalize>},
    {"swapcase", Transform<SwapCase>},
    {"strip", StripMethod<Side::kBoth>},
    {"lstrip", StripMethod<Side::kLeft>},
    {"rstrip", StripMethod<Side::kRight>},
    {"split", Split<false>},
    {"rsplit", Split<true>},
    {"splitlines", SplitLines},
    {"startswith", StartsOrEndsWith<true>},
    {"endswith", StartsOrEndsWith<false>},
    {"find", FindMethod<false, false>},
    {"rfind", FindMethod<true, false>},
    {"index", FindMethod<false, true>},
    {"rindex", FindMethod<true, true>},
    {"count", Count},
    {"replace", Replace},
    {"join", JoinMethod},
    {"format", FormatMethod},
    {"ljust", Justify<'<'>},
    {"rjust", Justify<'>'>},
    {"center", Justify<'^'>},
    {"zfill", ZeroFill},
    {"removeprefix", Remove<true>},
    {"removesuffix", Remove<false>},
    {"partition", Partition<false>},
    {"rpartition", Partition<true>},
    {"isalpha", IsAll<IsAlpha>},
    {"isdigit", IsAll<IsDigit>},
    {"isdecimal", IsAll<IsDigit>},
    {"isnumeric", IsAll<IsDigit>},
    {"isalnum", IsAll<IsAlnum>},
    {"isspace", IsAll<IsSpace>},
    {"isupper", HasCase<true>},
    {"islower", HasCase<false>},
    {"isascii", IsAscii},
};

}  // namespace

absl::Span<const NamedNative> StringMethods() { return kMethods; }

}  // namespace antiphon::model::jinja
