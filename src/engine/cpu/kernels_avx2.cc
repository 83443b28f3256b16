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

// The values of half a group, 8 output rows, in one block, unsigned as they are stored: `block` is
// moved to its lanes. Step i holds columns 4i to 4i + 3. Bytes come in two: w[i] has the lower four
// bits of step i, w[i + 8] the upper ones.
template <PackedType kType>
constexpr int kVectors = FormatOf(kType).bits == 8 ? 16 : 8;

template <PackedType kType>
inline void Unpack(const std::byte* block, __m256i (&w)[kVectors<kType>]) {
  constexpr QuantFormat kFormat = FormatOf(kType);
  const std::byte* high = block + kFormat.head_bytes;
  const std::byte* values = high + kFormat.high_bytes;
  const __m256i low = _mm256_set1_epi8(15);
#pragma GCC unroll 8
  for (int i = 0; i < kVectors<kType> / 2; ++i) {
    const __m256i packed = Load256(values + 64 * i);
    w[i] = _mm256_and_si256(packed, low);
    w[i + kVectors<kType> / 2] = _mm256_and_si256(_mm256_srli_epi16(packed, 4), low);
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

// The additions stay in their order: regrouped by the compiler they need more registers than there
// are.
inline void Pin(__m256i& value) { __asm__("" : "+x"(value)); }

// The sums over kSteps steps of the products of kRows activation rows. They advance together: one
// row's dependent additions hide another's. The pairs that vpmaddubsw adds stay below 2^15, and so
// do so many of them that are added before they are widened: 8 * 2 * 15 * 127 = 30,480,
// 4 * 2 * 31 * 127 = 31,496 and 2 * 2 * 63 * 127 = 32,004.
template <int kBits, int kSteps, int kRows>
inline void SumSteps(const __m256i* w, const std::byte* values, __m256i (&sums)[kRows]) {
  constexpr int kRun = kBits == 4 || kBits == 8 ? 8 : kBits == 5 ? 4 : 2;
  const __m256i ones = _mm256_set1_epi16(1);
  const int32_t* x = reinterpret_cast<const int32_t*>(values);
#pragma GCC unroll 8
  for (int first = 0; first < kSteps; first += kRun) {
    __m256i pairs[kRows], upper[kRows];
#pragma GCC unroll 8
    for (int i = first; i < first + kRun; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m256i a = _mm256_set1_epi32(x[r * (kQuantBlock / 4) + i]);
        const __m256i products = _mm256_maddubs_epi16(w[i], a);
        pairs[r] = i == first ? products : _mm256_add_epi16(pairs[r], products);
        if (i > first) Pin(pairs[r]);
        if constexpr (kBits == 8) {
          const __m256i more = _mm256_maddubs_epi16(w[8 + i], a);
          upper[r] = i == first ? more : _mm256_add_epi16(upper[r], more);
          if (i > first) Pin(upper[r]);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      __m256i wide = _mm256_madd_epi16(pairs[r], ones);
      if constexpr (kBits == 8) {
        wide = _mm256_add_epi32(wide, _mm256_madd_epi16(upper[r], _mm256_set1_epi16(16)));
      }
      sums[r] = first == 0 ? wide : _mm256_add_epi32(sums[r], wide);
    }
  }
}

// A row at 16 bits has its values as such: of a block first those of columns 4i and 4i + 2, for all
// eight steps, then those of 4i + 1 and 4i + 3.
void QuantizeRowWide(const float* x, size_t columns, int row, int tile_rows, std::byte* tile) {
  QuantizeRowFine(x, columns, row, tile_rows, tile);
  for (size_t block = 0; block < columns / kQuantBlock; ++block) {
    __m256i* places = reinterpret_cast<__m256i*>(SlotOf(tile, block, row, tile_rows).values);
    const __m256i upper = _mm256_loadu_si256(places), lower = _mm256_loadu_si256(places + 1);
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(lower, 8), 8);
    const __m256i odd = _mm256_srai_epi16(lower, 8);
    _mm256_storeu_si256(places, _mm256_add_epi16(_mm256_slli_epi16(upper, 8), even));
    const __m256i high = _mm256_set1_epi16(static_cast<int16_t>(0xff00));
    _mm256_storeu_si256(places + 1, _mm256_add_epi16(_mm256_and_si256(upper, high), odd));
  }
}

// The bytes of half a group in one block: w[i] has those of step i.
template <PackedType kType>
inline void UnpackBytes(const std::byte* block, __m256i (&w)[8]) {
  constexpr QuantFormat kFormat = FormatOf(kType);
  if constexpr (kFormat.bits == 8) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) w[i] = Load256(block + kFormat.head_bytes + 64 * i);
  } else {
    Unpack<kType>(block, w);
  }
}

