// The integer products on a tile unit: AMX, or a model of it. A block's products of sixteen
// activation rows with sixteen output rows are one instruction; what is done with the sums is what
// AVX-512 does with its own, so the bits are the same.
//
// A tile unit `Tiles` has eight tile registers of 16 rows of 64 bytes, and
//   Configure(const TileShapes&), Release()  before and after anything else; a thread's own
//   Load<t>(from, stride), Store<t>(to, stride)  as many rows and bytes as t has
//   Zero<t>()
//   Dot<c, a, b>()  c[m][n] += sum over k and i < 4 of a[m][4k + i], signed, times b[k][4n + i],
//                   unsigned: Intel's TDPBSUD
#ifndef ANTIPHON_ENGINE_CPU_TILE_PRODUCTS_INL_H_
#define ANTIPHON_ENGINE_CPU_TILE_PRODUCTS_INL_H_

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "engine/cpu/kernels.h"
#include "engine/cpu/kernels_x86.h"
#include "engine/cpu/quant_avx512-inl.h"

namespace antiphon::engine::cpu {
namespace {

// Intel's SDM, "TILECFG": palette 1.
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64);

// Blocks whose sums are made before their numbers are added. Sums are in tiles 0 to 3, activations
// in 4 and 5, weights in 6 and 7.
constexpr size_t kBlocksAtOnce = 4;
constexpr size_t kUnpackedBlockBytes = 8 * 64;
// Unpacked weights of a group that stay in a first-level cache beside a tile's activations.
constexpr size_t kPanelColumns = 1024;
constexpr size_t kPanelBlocks = kPanelColumns / kQuantBlock;
constexpr int kRowsAtOnce = 256;  // activation rows that an unpacked panel serves

struct alignas(64) TileScratch {
  std::byte weights[kPanelBlocks * kUnpackedBlockBytes];
  int32_t sums[kBlocksAtOnce][2][kRowTile][kGroupRows];  // [1]: the right half's, of kQ6_K
  float acc[kRowsAtOnce][kGroupRows];
};

template <PackedType kType>
constexpr bool kHalves = kType == PackedType::kQ6_K;  // two sums a block
template <PackedType kType>
constexpr size_t kGroupStep = FormatOf(kType).super_bytes == 0 ? 1 : kSuperBlock / kQuantBlock;

template <PackedType kType>
TileShapes ShapesOf() {
  constexpr int kDepth = kHalves<kType> ? kQuantBlock / 2 : kQuantBlock;  // columns of a product
  TileShapes shapes;
  for (int t = 0; t < 8; ++t) {
    const bool activations = t == 4 || t == 5, weights = t > 5;
    shapes.row_bytes[t] = activations ? kDepth : 64;
    shapes.rows[t] = weights ? kDepth / 4 : kRowTile;
  }
  return shapes;
}

// The address of block `block` of a group: ahead of a super-block's first stand its numbers.
template <PackedType kType>
inline const std::byte* BlockAt(const std::byte* group, size_t block) {
  constexpr QuantFormat kFormat = FormatOf(kType);
  const size_t supers = kFormat.super_bytes == 0 ? 0 : block / kGroupStep<kType> + 1;
  return group + supers * kFormat.super_bytes + block * BlockBytes(kFormat);
}

template <PackedType kType>
inline void UnpackPanel(const std::byte* group, size_t first, size_t blocks, TileScratch& scratch) {
  for (size_t b = 0; b < blocks; ++b) {
    __m512i w[8];
    Unpack<kType>(BlockAt<kType>(group, first + b), w);
    std::byte* out = scratch.weights + b * kUnpackedBlockBytes;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) _mm512_store_si512(out + 64 * i, w[i]);
  }
}

// The products of one block (of its half at `column`), to scratch.sums[kSlot].
template <typename Tiles, int kSlot, bool kRight>
inline void Products(const std::byte* values, const std::byte* weights, TileScratch& scratch) {
  constexpr int kActivations = 4 + (kSlot & 1), kWeights = 6 + (kSlot & 1);
  constexpr size_t kAt = kRight ? kQuantBlock / 2 : 0;
  Tiles::template Load<kActivations>(values + kAt, kQuantBlock);
  Tiles::template Load<kWeights>(weights + 16 * kAt, 64);
  Tiles::template Zero<kSlot>();
  Tiles::template Dot<kSlot, kActivations, kWeights>();
  Tiles::template Store<kSlot>(scratch.sums[kSlot][kRight], 64);
}

template <PackedType kType, typename Tiles, int kSlot>
inline void BlockProducts(const std::byte* tile, size_t b, TileScratch& scratch) {
  const std::byte* values = tile + b * kRowTile * kQuantRowBlockBytes;
  const std::byte* weights = scratch.weights + b * kUnpackedBlockBytes;
  Products<Tiles, kSlot, false>(values, weights, scratch);
  if constexpr (kHalves<kType>) Products<Tiles, kSlot, true>(values, weights, scratch);
}

