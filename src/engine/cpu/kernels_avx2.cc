#include "engine/cpu/kernels_x86.h"
#include "engine/cpu/simd_avx2.h"
#include "engine/cpu/kernels-inl.h"

namespace antiphon::engine::cpu {
namespace {

inline __m256i Load256(const std::byte* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

// Bits `mask` of `high` join those of `values`.
inline __m256i Join(__m256i values, __m256i high, __m256i mask) {
  return _mm256_or_si256(values, _mm256_and_si256(high, mask));
}

// The values of a block for one half of the group: `block` is moved to its lanes. Step i holds
// columns 4i to 4i + 3. kQ8_0's come signed, the others as they are stored.
template <PackedType kType>
inline void Unpack(const std::byte* block, __m256i (&w)[8]) {
  constexpr QuantFormat kFormat = FormatOf(kType);
  const std::byte* high = block + kFormat.head_bytes;
  const std::byte* values = high + kFormat.high_bytes;
  if constexpr (kFormat.bits == 8) {
    const __m256i bias = _mm256_set1_epi8(static_cast<char>(-128));
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) w[i] = _mm256_xor_si256(Load256(values + 64 * i), bias);
  } else {
    const __m256i low = _mm256_set1_epi8(15);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m256i packed = Load256(values + 64 * i);
      w[i] = _mm256_and_si256(packed, low);
      w[i + 4] = _mm256_and_si256(_mm256_srli_epi16(packed, 4), low);
    }
  }
  if constexpr (kFormat.bits == 5) {
    const __m256i fifth = _mm256_set1_epi8(16);
    const __m256i bits = Load256(high);
    w[0] = Join(w[0], _mm256_slli_epi16(bits, 4), fifth);
    w[1] = Join(w[1], _mm256_slli_epi16(bits, 3), fifth);
    w[2] = Join(w[2], _mm256_slli_epi16(bits, 2), fifth);
    w[3] = Join(w[3], _mm256_slli_epi16(bits, 1), fifth);
    w[4] = Join(w[4], bits, fifth);
    w[5] = Join(w[5], _mm256_srli_epi16(bits, 1), fifth);
    w[6] = Join(w[6], _mm256_srli_epi16(bits, 2), fifth);
    w[7] = Join(w[7], _mm256_srli_epi16(bits, 3), fifth);
  }
  if constexpr (kFormat.bits == 6) {
    const __m256i pair = _mm256_set1_epi8(48);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i bits = Load256(high + 64 * half);
      __m256i* step = w + 4 * half;
      step[0] = Join(step[0], _mm256_slli_epi16(bits, 4), pair);
      step[1] = Join(step[1], _mm256_slli_epi16(bits, 2), pair);
      step[2] = Join(step[2], bits, pair);
      step[3] = Join(step[3], _mm256_srli_epi16(bits, 2), pair);
    }
  }
}

// Sum of the products of `kSteps` steps for 8 output rows. The pairs that vpmaddubsw adds stay
// below 2^15, and so do so many of them that are added before they are widened: 8 * 2 * 15 * 127 =
// 30,480, 4 * 2 * 31 * 127 = 31,496 and 2 * 2 * 63 * 127 = 32,004. For bytes the sign of the weight
// moves to the activation, and one pair is at most 2 * 128 * 127.
template <int kBits, int kSteps>
inline __m256i StepSum(const __m256i* w, const std::byte* values) {
  constexpr int kRun = kBits == 4 ? 8 : kBits == 5 ? 4 : kBits == 6 ? 2 : 1;
  const __m256i ones = _mm256_set1_epi16(1);
  const int32_t* x = reinterpret_cast<const int32_t*>(values);
  __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 8
  for (int first = 0; first < kSteps; first += kRun) {
    __m256i pairs = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int i = first; i < first + kRun; ++i) {
      const __m256i a = _mm256_set1_epi32(x[i]);
      __m256i products;
      if constexpr (kBits == 8) {
        products = _mm256_maddubs_epi16(_mm256_abs_epi8(w[i]), _mm256_sign_epi8(a, w[i]));
      } else {
        products = _mm256_maddubs_epi16(w[i], a);
      }
      pairs = i == first ? products : _mm256_add_epi16(pairs, products);
    }
    const __m256i wide = _mm256_madd_epi16(pairs, ones);
    sum = first == 0 ? wide : _mm256_add_epi32(sum, wide);
  }
  return sum;
}

