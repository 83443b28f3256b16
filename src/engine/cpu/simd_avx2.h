// Sixteen float lanes in two AVX2 registers (with FMA and F16C). Equals simd_scalar.h bit for bit.
#ifndef ANTIPHON_ENGINE_CPU_SIMD_AVX2_H_
#define ANTIPHON_ENGINE_CPU_SIMD_AVX2_H_

#include <immintrin.h>

#include <cstdint>

namespace antiphon::engine::cpu {
namespace {

struct F {
  __m256 lo, hi;
};

constexpr int kTileQueries = 4;
constexpr int kManyQueries = 3;
constexpr int TileVectors(int queries) { return queries == 4 ? 1 : 2; }
constexpr bool kTransposesInRegisters = true;  // 16 vectors and what goes with them
constexpr int kFloatRows = 3;
constexpr int kFloatGroups = 2;

// What `p` points to is loaded anew, not kept: there are not the registers.
template <typename T>
inline void Forget(const T*& p) {
  __asm__ volatile("" : "+r"(p));
}
inline F Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F Splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F Load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void Store(float* p, F a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline F Add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F Sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F Mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F Div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F Fma(F a, F b, F c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F Max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F Min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline F Abs(F a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline F ZeroBelow(F x, F threshold, F value) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.lo, threshold.lo, _CMP_GE_OQ), value.lo),
          _mm256_and_ps(_mm256_cmp_ps(x.hi, threshold.hi, _CMP_GE_OQ), value.hi)};
}
inline F FillFrom(F x, int n, float fill) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256 f = _mm256_set1_ps(fill);
  const __m256i keep_lo = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);
  const __m256i keep_hi = _mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lane);
  return {_mm256_blendv_ps(f, x.lo, _mm256_castsi256_ps(keep_lo)),
          _mm256_blendv_ps(f, x.hi, _mm256_castsi256_ps(keep_hi))};
}
inline __m256 Exp2Half(__m256 n) {
  const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
}
inline F Exp2(F n) { return {Exp2Half(n.lo), Exp2Half(n.hi)}; }
inline __m256 AddToExponentHalf(__m256 x, __m256 n) {
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_castps_si256(n), 23)));
}
inline F AddToExponent(F x, F n) {
  return {AddToExponentHalf(x.lo, n.lo), AddToExponentHalf(x.hi, n.hi)};
}
inline __m256 WidenF16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline F LoadF16(const uint16_t* p) { return {WidenF16(p), WidenF16(p + 8)}; }
inline __m256 WidenBf16(const uint16_t* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
inline F LoadBf16(const uint16_t* p) { return {WidenBf16(p), WidenBf16(p + 8)}; }
inline __m256 LowHalves(__m256 pairs) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs), 16));
}
inline F LowBf16(F pairs) { return {LowHalves(pairs.lo), LowHalves(pairs.hi)}; }
inline F HighBf16(F pairs) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xffff0000)));
  return {_mm256_and_ps(pairs.lo, mask), _mm256_and_ps(pairs.hi, mask)};
}
inline __m256i NearestBf16(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))),
                           16);
}
inline void StoreBf16(uint16_t* p, F a) {
  const __m256i packed = _mm256_packus_epi32(NearestBf16(a.lo), NearestBf16(a.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
inline __m256 RoundBf16Half(__m256 a) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(NearestBf16(a), 16));
}
inline F RoundBf16(F a) { return {RoundBf16Half(a.lo), RoundBf16Half(a.hi)}; }
inline int32_t StoreInt8(int8_t* p, F a) {
  const __m256i lo = _mm256_cvtps_epi32(a.lo);
  const __m256i hi = _mm256_cvtps_epi32(a.hi);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(lo, hi), 0xd8);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  const __m256i sum8 = _mm256_add_epi32(lo, hi);
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sum8), _mm256_extracti128_si256(sum8, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
  return _mm_cvtsi128_si32(sum);
}
inline float Sum(F a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float MaxOf(F a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline void Transpose8(__m256 (&r)[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x20);
    r[4 + j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x31);
  }
}
[[gnu::always_inline]] inline void Transpose(F (&rows)[16]) {
  __m256 a[8], b[8], c[8], d[8];
  for (int i = 0; i < 8; ++i) {
    a[i] = rows[i].lo;
    b[i] = rows[i].hi;
    c[i] = rows[8 + i].lo;
    d[i] = rows[8 + i].hi;
  }
  Transpose8(a);
  Transpose8(b);
  Transpose8(c);
  Transpose8(d);
  for (int i = 0; i < 8; ++i) {
    rows[i] = {a[i], c[i]};
    rows[8 + i] = {b[i], d[i]};
  }
}

// The lanes of `even` and `odd` in turns: the first sixteen, then the others.
inline void InterleaveHalf(__m256 even, __m256 odd, F& out) {
  const __m256 a = _mm256_unpacklo_ps(even, odd), b = _mm256_unpackhi_ps(even, odd);
  out = {_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)};
}
inline void Interleave(F& even, F& odd) {
  const F e = even, o = odd;
  InterleaveHalf(e.lo, o.lo, even);
  InterleaveHalf(e.hi, o.hi, odd);
}
}  // namespace
}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_SIMD_AVX2_H_
