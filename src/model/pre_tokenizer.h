// The pre-tokenizers of four model families as hand-written matchers: linear time, no backtracking.
// They cut exactly where these regular expressions of the families' tokenizer.json files match
// (engine: Oniguruma, classes of unicode.h):
//   gpt-2     's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//   smollm    every digit on its own (Digits, individual_digits), then gpt-2 between them
//   llama-bpe (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|
//             ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
//   qwen2     llama-bpe's with \p{N} in place of \p{N}{1,3}, after normal form C
#ifndef ANTIPHON_MODEL_PRE_TOKENIZER_H_
#define ANTIPHON_MODEL_PRE_TOKENIZER_H_

#include <cstddef>
#include <optional>
#include <string_view>

namespace antiphon::model {

enum class PreTokenizer { kGpt2, kSmolLm, kLlamaBpe, kQwen2 };

// By the value of tokenizer.ggml.pre. nullopt: none of ours. "default" is none: llama.cpp's
// expressions for it are not GPT-2's.
std::optional<PreTokenizer> PreTokenizerNamed(std::string_view name);
std::string_view NameOf(PreTokenizer pre);

// Where the piece that starts at `at` ends; at < text.size(). `text` is valid UTF-8 and `at` the
// end of the piece before it.
size_t PieceEnd(PreTokenizer pre, std::string_view text, size_t at);

}  // namespace antiphon::model

#endif  // ANTIPHON_MODEL_PRE_TOKENIZER_H_