// The numbers of a tile's rows, of one block.
inline const QuantNumbers* NumbersOf(const std::byte* tile, size_t rows) {
  return reinterpret_cast<const QuantNumbers*>(tile + rows * kQuantBlock);
}

template <int kRows>
inline void StoreHalf(const MatMul& m, const __m256 (&acc)[kRows], float* out) {
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    float* o = out + r * m.out_stride;
    _mm256_storeu_ps(o, m.add ? _mm256_add_ps(acc[r], _mm256_loadu_ps(o)) : acc[r]);
  }
}

// Half a group: 8 output rows against kRows activation rows of a tile with `rows`, from row
// `first`.
template <PackedType kType, int kRows>
void QuantTile(const MatMul& m, const std::byte* weights, const std::byte* tile, size_t rows,
               size_t first, int half, float* out) {
  constexpr QuantFormat kFormat = FormatOf(kType);
  const size_t blocks = m.columns / kQuantBlock;
  __m256 acc[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) acc[r] = _mm256_setzero_ps();
  for (size_t b = 0; b < blocks; ++b) {
    const uint16_t* head = reinterpret_cast<const uint16_t*>(weights) + 8 * half;
    const __m256 scale = WidenF16(head);
    __m256i w[8];
    Unpack<kType>(weights + 32 * half, w);
    const QuantNumbers* numbers = NumbersOf(tile, rows);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const size_t row = first + static_cast<size_t>(r);
      __m256i sum = StepSum<kFormat.bits, 8>(w, tile + row * kQuantBlock);
      if constexpr (!kFormat.minima && kFormat.bits != 8) {
        sum = _mm256_add_epi32(
            sum, _mm256_srai_epi32(_mm256_set1_epi32(numbers[row].offset), 8 - kFormat.bits));
      }
      const __m256 scaled =
          _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(numbers[row].scale));
      acc[r] = _mm256_fmadd_ps(scaled, scale, acc[r]);
      if constexpr (kFormat.minima) {
        acc[r] = _mm256_fmadd_ps(WidenF16(head + 16), _mm256_set1_ps(numbers[row].sum), acc[r]);
      }
    }
    weights += BlockBytes(kFormat);
    tile += rows * kQuantRowBlockBytes;
  }
  StoreHalf(m, acc, out + 8 * half);
}

inline __m256 WidenU8(const std::byte* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline __m256 WidenI8(const std::byte* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

// The products of a super-block: to `sums` those of kRows rows.
template <PackedType kType, int kRows>
inline void SuperProducts(const std::byte* weights, const std::byte* tile, size_t rows,
                          size_t first, int half, __m256 (&sums)[kRows]) {
  constexpr QuantFormat kFormat = FormatOf(kType);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sums[r] = _mm256_setzero_ps();
  for (int b = 0; b < kSuperBlock / kQuantBlock; ++b) {
    __m256i w[8];
    Unpack<kType>(weights + 32 * half, w);
    const QuantNumbers* numbers = NumbersOf(tile, rows);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const size_t row = first + static_cast<size_t>(r);
      const std::byte* x = tile + row * kQuantBlock;
      __m256 scaled;
      if constexpr (kType == PackedType::kQ6_K) {
        const __m256i offset = _mm256_set1_epi32(numbers[row].half);
        const __m256i both = _mm256_srai_epi32(_mm256_set1_epi32(numbers[row].offset), 2);
        const __m256i left = _mm256_add_epi32(StepSum<6, 4>(w, x), offset);
        const __m256i right =
            _mm256_add_epi32(StepSum<6, 4>(w + 4, x + 16), _mm256_sub_epi32(both, offset));
        scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(left), WidenI8(weights + 8 * half));
        scaled =
            _mm256_fmadd_ps(_mm256_cvtepi32_ps(right), WidenI8(weights + 16 + 8 * half), scaled);
      } else {
        scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(StepSum<kFormat.bits, 8>(w, x)),
                               WidenU8(weights + 8 * half));
      }
      sums[r] = _mm256_fmadd_ps(scaled, _mm256_set1_ps(numbers[row].scale), sums[r]);
    }
    weights += BlockBytes(kFormat);
    tile += rows * kQuantRowBlockBytes;
  }
}