// As SumSteps, of rows at 16 bits, a tile's two places each.
template <int kSteps, int kRows>
inline void SumWideSteps(const __m256i* w, const std::byte* values, __m256i (&sums)[kRows]) {
  constexpr int kRowWords = 2 * kQuantBlock / 4, kOdd = kQuantBlock / 4;
  const int32_t* x = reinterpret_cast<const int32_t*>(values);
  __m256i odd_sums[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kSteps; ++i) {
    const __m256i even = _mm256_and_si256(w[i], _mm256_set1_epi16(255));
    const __m256i odd = _mm256_srli_epi16(w[i], 8);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const int32_t* at = x + r * kRowWords + i;
      const __m256i even_products = _mm256_madd_epi16(even, _mm256_set1_epi32(at[0]));
      const __m256i odd_products = _mm256_madd_epi16(odd, _mm256_set1_epi32(at[kOdd]));
      sums[r] = i == 0 ? even_products : _mm256_add_epi32(sums[r], even_products);
      odd_sums[r] = i == 0 ? odd_products : _mm256_add_epi32(odd_sums[r], odd_products);
      Pin(sums[r]);
      Pin(odd_sums[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sums[r] = _mm256_add_epi32(sums[r], odd_sums[r]);
}

// The rows of a tile in one block.
template <bool kFine>
struct TileBlock {
  static constexpr int kPlaces = kFine ? 2 : 1;  // of a row
  TileBlock(const std::byte* tile, int tile_rows)
      : values(tile),
        numbers(reinterpret_cast<const QuantNumbers*>(tile + static_cast<size_t>(tile_rows) *
                                                                 kPlaces * kQuantBlock)),
        rows(tile_rows) {}
  const std::byte* ValuesOf(int row) const { return values + row * kPlaces * kQuantBlock; }
  const QuantNumbers& NumbersOf(int row) const { return numbers[row * kPlaces]; }
  const std::byte* values;
  const QuantNumbers* numbers;
  int rows;
};

// The integer sums of a block for the rows of a tile; of kQ6_K those of the halves of the block.
template <PackedType kType>
constexpr int kHalves = kType == PackedType::kQ6_K ? 2 : 1;
template <PackedType kType>
struct alignas(64) BlockSums {
  int32_t of[kHalves<kType>][kRowTile][kGroupRows];
};

// kRows rows from `row` on with 8 output rows.
template <PackedType kType, int kRows, bool kFine, int kWeights>
inline void SumRows(const __m256i (&w)[kWeights], const TileBlock<kFine>& tile, int row, int half,
                    BlockSums<kType>& sums) {
  constexpr int kSteps = 8 / kHalves<kType>;
#pragma GCC unroll 2
  for (int h = 0; h < kHalves<kType>; ++h) {
    __m256i sum[kRows];
    const std::byte* values = tile.ValuesOf(row) + 4 * kSteps * h;
    if constexpr (kFine) {
      SumWideSteps<kSteps>(w + kSteps * h, values, sum);
    } else {
      SumSteps<FormatOf(kType).bits, kSteps>(w + kSteps * h, values, sum);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(&sums.of[h][row + r][8 * half]), sum[r]);
    }
  }
}

// The weights of half the group stay in registers while the rows pass by.
template <PackedType kType, bool kFine>
inline void SumBlock(const std::byte* block, const TileBlock<kFine>& tile, BlockSums<kType>& sums) {
  constexpr int kTogether = 2;
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    __m256i w[kFine ? 8 : kVectors<kType>];
    if constexpr (kFine) {
      UnpackBytes<kType>(block + 32 * half, w);
    } else {
      Unpack<kType>(block + 32 * half, w);
    }
    int row = 0;
    for (; row + kTogether <= tile.rows; row += kTogether) {
      SumRows<kType, kTogether>(w, tile, row, half, sums);
    }
    for (; row < tile.rows; ++row) SumRows<kType, 1>(w, tile, row, half, sums);
  }
}

inline F Widen(const int32_t* sums, int32_t offset) {
  const __m256i* p = reinterpret_cast<const __m256i*>(sums);
  const __m256i o = _mm256_set1_epi32(offset);
  return {_mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_load_si256(p), o)),
          _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_load_si256(p + 1), o))};
}
inline F Widen(const int32_t* sums) {
  const __m256i* p = reinterpret_cast<const __m256i*>(sums);
  return {_mm256_cvtepi32_ps(_mm256_load_si256(p)), _mm256_cvtepi32_ps(_mm256_load_si256(p + 1))};
}
inline __m256 WidenU8x8(const std::byte* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline F WidenU8(const std::byte* p) { return {WidenU8x8(p), WidenU8x8(p + 8)}; }
inline __m256 WidenI8x8(const std::byte* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline F WidenI8(const std::byte* p) { return {WidenI8x8(p), WidenI8x8(p + 8)}; }
inline F WidenHalves(const std::byte* p) { return LoadF16(reinterpret_cast<const uint16_t*>(p)); }

// Adds a block's sums to the rows', acc[row][kGroupRows]: of a format with super-blocks, to those
// of its super-block. Apart from the integer products: the processor looks only so far ahead, and
// would see too few rows of both.
template <PackedType kType, bool kFine>
inline void AddSums(const std::byte* block, const TileBlock<kFine>& tile,
                    const BlockSums<kType>& sums, float* acc) {
  constexpr QuantFormat kFormat = FormatOf(kType);
  F first, second;
  if constexpr (kType == PackedType::kQ6_K) {
    first = WidenI8(block);
    second = WidenI8(block + 16);
  } else if constexpr (kFormat.super_bytes != 0) {
    first = WidenU8(block);
  } else {
    first = WidenHalves(block);
    if constexpr (kFormat.minima) second = WidenHalves(block + 32);
  }
#pragma GCC unroll 2
  for (int r = 0; r < tile.rows; ++r) {
    const QuantNumbers& numbers = tile.NumbersOf(r);
    float* a = acc + r * kGroupRows;
    const F scale = Splat(numbers.scale);
    if constexpr (kType == PackedType::kQ6_K) {
      const F left = Widen(sums.of[0][r], numbers.half);
      const F right = Widen(sums.of[1][r], (numbers.offset >> 2) - numbers.half);
      Store(a, Fma(Fma(right, second, Mul(left, first)), scale, Load(a)));
    } else if constexpr (kFormat.super_bytes != 0) {
      Store(a, Fma(Mul(Widen(sums.of[0][r]), first), scale, Load(a)));
    } else if constexpr (kFormat.minima) {
      const F products = Fma(Mul(Widen(sums.of[0][r]), scale), first, Load(a));
      Store(a, Fma(second, Splat(numbers.sum), products));
    } else {
      const F sum = Widen(sums.of[0][r], numbers.offset >> (8 - kFormat.bits));
      Store(a, Fma(Mul(sum, scale), first, Load(a)));
    }
  }
}

// The processor's own prefetching does not look this far, and stops at each page.
inline void Prefetch(const std::byte* block, size_t bytes) {
  constexpr size_t kAhead = 2560;
  for (size_t line = 0; line < bytes; line += 64) {
    _mm_prefetch(block + kAhead + line, _MM_HINT_T0);
  }
}

// A block of a group against the rows of a tile.
template <PackedType kType, bool kFine>
inline void AddBlock(const std::byte* block, const TileBlock<kFine>& tile, float* acc) {
  BlockSums<kType> sums;
  Prefetch(block, BlockBytes(FormatOf(kType)));
  SumBlock<kType>(block, tile, sums);
  AddSums<kType>(block, tile, sums, acc);
}

template <bool kFine>
constexpr size_t TileBytes(int rows, int columns) {
  return QuantTileBytes(static_cast<size_t>(rows) * TileBlock<kFine>::kPlaces,
                        static_cast<size_t>(columns));
}

inline void Clear(float* acc, int rows) {
  for (int r = 0; r < rows; ++r) Store(acc + r * kGroupRows, Zero());
}

// Takes the minima of a super-block off the rows' sums. `tile`: the rows in its first block.
template <PackedType kType, bool kFine>
inline void SubtractMinima(const std::byte* super, const std::byte* tile, int rows, float* acc) {
  constexpr QuantFormat kFormat = FormatOf(kType);
  constexpr int kBlocks = kSuperBlock / kQuantBlock;
  const std::byte* blocks = super + kFormat.super_bytes;
  for (int half = 0; half < 2; ++half) {
    __m256 minima[kBlocks];
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
      minima[b] = WidenU8x8(blocks + static_cast<size_t>(b) * BlockBytes(kFormat) + 16 + 8 * half);
    }
    const __m256 minimum = WidenF16(reinterpret_cast<const uint16_t*>(super) + 16 + 8 * half);
    for (int r = 0; r < rows; ++r) {
      __m256 sum = _mm256_setzero_ps();
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; ++b) {
        const TileBlock<kFine> at(tile + TileBytes<kFine>(rows, b * kQuantBlock), rows);
        sum = _mm256_fmadd_ps(minima[b], _mm256_set1_ps(at.NumbersOf(r).sum), sum);
      }
      float* a = acc + r * kGroupRows + 8 * half;
      _mm256_store_ps(a, _mm256_fnmadd_ps(sum, minimum, _mm256_load_ps(a)));
    }
  }
}

