// Sixteen float lanes in four NEON registers. Equals simd_scalar.h bit for bit: maximum and minimum
// compare and select, because FMAX and FMIN treat NaN and the zeros' signs in their own way.
#ifndef ANTIPHON_ENGINE_CPU_SIMD_NEON_H_
#define ANTIPHON_ENGINE_CPU_SIMD_NEON_H_

#include <arm_neon.h>

#include <cstdint>

namespace antiphon::engine::cpu {
namespace {

struct F {
  float32x4_t v[4];
};

// 16 accumulators in the products, 8 vectors of the other operand: 24 of the 32 registers.
constexpr int kTileQueries = 2;
constexpr int kManyQueries = 2;
constexpr int TileVectors(int) { return 2; }
constexpr bool kTransposesInRegisters = false;  // 16 vectors and what goes with them
constexpr int kFloatRows = 2;
constexpr int kFloatGroups = 2;

#define ANTIPHON_QUARTERS(expr)                                        \
  F r;                                                                 \
  _Pragma("GCC unroll 4") for (int i = 0; i < 4; ++i) r.v[i] = (expr); \
  return r

template <typename T>
inline void Forget(const T*&) {}  // there are registers enough
inline F Splat(float x) { ANTIPHON_QUARTERS(vdupq_n_f32(x)); }
inline F Zero() { return Splat(0.0f); }
inline F Load(const float* p) { ANTIPHON_QUARTERS(vld1q_f32(p + 4 * i)); }
inline void Store(float* p, F a) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
}
inline F Add(F a, F b) { ANTIPHON_QUARTERS(vaddq_f32(a.v[i], b.v[i])); }
inline F Sub(F a, F b) { ANTIPHON_QUARTERS(vsubq_f32(a.v[i], b.v[i])); }
inline F Mul(F a, F b) { ANTIPHON_QUARTERS(vmulq_f32(a.v[i], b.v[i])); }
inline F Div(F a, F b) { ANTIPHON_QUARTERS(vdivq_f32(a.v[i], b.v[i])); }
inline F Fma(F a, F b, F c) { ANTIPHON_QUARTERS(vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
inline float32x4_t Max4(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline float32x4_t Min4(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline F Max(F a, F b) { ANTIPHON_QUARTERS(Max4(a.v[i], b.v[i])); }
inline F Min(F a, F b) { ANTIPHON_QUARTERS(Min4(a.v[i], b.v[i])); }
inline F Abs(F a) { ANTIPHON_QUARTERS(vabsq_f32(a.v[i])); }
inline float32x4_t Keep(uint32x4_t mask, float32x4_t a) {
  return vreinterpretq_f32_u32(vandq_u32(mask, vreinterpretq_u32_f32(a)));
}
inline F ZeroBelow(F x, F threshold, F value) {
  ANTIPHON_QUARTERS(Keep(vcgeq_f32(x.v[i], threshold.v[i]), value.v[i]));
}
inline F FillFrom(F x, int n, float fill) {
  constexpr int32_t kLanes[4] = {0, 1, 2, 3};
  const int32x4_t lanes = vld1q_s32(kLanes);
  ANTIPHON_QUARTERS(vbslq_f32(vcltq_s32(lanes, vdupq_n_s32(n - 4 * i)), x.v[i], vdupq_n_f32(fill)));
}
inline float32x4_t Exp2Quarter(float32x4_t n) {
  const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
  return vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23));
}
inline F Exp2(F n) { ANTIPHON_QUARTERS(Exp2Quarter(n.v[i])); }
inline float32x4_t AddToExponentQuarter(float32x4_t x, float32x4_t n) {
  const uint32x4_t add = vshlq_n_u32(vreinterpretq_u32_f32(n), 23);
  return vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(x), add));
}
inline F AddToExponent(F x, F n) { ANTIPHON_QUARTERS(AddToExponentQuarter(x.v[i], n.v[i])); }
inline float32x4_t WidenF16(const uint16_t* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
inline F LoadF16(const uint16_t* p) { ANTIPHON_QUARTERS(WidenF16(p + 4 * i)); }
inline float32x4_t WidenBf16(const uint16_t* p) {
  return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(p)), 16));
}
inline F LoadBf16(const uint16_t* p) { ANTIPHON_QUARTERS(WidenBf16(p + 4 * i)); }
inline float32x4_t LowHalves(float32x4_t pairs) {
  return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(pairs), 16));
}
inline F LowBf16(F pairs) { ANTIPHON_QUARTERS(LowHalves(pairs.v[i])); }
inline F HighBf16(F pairs) { ANTIPHON_QUARTERS(Keep(vdupq_n_u32(0xffff0000), pairs.v[i])); }
// The upper halves are bf16 numbers.
inline uint32x4_t NearestBf16(float32x4_t a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  return vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
}
inline void StoreBf16(uint16_t* p, F a) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vshrn_n_u32(NearestBf16(a.v[i]), 16));
}
inline float32x4_t RoundBf16Quarter(float32x4_t a) {
  return Keep(vdupq_n_u32(0xffff0000), vreinterpretq_f32_u32(NearestBf16(a)));
}
inline F RoundBf16(F a) { ANTIPHON_QUARTERS(RoundBf16Quarter(a.v[i])); }
inline int32_t StoreInt8(int8_t* p, F a) {
  int32x4_t q[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) q[i] = vcvtnq_s32_f32(a.v[i]);
  const int16x8_t low = vcombine_s16(vmovn_s32(q[0]), vmovn_s32(q[1]));
  const int16x8_t high = vcombine_s16(vmovn_s32(q[2]), vmovn_s32(q[3]));
  vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
  return vaddvq_s32(vaddq_s32(vaddq_s32(q[0], q[1]), vaddq_s32(q[2], q[3])));
}
inline float Sum(F a) {
  const float32x4_t four = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
inline float MaxOf(F a) {
  const float32x4_t four = Max4(Max4(a.v[0], a.v[2]), Max4(a.v[1], a.v[3]));
  const float32x4_t two = Max4(four, vextq_f32(four, four, 2));
  return vgetq_lane_f32(Max4(two, vextq_f32(two, two, 1)), 0);
}
inline float32x4_t LowPairs(float32x4_t a, float32x4_t b) {
  return vreinterpretq_f32_f64(vtrn1q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
}
inline float32x4_t HighPairs(float32x4_t a, float32x4_t b) {
  return vreinterpretq_f32_f64(vtrn2q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
}
// Quarter `from` of four rows, transposed, to quarter `to` of four others.
inline void Transpose4(const F* rows, int from, F* out, int to) {
  const float32x4_t a = rows[0].v[from], b = rows[1].v[from];
  const float32x4_t c = rows[2].v[from], d = rows[3].v[from];
  const float32x4_t even_low = vtrn1q_f32(a, b), odd_low = vtrn2q_f32(a, b);
  const float32x4_t even_high = vtrn1q_f32(c, d), odd_high = vtrn2q_f32(c, d);
  out[0].v[to] = LowPairs(even_low, even_high);
  out[1].v[to] = LowPairs(odd_low, odd_high);
  out[2].v[to] = HighPairs(even_low, even_high);
  out[3].v[to] = HighPairs(odd_low, odd_high);
}
inline void Transpose(F (&rows)[16]) {
  F out[16];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) Transpose4(rows + 4 * i, j, out + 4 * j, i);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) rows[i] = out[i];
}
// The lanes of `even` and `odd` in turns: the first sixteen, then the others.
inline void Interleave(F& even, F& odd) {
  const F e = even, o = odd;
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    even.v[2 * i] = vzip1q_f32(e.v[i], o.v[i]);
    even.v[2 * i + 1] = vzip2q_f32(e.v[i], o.v[i]);
    odd.v[2 * i] = vzip1q_f32(e.v[2 + i], o.v[2 + i]);
    odd.v[2 * i + 1] = vzip2q_f32(e.v[2 + i], o.v[2 + i]);
  }
}
#undef ANTIPHON_QUARTERS

}  // namespace
}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_SIMD_NEON_H_
