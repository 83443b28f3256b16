// Drawing tokens on the device: engine/sampler.h's rules and, for the same logits, its tokens.
//
// The arithmetic is the sampler's own, sums included: masses of 1,024 logits are summed in floats
// by sixteen lanes, as every table of the CPU's kernels does it. What is summed in another order is
// summed in doubles. A row is left undecided, and the host draws, where top-k or top-p end among
// more than kDrawCandidates tokens within 1/64 of a nat, or 32 nats below the best one.
#ifndef ANTIPHON_ENGINE_CUDA_DRAW_H_
#define ANTIPHON_ENGINE_CUDA_DRAW_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "engine/cuda/module.h"

namespace antiphon::engine::cuda {

inline constexpr uint32_t kDrawCandidates = 2048;
inline constexpr uint32_t kDrawVocabMax = 2048 * 1024;
inline constexpr uint32_t kUndecided = 0xffffffffu;

struct DrawRow {
  Draw draw;                // its edits are not read
  uint32_t row = 0;         // of the logits
  uint32_t first_edit = 0;  // of `edits`
  uint32_t* token = nullptr;
  float* undecided = nullptr;  // [size], pinned: the model's logits when the row is left undecided
};

// Draws one token a row. Logits of rows are changed as the edits say, but for undecided ones.
// `originals` has room for each edit. size <= kDrawVocabMax.
cudaError_t DrawTokens(const DrawRow* rows, uint32_t count, const LogitEdit* edits,
                       float* originals, float* logits, uint32_t size, size_t stride,
                       cudaStream_t stream);

}  // namespace antiphon::engine::cuda

#endif  // ANTIPHON_ENGINE_CUDA_DRAW_H_
