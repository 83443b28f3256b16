// What the integer products of AVX-512 and of AMX share: how a block's values are unpacked, and
// what is done with the integer sums.
#ifndef ANTIPHON_ENGINE_CPU_QUANT_AVX512_INL_H_
#define ANTIPHON_ENGINE_CPU_QUANT_AVX512_INL_H_

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "engine/cpu/kernels.h"
#include "engine/cpu/simd_avx512.h"

namespace antiphon::engine::cpu {
namespace {

// Bits `mask` of `high` join those of `values`.
inline __m512i Join(__m512i values, __m512i high, __m512i mask) {
  return _mm512_ternarylogic_epi32(values, high, mask, 0xf8);  // values | (high & mask)
}

// The values of a block as they are stored; step i holds columns 4i to 4i + 3.
template <PackedType kType>
inline void Unpack(const std::byte* block, __m512i (&w)[8]) {
  constexpr QuantFormat kFormat = FormatOf(kType);
  const std::byte* high = block + kFormat.head_bytes;
  const std::byte* values = high + kFormat.high_bytes;
  if constexpr (kFormat.bits == 8) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) w[i] = _mm512_loadu_si512(values + 64 * i);
  } else {
    const __m512i low = _mm512_set1_epi8(15);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i packed = _mm512_loadu_si512(values + 64 * i);
      w[i] = _mm512_and_si512(packed, low);
      w[i + 4] = _mm512_and_si512(_mm512_srli_epi16(packed, 4), low);
    }
  }
  if constexpr (kFormat.bits == 5) {
    const __m512i fifth = _mm512_set1_epi8(16);
    const __m512i bits = _mm512_loadu_si512(high);
    w[0] = Join(w[0], _mm512_slli_epi16(bits, 4), fifth);
    w[1] = Join(w[1], _mm512_slli_epi16(bits, 3), fifth);
    w[2] = Join(w[2], _mm512_slli_epi16(bits, 2), fifth);
    w[3] = Join(w[3], _mm512_slli_epi16(bits, 1), fifth);
    w[4] = Join(w[4], bits, fifth);
    w[5] = Join(w[5], _mm512_srli_epi16(bits, 1), fifth);
    w[6] = Join(w[6], _mm512_srli_epi16(bits, 2), fifth);
    w[7] = Join(w[7], _mm512_srli_epi16(bits, 3), fifth);
  }
  if constexpr (kFormat.bits == 6) {
    const __m512i pair = _mm512_set1_epi8(48);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512i bits = _mm512_loadu_si512(high + 64 * half);
      __m512i* step = w + 4 * half;
      step[0] = Join(step[0], _mm512_slli_epi16(bits, 4), pair);
      step[1] = Join(step[1], _mm512_slli_epi16(bits, 2), pair);
      step[2] = Join(step[2], bits, pair);
      step[3] = Join(step[3], _mm512_srli_epi16(bits, 2), pair);
    }
  }
}

template <bool kFine>
constexpr int kPlacesOf = kFine ? 2 : 1;  // of a row in a tile

// A tile's rows in one block.
template <int kRows, bool kFine>
struct RowBlock {
  static constexpr int kPlaces = kRows * kPlacesOf<kFine>;
  static constexpr size_t kBytes = kPlaces * kQuantRowBlockBytes;
  explicit RowBlock(const std::byte* tile)
      : values(reinterpret_cast<const int32_t*>(tile)),
        numbers(reinterpret_cast<const QuantNumbers*>(tile + kPlaces * kQuantBlock)) {}
  const QuantNumbers& NumbersOf(int row) const { return numbers[row * kPlacesOf<kFine>]; }
  const int32_t* values;  // [place][8]: four columns each
  const QuantNumbers* numbers;
};

// The sum of a row at 16 bits, of those of its two places.
inline __m512i JoinSums(__m512i upper, __m512i lower) {
  return _mm512_add_epi32(_mm512_slli_epi32(upper, 8), lower);
}

