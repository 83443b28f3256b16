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
inline int QuantAt(const std::byte* quants, int lane, int k) {
  if constexpr (kType == PackedType::kQ8_0) {
    return static_cast<int>(quants[(k / 4) * 64 + lane * 4 + k % 4]);
  } else {
    const int step = (k % 16) / 4;
    const int byte = static_cast<int>(quants[step * 64 + lane * 4 + k % 4]);
    return k < 16 ? byte & 15 : byte >> 4;
  }
}

template <PackedType kType>
void QuantMatMul(const MatMul& m) {
  constexpr size_t kBlockBytes = PackedGroupBytes(kType, kQuantBlock);
  constexpr size_t kScaleBytes = kType == PackedType::kQ4_1 ? 64 : 32;
  const size_t blocks = m.columns / kQuantBlock;
  for (int row = 0; row < m.rows; ++row) {
    const int tile = row / kRowTile;
    const int tile_rows = m.rows - tile * kRowTile < kRowTile ? m.rows - tile * kRowTile : kRowTile;
    std::byte* tile_base = const_cast<std::byte*>(m.x_quant) +
                           static_cast<size_t>(tile) * QuantTileBytes(kRowTile, m.columns);
    for (int group = 0; group < m.groups; ++group) {
      const std::byte* weights = m.weights + group * blocks * kBlockBytes;
      float acc[kGroupRows] = {};
      for (size_t b = 0; b < blocks; ++b, weights += kBlockBytes) {
        const QuantSlot slot = SlotOf(tile_base, b, row % kRowTile, tile_rows);
        for (int lane = 0; lane < kGroupRows; ++lane) {
          int32_t sum = 0;
          if constexpr (kType == PackedType::kQ8_0) sum = *slot.offset;
          if constexpr (kType == PackedType::kQ4_0) sum = *slot.offset / 16;
          for (int k = 0; k < kQuantBlock; ++k) {
            sum += QuantAt<kType>(weights + kScaleBytes, lane, k) * slot.values[k];
          }
          const float scaled = static_cast<float>(sum) * *slot.scale;
          acc[lane] = __builtin_fmaf(scaled, HalfToFloat(HalfAt(weights, lane)), acc[lane]);
          if constexpr (kType == PackedType::kQ4_1) {
            const float minimum = HalfToFloat(HalfAt(weights + 32, lane));
            acc[lane] = __builtin_fmaf(minimum, *slot.sum, acc[lane]);
          }
        }
      }
      float* out = m.out + static_cast<size_t>(row) * m.out_stride + group * kGroupRows;
      for (int lane = 0; lane < kGroupRows; ++lane) {
        out[lane] = m.add ? acc[lane] + out[lane] : acc[lane];
      }
    }
  }
}

constexpr Kernels MakeTable() {
  Kernels k = FloatKernels("scalar");
  k.matmul[static_cast<int>(PackedType::kQ8_0)] = QuantMatMul<PackedType::kQ8_0>;
  k.matmul[static_cast<int>(PackedType::kQ4_0)] = QuantMatMul<PackedType::kQ4_0>;
  k.matmul[static_cast<int>(PackedType::kQ4_1)] = QuantMatMul<PackedType::kQ4_1>;
  return k;
}
constexpr Kernels kTable = MakeTable();

}  // namespace

const Kernels& ScalarKernels() { return kTable; }

}  // namespace antiphon::engine::cpu
