#include "model/jinja_lexer.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "common/status_macros.h"
#include "fmt/format.h"
#include "model/jinja_text.h"

namespace antiphon::model::jinja {
namespace {

bool AsciiDigit(char c) { return c >= '0' && c <= '9'; }
bool NameStart(uint32_t c) {
  return c == '_' || (c < 0x80 ? (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') : IsAlpha(c));
}

// Python's universal newlines; one newline at the very end of the template is dropped.
std::string WithPlainNewlines(std::string_view source) {
  std::string out;
  out.reserve(source.size());
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] == '\r') {
      out.push_back('\n');
      if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
    } else {
      out.push_back(source[i]);
    }
  }
  if (!out.empty() && out.back() == '\n') out.pop_back();
  return out;
}

class Lexer {
 public:
  explicit Lexer(std::string_view source) : source_(source) {}

  absl::StatusOr<std::vector<Token>> Run() {
    while (at_ < source_.size()) RETURN_IF_ERROR(Root());
    Push(Token::Kind::kEnd, "");
    return std::move(tokens_);
  }

 private:
  char Peek(size_t ahead = 0) const {
    return at_ + ahead < source_.size() ? source_[at_ + ahead] : '\0';
  }
  bool Next(std::string_view text) const { return source_.substr(at_).starts_with(text); }

  void Advance(size_t bytes) {
    line_ +=
        static_cast<int>(std::count(source_.begin() + static_cast<ptrdiff_t>(at_),
                                    source_.begin() + static_cast<ptrdiff_t>(at_ + bytes), '\n'));
    at_ += bytes;
  }

  void SkipSpace() {
    const std::string_view rest = source_.substr(at_);
    Advance(rest.size() - Strip(rest, Side::kLeft).size());
  }

  void Push(Token::Kind kind, std::string_view text) {
    tokens_.push_back({kind, line_, std::string(text)});
  }

  absl::Status Fail(std::string_view message) const { return SyntaxError(line_, message); }

  // Text up to the next opening tag, then the tag.
  absl::Status Root() {
    size_t open = at_;
    for (;;) {
      open = source_.find('{', open);
      if (open == std::string_view::npos || open + 1 >= source_.size()) {
        open = std::string_view::npos;
        break;
      }
      const char second = source_[open + 1];
      if (second == '{' || second == '%' || second == '#') break;
      ++open;
    }
    if (open == std::string_view::npos) {
      Push(Token::Kind::kData, source_.substr(at_));
      Advance(source_.size() - at_);
      return absl::OkStatus();
    }
    std::string_view text = source_.substr(at_, open - at_);
    const char kind = source_[open + 1];
    const char sign = open + 2 < source_.size() ? source_[open + 2] : '\0';
    if (sign == '-') {
      text = Strip(text, Side::kRight);
    } else if (sign != '+' && kind != '{') {
      text = WithoutIndent(text);
    }
    if (!text.empty()) Push(Token::Kind::kData, text);
    Advance(open - at_);
    const size_t opening = sign == '-' || sign == '+' ? 3 : 2;
    if (kind == '#') {
      Advance(opening);
      return Comment();
    }
    if (kind == '%' && IsRaw(opening)) {
      Advance(opening);
      return Raw();
    }
    Push(kind == '{' ? Token::Kind::kVariableBegin : Token::Kind::kBlockBegin, "");
    Advance(opening);
    return Inside(kind == '{');
  }

  // lstrip_blocks: white space between the start of the line and the tag goes.
  std::string_view WithoutIndent(std::string_view text) const {
    const size_t line_start = text.rfind('\n') + 1;  // npos + 1 is 0
    if (line_start == 0 && !line_starting_) return text;
    if (!Strip(text.substr(line_start), Side::kLeft).empty()) return text;
    return text.substr(0, line_start);
  }

  bool IsRaw(size_t opening) const {
    std::string_view rest = Strip(source_.substr(at_ + opening), Side::kLeft);
    if (!rest.starts_with("raw")) return false;
    rest = Strip(rest.substr(3), Side::kLeft);
    return rest.starts_with("%}") || rest.starts_with("-%}");
  }

  // After a closing tag: `-` eats all white space, otherwise trim_blocks one newline.
  void Close(size_t closing, bool strip, bool keep_newline) {
    const size_t start = at_;
    Advance(closing);
    if (strip) {
      SkipSpace();
    } else if (!keep_newline && Peek() == '\n') {
      Advance(1);
    }
    line_starting_ = at_ > start && source_[at_ - 1] == '\n';
  }

  absl::Status Comment() {
    const size_t end = source_.find("#}", at_);
    if (end == std::string_view::npos) return Fail("missing end of comment tag '#}'");
    const char sign = end > at_ ? source_[end - 1] : '\0';
    Advance(end - at_);
    Close(2, sign == '-', sign == '+');
    return absl::OkStatus();
  }

