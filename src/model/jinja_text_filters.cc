// Filters on text and to text.
#include <algorithm>
#include <boost/json/parse.hpp>
#include <cstring>

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

// The operand as text, charged for a pass over it.
absl::StatusOr<std::string> Text(Interpreter& in, const Value& self) {
  ASSIGN_OR_RETURN(std::string text, ToStr(in.heap(), self));
  if (!in.heap().SpendText(text.size() * 8)) return in.heap().Check();
  RETURN_IF_ERROR(in.heap().Room(text.size() * 2));
  return text;
}

template <std::string (*transform)(std::string_view)>
Result Transform(Interpreter& in, const Value& self, Args& args) {
  RETURN_IF_ERROR(Bound::Of("filter", args, {}).status());
  ASSIGN_OR_RETURN(const std::string text, Text(in, self));
  return in.heap().Str(transform(text));
}

// Jinja's own title case: words begin after white space, '-', and opening brackets.
std::string TitleWords(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    size_t end = 0;
    const auto separates = [](uint32_t c) {
      return IsSpace(c) || c == '-' || c == '(' || c == '{' || c == '[' || c == '<';
    };
    while (end < text.size() && !separates(Front(text.substr(end)))) {
      end += FrontBytes(text.substr(end));
    }
    if (end > 0) {
      const size_t first = FrontBytes(text);
      out += Upper(text.substr(0, first)) + Lower(text.substr(first, end - first));
    } else {
      end = FrontBytes(text);
      out += text.substr(0, end);
    }
    text.remove_prefix(end);
  }
  return out;
}

Result TrimFilter(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("trim", args, {"chars"}));
  ASSIGN_OR_RETURN(const std::string text, ToStr(in.heap(), self));
  Args none;
  if (bound.has(0)) none.positional.push_back(bound[0]);
  const Value value = in.heap().Str(text);
  ASSIGN_OR_RETURN(const Value strip, in.Attribute(value, "strip"));
  ASSIGN_OR_RETURN(Value out, in.Call(strip, none));
  if (self.is(Kind::kString)) out.as<String>().markup = self.as<String>().markup;
  return out;
}

Result ReplaceFilter(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("replace", args, {"old", "new", "count"}, 2));
  ASSIGN_OR_RETURN(const std::string text, ToStr(in.heap(), self));
  ASSIGN_OR_RETURN(const std::string old, ToStr(in.heap(), bound[0]));
  ASSIGN_OR_RETURN(const std::string replacement, ToStr(in.heap(), bound[1]));
  int64_t left = -1;
  if (bound.has(2)) {
    ASSIGN_OR_RETURN(left, bound.Integer(2, -1));
  }
  std::string out;
  size_t from = 0;
  while (left != 0) {
    // An empty pattern matches before every character and at the end.
    const size_t at =
        old.empty() ? (from <= text.size() ? from : std::string::npos) : Find(text, old, from);
    if (at == std::string::npos) break;
    if (!in.heap().SpendText(replacement.size())) return in.heap().Check();
    RETURN_IF_ERROR(in.heap().Room(out.size() + replacement.size() + text.size()));
    out.append(text, from, at - from);
    out += replacement;
    from = at + old.size();
    if (old.empty()) {
      const size_t bytes = at < text.size() ? FrontBytes(std::string_view(text).substr(at)) : 1;
      if (at < text.size()) out.append(text, at, bytes);
      from = at + bytes;
    }
    if (left > 0) --left;
  }
  if (from < text.size()) out.append(text, from);
  return in.heap().Str(std::move(out));
}

Result StringFilter(Interpreter& in, const Value& self, Args&) {
  if (self.is(Kind::kString)) return self;
  ASSIGN_OR_RETURN(std::string text, ToStr(in.heap(), self));
  return in.heap().Str(std::move(text));
}

Result Safe(Interpreter& in, const Value& self, Args&) {
  ASSIGN_OR_RETURN(std::string text, ToStr(in.heap(), self));
  return in.heap().Markup(std::move(text));
}

Result ForceEscape(Interpreter& in, const Value& self, Args&) {
  ASSIGN_OR_RETURN(const std::string text, Text(in, self));
  RETURN_IF_ERROR(in.heap().Room(text.size() * 5));
  return in.heap().Markup(HtmlEscaped(text));
}

Result Escape(Interpreter& in, const Value& self, Args& args) {
  if (self.is(Kind::kString) && self.as<String>().markup) return self;
  return ForceEscape(in, self, args);
}

Result ToJsonFilter(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(
      const Bound bound,
      Bound::Of("tojson", args, {"ensure_ascii", "indent", "separators", "sort_keys"}));
  JsonStyle style;
  style.ensure_ascii = bound.Flag(0, false);
  style.sort_keys = bound.Flag(3, false);
  if (bound.has(1)) {
    if (bound[1].is(Kind::kString)) {
      style.indent = bound[1].text();
    } else {
      ASSIGN_OR_RETURN(const int64_t width, bound.Integer(1, 0));
      style.indent = std::string(static_cast<size_t>(std::clamp<int64_t>(width, 0, 1000)), ' ');
    }
    style.item_separator = ",";
  }
  if (bound.has(2)) {
    ASSIGN_OR_RETURN(const std::vector<Value> separators, Items(in.heap(), bound[2]));
    if (separators.size() != 2 || !separators[0].is(Kind::kString) ||
        !separators[1].is(Kind::kString)) {
      return Error("tojson(): separators must be two strings");
    }
    style.item_separator = separators[0].text();
    style.key_separator = separators[1].text();
  }
  if (self.is(Kind::kUndefined)) {
    return Error("Object of type Undefined is not JSON serializable");
  }
  ASSIGN_OR_RETURN(std::string text, ToJson(in.heap(), self, style));
  return in.heap().Str(std::move(text));
}

