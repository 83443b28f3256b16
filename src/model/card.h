// What a model file says of itself: the card that workers register, and whether we can serve it.
#ifndef ANTIPHON_MODEL_CARD_H_
#define ANTIPHON_MODEL_CARD_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace antiphon::internal::v1 {
class ModelCard;
}

namespace antiphon::model {

class ModelFile;

struct CardParts {
  std::string tokenizer_blob;      // serialised TokenizerSpec; digest in the card
  std::string chat_template_blob;  // text; empty when the file has none
};

// What an earlier CardOf of the same file found out and is slow: the whole file's digest, and that
// the tokenizer with this digest can be made.
struct KnownDigests {
  std::string weights;
  std::string tokenizer;
};

// Fills everything but block_tokens, aliases and configuration's sampling. `name` is what clients
// will write. The weights digest is the SHA-256 of the whole file, which takes seconds a GiB unless
// it is in `known`.
absl::StatusOr<internal::v1::ModelCard> CardOf(const ModelFile& file, const std::string& name,
                                               CardParts& parts,
                                               const KnownDigests* known = nullptr);

// Hyper-parameters of the llama and qwen2 families.
struct LlamaShape {
  std::string architecture;  // llama | qwen2
  uint32_t layers = 0;
  uint32_t hidden = 0;
  uint32_t feed_forward = 0;
  uint32_t heads = 0;
  uint32_t kv_heads = 0;
  uint32_t head_dim = 0;
  uint32_t vocab = 0;
  uint32_t context = 0;  // tokens
  float rms_eps = 0;
  float rope_base = 0;
  uint32_t rope_dims = 0;
  bool rope_interleaved = false;  // llama GGUF: pairs (2i, 2i+1); qwen2: (i, i + dims/2)
  bool tied_output = false;       // no output.weight: token_embd is used
  bool qkv_bias = false;
  bool has_rope_freqs = false;  // rope_freqs.weight: divisors per pair (Llama 3 scaling)
  float rope_scale = 1;         // linear scaling factor, 1: none
};
// FAILED_PRECONDITION naming the tensor or key that we cannot serve.
absl::StatusOr<LlamaShape> LlamaShapeOf(const ModelFile& file);

// What `antiphon model inspect` prints; the last line is "servable: yes" or names the obstacle.
std::string Inspect(const ModelFile& file);

}  // namespace antiphon::model

#endif  // ANTIPHON_MODEL_CARD_H_
