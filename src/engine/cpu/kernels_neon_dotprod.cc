// Processors with SDOT (optional in Armv8.2, always there since Armv8.4).
#include "engine/cpu/kernels_arm.h"
#include "engine/cpu/simd_neon.h"
#include "engine/cpu/kernels-inl.h"

namespace antiphon::engine::cpu {
namespace {

template <int kBits, int kSteps>
inline int32x4_t StepSum(const int8x16_t* w, const std::byte* x) {
  int32x4_t sum = vdupq_n_s32(0);
#pragma GCC unroll 2
  for (int i = 0; i < kSteps; i += 4) {
    const int8x16_t a = vld1q_s8(reinterpret_cast<const int8_t*>(x + 4 * i));
    sum = vdotq_laneq_s32(sum, w[i], a, 0);
    sum = vdotq_laneq_s32(sum, w[i + 1], a, 1);
    sum = vdotq_laneq_s32(sum, w[i + 2], a, 2);
    sum = vdotq_laneq_s32(sum, w[i + 3], a, 3);
  }
  return sum;
}

}  // namespace
}  // namespace antiphon::engine::cpu

#include "engine/cpu/quant_neon-inl.h"

namespace antiphon::engine::cpu {
namespace {

constexpr Kernels kTable = MakeTable("neon-dotprod");

}  // namespace

const Kernels& NeonDotprodKernels() { return kTable; }

}  // namespace antiphon::engine::cpu
