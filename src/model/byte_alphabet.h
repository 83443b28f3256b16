// GPT-2's alphabet of 256 printable characters, one for each byte, in which byte-level BPE
// vocabularies write their tokens (bytes_to_unicode of openai/gpt-2, src/encoder.py).
#ifndef ANTIPHON_MODEL_BYTE_ALPHABET_H_
#define ANTIPHON_MODEL_BYTE_ALPHABET_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace antiphon::model {

std::string ToByteAlphabet(std::string_view bytes);
// nullopt when `text` has a character outside the alphabet or is not valid UTF-8.
std::optional<std::string> FromByteAlphabet(std::string_view text);

}  // namespace antiphon::model

#endif  // ANTIPHON_MODEL_BYTE_ALPHABET_H_
