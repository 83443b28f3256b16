#include "engine/cpu/kernels_x86.h"
#include "engine/cpu/simd_avx2.h"
#include "engine/cpu/kernels-inl.h"

namespace antiphon::engine::cpu {
namespace {

// Sum of a block's products for 8 output rows. The pairs that vpmaddubsw adds stay below 2^15: for
// nibbles even eight of them do (8 * 2 * 15 * 127 = 30,480); for bytes the sign of the weight moves
// to the activation, and one pair is at most 2 * 128 * 127.
template <PackedType kType>
inline __m256i BlockSum(const __m256i (&w)[8], const std::byte* values) {
  const __m256i ones = _mm256_set1_epi16(1);
  const int32_t* x = reinterpret_cast<const int32_t*>(values);
  if constexpr (kType == PackedType::kQ8_0) {
    __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m256i a = _mm256_sign_epi8(_mm256_set1_epi32(x[i]), w[i]);
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w[i]), a);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
    }
    return sum;
  } else {
    __m256i pairs = _mm256_maddubs_epi16(w[0], _mm256_set1_epi32(x[0]));
#pragma GCC unroll 7
    for (int i = 1; i < 8; ++i) {
      pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w[i], _mm256_set1_epi32(x[i])));
    }
    return _mm256_madd_epi16(pairs, ones);
  }
}

// Half a group: 8 output rows against kRows activation rows of a tile with `tile_rows`.
template <PackedType kType, int kRows>
void QuantTile(const MatMul& m, const std::byte* weights, const std::byte* tile, int tile_rows,
               int first, int half, float* out) {
  constexpr size_t kBlockBytes = PackedGroupBytes(kType, kQuantBlock);
  constexpr size_t kScaleBytes = kType == PackedType::kQ4_1 ? 64 : 32;
  const size_t rows = static_cast<size_t>(tile_rows);
  const size_t blocks = m.columns / kQuantBlock;
  __m256 acc[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) acc[r] = _mm256_setzero_ps();
  const __m256i low = _mm256_set1_epi8(15);
  for (size_t b = 0; b < blocks; ++b, weights += kBlockBytes, tile += rows * kQuantRowBlockBytes) {
    const __m256 scale = WidenF16(reinterpret_cast<const uint16_t*>(weights) + 8 * half);
    const std::byte* quants = weights + kScaleBytes + 32 * half;
    __m256i w[8];
    if constexpr (kType == PackedType::kQ8_0) {
      const __m256i bias = _mm256_set1_epi8(static_cast<char>(-128));
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        w[i] = _mm256_xor_si256(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(quants + 64 * i)), bias);
      }
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256i packed =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(quants + 64 * i));
        w[i] = _mm256_and_si256(packed, low);
        w[i + 4] = _mm256_and_si256(_mm256_srli_epi16(packed, 4), low);
      }
    }
    const std::byte* numbers = tile + rows * kQuantBlock;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const size_t row = static_cast<size_t>(first + r);
      __m256i sum = BlockSum<kType>(w, tile + row * kQuantBlock);
      if constexpr (kType == PackedType::kQ4_0) {
        const __m256i offset =
            _mm256_set1_epi32(reinterpret_cast<const int32_t*>(numbers + 8 * rows)[row]);
        sum = _mm256_add_epi32(sum, _mm256_srai_epi32(offset, 4));
      }
      const __m256 scaled = _mm256_mul_ps(
          _mm256_cvtepi32_ps(sum), _mm256_set1_ps(reinterpret_cast<const float*>(numbers)[row]));
      acc[r] = _mm256_fmadd_ps(scaled, scale, acc[r]);
      if constexpr (kType == PackedType::kQ4_1) {
        const __m256 minimum =
            WidenF16(reinterpret_cast<const uint16_t*>(weights + 32) + 8 * half);
        acc[r] = _mm256_fmadd_ps(
            minimum, _mm256_set1_ps(reinterpret_cast<const float*>(numbers + 4 * rows)[row]),
            acc[r]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    float* o = out + r * m.out_stride + 8 * half;
    _mm256_storeu_ps(o, m.add ? _mm256_add_ps(acc[r], _mm256_loadu_ps(o)) : acc[r]);
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
        for (; r + 4 <= rows; r += 4) {
          QuantTile<kType, 4>(m, weights, tile, rows, r, half, out + r * m.out_stride);
        }
        for (; r < rows; ++r) {
          QuantTile<kType, 1>(m, weights, tile, rows, r, half, out + r * m.out_stride);
        }
      }
    }
  }
}

constexpr Kernels MakeTable() {
  Kernels k = FloatKernels("avx2");
  k.matmul[static_cast<int>(PackedType::kQ8_0)] = QuantMatMul<PackedType::kQ8_0>;
  k.matmul[static_cast<int>(PackedType::kQ4_0)] = QuantMatMul<PackedType::kQ4_0>;
  k.matmul[static_cast<int>(PackedType::kQ4_1)] = QuantMatMul<PackedType::kQ4_1>;
  return k;
}
constexpr Kernels kTable = MakeTable();

}  // namespace

const Kernels& Avx2Kernels() { return kTable; }

}  // namespace antiphon::engine::cpu
