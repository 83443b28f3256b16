// The weights of a llama or qwen2 model as the kernels want them: matrices packed once at load into
// one image, the rest in place in the file's mapping.
#ifndef ANTIPHON_ENGINE_CPU_WEIGHTS_H_
#define ANTIPHON_ENGINE_CPU_WEIGHTS_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/cpu/cpu_runner.h"
#include "engine/cpu/kernels.h"
#include "engine/image_source.h"
#include "model/card.h"
#include "model/model_file.h"

namespace antiphon::engine::cpu {

// Anonymous zeroed memory, on huge pages where the system has them.
class Arena {
 public:
  static absl::StatusOr<Arena> Create(size_t bytes);
  Arena() = default;
  Arena(Arena&& other) noexcept;
  Arena& operator=(Arena&& other) noexcept;
  ~Arena();
  std::byte* data() const { return data_; }

 private:
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

// One rank's part of a model: equal runs of heads, of the feed-forward's columns and of the
// vocabulary (in groups of 16 rows, nearly equal).
struct Shard {
  uint32_t rank = 0;
  uint32_t size = 1;
  uint32_t Begin(uint32_t count) const {
    return static_cast<uint32_t>(uint64_t{count} * rank / size);
  }
  uint32_t End(uint32_t count) const {
    return static_cast<uint32_t>(uint64_t{count} * (rank + 1) / size);
  }
};

// y = W x. Packed (kernels.h), or rows of the file where Activations::kFloat asks for quantised
// weights to be multiplied exactly, which is slow.
struct Matrix {
  const model::Tensor* tensor = nullptr;
  uint32_t rows = 0;
  uint32_t columns = 0;
  // The shard's place in the tensor.
  uint32_t first_row = 0;
  uint32_t first_column = 0;
  std::optional<PackedType> packed;  // none: dequantised 16 rows at a time when used
  const std::byte* image = nullptr;  // packed groups
  // Interleaved rotary pairs (2i, 2i + 1) are turned into halves (i, i + pairs) by permuting the
  // rows of q and k in each head; products of q and k do not notice.
  uint32_t interleaved_dims = 0;
  uint32_t head_dim = 0;

  int groups() const { return static_cast<int>((rows + kGroupRows - 1) / kGroupRows); }
  uint32_t SourceRow(uint32_t row) const;           // in the tensor
  const std::byte* SourceData(uint32_t row) const;  // from first_column on
  // Sixteen rows as [column][16] floats, whatever the format; rows past the end are zero. `scratch`
  // holds `columns` floats.
  void DequantizeGroup(int group, float* scratch, float* out) const;
};

struct LayerWeights {
  std::vector<float> attention_norm, feed_forward_norm;  // padded to 16 with zeros
  Matrix q, k, v, attention_output, gate, up, down;
  std::vector<float> q_bias, k_bias, v_bias;  // empty: none; in the rows' packed order
};

struct Weights {
  // Of this rank: heads, kv_heads and feed_forward are its share, the rest is the model's.
  model::LlamaShape shape;
  Shard shard;
  const model::Tensor* embedding = nullptr;
  std::vector<LayerWeights> layers;
  std::vector<float> output_norm;
  Matrix output;                        // the shard's rows of the vocabulary
  std::vector<float> rope_frequencies;  // radians a token for each pair
  Arena image;                          // or:
  std::unique_ptr<SharedImage> shared_image;
};

// FAILED_PRECONDITION naming the field that `shards` ranks do not divide, or the tensor whose
// blocks they would cut. Quick.
absl::Status CheckShards(const model::ModelFile& file, uint32_t shards);

// Everything but the packed image: matrices have no `image` yet. FAILED_PRECONDITION naming the
// tensor that is missing, of a wrong size or of an unknown type, or the field that the shards do
// not divide.
absl::StatusOr<std::unique_ptr<Weights>> FindWeights(const model::ModelFile& file,
                                                     Activations activations, Shard shard = {});
// FindWeights, and the packed image: the one that `images` has finished, or one packed here on
// `threads` threads, for `images` if it wants it. RESOURCE_EXHAUSTED: it does not fit in memory.
absl::StatusOr<std::unique_ptr<Weights>> LoadWeights(const model::ModelFile& file,
                                                     Activations activations, int threads,
                                                     const std::function<void(double)>& progress,
                                                     Shard shard = {},
                                                     ImageSource* images = nullptr);

}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_WEIGHTS_H_
