#include "engine/cpu/kernels_x86.h"
#include "engine/cpu/simd_avx512.h"
#include "engine/cpu/kernels-inl.h"

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

// A tile's rows in one block.
template <int kRows>
struct RowBlock {
  explicit RowBlock(const std::byte* tile)
      : values(reinterpret_cast<const int32_t*>(tile)),
        numbers(reinterpret_cast<const QuantNumbers*>(tile + kRows * kQuantBlock)) {}
  const int32_t* values;  // four columns each
  const QuantNumbers* numbers;
};

// Adds the products of the steps [kFirst, kFirst + kSteps) to `sums` of the rows from `first` on.
// The rows advance together: one row's dependent steps hide another's. Activations come as
// broadcasts from memory.
template <int kFirst, int kSteps, int kBunch>
inline void AddSteps(const __m512i (&w)[8], const int32_t* values, int first, int bunch,
                     __m512i (&sums)[kBunch]) {
#pragma GCC unroll 8
  for (int i = kFirst; i < kFirst + kSteps; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < bunch; ++j) {
      sums[j] = _mm512_dpbusd_epi32(sums[j], w[i], _mm512_set1_epi32(values[(first + j) * 8 + i]));
    }
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

// One group of 16 output rows against kRows activation rows: the block's weights stay in eight
// registers while the rows pass by.
template <PackedType kType, int kRows>
void QuantTile(const MatMul& m, const std::byte* weights, const std::byte* tile, float* out) {
  constexpr QuantFormat kFormat = FormatOf(kType);
  constexpr int kBunch = 4;
  const size_t blocks = m.columns / kQuantBlock;
  __m512 acc[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) acc[r] = _mm512_setzero_ps();
  for (size_t b = 0; b < blocks; ++b) {
    const __m512 scale = LoadF16(reinterpret_cast<const uint16_t*>(weights)).v;
    __m512 minimum = _mm512_setzero_ps();
    if constexpr (kFormat.minima) {
      minimum = LoadF16(reinterpret_cast<const uint16_t*>(weights + 32)).v;
    }
    __m512i w[8];
    Unpack<kType>(weights, w);
    const RowBlock<kRows> rows(tile);
#pragma GCC unroll 16
    for (int first = 0; first < kRows; first += kBunch) {
      const int bunch = kRows - first < kBunch ? kRows - first : kBunch;
      __m512i sum[kBunch];
#pragma GCC unroll 4
      for (int j = 0; j < bunch; ++j) {
        sum[j] = _mm512_setzero_si512();
        if constexpr (!kFormat.minima) {
          sum[j] = _mm512_set1_epi32(rows.numbers[first + j].offset);
          if constexpr (kFormat.bits != 8) sum[j] = _mm512_srai_epi32(sum[j], 8 - kFormat.bits);
        }
      }
      AddSteps<0, 8>(w, rows.values, first, bunch, sum);
#pragma GCC unroll 4
      for (int j = 0; j < bunch; ++j) {
        const int r = first + j;
        const __m512 scaled =
            _mm512_mul_ps(_mm512_cvtepi32_ps(sum[j]), _mm512_set1_ps(rows.numbers[r].scale));
        acc[r] = _mm512_fmadd_ps(scaled, scale, acc[r]);
        if constexpr (kFormat.minima) {
          acc[r] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(rows.numbers[r].sum), acc[r]);
        }
      }
    }
    weights += BlockBytes(kFormat);
    tile += kRows * kQuantRowBlockBytes;
  }
  StoreRows(m, acc, out);
}

inline __m512 WidenU8(const std::byte* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline __m512 WidenI8(const std::byte* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// Adds one block of kQ4_K or kQ5_K to the sums of its super-block.
template <PackedType kType, int kRows>
inline void AddK45Block(const std::byte* block, const __m512i (&w)[8], const RowBlock<kRows>& rows,
                        __m512 (&products)[kRows]) {
  constexpr int kBunch = 4;
  const __m512 scale = WidenU8(block);
#pragma GCC unroll 16
  for (int first = 0; first < kRows; first += kBunch) {
    const int bunch = kRows - first < kBunch ? kRows - first : kBunch;
    __m512i sum[kBunch];
#pragma GCC unroll 4
    for (int j = 0; j < bunch; ++j) sum[j] = _mm512_setzero_si512();
    AddSteps<0, 8>(w, rows.values, first, bunch, sum);
#pragma GCC unroll 4
    for (int j = 0; j < bunch; ++j) {
      const int r = first + j;
      products[r] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum[j]), scale),
                                    _mm512_set1_ps(rows.numbers[r].scale), products[r]);
    }
  }
}

