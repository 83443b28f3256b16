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

// Adds the products of the steps [kFirst, kFirst + kSteps) to `sums` of the places from `first` on.
// The places advance together: one's dependent steps hide another's. Activations come as broadcasts
// from memory.
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

// sums[j] of `bunch` rows from `first` on: start(row) and the products of the steps.
template <int kFirst, int kSteps, int kBunch, int kRows, bool kFine, typename Start>
inline void SumSteps(const __m512i (&w)[8], const RowBlock<kRows, kFine>& rows, int first,
                     int bunch, Start start, __m512i (&sums)[kBunch]) {
  constexpr int kPlaces = kPlacesOf<kFine>;
  __m512i of_places[kBunch * kPlaces];
#pragma GCC unroll 4
  for (int j = 0; j < bunch; ++j) {
    of_places[j * kPlaces] = _mm512_setzero_si512();
    of_places[j * kPlaces + kPlaces - 1] = start(first + j);
  }
  AddSteps<kFirst, kSteps>(w, rows.values, first * kPlaces, bunch * kPlaces, of_places);
#pragma GCC unroll 4
  for (int j = 0; j < bunch; ++j) {
    sums[j] = kFine ? JoinSums(of_places[2 * j], of_places[2 * j + 1]) : of_places[j];
  }
}

// One group of 16 output rows against kRows activation rows: the block's weights stay in eight
// registers while the rows pass by.
template <PackedType kType, int kRows, bool kFine>
void QuantTile(const MatMul& m, const std::byte* weights, const std::byte* tile, float* out) {
  constexpr QuantFormat kFormat = FormatOf(kType);
  constexpr int kBunch = 4 / kPlacesOf<kFine>;
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
    PrefetchWeights<kRows * kPlacesOf<kFine>>(weights, BlockBytes(kFormat));
    const RowBlock<kRows, kFine> rows(tile);
    const auto start = [&](int row) { return OffsetOf<kType>(rows.NumbersOf(row)); };
#pragma GCC unroll 16
    for (int first = 0; first < kRows; first += kBunch) {
      const int bunch = kRows - first < kBunch ? kRows - first : kBunch;
      __m512i sum[kBunch];
      SumSteps<0, 8>(w, rows, first, bunch, start, sum);
#pragma GCC unroll 4
      for (int j = 0; j < bunch; ++j) {
        const int r = first + j;
        acc[r] = AddBlock<kType>(sum[j], rows.NumbersOf(r), scale, minimum, acc[r]);
      }
    }
    weights += BlockBytes(kFormat);
    tile += RowBlock<kRows, kFine>::kBytes;
  }
  StoreRows(m, acc, out);
}

// Adds one block of kQ4_K or kQ5_K to the sums of its super-block.
template <PackedType kType, int kRows, bool kFine>
inline void AddK45Block(const std::byte* block, const __m512i (&w)[8],
                        const RowBlock<kRows, kFine>& rows, __m512 (&products)[kRows]) {
  constexpr int kBunch = 4 / kPlacesOf<kFine>;
  const __m512 scale = WidenU8(block);
  const auto start = [](int) { return _mm512_setzero_si512(); };
#pragma GCC unroll 16
  for (int first = 0; first < kRows; first += kBunch) {
    const int bunch = kRows - first < kBunch ? kRows - first : kBunch;
    __m512i sum[kBunch];
    SumSteps<0, 8>(w, rows, first, bunch, start, sum);
#pragma GCC unroll 4
    for (int j = 0; j < bunch; ++j) {
      const int r = first + j;
      products[r] = AddK45(sum[j], rows.NumbersOf(r), scale, products[r]);
    }
  }
}

