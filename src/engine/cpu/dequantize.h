// Rows of GGUF's tensor types as floats, exactly as ggml defines them: embeddings, the slow exact
// path, and the reference of the tests.
#ifndef ANTIPHON_ENGINE_CPU_DEQUANTIZE_H_
#define ANTIPHON_ENGINE_CPU_DEQUANTIZE_H_

#include <cstddef>

#include "model/model_file.h"

namespace antiphon::engine::cpu {

bool CanDequantize(model::TensorType type);

// `n` elements, a multiple of the type's block. CHECKs that the type can be dequantised.
void Dequantize(model::TensorType type, const std::byte* row, size_t n, float* out);

float HalfToFloat(uint16_t half);

}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_DEQUANTIZE_H_