// The same for kQ6_K, whose halves of a block have scales of their own: two sums a row.
template <int kRows>
inline void AddK6Block(const std::byte* block, const __m512i (&w)[8], const RowBlock<kRows>& rows,
                       __m512 (&products)[kRows]) {
  constexpr int kBunch = 2;
  const __m512 left_scale = WidenI8(block), right_scale = WidenI8(block + 16);
#pragma GCC unroll 16
  for (int first = 0; first < kRows; first += kBunch) {
    const int bunch = kRows - first < kBunch ? kRows - first : kBunch;
    __m512i left[kBunch], right[kBunch];
#pragma GCC unroll 2
    for (int j = 0; j < bunch; ++j) {
      left[j] = _mm512_set1_epi32(rows.numbers[first + j].half);
      right[j] = _mm512_sub_epi32(
          _mm512_srai_epi32(_mm512_set1_epi32(rows.numbers[first + j].offset), 2), left[j]);
    }
    AddSteps<0, 4>(w, rows.values, first, bunch, left);
    AddSteps<4, 4>(w, rows.values, first, bunch, right);
#pragma GCC unroll 2
    for (int j = 0; j < bunch; ++j) {
      const int r = first + j;
      const __m512 scaled = _mm512_fmadd_ps(_mm512_cvtepi32_ps(right[j]), right_scale,
                                            _mm512_mul_ps(_mm512_cvtepi32_ps(left[j]), left_scale));
      products[r] = _mm512_fmadd_ps(scaled, _mm512_set1_ps(rows.numbers[r].scale), products[r]);
    }
  }
}

// As QuantTile, for the formats with super-blocks. The rows' sums over super-blocks are touched
// once in 256 columns: where registers are short, it is those that go to memory.
template <PackedType kType, int kRows>
void SuperTile(const MatMul& m, const std::byte* weights, const std::byte* tile, float* out) {
  constexpr QuantFormat kFormat = FormatOf(kType);
  constexpr size_t kBlocks = kSuperBlock / kQuantBlock;
  constexpr size_t kTileBlockBytes = kRows * kQuantRowBlockBytes;
  __m512 acc[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) acc[r] = _mm512_setzero_ps();
  for (size_t super = 0; super < m.columns / kSuperBlock; ++super) {
    const __m512 scale = LoadF16(reinterpret_cast<const uint16_t*>(weights)).v;
    const std::byte* blocks = weights + kFormat.super_bytes;
    __m512 products[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) products[r] = _mm512_setzero_ps();
    for (size_t b = 0; b < kBlocks; ++b) {
      const std::byte* block = blocks + b * BlockBytes(kFormat);
      const RowBlock<kRows> rows(tile + b * kTileBlockBytes);
      __m512i w[8];
      Unpack<kType>(block, w);
      if constexpr (kType == PackedType::kQ6_K) {
        AddK6Block(block, w, rows, products);
      } else {
        AddK45Block<kType>(block, w, rows, products);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) acc[r] = _mm512_fmadd_ps(products[r], scale, acc[r]);
    if constexpr (kFormat.minima) {
      __m512 minima[kBlocks];
#pragma GCC unroll 8
      for (size_t b = 0; b < kBlocks; ++b) {
        minima[b] = WidenU8(blocks + b * BlockBytes(kFormat) + 16);
      }
      const __m512 minimum = LoadF16(reinterpret_cast<const uint16_t*>(weights + 32)).v;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 8
        for (size_t b = 0; b < kBlocks; ++b) {
          const RowBlock<kRows> rows(tile + b * kTileBlockBytes);
          sum = _mm512_fmadd_ps(minima[b], _mm512_set1_ps(rows.numbers[r].sum), sum);
        }
        acc[r] = _mm512_fnmadd_ps(sum, minimum, acc[r]);
      }
    }
    weights = blocks + kBlocks * BlockBytes(kFormat);
    tile += kBlocks * kTileBlockBytes;
  }
  StoreRows(m, acc, out);
}

template <PackedType kType, int kRows>
inline void QuantTileOf(int rows, const MatMul& m, const std::byte* weights, const std::byte* tile,
                        float* out) {
  if (rows < kRows) {
    if constexpr (kRows > 1) QuantTileOf<kType, kRows - 1>(rows, m, weights, tile, out);
  } else if constexpr (FormatOf(kType).super_bytes == 0) {
    QuantTile<kType, kRows>(m, weights, tile, out);
  } else {
    SuperTile<kType, kRows>(m, weights, tile, out);
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

constexpr Kernels kTable = MakeTable("avx512");

constexpr Kernels WithBf16(Kernels table) {
  table.name = "avx512-bf16";
  table.attention = AttendWithBf16;
  return table;
}
constexpr Kernels kBf16Table = WithBf16(kTable);

}  // namespace

const Kernels& Avx512Kernels() { return kTable; }
const Kernels& Avx512Bf16Kernels() { return kBf16Table; }

}  // namespace antiphon::engine::cpu