// Of the blocks b to b + count of a panel.
template <PackedType kType, typename Tiles>
inline void ProductsOf(const std::byte* tile, size_t b, size_t count, TileScratch& scratch) {
  BlockProducts<kType, Tiles, 0>(tile, b, scratch);
  if (count > 1) BlockProducts<kType, Tiles, 1>(tile, b + 1, scratch);
  if (count > 2) BlockProducts<kType, Tiles, 2>(tile, b + 2, scratch);
  if (count > 3) BlockProducts<kType, Tiles, 3>(tile, b + 3, scratch);
}

template <bool kFine>
constexpr int kRowsOf = kRowTile / kPlacesOf<kFine>;  // of a full tile

template <bool kFine>
inline __m512i SumOf(const TileScratch& scratch, size_t slot, int half, int row) {
  const auto& sums = scratch.sums[slot][half];
  if constexpr (kFine) {
    return JoinSums(_mm512_load_si512(sums[2 * row]), _mm512_load_si512(sums[2 * row + 1]));
  }
  return _mm512_load_si512(sums[row]);
}

// Adds a block's sums, which are in `slot`, to the rows': of a format with super-blocks, to those
// of its super-block.
template <PackedType kType, bool kFine>
inline void AddSums(const std::byte* block, const std::byte* tile, size_t slot,
                    const TileScratch& scratch, __m512 (&acc)[kRowsOf<kFine>]) {
  constexpr QuantFormat kFormat = FormatOf(kType);
  constexpr int kRows = kRowsOf<kFine>;
  const RowBlock<kRows, kFine> rows(tile);
  if constexpr (kHalves<kType>) {
    const __m512 left_scale = WidenI8(block), right_scale = WidenI8(block + 16);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const QuantNumbers& numbers = rows.NumbersOf(r);
      const __m512i left = _mm512_add_epi32(SumOf<kFine>(scratch, slot, 0, r), LeftOffset(numbers));
      const __m512i right =
          _mm512_add_epi32(SumOf<kFine>(scratch, slot, 1, r), RightOffset(numbers));
      acc[r] = AddK6(left, right, numbers, left_scale, right_scale, acc[r]);
    }
  } else if constexpr (kFormat.super_bytes != 0) {
    const __m512 scale = WidenU8(block);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      acc[r] = AddK45(SumOf<kFine>(scratch, slot, 0, r), rows.NumbersOf(r), scale, acc[r]);
    }
  } else {
    const __m512 scale = LoadHalves(block);
    __m512 minimum = _mm512_setzero_ps();
    if constexpr (kFormat.minima) minimum = LoadHalves(block + 32);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      __m512i sum = SumOf<kFine>(scratch, slot, 0, r);
      if constexpr (!kFormat.minima) {
        sum = _mm512_add_epi32(sum, OffsetOf<kType>(rows.NumbersOf(r)));
      }
      acc[r] = AddBlock<kType>(sum, rows.NumbersOf(r), scale, minimum, acc[r]);
    }
  }
}

// Adds the blocks from `b` to `end` of a panel that begins at block `first` of the group.
template <PackedType kType, bool kFine, typename Tiles>
inline void AddBlocks(const std::byte* group, const std::byte* tile, size_t first, size_t b,
                      size_t end, TileScratch& scratch, __m512 (&acc)[kRowsOf<kFine>]) {
  for (; b < end; b += kBlocksAtOnce) {
    const size_t count = end - b < kBlocksAtOnce ? end - b : kBlocksAtOnce;
    ProductsOf<kType, Tiles>(tile, b, count, scratch);
    for (size_t slot = 0; slot < count; ++slot) {
      AddSums<kType, kFine>(BlockAt<kType>(group, first + b + slot),
                            tile + (b + slot) * kRowTile * kQuantRowBlockBytes, slot, scratch, acc);
    }
  }
}

// The panel's part of one tile's rows. `tile`: the rows in the panel's first block.
template <PackedType kType, bool kFine, typename Tiles>
void AddPanel(const std::byte* group, const std::byte* tile, size_t first, size_t blocks,
              TileScratch& scratch, __m512 (&acc)[kRowsOf<kFine>]) {
  constexpr QuantFormat kFormat = FormatOf(kType);
  constexpr int kRows = kRowsOf<kFine>;
  if constexpr (kFormat.super_bytes == 0) {
    AddBlocks<kType, kFine, Tiles>(group, tile, first, 0, blocks, scratch, acc);
  } else {
    constexpr size_t kStep = kGroupStep<kType>;
    for (size_t b = 0; b < blocks; b += kStep) {
      const std::byte* super = BlockAt<kType>(group, first + b) - kFormat.super_bytes;
      __m512 products[kRows];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) products[r] = _mm512_setzero_ps();
      AddBlocks<kType, kFine, Tiles>(group, tile, first, b, b + kStep, scratch, products);
      const __m512 scale = LoadHalves(super);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) acc[r] = _mm512_fmadd_ps(products[r], scale, acc[r]);
      if constexpr (kFormat.minima) {
        SubtractMinima<kType, kFine>(super, tile + b * kRowTile * kQuantRowBlockBytes, acc);
      }
    }
  }
}

