// What every AArch64 processor has: bytes are multiplied to 16 bits.
#include "engine/cpu/kernels_arm.h"
#include "engine/cpu/simd_neon.h"
#include "engine/cpu/kernels-inl.h"

namespace antiphon::engine::cpu {
namespace {

// A lane of 16 bits sums one column of each step, up to as many as it holds: 8 * 15 * 127 = 15,240,
// 8 * 31 * 127 = 31,496, 4 * 63 * 127 = 32,004 and 2 * 128 * 127 = 32,512.
template <int kBits, int kSteps>
inline int32x4_t StepSum(const int8x16_t* w, const std::byte* x) {
  constexpr int kRun = kBits == 8 ? 2 : kBits == 6 ? 4 : kSteps;
  const int32_t* columns = reinterpret_cast<const int32_t*>(x);
  int32x4_t low_sum, high_sum;  // pairs of columns: of the first and of the last two rows
#pragma GCC unroll 4
  for (int first = 0; first < kSteps; first += kRun) {
    int16x8_t low, high;
#pragma GCC unroll 8
    for (int i = first; i < first + kRun; ++i) {
      const int8x16_t a = vreinterpretq_s8_s32(vdupq_n_s32(columns[i]));
      if (i == first) {
        low = vmull_s8(vget_low_s8(w[i]), vget_low_s8(a));
        high = vmull_high_s8(w[i], a);
      } else {
        low = vmlal_s8(low, vget_low_s8(w[i]), vget_low_s8(a));
        high = vmlal_high_s8(high, w[i], a);
      }
    }
    low_sum = first == 0 ? vpaddlq_s16(low) : vpadalq_s16(low_sum, low);
    high_sum = first == 0 ? vpaddlq_s16(high) : vpadalq_s16(high_sum, high);
  }
  return vpaddq_s32(low_sum, high_sum);
}

}  // namespace
}  // namespace antiphon::engine::cpu

#include "engine/cpu/quant_neon-inl.h"

namespace antiphon::engine::cpu {
namespace {

constexpr Kernels kTable = MakeTable("neon");

}  // namespace

const Kernels& NeonKernels() { return kTable; }

}  // namespace antiphon::engine::cpu