// The minima of a super-block, likewise.
template <PackedType kType, int kRows>
inline void SuperMinima(const std::byte* weights, const std::byte* tile, size_t rows, size_t first,
                        int half, __m256 (&sums)[kRows]) {
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sums[r] = _mm256_setzero_ps();
  for (int b = 0; b < kSuperBlock / kQuantBlock; ++b) {
    const __m256 minimum = WidenU8(weights + 16 + 8 * half);
    const QuantNumbers* numbers = NumbersOf(tile, rows) + first;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      sums[r] = _mm256_fmadd_ps(minimum, _mm256_set1_ps(numbers[r].sum), sums[r]);
    }
    weights += BlockBytes(FormatOf(kType));
    tile += rows * kQuantRowBlockBytes;
  }
}

// As QuantTile, for the formats with super-blocks.
template <PackedType kType, int kRows>
void SuperTile(const MatMul& m, const std::byte* weights, const std::byte* tile, size_t rows,
               size_t first, int half, float* out) {
  constexpr QuantFormat kFormat = FormatOf(kType);
  constexpr size_t kSuperTileBlocks = kSuperBlock / kQuantBlock;
  __m256 acc[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) acc[r] = _mm256_setzero_ps();
  for (size_t super = 0; super < m.columns / kSuperBlock; ++super) {
    const uint16_t* head = reinterpret_cast<const uint16_t*>(weights) + 8 * half;
    const std::byte* blocks = weights + kFormat.super_bytes;
    __m256 sums[kRows];
    SuperProducts<kType>(blocks, tile, rows, first, half, sums);
    const __m256 scale = WidenF16(head);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) acc[r] = _mm256_fmadd_ps(sums[r], scale, acc[r]);
    if constexpr (kFormat.minima) {
      SuperMinima<kType>(blocks, tile, rows, first, half, sums);
      const __m256 minimum = WidenF16(head + 16);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) acc[r] = _mm256_fnmadd_ps(sums[r], minimum, acc[r]);
    }
    weights = blocks + kSuperTileBlocks * BlockBytes(kFormat);
    tile += kSuperTileBlocks * rows * kQuantRowBlockBytes;
  }
  StoreHalf(m, acc, out + 8 * half);
}

template <PackedType kType, int kRows>
inline void AnyTile(const MatMul& m, const std::byte* weights, const std::byte* tile, int rows,
                    int first, int half, float* out) {
  const size_t row = static_cast<size_t>(first);
  if constexpr (FormatOf(kType).super_bytes == 0) {
    QuantTile<kType, kRows>(m, weights, tile, static_cast<size_t>(rows), row, half,
                            out + row * m.out_stride);
  } else {
    SuperTile<kType, kRows>(m, weights, tile, static_cast<size_t>(rows), row, half,
                            out + row * m.out_stride);
  }
}

template <PackedType kType>
void QuantMatMul(const MatMul& m) {
  const size_t group_bytes = PackedGroupBytes(kType, m.columns);
  const size_t tile_bytes = QuantTileBytes(kRowTile, m.columns);
  for (int group = 0; group < m.groups; ++group) {
    const std::byte* weights = m.weights + group * group_bytes;
    const std::byte* tile = m.x_quant;
    for (int row = 0; row < m.rows; row += kRowTile, tile += tile_bytes) {
      const int rows = m.rows - row < kRowTile ? m.rows - row : kRowTile;
      float* out = m.out + static_cast<size_t>(row) * m.out_stride + group * kGroupRows;
      for (int half = 0; half < 2; ++half) {
        int r = 0;
        for (; r + 4 <= rows; r += 4) AnyTile<kType, 4>(m, weights, tile, rows, r, half, out);
        for (; r < rows; ++r) AnyTile<kType, 1>(m, weights, tile, rows, r, half, out);
      }
    }
  }
}

constexpr Kernels kTable = MakeTable("avx2");

}  // namespace

const Kernels& Avx2Kernels() { return kTable; }

}  // namespace antiphon::engine::cpu
