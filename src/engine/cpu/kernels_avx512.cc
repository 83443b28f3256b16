#include "engine/cpu/kernels_x86.h"
#include "engine/cpu/simd_avx512.h"
#include "engine/cpu/kernels-inl.h"
#include "engine/cpu/quant_avx512-inl.h"

namespace antiphon::engine::cpu {
namespace {

// Many rows take longer over a block than the processor's own prefetching looks ahead, and that
// stops at each page. With few rows the weights come as fast as memory gives them.
template <int kRows>
inline void PrefetchWeights(const std::byte* block, size_t bytes) {
  constexpr size_t kAhead = 2560;
  if constexpr (kRows < 8) return;
#pragma GCC unroll 9
  for (size_t line = 0; line < bytes; line += 64) {
    _mm_prefetch(block + kAhead + line, _MM_HINT_T0);
  }
}

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
    const __m512 scale = LoadHalves(weights);
    __m512 minimum = _mm512_setzero_ps();
    if constexpr (kFormat.minima) minimum = LoadHalves(weights + 32);
    __m512i w[8];
    Unpack<kType>(weights, w);
    PrefetchWeights<kRows>(weights, BlockBytes(kFormat));
    const RowBlock<kRows> rows(tile);
#pragma GCC unroll 16
    for (int first = 0; first < kRows; first += kBunch) {
      const int bunch = kRows - first < kBunch ? kRows - first : kBunch;
      __m512i sum[kBunch];
#pragma GCC unroll 4
      for (int j = 0; j < bunch; ++j) sum[j] = OffsetOf<kType>(rows.numbers[first + j]);
      AddSteps<0, 8>(w, rows.values, first, bunch, sum);
#pragma GCC unroll 4
      for (int j = 0; j < bunch; ++j) {
        const int r = first + j;
        acc[r] = AddBlock<kType>(sum[j], rows.numbers[r], scale, minimum, acc[r]);
      }
    }
    weights += BlockBytes(kFormat);
    tile += kRows * kQuantRowBlockBytes;
  }
  StoreRows(m, acc, out);
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
      products[r] = AddK45(sum[j], rows.numbers[r], scale, products[r]);
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
      left[j] = LeftOffset(rows.numbers[first + j]);
      right[j] = RightOffset(rows.numbers[first + j]);
    }
    AddSteps<0, 4>(w, rows.values, first, bunch, left);
    AddSteps<4, 4>(w, rows.values, first, bunch, right);
#pragma GCC unroll 2
    for (int j = 0; j < bunch; ++j) {
      const int r = first + j;
      products[r] =
          AddK6(left[j], right[j], rows.numbers[r], left_scale, right_scale, products[r]);
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
    const __m512 scale = LoadHalves(weights);
    const std::byte* blocks = weights + kFormat.super_bytes;
    __m512 products[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) products[r] = _mm512_setzero_ps();
    for (size_t b = 0; b < kBlocks; ++b) {
      const std::byte* block = blocks + b * BlockBytes(kFormat);
      const RowBlock<kRows> rows(tile + b * kTileBlockBytes);
      __m512i w[8];
      Unpack<kType>(block, w);
      PrefetchWeights<kRows>(block, BlockBytes(kFormat));
      if constexpr (kType == PackedType::kQ6_K) {
        AddK6Block(block, w, rows, products);
      } else {
        AddK45Block<kType>(block, w, rows, products);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) acc[r] = _mm512_fmadd_ps(products[r], scale, acc[r]);
    if constexpr (kFormat.minima) SubtractMinima<kType>(weights, tile, acc);
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
