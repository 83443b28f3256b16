#include "model/pre_tokenizer.h"

#include <cstdint>

#include "model/unicode.h"

namespace antiphon::model {
namespace {

// What one character is to a pattern. kEnd: no more characters, or one where the digit splitter
// has cut already.
enum class Kind : uint8_t { kOther, kLetter, kNumber, kSpace, kEnd };

struct Char {
  Kind kind = Kind::kEnd;
  uint32_t value = 0;
  uint32_t bytes = 0;
};

template <bool kDigitsCut>
class Scanner {
 public:
  explicit Scanner(std::string_view text) : text_(text) {}

  Char At(size_t at) const {
    if (at >= text_.size()) return {};
    const CodePoint c = DecodeUtf8(text_, at);
    return {KindOf(ClassOf(c.value)), c.value, c.bytes};
  }

  // The end of the run of `kind` from `at` on, of at most `count_max` characters.
  size_t Run(Kind kind, size_t at, size_t count_max = SIZE_MAX) const {
    for (size_t n = 0; n < count_max; ++n) {
      const Char c = At(at);
      if (c.kind != kind) break;
      at += c.bytes;
    }
    return at;
  }

  // 's 't 're 've 'm 'll 'd after the apostrophe at `at`; 0 when there is none of them.
  size_t Contraction(size_t at, bool ignore_case) const {
    const uint32_t a = Fold(At(at + 1), ignore_case);
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return at + 1 + At(at + 1).bytes;
    if (a != 'r' && a != 'v' && a != 'l') return 0;
    const uint32_t b = Fold(At(at + 2), ignore_case);
    return (a == 'l' && b == 'l') || (a != 'l' && b == 'e') ? at + 3 : 0;
  }

  // \s+(?!\S)|\s+ where a space starts: the run without its last character, unless it is the only
  // one or nothing follows.
  size_t Spaces(size_t at) const {
    size_t last = at;
    size_t end = at;
    for (Char c = At(at); c.kind == Kind::kSpace; c = At(end)) {
      last = end;
      end += c.bytes;
    }
    if (At(end).kind == Kind::kEnd || last == at) return end;
    return last;
  }

 private:
  static Kind KindOf(CharClass c) {
    switch (c) {
      case CharClass::kLetter:
        return Kind::kLetter;
      case CharClass::kNumber:
        return kDigitsCut ? Kind::kEnd : Kind::kNumber;
      case CharClass::kSpace:
        return Kind::kSpace;
      case CharClass::kLateNumber:
        return kDigitsCut ? Kind::kEnd : Kind::kOther;
      case CharClass::kOther:
        break;
    }
    return Kind::kOther;
  }

  static uint32_t Fold(const Char& c, bool ignore_case) {
    if (!ignore_case) return c.value;
    if (c.value >= 'A' && c.value <= 'Z') return c.value + ('a' - 'A');
    return c.value == 0x17F ? 's' : c.value;  // U+017F is the one other letter that folds to these
  }

  std::string_view text_;
};

template <bool kDigitsCut>
size_t Gpt2End(std::string_view text, size_t at) {
  const Scanner<kDigitsCut> scan(text);
  const Char c = scan.At(at);
  if (c.kind == Kind::kEnd) return at + c.bytes;  // a digit that stands alone
  if (c.value == '\'') {
    if (const size_t end = scan.Contraction(at, /*ignore_case=*/false); end != 0) return end;
  }
  if (c.value == ' ') {
    const Kind next = scan.At(at + 1).kind;
    if (next != Kind::kSpace && next != Kind::kEnd) return scan.Run(next, at + 1);
  }
  if (c.kind != Kind::kSpace) return scan.Run(c.kind, at);
  return scan.Spaces(at);
}

size_t NewlinesEnd(std::string_view text, size_t at) {
  while (at < text.size() && (text[at] == '\r' || text[at] == '\n')) ++at;
  return at;
}

// \s*[\r\n]+ where a space starts: up to the last line break of the run; 0 when it has none.
size_t LineBreaksEnd(const Scanner<false>& scan, size_t at) {
  size_t end = 0;
  for (Char c = scan.At(at); c.kind == Kind::kSpace; c = scan.At(at)) {
    at += c.bytes;
    if (c.value == '\r' || c.value == '\n') end = at;
  }
  return end;
}

size_t LlamaEnd(std::string_view text, size_t at, size_t digits_max) {
  const Scanner<false> scan(text);
  const Char c = scan.At(at);
  if (c.value == '\'') {
    if (const size_t end = scan.Contraction(at, /*ignore_case=*/true); end != 0) return end;
  }
  if (c.kind == Kind::kLetter) return scan.Run(Kind::kLetter, at);
  if (c.kind == Kind::kNumber) return scan.Run(Kind::kNumber, at, digits_max);
  const Char next = scan.At(at + c.bytes);
  if (c.value != '\r' && c.value != '\n' && next.kind == Kind::kLetter) {
    return scan.Run(Kind::kLetter, at + c.bytes);
  }
  if (c.kind == Kind::kOther || (c.value == ' ' && next.kind == Kind::kOther)) {
    return NewlinesEnd(text, scan.Run(Kind::kOther, at + (c.value == ' ' ? 1 : 0)));
  }
  if (const size_t end = LineBreaksEnd(scan, at); end != 0) return end;
  return scan.Spaces(at);
}

}  // namespace

std::optional<PreTokenizer> PreTokenizerNamed(std::string_view name) {
  if (name == "gpt-2") return PreTokenizer::kGpt2;
  if (name == "smollm") return PreTokenizer::kSmolLm;
  if (name == "llama-bpe" || name == "llama-v3" || name == "llama3") return PreTokenizer::kLlamaBpe;
  if (name == "qwen2") return PreTokenizer::kQwen2;
  return std::nullopt;
}

std::string_view NameOf(PreTokenizer pre) {
  switch (pre) {
    case PreTokenizer::kGpt2:
      return "gpt-2";
    case PreTokenizer::kSmolLm:
      return "smollm";
    case PreTokenizer::kLlamaBpe:
      return "llama-bpe";
    case PreTokenizer::kQwen2:
      return "qwen2";
  }
  return "";
}

size_t PieceEnd(PreTokenizer pre, std::string_view text, size_t at) {
  switch (pre) {
    case PreTokenizer::kGpt2:
      return Gpt2End<false>(text, at);
    case PreTokenizer::kSmolLm:
      return Gpt2End<true>(text, at);
    case PreTokenizer::kLlamaBpe:
      return LlamaEnd(text, at, 3);
    case PreTokenizer::kQwen2:
      return LlamaEnd(text, at, 1);
  }
  return text.size();
}

}  // namespace antiphon::model
