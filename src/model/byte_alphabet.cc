#include "model/byte_alphabet.h"

#include <array>

#include "model/unicode.h"

namespace antiphon::model {
namespace {

struct Alphabet {
  Alphabet() {
    byte_of.fill(-1);
    uint16_t next = 256;
    for (int b = 0; b < 256; ++b) {
      const bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
      char_of[b] = printable ? static_cast<uint16_t>(b) : next++;
      byte_of[char_of[b]] = static_cast<int16_t>(b);
    }
  }
  std::array<uint16_t, 256> char_of;
  std::array<int16_t, 324> byte_of;  // 256 and the 68 bytes that are not printable
};

const Alphabet& TheAlphabet() {
  static const Alphabet alphabet;
  return alphabet;
}

}  // namespace

std::string ToByteAlphabet(std::string_view bytes) {
  std::string out;
  for (const char c : bytes) AppendUtf8(TheAlphabet().char_of[static_cast<uint8_t>(c)], out);
  return out;
}

std::optional<std::string> FromByteAlphabet(std::string_view text) {
  const Alphabet& alphabet = TheAlphabet();
  std::string out;
  out.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const Utf8Step step = StepUtf8(text, at);
    if (step.kind != Utf8Step::Kind::kValid) return std::nullopt;
    const CodePoint c = DecodeUtf8(text, at);
    if (c.value >= alphabet.byte_of.size() || alphabet.byte_of[c.value] < 0) return std::nullopt;
    out.push_back(static_cast<char>(alphabet.byte_of[c.value]));
    at += c.bytes;
  }
  return out;
}

}  // namespace antiphon::model