// A super-block of a group against the rows of a tile. `tile`: the rows in its first block.
template <PackedType kType, bool kFine>
inline void AddSuperBlock(const std::byte* super, const std::byte* tile, int rows, float* acc) {
  constexpr QuantFormat kFormat = FormatOf(kType);
  alignas(64) float products[kRowTile * kGroupRows];
  Clear(products, rows);
  for (int b = 0; b < kSuperBlock / kQuantBlock; ++b) {
    const TileBlock<kFine> at(tile + TileBytes<kFine>(rows, b * kQuantBlock), rows);
    AddBlock<kType>(super + kFormat.super_bytes + static_cast<size_t>(b) * BlockBytes(kFormat), at,
                    products);
  }
  const F scale = WidenHalves(super);
  for (int r = 0; r < rows; ++r) {
    float* a = acc + r * kGroupRows;
    Store(a, Fma(Load(products + r * kGroupRows), scale, Load(a)));
  }
  if constexpr (kFormat.minima) SubtractMinima<kType, kFine>(super, tile, rows, acc);
}

// One group of 16 output rows against the rows of a tile. Inlined, so that of one row the sums stay
// in registers.
template <PackedType kType, bool kFine>
[[gnu::always_inline]] inline void QuantTile(const MatMul& m, const std::byte* weights,
                                             const std::byte* tile, int rows, float* out) {
  constexpr QuantFormat kFormat = FormatOf(kType);
  constexpr bool kSuper = kFormat.super_bytes != 0;
  constexpr int kStep = kSuper ? kSuperBlock : kQuantBlock;  // columns
  alignas(64) float acc[kRowTile * kGroupRows];
  Clear(acc, rows);
  for (size_t column = 0; column < m.columns; column += kStep) {
    if constexpr (kSuper) {
      AddSuperBlock<kType, kFine>(weights, tile, rows, acc);
    } else {
      AddBlock<kType>(weights, TileBlock<kFine>(tile, rows), acc);
    }
    weights += PackedGroupBytes(kType, kStep);
    tile += TileBytes<kFine>(rows, kStep);
  }
  for (int r = 0; r < rows; ++r, out += m.out_stride) {
    const F sum = Load(acc + r * kGroupRows);
    Store(out, m.add ? Add(sum, Load(out)) : sum);
  }
}

