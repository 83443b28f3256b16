#include <cstring>

#include "engine/cpu/kernels_x86.h"
#include "engine/cpu/simd_avx512.h"
#include "engine/cpu/exp-inl.h"
#include "engine/cpu/attention_operands-inl.h"
#include "engine/cpu/pair_operands_avx512.h"

namespace antiphon::engine::cpu {
namespace {

using Bf16Operands = PairOperands;

}  // namespace
}  // namespace antiphon::engine::cpu

#include "engine/cpu/attention-inl.h"

namespace antiphon::engine::cpu {

// Attention only: the rest is Avx512Kernels'.
void AttendWithBf16(const Attention& a) { Attend(a); }

bool Bf16ProductsAreTwoFmas() {
  uint32_t state = 1;
  const auto draw = [&state] { return state = state * 1664525 + 1013904223; };
  // A sign, a mantissa and an exponent of 15 around that of 1.
  const auto draw_bf16 = [&draw] {
    const uint32_t bits = draw() >> 8;
    return (bits & 0x807f) | (120 + (bits >> 16) % 15) << 7;
  };
  for (int round = 0; round < 256; ++round) {
    uint32_t a[16], b[16], c[16];
    for (int i = 0; i < 16; ++i) {
      a[i] = draw_bf16() | draw_bf16() << 16;
      b[i] = draw_bf16() | draw_bf16() << 16;
      c[i] = draw_bf16() << 16 | (draw() >> 16);
    }
    const F pairs_a = Load(reinterpret_cast<const float*>(a));
    const F pairs_b = Load(reinterpret_cast<const float*>(b));
    const F sum = Load(reinterpret_cast<const float*>(c));
    const F want = Fma(LowBf16(pairs_a), LowBf16(pairs_b),
                       Fma(HighBf16(pairs_a), HighBf16(pairs_b), sum));
    const F got = PairFma(pairs_a, pairs_b, sum);
    if (_mm512_cmpneq_epi32_mask(_mm512_castps_si512(got.v), _mm512_castps_si512(want.v)) != 0) {
      return false;
    }
  }
  return true;
}

}  // namespace antiphon::engine::cpu