  absl::Status Raw() {
    SkipSpace();
    Advance(3);
    SkipSpace();
    const bool strip_front = Peek() == '-';
    Advance(strip_front ? 3 : 2);
    if (strip_front) SkipSpace();
    line_starting_ = false;
    for (size_t open = source_.find("{%", at_); open != std::string_view::npos;
         open = source_.find("{%", open + 2)) {
      size_t tag = open + 2;
      const char sign = tag < source_.size() ? source_[tag] : '\0';
      if (sign == '-' || sign == '+') ++tag;
      std::string_view rest = Strip(source_.substr(tag), Side::kLeft);
      if (!rest.starts_with("endraw")) continue;
      rest = Strip(rest.substr(6), Side::kLeft);
      const bool signed_end = rest.starts_with("-%}") || rest.starts_with("+%}");
      if (!signed_end && !rest.starts_with("%}")) continue;
      std::string_view text = source_.substr(at_, open - at_);
      if (sign == '-') {
        text = Strip(text, Side::kRight);
      } else if (sign != '+') {
        text = WithoutIndent(text);
      }
      if (!text.empty()) Push(Token::Kind::kData, text);
      Advance(static_cast<size_t>(rest.data() - source_.data()) - at_);
      Close(signed_end ? 3 : 2, rest.front() == '-', rest.front() == '+');
      return absl::OkStatus();
    }
    return Fail("missing end of raw directive '{% endraw %}'");
  }

  absl::Status Inside(bool variable) {
    const std::string_view end = variable ? "}}" : "%}";
    const auto kind = variable ? Token::Kind::kVariableEnd : Token::Kind::kBlockEnd;
    std::string open;  // brackets that wait for their partner
    for (;;) {
      SkipSpace();
      if (at_ >= source_.size()) {
        return Fail(fmt::format("unexpected end of template, expected '{}'", end));
      }
      if (open.empty()) {
        const bool minus = Peek() == '-' && source_.substr(at_ + 1).starts_with(end);
        const bool plus = !variable && Peek() == '+' && source_.substr(at_ + 1).starts_with(end);
        if (minus || plus || Next(end)) {
          Push(kind, "");
          Close(minus || plus ? 3 : 2, minus, plus || variable);
          return absl::OkStatus();
        }
      }
      const char c = Peek();
      if (AsciiDigit(c)) {
        RETURN_IF_ERROR(Number());
      } else if (NameStart(Front(source_.substr(at_)))) {
        Name();
      } else if (c == '\'' || c == '"') {
        RETURN_IF_ERROR(Quote(c));
      } else {
        RETURN_IF_ERROR(Operator(&open));
      }
    }
  }

  void Name() {
    size_t end = at_;
    while (end < source_.size()) {
      const uint32_t c = Front(source_.substr(end));
      if (!NameStart(c) && !IsDigit(c)) break;
      end += FrontBytes(source_.substr(end));
    }
    Push(Token::Kind::kName, source_.substr(at_, end - at_));
    Advance(end - at_);
  }

  absl::Status Operator(std::string* open) {
    static constexpr std::string_view kOperators[] = {
        "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[",
        "]",  "(",  ")",  "{",  "}",  ">",  "<", "=", ".", ":", "|", ",", ";"};
    for (std::string_view symbol : kOperators) {
      if (!Next(symbol)) continue;
      const char c = symbol[0];
      if (c == '(' || c == '[' || c == '{') {
        open->push_back(c == '(' ? ')' : c == '[' ? ']' : '}');
      } else if (c == ')' || c == ']' || c == '}') {
        if (open->empty()) return Fail(fmt::format("unexpected '{}'", c));
        if (open->back() != c) {
          return Fail(fmt::format("unexpected '{}', expected '{}'", c, open->back()));
        }
        open->pop_back();
      }
      Push(Token::Kind::kOperator, symbol);
      Advance(symbol.size());
      return absl::OkStatus();
    }
    const std::string_view rest = source_.substr(at_);
    return Fail(fmt::format("unexpected character {}", Quoted(rest.substr(0, FrontBytes(rest)))));
  }

  // Digits with single underscores between them, from `at`.
  size_t DigitsEnd(size_t at) const {
    while (at < source_.size() &&
           (AsciiDigit(source_[at]) ||
            (source_[at] == '_' && at + 1 < source_.size() && AsciiDigit(source_[at + 1]))))
      ++at;
    return at;
  }

  absl::Status Number() {
    const char marker = Peek(1) | 0x20;
    if (Peek() == '0' && (marker == 'x' || marker == 'o' || marker == 'b')) return Radix(marker);
    size_t end = DigitsEnd(at_);
    bool real = false;
    const bool after_dot = at_ > 0 && source_[at_ - 1] == '.';
    if (!after_dot && end + 1 < source_.size() && source_[end] == '.' &&
        AsciiDigit(source_[end + 1])) {
      real = true;
      end = DigitsEnd(end + 1);
    }
    if (!after_dot && end < source_.size() && (source_[end] | 0x20) == 'e') {
      size_t digits = end + 1;
      if (digits < source_.size() && (source_[digits] == '+' || source_[digits] == '-')) ++digits;
      if (digits < source_.size() && AsciiDigit(source_[digits])) {
        real = true;
        end = DigitsEnd(digits);
      }
    }
    std::string text(source_.substr(at_, end - at_));
    std::erase(text, '_');
    Token token{real ? Token::Kind::kFloat : Token::Kind::kInteger, line_, text};
    if (real) {
      token.real = std::strtod(text.c_str(), nullptr);
    } else {
      for (char c : text) RETURN_IF_ERROR(AppendDigit(c - '0', 10, &token.integer));
    }
    tokens_.push_back(std::move(token));
    Advance(end - at_);
    return absl::OkStatus();
  }