inline __m512 LoadHalves(const std::byte* p) {
  return LoadF16(reinterpret_cast<const uint16_t*>(p)).v;
}
inline __m512 WidenU8(const std::byte* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline __m512 WidenI8(const std::byte* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// What a row's products of unsigned values with an offset start from: minus the offset times the
// sum of the activations.
template <PackedType kType>
inline __m512i OffsetOf(const QuantNumbers& numbers) {
  constexpr QuantFormat kFormat = FormatOf(kType);
  if constexpr (kFormat.minima) return _mm512_setzero_si512();
  const __m512i offset = _mm512_set1_epi32(numbers.offset);
  if constexpr (kFormat.bits == 8) return offset;
  return _mm512_srai_epi32(offset, 8 - kFormat.bits);
}
// The same of the halves of a block of kQ6_K.
inline __m512i LeftOffset(const QuantNumbers& numbers) { return _mm512_set1_epi32(numbers.half); }
inline __m512i RightOffset(const QuantNumbers& numbers) {
  return _mm512_sub_epi32(OffsetOf<PackedType::kQ6_K>(numbers), LeftOffset(numbers));
}

// One row and block of a format without super-blocks: `sum` is of the products, offset included.
template <PackedType kType>
inline __m512 AddBlock(__m512i sum, const QuantNumbers& numbers, __m512 scale, __m512 minimum,
                       __m512 acc) {
  const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(numbers.scale));
  acc = _mm512_fmadd_ps(scaled, scale, acc);
  if constexpr (FormatOf(kType).minima) {
    acc = _mm512_fmadd_ps(minimum, _mm512_set1_ps(numbers.sum), acc);
  }
  return acc;
}
// Of kQ4_K and kQ5_K, to the products of a super-block.
inline __m512 AddK45(__m512i sum, const QuantNumbers& numbers, __m512 scale, __m512 products) {
  return _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale),
                         _mm512_set1_ps(numbers.scale), products);
}
// Of kQ6_K, whose halves of a block have scales of their own.
inline __m512 AddK6(__m512i left, __m512i right, const QuantNumbers& numbers, __m512 left_scale,
                    __m512 right_scale, __m512 products) {
  const __m512 scaled = _mm512_fmadd_ps(_mm512_cvtepi32_ps(right), right_scale,
                                        _mm512_mul_ps(_mm512_cvtepi32_ps(left), left_scale));
  return _mm512_fmadd_ps(scaled, _mm512_set1_ps(numbers.scale), products);
}

// Takes the minima of a super-block off the rows' sums. `tile`: the rows in its first block.
template <PackedType kType, bool kFine, int kRows>
inline void SubtractMinima(const std::byte* super, const std::byte* tile, __m512 (&acc)[kRows]) {
  constexpr QuantFormat kFormat = FormatOf(kType);
  constexpr size_t kBlocks = kSuperBlock / kQuantBlock;
  const std::byte* blocks = super + kFormat.super_bytes;
  __m512 minima[kBlocks];
#pragma GCC unroll 8
  for (size_t b = 0; b < kBlocks; ++b) {
    minima[b] = WidenU8(blocks + b * BlockBytes(kFormat) + 16);
  }
  const __m512 minimum = LoadHalves(super + 32);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 8
    for (size_t b = 0; b < kBlocks; ++b) {
      const RowBlock<kRows, kFine> rows(tile + b * RowBlock<kRows, kFine>::kBytes);
      sum = _mm512_fmadd_ps(minima[b], _mm512_set1_ps(rows.NumbersOf(r).sum), sum);
    }
    acc[r] = _mm512_fnmadd_ps(sum, minimum, acc[r]);
  }
}

template <int kRows>
inline void StoreRows(const MatMul& m, const __m512 (&acc)[kRows], float* out) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    float* o = out + r * m.out_stride;
    _mm512_storeu_ps(o, m.add ? _mm512_add_ps(acc[r], _mm512_loadu_ps(o)) : acc[r]);
  }
}

}  // namespace
}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_QUANT_AVX512_INL_H_