// The same for kQ6_K, whose halves of a block have scales of their own: two sums a row.
template <int kRows, bool kFine>
inline void AddK6Block(const std::byte* block, const __m512i (&w)[8],
                       const RowBlock<kRows, kFine>& rows, __m512 (&products)[kRows]) {
  constexpr int kBunch = 2 / kPlacesOf<kFine>;
  const __m512 left_scale = WidenI8(block), right_scale = WidenI8(block + 16);
  const auto start_left = [&](int row) { return LeftOffset(rows.NumbersOf(row)); };
  const auto start_right = [&](int row) { return RightOffset(rows.NumbersOf(row)); };
#pragma GCC unroll 16
  for (int first = 0; first < kRows; first += kBunch) {
    const int bunch = kRows - first < kBunch ? kRows - first : kBunch;
    __m512i left[kBunch], right[kBunch];
    SumSteps<0, 4>(w, rows, first, bunch, start_left, left);
    SumSteps<4, 4>(w, rows, first, bunch, start_right, right);
#pragma GCC unroll 2
    for (int j = 0; j < bunch; ++j) {
      const int r = first + j;
      products[r] =
          AddK6(left[j], right[j], rows.NumbersOf(r), left_scale, right_scale, products[r]);
    }
  }
}

// As QuantTile, for the formats with super-blocks. The rows' sums over super-blocks are touched
// once in 256 columns: where registers are short, it is those that go to memory.
template <PackedType kType, int kRows, bool kFine>
void SuperTile(const MatMul& m, const std::byte* weights, const std::byte* tile, float* out) {
  constexpr QuantFormat kFormat = FormatOf(kType);
  constexpr size_t kBlocks = kSuperBlock / kQuantBlock;
  constexpr size_t kTileBlockBytes = RowBlock<kRows, kFine>::kBytes;
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
      const RowBlock<kRows, kFine> rows(tile + b * kTileBlockBytes);
      __m512i w[8];
      Unpack<kType>(block, w);
      PrefetchWeights<kRows * kPlacesOf<kFine>>(block, BlockBytes(kFormat));
      if constexpr (kType == PackedType::kQ6_K) {
        AddK6Block(block, w, rows, products);
      } else {
        AddK45Block<kType>(block, w, rows, products);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) acc[r] = _mm512_fmadd_ps(products[r], scale, acc[r]);
    if constexpr (kFormat.minima) SubtractMinima<kType, kFine>(weights, tile, acc);
    weights = blocks + kBlocks * BlockBytes(kFormat);
    tile += kBlocks * kTileBlockBytes;
  }
  StoreRows(m, acc, out);
}

template <PackedType kType, int kRows, bool kFine>
inline void QuantTileOf(int rows, const MatMul& m, const std::byte* weights, const std::byte* tile,
                        float* out) {
  if (rows < kRows) {
    if constexpr (kRows > 1) QuantTileOf<kType, kRows - 1, kFine>(rows, m, weights, tile, out);
  } else if constexpr (FormatOf(kType).super_bytes == 0) {
    QuantTile<kType, kRows, kFine>(m, weights, tile, out);
  } else {
    SuperTile<kType, kRows, kFine>(m, weights, tile, out);
  }
}

template <PackedType kType, bool kFine>
void TiledMatMul(const MatMul& m) {
  constexpr int kTileRows = kRowTile / kPlacesOf<kFine>;
  const size_t group_bytes = PackedGroupBytes(kType, m.columns);
  const size_t tile_bytes = QuantTileBytes(kRowTile, m.columns);
  for (int group = 0; group < m.groups; ++group) {
    const std::byte* weights = m.weights + group * group_bytes;
    const std::byte* tile = m.x_quant;
    for (int row = 0; row < m.rows; row += kTileRows, tile += tile_bytes) {
      const int rows = m.rows - row < kTileRows ? m.rows - row : kTileRows;
      float* out = m.out + static_cast<size_t>(row) * m.out_stride + group * kGroupRows;
      QuantTileOf<kType, kTileRows, kFine>(rows, m, weights, tile, out);
    }
  }
}

template <PackedType kType>
void QuantMatMul(const MatMul& m) {
  m.fine ? TiledMatMul<kType, true>(m) : TiledMatMul<kType, false>(m);
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
