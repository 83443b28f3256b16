// Products for one or two rows, where all that counts is how fast the weights come in: they stream
// through registers once, the norm before and the activation behind are part of the kernel, and its
// first weights are on their way before the kernel before it has ended (programmatic dependent
// launch, compute capability 9.0 and later).
#ifndef ANTIPHON_ENGINE_CUDA_FEW_ROWS_H_
#define ANTIPHON_ENGINE_CUDA_FEW_ROWS_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace antiphon::engine::cuda {

enum class FewRowsOutput : uint8_t {
  kBf16,      // y[row][n]
  kAddFloat,  // y[row][n] += ...
  kFloat,     // y[row][n]
  kSilu,      // y[row][n / 2] = silu(the first half of w's rows) * the second half
};

struct FewRowsProduct {
  const uint16_t* w = nullptr;  // [n][k], bf16; k is a multiple of 8
  uint32_t n = 0;
  uint32_t k = 0;
  // One of them: bf16 [rows][k], or float [rows][k] that is normalised with `norm` on the way.
  const uint16_t* x = nullptr;
  const float* residual = nullptr;
  const float* norm = nullptr;
  float eps = 0;
  void* y = nullptr;
  size_t y_stride = 0;  // elements
  FewRowsOutput output = FewRowsOutput::kBf16;
};

// At 4 cuBLASLt is faster: the sums take longer than the weights.
inline constexpr uint32_t kFewRowsMax = 2;

// Whether `rows` of a product fit: 1 or 2, and few enough columns for the shared memory.
bool FewRowsServes(uint32_t rows, uint32_t k);

// `dependent`: launch programmatically behind the kernel before it on the stream. The sum's order
// depends on k alone.
cudaError_t MultiplyFewRows(const FewRowsProduct& product, uint32_t rows, bool dependent,
                            cudaStream_t stream);

}  // namespace antiphon::engine::cuda

#endif  // ANTIPHON_ENGINE_CUDA_FEW_ROWS_H_