// One group of 16 output rows against `tiles` full tiles of activation rows, whose results begin at
// `out`. Panels are left to right: a row's sum waits for its next panel in scratch.acc.
template <PackedType kType, bool kFine, typename Tiles>
void MultiplyGroup(const MatMul& m, const std::byte* group, const std::byte* first_tile, int tiles,
                   float* out, TileScratch& scratch) {
  constexpr int kRows = kRowsOf<kFine>;
  const size_t tile_bytes = QuantTileBytes(kRowTile, m.columns);
  const size_t blocks = m.columns / kQuantBlock;
  for (size_t first = 0; first < blocks; first += kPanelBlocks) {
    const size_t count = blocks - first < kPanelBlocks ? blocks - first : kPanelBlocks;
    UnpackPanel<kType>(group, first, count, scratch);
    for (int t = 0; t < tiles; ++t) {
      const std::byte* tile = first_tile + static_cast<size_t>(t) * tile_bytes;
      float(*kept)[kGroupRows] = scratch.acc + t * kRows;
      __m512 acc[kRows];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        acc[r] = first == 0 ? _mm512_setzero_ps() : _mm512_load_ps(kept[r]);
      }
      AddPanel<kType, kFine, Tiles>(group, tile + first * kRowTile * kQuantRowBlockBytes, first,
                                    count, scratch, acc);
      if (first + count == blocks) {
        StoreRows(m, acc, out + static_cast<size_t>(t) * kRows * m.out_stride);
      } else {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) _mm512_store_ps(kept[r], acc[r]);
      }
    }
  }
}

// The rows past the last full tile, few or none, go to AVX-512.
template <PackedType kType, bool kFine, typename Tiles>
void TiledMatMul(const MatMul& m) {
  constexpr int kRows = kRowsOf<kFine>;
  static_assert(kPanelBlocks % kGroupStep<kType> == 0);
  const int full_tiles = m.rows / kRows;
  if (full_tiles > 0) {
    const size_t group_bytes = PackedGroupBytes(kType, m.columns);
    const size_t tile_bytes = QuantTileBytes(kRowTile, m.columns);
    constexpr int kTilesAtOnce = kRowsAtOnce / kRowTile;
    TileScratch scratch;
    const TileShapes shapes = ShapesOf<kType>();
    Tiles::Configure(shapes);
    for (int tile = 0; tile < full_tiles; tile += kTilesAtOnce) {
      const int tiles = full_tiles - tile < kTilesAtOnce ? full_tiles - tile : kTilesAtOnce;
      const std::byte* first = m.x_quant + static_cast<size_t>(tile) * tile_bytes;
      float* out = m.out + static_cast<size_t>(tile) * kRows * m.out_stride;
      for (int group = 0; group < m.groups; ++group) {
        MultiplyGroup<kType, kFine, Tiles>(m, m.weights + static_cast<size_t>(group) * group_bytes,
                                           first, tiles, out + group * kGroupRows, scratch);
      }
    }
    Tiles::Release();
  }
  if (m.rows % kRows == 0) return;
  MatMul rest = m;
  rest.x_quant += static_cast<size_t>(full_tiles) * QuantTileBytes(kRowTile, m.columns);
  rest.rows = m.rows % kRows;
  rest.out += static_cast<size_t>(full_tiles) * kRows * m.out_stride;
  Avx512Kernels().matmul[static_cast<int>(kType)](rest);
}

template <PackedType kType, typename Tiles>
void TileMatMul(const MatMul& m) {
  m.fine ? TiledMatMul<kType, true, Tiles>(m) : TiledMatMul<kType, false, Tiles>(m);
}

// Avx512Bf16Kernels with products on the tile unit.
template <typename Tiles>
Kernels TableWithTiles(const char* name) {
  Kernels k = Avx512Bf16Kernels();
  k.name = name;
  k.matmul[static_cast<int>(PackedType::kQ8_0)] = TileMatMul<PackedType::kQ8_0, Tiles>;
  k.matmul[static_cast<int>(PackedType::kQ4_0)] = TileMatMul<PackedType::kQ4_0, Tiles>;
  k.matmul[static_cast<int>(PackedType::kQ4_1)] = TileMatMul<PackedType::kQ4_1, Tiles>;
  k.matmul[static_cast<int>(PackedType::kQ5_0)] = TileMatMul<PackedType::kQ5_0, Tiles>;
  k.matmul[static_cast<int>(PackedType::kQ5_1)] = TileMatMul<PackedType::kQ5_1, Tiles>;
  k.matmul[static_cast<int>(PackedType::kQ4_K)] = TileMatMul<PackedType::kQ4_K, Tiles>;
  k.matmul[static_cast<int>(PackedType::kQ5_K)] = TileMatMul<PackedType::kQ5_K, Tiles>;
  k.matmul[static_cast<int>(PackedType::kQ6_K)] = TileMatMul<PackedType::kQ6_K, Tiles>;
  return k;
}

}  // namespace
}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_TILE_PRODUCTS_INL_H_
