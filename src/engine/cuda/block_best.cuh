// The best of a row of logits, by one block.
#ifndef ANTIPHON_ENGINE_CUDA_BLOCK_BEST_CUH_
#define ANTIPHON_ENGINE_CUDA_BLOCK_BEST_CUH_

#include "engine/cuda/arithmetic.h"

namespace antiphon::engine::cuda {

// Every thread of the block has the result; the id of a row of NaN alone is 0xffffffff.
template <uint32_t kThreads>
__device__ __forceinline__ Best BestOfBlock(const float* row, uint32_t size) {
  constexpr uint32_t kWarp = 32;
  static_assert(kThreads == kWarp * kWarp);
  __shared__ Best partial[kWarp];
  Best best = {-INFINITY, 0xffffffffu};
  for (uint32_t i = threadIdx.x; i < size; i += kThreads) best = Better(best, {row[i], i});
  const auto reduce = [](Best mine) {
    for (uint32_t step = kWarp / 2; step > 0; step /= 2) {
      const Best other = {__shfl_xor_sync(0xffffffffu, mine.value, step),
                          __shfl_xor_sync(0xffffffffu, mine.id, step)};
      mine = Better(mine, other);
    }
    return mine;
  };
  best = reduce(best);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = best;
  __syncthreads();
  return reduce(partial[threadIdx.x % kWarp]);
}

}  // namespace antiphon::engine::cuda

#endif  // ANTIPHON_ENGINE_CUDA_BLOCK_BEST_CUH_
