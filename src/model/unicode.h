// Characters as Hugging Face tokenizers sees them: regular-expression classes and normal form C, in
// the Unicode versions that its engines carry (tables generated from the package itself).
#ifndef ANTIPHON_MODEL_UNICODE_H_
#define ANTIPHON_MODEL_UNICODE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace antiphon::model {

enum class CharClass : uint8_t {
  kOther = 0,
  kLetter = 1,      // \p{L}
  kNumber = 2,      // \p{N}
  kSpace = 3,       // \s
  kLateNumber = 4,  // a number to the digit splitter, none to \p{N}: a younger Unicode
};

CharClass ClassOf(uint32_t code_point);

struct CodePoint {
  uint32_t value;
  uint32_t bytes;
};
// The character at `at`, which must be inside `text`. The text must be valid UTF-8.
inline CodePoint DecodeUtf8(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) { return static_cast<uint32_t>(static_cast<uint8_t>(text[i])); };
  const uint32_t b = byte(at);
  if (b < 0x80) return {b, 1};
  if (b < 0xE0) return {(b & 0x1F) << 6 | (byte(at + 1) & 0x3F), 2};
  if (b < 0xF0) return {(b & 0x0F) << 12 | (byte(at + 1) & 0x3F) << 6 | (byte(at + 2) & 0x3F), 3};
  return {(b & 0x07) << 18 | (byte(at + 1) & 0x3F) << 12 | (byte(at + 2) & 0x3F) << 6 |
              (byte(at + 3) & 0x3F),
          4};
}
// What stands at `at` (inside `text`) of text that may be broken. `bytes`: of the character; of the
// longest part that cannot be continued to one (what becomes a single U+FFFD); of the beginning of
// a character that ends with the text. The Unicode Standard, table 3-7 and section 3.9.
struct Utf8Step {
  enum class Kind : uint8_t { kValid, kInvalid, kUnfinished } kind;
  uint32_t bytes;
};
Utf8Step StepUtf8(std::string_view text, size_t at);
void AppendUtf8(uint32_t code_point, std::string& out);

// Normal form C of valid UTF-8. O(n log n), also for long runs of combining marks.
std::string NormalizeNfc(std::string_view text);

}  // namespace antiphon::model

#endif  // ANTIPHON_MODEL_UNICODE_H_