template <PackedType kType, bool kFine>
void TiledMatMul(const MatMul& m) {
  constexpr int kTileRows = kRowTile / TileBlock<kFine>::kPlaces;
  const size_t group_bytes = PackedGroupBytes(kType, m.columns);
  const size_t tile_bytes = QuantTileBytes(kRowTile, m.columns);
  for (int group = 0; group < m.groups; ++group) {
    const std::byte* weights = m.weights + group * group_bytes;
    const std::byte* tile = m.x_quant;
    for (int row = 0; row < m.rows; row += kTileRows, tile += tile_bytes) {
      const int rows = m.rows - row < kTileRows ? m.rows - row : kTileRows;
      float* out = m.out + static_cast<size_t>(row) * m.out_stride + group * kGroupRows;
      if (rows == 1) {
        QuantTile<kType, kFine>(m, weights, tile, 1, out);
      } else {
        QuantTile<kType, kFine>(m, weights, tile, rows, out);
      }
    }
  }
}

template <PackedType kType>
void QuantMatMul(const MatMul& m) {
  m.fine ? TiledMatMul<kType, true>(m) : TiledMatMul<kType, false>(m);
}

constexpr Kernels WithWideRows(Kernels table) {
  table.quantize_row_fine = QuantizeRowWide;
  return table;
}
constexpr Kernels kTable = WithWideRows(MakeTable("avx2"));

}  // namespace

const Kernels& Avx2Kernels() { return kTable; }

}  // namespace antiphon::engine::cpu
