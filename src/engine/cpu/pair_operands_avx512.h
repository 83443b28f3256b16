// Keys, values, queries and weights of attention as pairs of bf16 numbers, for processors with
// AVX512_BF16. Their products have the bits of FloatOperands'.
#ifndef ANTIPHON_ENGINE_CPU_PAIR_OPERANDS_AVX512_H_
#define ANTIPHON_ENGINE_CPU_PAIR_OPERANDS_AVX512_H_

#include <immintrin.h>

namespace antiphon::engine::cpu {
namespace {

// sum + the product of the upper halves, then + that of the lower ones.
inline F PairFma(F a, F b, F sum) {
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_castps_si512(a.v),
                           (__m512bh)_mm512_castps_si512(b.v))};
}
inline F KeepLow(F pairs) {
  const __m512i low = _mm512_set1_epi32(0xffff);
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs.v), low))};
}
// Lane i: number `dim` + i of `first` below that of `second`.
inline F InterleaveBf16(const std::byte* first, const std::byte* second, int dim) {
  const __m512i low =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + 2 * dim)));
  const __m512i high =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second + 2 * dim)));
  return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
}

// Two bf16 numbers a step, in the halves of a 32-bit lane.
struct PairOperands {
  using Cache = Bf16Cache;
  static constexpr int kNumbers = 2;
  static int Index(int step) { return step; }
  static F Product(F a, F b, F sum) { return PairFma(a, b, sum); }

  static void PackQuery(const float* query, int padded_dim, float* out) {
    uint16_t* numbers = reinterpret_cast<uint16_t*>(out);
    for (int d = 0; d < padded_dim; d += 16) StoreBf16(numbers + d, Load(query + d));
  }
  // keys: [pair of dims][64 tokens].
  static void PackKeys(const Attention& a, const TileTokens& tile, int t, float* keys) {
    for (; t < tile.count; t += 16) {
      int dim = 0;
      for (; dim + 32 <= a.head_dim; dim += 32) {
        F k[16];
        TurnPairs(a, tile, t, dim, k);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) Store(keys + (dim / 2 + i) * kAttentionTile + t, k[i]);
      }
      const int lanes = tile.count - t < 16 ? tile.count - t : 16;
      for (; dim < a.padded_dim; dim += 2) {
        uint16_t pairs[32] = {};
        const size_t bytes = dim + 2 <= a.head_dim ? 4 : dim < a.head_dim ? 2 : 0;
        for (int i = 0; i < lanes; ++i) {
          std::memcpy(pairs + 2 * i, tile.at[t + i] + a.key_offset + 2 * dim, bytes);
        }
        std::memcpy(keys + dim / 2 * kAttentionTile + t, pairs, sizeof(pairs));
      }
    }
  }
  // values: [pair of tokens][dim].
  static void PackValues(const Attention& a, const TileTokens& tile, float* values) {
    for (int t = 0; t < tile.count; t += 2) {
      float* out = values + t / 2 * a.padded_dim;
      const std::byte* first = tile.at[t] + a.value_offset;
      const std::byte* second = tile.at[t + 1] + a.value_offset;
      int dim = 0;
      for (; dim + 16 <= a.head_dim; dim += 16)
        Store(out + dim, InterleaveBf16(first, second, dim));
      if (dim == a.head_dim) continue;
      std::byte tails[2][2 * 16] = {};
      std::memcpy(tails[0], first + 2 * dim, static_cast<size_t>(2 * (a.head_dim - dim)));
      std::memcpy(tails[1], second + 2 * dim, static_cast<size_t>(2 * (a.head_dim - dim)));
      Store(out + dim, InterleaveBf16(tails[0], tails[1], 0));
    }
  }
  struct CachedValues {
    static constexpr bool kTurned = true;
    const Attention& a;
    const TileTokens& tile;
    LinesAhead& ahead;
    F At(int pair, int dim) const {
      return InterleaveBf16(tile.at[2 * pair] + a.value_offset,
                            tile.at[2 * pair + 1] + a.value_offset, dim);
    }
    // Of 32 dims, two instructions instead of eight: of each eight dims the first four, or the
    // rest.
    F Front(int pair, int dim) const {
      return {
          _mm512_castsi512_ps(_mm512_unpacklo_epi16(Line(2 * pair, dim), Line(2 * pair + 1, dim)))};
    }
    F Rear(int pair, int dim) const {
      return {
          _mm512_castsi512_ps(_mm512_unpackhi_epi16(Line(2 * pair, dim), Line(2 * pair + 1, dim)))};
    }
    __m512i Line(int t, int dim) const {
      return _mm512_loadu_si512(tile.at[t] + a.value_offset + 2 * dim);
    }
    static void TurnBack(F& low, F& high) {
      const __m512i front = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
      const __m512i rear = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
      const __m512d a = _mm512_castps_pd(low.v), b = _mm512_castps_pd(high.v);
      low = {_mm512_castpd_ps(_mm512_permutex2var_pd(a, front, b))};
      high = {_mm512_castpd_ps(_mm512_permutex2var_pd(a, rear, b))};
    }
  };
  static constexpr int kLinesBesideScores = 20;
  static constexpr int kLinesBesideSoftmax = 32;
  static F AddLone(F weights, F values, F sum) { return PairFma(weights, KeepLow(values), sum); }
  // The processor's rounding is RoundBf16's but for subnormal numbers, which weights never are.
  static F StoreWeights(F x, float* weights, int t) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(x.v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<uint16_t*>(weights) + t),
                        rounded);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16))};
  }
};

}  // namespace
}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_PAIR_OPERANDS_AVX512_H_
