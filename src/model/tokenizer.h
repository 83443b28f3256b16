// Byte-level BPE with the pre-tokenizers gpt-2, smollm, llama-bpe and qwen2, added tokens, and an
// incremental detokeniser. Ids equal those of Hugging Face `tokenizers` on valid UTF-8.
#ifndef ANTIPHON_MODEL_TOKENIZER_H_
#define ANTIPHON_MODEL_TOKENIZER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace antiphon::internal::v1 {
class TokenizerSpec;
}

namespace antiphon::model {

class ModelFile;

// The spec of a file's tokenizer. INVALID_ARGUMENT names the key that is missing, malformed or not
// supported (an unknown pre-tokenizer is refused: it would mis-tokenise silently).
absl::StatusOr<internal::v1::TokenizerSpec> TokenizerSpecOf(const ModelFile& file);

// Immutable, thread-safe.
class Tokenizer {
 public:
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Create(const internal::v1::TokenizerSpec& spec);
  ~Tokenizer();

  struct EncodeOptions {
    bool add_bos = true;        // only when the model asks for it, and never twice
    bool parse_special = true;  // control tokens written in the text become their ids
  };
  // `text` must be valid UTF-8 (INVALID_ARGUMENT with the byte offset otherwise). Time is
  // O(n log n) even for one long run without spaces.
  absl::StatusOr<std::vector<uint32_t>> Encode(std::string_view text, EncodeOptions options) const;

  // Bytes of one token; empty for an id out of range. Control tokens give their text.
  std::string_view TokenBytes(uint32_t id) const;
  bool IsControl(uint32_t id) const;
  uint32_t vocab_size() const;
  const std::vector<uint32_t>& end_of_generation_ids() const;  // sorted
  // Texts that chat templates use as bos_token and eos_token; empty when there is none.
  std::string_view bos_text() const;
  std::string_view eos_text() const;
  // The id of a token's exact text; -1 when there is none.
  int64_t FindToken(std::string_view text) const;

  // Whole text at once; invalid UTF-8 becomes U+FFFD.
  std::string Decode(absl::Span<const uint32_t> ids, bool skip_special) const;

 private:
  Tokenizer();
  struct State;
  std::unique_ptr<State> state_;
};

// Turns a stream of ids into text that is valid UTF-8 at every cut: bytes of an unfinished
// character wait; bytes that can no longer become one turn into U+FFFD.
class Detokenizer {
 public:
  Detokenizer(const Tokenizer* tokenizer, bool skip_special)
      : tokenizer_(tokenizer), skip_special_(skip_special) {}
  std::string Push(uint32_t id);  // what became complete, possibly nothing
  std::string Finish();           // what is left

 private:
  const Tokenizer* tokenizer_;
  bool skip_special_;
  std::string pending_;
};

// Byte offset of the first byte that is not valid UTF-8; npos when all is.
size_t FindInvalidUtf8(std::string_view text);

}  // namespace antiphon::model

#endif  // ANTIPHON_MODEL_TOKENIZER_H_