Result FromJsonFilter(Interpreter& in, const Value& self, Args& args) {
  RETURN_IF_ERROR(Bound::Of("from_json", args, {}).status());
  if (!self.is(Kind::kString)) return Error("from_json needs a string");
  if (!in.heap().SpendText(self.text().size() * 8)) return in.heap().Check();
  // A parsed document takes several times its text.
  RETURN_IF_ERROR(in.heap().Room(self.text().size() * 8));
  boost::system::error_code error;
  const Json json = boost::json::parse(self.text(), error);
  if (error) return Error(fmt::format("from_json: not valid JSON: {}", error.message()));
  return in.Import(json);
}

Result Indent(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("indent", args, {"width", "first", "blank"}));
  std::string indent(4, ' ');
  if (bound.passed(0) && bound[0].is(Kind::kString)) {
    indent = bound[0].text();
  } else if (bound.passed(0)) {
    ASSIGN_OR_RETURN(const int64_t width, bound.Integer(0, 4));
    RETURN_IF_ERROR(in.heap().Room(static_cast<size_t>(std::max<int64_t>(width, 0))));
    indent = std::string(static_cast<size_t>(std::max<int64_t>(width, 0)), ' ');
  }
  const bool first = bound.Flag(1, false);
  const bool blank = bound.Flag(2, false);
  ASSIGN_OR_RETURN(const std::string text, Text(in, self));
  std::string out;
  if (first) out += indent;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    if (at > 0 && (blank || end > at)) out += indent;
    out.append(text, at, end - at);
    if (end < text.size()) out += '\n';
    RETURN_IF_ERROR(in.heap().Room(out.size() + indent.size()));
    at = end + 1;
  }
  if (!text.empty() && text.back() == '\n' && blank) out += indent;
  return in.heap().Str(std::move(out));
}

Result Center(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound, Bound::Of("center", args, {"width"}));
  ASSIGN_OR_RETURN(const int64_t width, bound.Integer(0, 80));
  ASSIGN_OR_RETURN(std::string text, ToStr(in.heap(), self));
  const Value value = in.heap().Str(std::move(text));
  Args justify{{Value::Integer(width)}, {}};
  ASSIGN_OR_RETURN(const Value center, in.Attribute(value, "center"));
  return in.Call(center, justify);
}

Result FormatFilter(Interpreter& in, const Value& self, Args& args) {
  if (!args.positional.empty() && !args.named.empty()) {
    return Error("can't handle positional and keyword arguments at the same time");
  }
  ASSIGN_OR_RETURN(const std::string format, ToStr(in.heap(), self));
  ASSIGN_OR_RETURN(std::string text, PercentFormat(in, format, args));
  return in.heap().Str(std::move(text));
}

Result WordCount(Interpreter& in, const Value& self, Args&) {
  ASSIGN_OR_RETURN(const std::string text, Text(in, self));
  Int words = 0;
  bool in_word = false;
  for (std::string_view rest = text; !rest.empty(); rest.remove_prefix(FrontBytes(rest))) {
    const uint32_t c = Front(rest);
    const bool word = IsAlnum(c) || c == '_';
    words += word && !in_word;
    in_word = word;
  }
  return Value::Integer(words);
}

Result Truncate(Interpreter& in, const Value& self, Args& args) {
  ASSIGN_OR_RETURN(const Bound bound,
                   Bound::Of("truncate", args, {"length", "killwords", "end", "leeway"}));
  ASSIGN_OR_RETURN(const int64_t length, bound.Integer(0, 255));
  ASSIGN_OR_RETURN(const std::string end, bound.Text(2, "..."));
  int64_t leeway = 5;
  if (bound.has(3)) {
    ASSIGN_OR_RETURN(leeway, bound.Integer(3, 5));
  }
  const auto tail = static_cast<int64_t>(CodePoints(end));
  if (length < tail) return Error("truncate(): length must cover the end marker");
  if (leeway < 0) return Error("truncate(): leeway must not be negative");
  ASSIGN_OR_RETURN(const std::string text, Text(in, self));
  if (static_cast<int64_t>(CodePoints(text)) <= length + leeway) return in.heap().Str(text);
  std::string out = text.substr(0, ByteOffset(text, static_cast<size_t>(length - tail)));
  if (!bound.Flag(1, false)) {
    const size_t space = out.rfind(' ');
    if (space != std::string::npos) out.resize(space);
  }
  return in.heap().Str(out + end);
}

Result UrlEncode(Interpreter& in, const Value& self, Args&) {
  ASSIGN_OR_RETURN(const std::string text, Text(in, self));
  std::string out;
  for (char c : text) {
    const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                       std::strchr("_.-~/", c) != nullptr;
    if (plain && c != '\0') {
      out += c;
    } else {
      out += fmt::format("%{:02X}", static_cast<uint8_t>(c));
    }
  }
  return in.heap().Str(std::move(out));
}

constexpr NamedNative kFilters[] = {
    {"upper", Transform<Upper>},
    {"lower", Transform<Lower>},
    {"capitalize", Transform<Capitalize>},
    {"title", Transform<TitleWords>},
    {"trim", TrimFilter},
    {"replace", ReplaceFilter},
    {"string", StringFilter},
    {"safe", Safe},
    {"escape", Escape},
    {"e", Escape},
    {"forceescape", ForceEscape},
    {"tojson", ToJsonFilter},
    {"from_json", FromJsonFilter},
    {"indent", Indent},
    {"center", Center},
    {"format", FormatFilter},
    {"wordcount", WordCount},
    {"truncate", Truncate},
    {"urlencode", UrlEncode},
};

}  // namespace

absl::Span<const NamedNative> TextFilters() { return kFilters; }

}  // namespace antiphon::model::jinja
