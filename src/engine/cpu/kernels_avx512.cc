#include "engine/cpu/kernels_x86.h"
#include "engine/cpu/simd_avx512.h"
#include "engine/cpu/kernels-inl.h"

namespace antiphon::engine::cpu {
namespace {

constexpr int kBunch = 4;

// One group of 16 output rows against kRows activation rows: the block's weights stay in eight
// registers while the rows pass by; activations come as broadcasts from memory.
template <PackedType kType, int kRows>
void QuantTile(const MatMul& m, const std::byte* weights, const std::byte* tile, float* out) {
  constexpr size_t kBlockBytes = PackedGroupBytes(kType, kQuantBlock);
  constexpr size_t kScaleBytes = kType == PackedType::kQ4_1 ? 64 : 32;
  constexpr size_t kTileBlockBytes = kRows * kQuantRowBlockBytes;
  const size_t blocks = m.columns / kQuantBlock;
  __m512 acc[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) acc[r] = _mm512_setzero_ps();
  const __m512i low = _mm512_set1_epi8(15);
  for (size_t b = 0; b < blocks; ++b, weights += kBlockBytes, tile += kTileBlockBytes) {
    const __m512 scale = LoadF16(reinterpret_cast<const uint16_t*>(weights)).v;
    __m512 minimum = _mm512_setzero_ps();
    if constexpr (kType == PackedType::kQ4_1) {
      minimum = LoadF16(reinterpret_cast<const uint16_t*>(weights + 32)).v;
    }
    __m512i w[8];
    if constexpr (kType == PackedType::kQ8_0) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) w[i] = _mm512_loadu_si512(weights + kScaleBytes + 64 * i);
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512i packed = _mm512_loadu_si512(weights + kScaleBytes + 64 * i);
        w[i] = _mm512_and_si512(packed, low);
        w[i + 4] = _mm512_and_si512(_mm512_srli_epi16(packed, 4), low);
      }
    }
    const std::byte* numbers = tile + kRows * kQuantBlock;
    const float* scales = reinterpret_cast<const float*>(numbers);
    const float* sums = scales + kRows;
    const int32_t* offsets = reinterpret_cast<const int32_t*>(sums + kRows);
    // Rows advance together in small bunches: one row's eight dependent steps hide another's.
#pragma GCC unroll 16
    for (int first = 0; first < kRows; first += kBunch) {
      const int bunch = kRows - first < kBunch ? kRows - first : kBunch;
      __m512i sum[kBunch];
#pragma GCC unroll 4
      for (int j = 0; j < bunch; ++j) {
        sum[j] = _mm512_setzero_si512();
        if constexpr (kType != PackedType::kQ4_1) {
          sum[j] = _mm512_set1_epi32(offsets[first + j]);
          if constexpr (kType == PackedType::kQ4_0) sum[j] = _mm512_srai_epi32(sum[j], 4);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < bunch; ++j) {
          const int32_t* x = reinterpret_cast<const int32_t*>(tile + (first + j) * kQuantBlock);
          sum[j] = _mm512_dpbusd_epi32(sum[j], w[i], _mm512_set1_epi32(x[i]));
        }
      }
#pragma GCC unroll 4
      for (int j = 0; j < bunch; ++j) {
        const int r = first + j;
        const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[j]), _mm512_set1_ps(scales[r]));
        acc[r] = _mm512_fmadd_ps(scaled, scale, acc[r]);
        if constexpr (kType == PackedType::kQ4_1) {
          acc[r] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(sums[r]), acc[r]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    float* o = out + r * m.out_stride;
    _mm512_storeu_ps(o, m.add ? _mm512_add_ps(acc[r], _mm512_loadu_ps(o)) : acc[r]);
  }
}

template <PackedType kType, int kRows>
inline void QuantTileOf(int rows, const MatMul& m, const std::byte* weights, const std::byte* tile,
                        float* out) {
  if (rows == kRows) {
    QuantTile<kType, kRows>(m, weights, tile, out);
  } else if constexpr (kRows > 1) {
    QuantTileOf<kType, kRows - 1>(rows, m, weights, tile, out);
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
      QuantTileOf<kType, kRowTile>(rows, m, weights, tile, out);
    }
  }
}

constexpr Kernels MakeTable() {
  Kernels k = FloatKernels("avx512");
  k.matmul[static_cast<int>(PackedType::kQ8_0)] = QuantMatMul<PackedType::kQ8_0>;
  k.matmul[static_cast<int>(PackedType::kQ4_0)] = QuantMatMul<PackedType::kQ4_0>;
  k.matmul[static_cast<int>(PackedType::kQ4_1)] = QuantMatMul<PackedType::kQ4_1>;
  return k;
}
constexpr Kernels kTable = MakeTable();

}  // namespace

const Kernels& Avx512Kernels() { return kTable; }

}  // namespace antiphon::engine::cpu
