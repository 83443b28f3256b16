// The reference: every other table must give these bits. Also what runs where nothing better is
// granted.
#include "engine/cpu/kernels.h"
#include "engine/cpu/simd_scalar.h"
#include "engine/cpu/kernels-inl.h"

namespace antiphon::engine::cpu {
namespace {

inline uint16_t HalfAt(const std::byte* p, int lane) {
  uint16_t h;
  std::memcpy(&h, p + 2 * lane, 2);
  return h;
}

// Value of row `lane`, column `k` of a block, without its offset.
template <PackedType kType>
inline int QuantAt(const std::byte* block, int lane, int k) {
  constexpr QuantFormat kFormat = FormatOf(kType);
  const std::byte* high = block + kFormat.head_bytes;
  const std::byte* values = high + kFormat.high_bytes;
  const int at = lane * 4 + k % 4;
  if constexpr (kFormat.bits == 8) {
    return static_cast<int>(values[k / 4 * 64 + at]);
  } else {
    const int byte = static_cast<int>(values[k % 16 / 4 * 64 + at]);
    int value = k < 16 ? byte & 15 : byte >> 4;
    if constexpr (kFormat.bits == 5) value |= (static_cast<int>(high[at]) >> (k / 4) & 1) << 4;
    if constexpr (kFormat.bits == 6) {
      value |= (static_cast<int>(high[k / 16 * 64 + at]) >> (k % 16 / 4 * 2) & 3) << 4;
    }
    return value;
  }
}

// Value `k` of a row's block; a row at 16 bits has the next place too.
template <bool kFine>
inline int32_t ValueAt(const QuantSlot& slot, int k) {
  return kFine ? 256 * slot.values[k] + slot.values[kQuantBlock + k] : slot.values[k];
}

// Sum of the products of columns [begin, end) of a block.
template <PackedType kType, bool kFine>
inline int32_t ProductSum(const std::byte* block, int lane, const QuantSlot& slot, int begin,
                          int end) {
  int32_t sum = 0;
  for (int k = begin; k < end; ++k) sum += QuantAt<kType>(block, lane, k) * ValueAt<kFine>(slot, k);
  return sum;
}

// Adds one block to the lanes of `acc`.
template <PackedType kType, bool kFine>
void AddBlock(const std::byte* block, const QuantSlot& slot, float* acc) {
  constexpr QuantFormat kFormat = FormatOf(kType);
  for (int lane = 0; lane < kGroupRows; ++lane) {
    int32_t sum = ProductSum<kType, kFine>(block, lane, slot, 0, kQuantBlock);
    if constexpr (!kFormat.minima) sum += slot.numbers->offset / (256 >> kFormat.bits);
    const float scaled = static_cast<float>(sum) * slot.numbers->scale;
    acc[lane] = __builtin_fmaf(scaled, HalfToFloat(HalfAt(block, lane)), acc[lane]);
    if constexpr (kFormat.minima) {
      const float minimum = HalfToFloat(HalfAt(block + 32, lane));
      acc[lane] = __builtin_fmaf(minimum, slot.numbers->sum, acc[lane]);
    }
  }
}

// The integer sum of one block of a super-block, with its scales.
template <PackedType kType, bool kFine>
inline float ScaledSum(const std::byte* block, int lane, const QuantSlot& slot) {
  if constexpr (kType == PackedType::kQ6_K) {
    const int32_t first = ProductSum<kType, kFine>(block, lane, slot, 0, 16) + slot.numbers->half;
    const int32_t offset = slot.numbers->offset / 4 - slot.numbers->half;
    const int32_t second = ProductSum<kType, kFine>(block, lane, slot, 16, 32) + offset;
    return __builtin_fmaf(
        static_cast<float>(second), static_cast<float>(static_cast<int8_t>(block[16 + lane])),
        static_cast<float>(first) * static_cast<float>(static_cast<int8_t>(block[lane])));
  } else {
    const int32_t sum = ProductSum<kType, kFine>(block, lane, slot, 0, kQuantBlock);
    return static_cast<float>(sum) * static_cast<float>(static_cast<int>(block[lane]));
  }
}

// Adds the super-block whose first block is number `first` of the tile.
template <PackedType kType, bool kFine>
void AddSuperBlock(const std::byte* super, std::byte* tile, size_t first, int place, int places,
                   float* acc) {
  constexpr QuantFormat kFormat = FormatOf(kType);
  for (int lane = 0; lane < kGroupRows; ++lane) {
    float products = 0, minima = 0;
    const std::byte* block = super + kFormat.super_bytes;
    for (size_t b = 0; b < kSuperBlock / kQuantBlock; ++b, block += BlockBytes(kFormat)) {
      const QuantSlot slot = SlotOf(tile, first + b, place, places);
      products =
          __builtin_fmaf(ScaledSum<kType, kFine>(block, lane, slot), slot.numbers->scale, products);
      if constexpr (kFormat.minima) {
        minima = __builtin_fmaf(static_cast<float>(static_cast<int>(block[16 + lane])),
                                slot.numbers->sum, minima);
      }
    }
    acc[lane] = __builtin_fmaf(products, HalfToFloat(HalfAt(super, lane)), acc[lane]);
    if constexpr (kFormat.minima) {
      acc[lane] = __builtin_fmaf(-minima, HalfToFloat(HalfAt(super + 32, lane)), acc[lane]);
    }
  }
}

// One activation row against one group.
template <PackedType kType, bool kFine>
void MultiplyRow(const std::byte* weights, size_t columns, std::byte* tile, int place, int places,
                 float* acc) {
  constexpr QuantFormat kFormat = FormatOf(kType);
  const size_t blocks = columns / kQuantBlock;
  if constexpr (kFormat.super_bytes == 0) {
    for (size_t b = 0; b < blocks; ++b, weights += BlockBytes(kFormat)) {
      AddBlock<kType, kFine>(weights, SlotOf(tile, b, place, places), acc);
    }
  } else {
    for (size_t b = 0; b < blocks; b += kSuperBlock / kQuantBlock) {
      AddSuperBlock<kType, kFine>(weights, tile, b, place, places, acc);
      weights += PackedGroupBytes(kType, kSuperBlock);
    }
  }
}

template <PackedType kType, bool kFine>
void MultiplyRows(const MatMul& m) {
  constexpr int kPlaces = kFine ? 2 : 1;  // of a row
  for (int row = 0; row < m.rows; ++row) {
    const int first = row * kPlaces / kRowTile * kRowTile;  // place of the tile
    const int places = m.rows * kPlaces - first < kRowTile ? m.rows * kPlaces - first : kRowTile;
    std::byte* tile =
        const_cast<std::byte*>(m.x_quant) + QuantTileBytes(static_cast<size_t>(first), m.columns);
    for (int group = 0; group < m.groups; ++group) {
      float acc[kGroupRows] = {};
      MultiplyRow<kType, kFine>(m.weights + group * PackedGroupBytes(kType, m.columns), m.columns,
                                tile, row * kPlaces - first, places, acc);
      float* out = m.out + static_cast<size_t>(row) * m.out_stride + group * kGroupRows;
      for (int lane = 0; lane < kGroupRows; ++lane) {
        out[lane] = m.add ? acc[lane] + out[lane] : acc[lane];
      }
    }
  }
}

template <PackedType kType>
void QuantMatMul(const MatMul& m) {
  m.fine ? MultiplyRows<kType, true>(m) : MultiplyRows<kType, false>(m);
}

constexpr Kernels kTable = MakeTable("scalar");

}  // namespace

const Kernels& ScalarKernels() { return kTable; }

}  // namespace antiphon::engine::cpu