  absl::Status Radix(char marker) {
    const int base = marker == 'x' ? 16 : marker == 'o' ? 8 : 2;
    Token token{Token::Kind::kInteger, line_, ""};
    size_t end = at_ + 2;
    size_t digits = 0;
    for (; end < source_.size(); ++end) {
      const char c = source_[end];
      if (c == '_') continue;
      const int digit = AsciiDigit(c)                            ? c - '0'
                        : (c | 0x20) >= 'a' && (c | 0x20) <= 'f' ? (c | 0x20) - 'a' + 10
                                                                 : 99;
      if (digit >= base) break;
      ++digits;
      RETURN_IF_ERROR(AppendDigit(digit, base, &token.integer));
    }
    if (digits == 0) return Fail("a number without digits");
    tokens_.push_back(std::move(token));
    Advance(end - at_);
    return absl::OkStatus();
  }

  absl::Status AppendDigit(int digit, int base, Int* value) const {
    if (__builtin_mul_overflow(*value, Int{base}, value) ||
        __builtin_add_overflow(*value, Int{digit}, value)) {
      return Fail("integer literal beyond 128 bits");
    }
    return absl::OkStatus();
  }

  absl::Status Quote(char quote) {
    const int line = line_;
    size_t end = at_ + 1;
    while (end < source_.size() && source_[end] != quote) end += source_[end] == '\\' ? 2 : 1;
    if (end >= source_.size()) return Fail("string without an end");
    std::string text;
    const std::string_view body = source_.substr(at_ + 1, end - at_ - 1);
    for (size_t i = 0; i < body.size();) {
      if (body[i] != '\\') {
        text.push_back(body[i++]);
      } else {
        RETURN_IF_ERROR(Escape(body, &i, &text));
      }
    }
    tokens_.push_back({Token::Kind::kString, line, std::move(text)});
    Advance(end + 1 - at_);
    return absl::OkStatus();
  }

  // Python's escapes; an unknown one stays as it is, backslash included.
  absl::Status Escape(std::string_view body, size_t* at, std::string* out) const {
    static constexpr std::pair<char, char> kSimple[] = {
        {'n', '\n'}, {'t', '\t'}, {'r', '\r'}, {'\\', '\\'}, {'\'', '\''},
        {'"', '"'},  {'a', '\a'}, {'b', '\b'}, {'f', '\f'},  {'v', '\v'}};
    const char c = body[*at + 1];
    *at += 2;
    for (const auto& [letter, value] : kSimple) {
      if (c == letter) {
        out->push_back(value);
        return absl::OkStatus();
      }
    }
    if (c == '\n') return absl::OkStatus();
    if (c >= '0' && c <= '7') {
      uint32_t value = static_cast<uint32_t>(c - '0');
      for (int i = 0; i < 2 && *at < body.size() && body[*at] >= '0' && body[*at] <= '7'; ++i) {
        value = value * 8 + static_cast<uint32_t>(body[(*at)++] - '0');
      }
      AppendUtf8(value, out);
      return absl::OkStatus();
    }
    const size_t digits = c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
    if (digits == 0) {
      out->push_back('\\');
      out->push_back(c);
      return absl::OkStatus();
    }
    uint32_t value = 0;
    for (size_t i = 0; i < digits; ++i) {
      const char d = *at < body.size() ? body[*at] : '\0';
      const char lower = d | 0x20;
      if (!AsciiDigit(d) && (lower < 'a' || lower > 'f')) {
        return Fail(fmt::format("\\{} needs {} hexadecimal digits", c, digits));
      }
      value = value * 16 + static_cast<uint32_t>(AsciiDigit(d) ? d - '0' : lower - 'a' + 10);
      ++*at;
    }
    if (value > 0x10ffff || (value >= 0xd800 && value < 0xe000)) {
      return Fail("an escape that is no Unicode character");
    }
    AppendUtf8(value, out);
    return absl::OkStatus();
  }

  const std::string_view source_;
  size_t at_ = 0;
  int line_ = 1;
  bool line_starting_ = true;
  std::vector<Token> tokens_;
};

}  // namespace

absl::Status SyntaxError(int line, std::string_view message) {
  return absl::InvalidArgumentError(fmt::format("line {}: {}", line, message));
}

absl::StatusOr<std::vector<Token>> Tokenize(std::string_view source) {
  if (!ValidUtf8(source)) return absl::InvalidArgumentError("the template is not UTF-8");
  const std::string plain = WithPlainNewlines(source);
  return Lexer(plain).Run();
}

}  // namespace antiphon::model::jinja
