// A model file's weights, or a rank's share of them, as the CUDA module asks for them.
#ifndef ANTIPHON_ENGINE_CUDA_BF16_SOURCE_H_
#define ANTIPHON_ENGINE_CUDA_BF16_SOURCE_H_

#include <cstdint>
#include <vector>

#include "engine/cuda/module.h"

namespace antiphon::engine::cpu {
struct Matrix;
struct Weights;
}  // namespace antiphon::engine::cpu

namespace antiphon::engine::cuda {

class Bf16Source {
 public:
  // `weights` outlives it. Rows are prepared on `threads` threads.
  Bf16Source(const cpu::Weights& weights, int threads) : weights_(weights), threads_(threads) {}
  WeightSource Face();

 private:
  std::vector<const cpu::Matrix*> Parts(Weight weight, uint32_t layer) const;
  void Fill(Weight weight, uint32_t layer, uint64_t first, uint64_t rows, uint16_t* out) const;
  void FillRows(Weight weight, uint32_t layer, uint64_t begin, uint64_t end, uint64_t first,
                uint16_t* out) const;
  void Vector(Weight weight, uint32_t layer, float* out) const;

  const cpu::Weights& weights_;
  const int threads_;
};

}  // namespace antiphon::engine::cuda

#endif  // ANTIPHON_ENGINE_CUDA_BF16_SOURCE_H_
