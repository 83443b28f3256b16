// The products of the integer formats on NEON, written once over how bytes are multiplied. Included
// by exactly one kernels_neon*.cc for each such way, after kernels-inl.h and its
//   template <int kBits, int kSteps> int32x4_t StepSum(const int8x16_t* w, const std::byte* x)
// sum of the products of four output rows: w[i] has the values of columns 4i to 4i + 3, row by row,
// x the activations, from -127 to 127. The values are those of Unpack.
#ifndef ANTIPHON_ENGINE_CPU_QUANT_NEON_INL_H_
#define ANTIPHON_ENGINE_CPU_QUANT_NEON_INL_H_

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "engine/cpu/kernels.h"

namespace antiphon::engine::cpu {
namespace {

constexpr int kQuarters = 4;  // of a group: four output rows in a register

inline uint8x16_t LoadBytes(const std::byte* p) {
  return vld1q_u8(reinterpret_cast<const uint8_t*>(p));
}

// Bits `mask` of `high` join those of `values`.
inline uint8x16_t Join(uint8x16_t values, uint8x16_t high, uint8_t mask) {
  return vorrq_u8(values, vandq_u8(high, vdupq_n_u8(mask)));
}

// The values of a block for one quarter of the group: `block` is moved to its lanes. Step i holds
// columns 4i to 4i + 3. kQ8_0's lose their offset (the flipped sign bit is -128), the others are as
// they are stored: below 64, so they are signed bytes too.
template <PackedType kType>
inline void Unpack(const std::byte* block, int8x16_t (&signed_w)[8]) {
  constexpr QuantFormat kFormat = FormatOf(kType);
  const std::byte* high = block + kFormat.head_bytes;
  const std::byte* values = high + kFormat.high_bytes;
  uint8x16_t w[8];
  if constexpr (kFormat.bits == 8) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) w[i] = veorq_u8(LoadBytes(values + 64 * i), vdupq_n_u8(128));
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const uint8x16_t packed = LoadBytes(values + 64 * i);
      w[i] = vandq_u8(packed, vdupq_n_u8(15));
      w[i + 4] = vshrq_n_u8(packed, 4);
    }
  }
  if constexpr (kFormat.bits == 5) {
    const uint8x16_t bits = LoadBytes(high);
    w[0] = Join(w[0], vshlq_n_u8(bits, 4), 16);
    w[1] = Join(w[1], vshlq_n_u8(bits, 3), 16);
    w[2] = Join(w[2], vshlq_n_u8(bits, 2), 16);
    w[3] = Join(w[3], vshlq_n_u8(bits, 1), 16);
    w[4] = Join(w[4], bits, 16);
    w[5] = Join(w[5], vshrq_n_u8(bits, 1), 16);
    w[6] = Join(w[6], vshrq_n_u8(bits, 2), 16);
    w[7] = Join(w[7], vshrq_n_u8(bits, 3), 16);
  }
  if constexpr (kFormat.bits == 6) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const uint8x16_t bits = LoadBytes(high + 64 * half);
      uint8x16_t* step = w + 4 * half;
      step[0] = Join(step[0], vshlq_n_u8(bits, 4), 48);
      step[1] = Join(step[1], vshlq_n_u8(bits, 2), 48);
      step[2] = Join(step[2], bits, 48);
      step[3] = Join(step[3], vshrq_n_u8(bits, 2), 48);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) signed_w[i] = vreinterpretq_s8_u8(w[i]);
}

// A row in one block of a tile with `places`, from its place `place` on.
template <bool kFine>
struct RowBlock {
  static constexpr size_t kPlaces = kFine ? 2 : 1;
  RowBlock(const std::byte* tile, size_t places, size_t place)
      : values(tile + place * kQuantBlock),
        numbers(reinterpret_cast<const QuantNumbers*>(tile + places * kQuantBlock)[place]) {}
  // Of kSteps steps from `step` on.
  template <int kBits, int kSteps>
  int32x4_t Sum(const int8x16_t* w, int step) const {
    const std::byte* x = values + 4 * step;
    if constexpr (kFine) {
      const int32x4_t upper = StepSum<kBits, kSteps>(w + step, x);
      return vaddq_s32(vshlq_n_s32(upper, 8), StepSum<kBits, kSteps>(w + step, x + kQuantBlock));
    } else {
      return StepSum<kBits, kSteps>(w + step, x);
    }
  }
  const std::byte* values;
  const QuantNumbers& numbers;
};

// Of row `row` behind the one at place `first`.
template <bool kFine>
inline size_t PlaceOf(size_t first, int row) {
  return first + static_cast<size_t>(row) * RowBlock<kFine>::kPlaces;
}

// Four f16 numbers, or bytes, of a quarter.
inline float32x4_t HalvesAt(const std::byte* p) {
  return WidenF16(reinterpret_cast<const uint16_t*>(p));
}
inline uint32_t FourBytes(const std::byte* p) {
  uint32_t four;
  std::memcpy(&four, p, 4);
  return four;
}
inline int32x4_t UnsignedAt(const std::byte* p) {
  const uint16x8_t words = vmovl_u8(vcreate_u8(FourBytes(p)));
  return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(words)));
}
inline int32x4_t SignedAt(const std::byte* p) {
  return vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(FourBytes(p)))));
}

template <int kRows>
inline void Clear(float32x4_t (&sums)[kRows][kQuarters]) {
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int q = 0; q < kQuarters; ++q) sums[r][q] = vdupq_n_f32(0.0f);
  }
}

template <int kRows>
inline void StoreRows(const MatMul& m, const float32x4_t (&acc)[kRows][kQuarters], float* out) {
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int q = 0; q < kQuarters; ++q) {
      float* o = out + static_cast<size_t>(r) * m.out_stride + 4 * q;
      vst1q_f32(o, m.add ? vaddq_f32(acc[r][q], vld1q_f32(o)) : acc[r][q]);
    }
  }
}

// One group of 16 output rows against kRows activation rows of a tile with `places`, from place
// `first` on.
template <PackedType kType, int kRows, bool kFine>
void QuantTile(const MatMul& m, const std::byte* weights, const std::byte* tile, size_t places,
               size_t first, float* out) {
  constexpr QuantFormat kFormat = FormatOf(kType);
  const size_t blocks = m.columns / kQuantBlock;
  float32x4_t acc[kRows][kQuarters];
  Clear(acc);
  for (size_t b = 0; b < blocks; ++b) {
#pragma GCC unroll 4
    for (int q = 0; q < kQuarters; ++q) {
      const float32x4_t scale = HalvesAt(weights + 8 * q);
      int8x16_t w[8];
      Unpack<kType>(weights + 16 * q, w);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const RowBlock<kFine> row(tile, places, PlaceOf<kFine>(first, r));
        int32x4_t sum = row.template Sum<kFormat.bits, 8>(w, 0);
        if constexpr (!kFormat.minima && kFormat.bits != 8) {
          sum = vaddq_s32(sum, vdupq_n_s32(row.numbers.offset / (256 >> kFormat.bits)));
        }
        const float32x4_t scaled = vmulq_n_f32(vcvtq_f32_s32(sum), row.numbers.scale);
        acc[r][q] = vfmaq_f32(acc[r][q], scaled, scale);
        if constexpr (kFormat.minima) {
          acc[r][q] =
              vfmaq_f32(acc[r][q], HalvesAt(weights + 32 + 8 * q), vdupq_n_f32(row.numbers.sum));
        }
      }
    }
    weights += BlockBytes(kFormat);
    tile += places * kQuantRowBlockBytes;
  }
  StoreRows(m, acc, out);
}

// What the products of a block grow to with its scales: of 8 bits, integers below 2^24.
template <PackedType kType, bool kFine>
inline float32x4_t ScaledSum(const std::byte* block, int quarter, const int8x16_t (&w)[8],
                             const RowBlock<kFine>& row) {
  if constexpr (kType == PackedType::kQ6_K) {
    const int32_t left_offset = row.numbers.half;
    const int32_t right_offset = row.numbers.offset / 4 - left_offset;
    const int32x4_t left = vaddq_s32(row.template Sum<6, 4>(w, 0), vdupq_n_s32(left_offset));
    const int32x4_t right = vaddq_s32(row.template Sum<6, 4>(w, 4), vdupq_n_s32(right_offset));
    const int32x4_t left_scale = SignedAt(block + 4 * quarter);
    const int32x4_t right_scale = SignedAt(block + 16 + 4 * quarter);
    if constexpr (kFine) {
      return vfmaq_f32(vmulq_f32(vcvtq_f32_s32(left), vcvtq_f32_s32(left_scale)),
                       vcvtq_f32_s32(right), vcvtq_f32_s32(right_scale));
    } else {
      return vcvtq_f32_s32(vmlaq_s32(vmulq_s32(left, left_scale), right, right_scale));
    }
  } else {
    const int32x4_t sum = row.template Sum<FormatOf(kType).bits, 8>(w, 0);
    const int32x4_t scale = UnsignedAt(block + 4 * quarter);
    if constexpr (kFine) {
      return vmulq_f32(vcvtq_f32_s32(sum), vcvtq_f32_s32(scale));
    } else {
      return vcvtq_f32_s32(vmulq_s32(sum, scale));
    }
  }
}

// The products of a super-block: to `sums` those of kRows rows.
template <PackedType kType, bool kFine, int kRows>
inline void SuperProducts(const std::byte* weights, const std::byte* tile, size_t places,
                          size_t first, float32x4_t (&sums)[kRows][kQuarters]) {
  Clear(sums);
  for (int b = 0; b < kSuperBlock / kQuantBlock; ++b) {
#pragma GCC unroll 4
    for (int q = 0; q < kQuarters; ++q) {
      int8x16_t w[8];
      Unpack<kType>(weights + 16 * q, w);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const RowBlock<kFine> row(tile, places, PlaceOf<kFine>(first, r));
        sums[r][q] = vfmaq_f32(sums[r][q], ScaledSum<kType>(weights, q, w, row),
                               vdupq_n_f32(row.numbers.scale));
      }
    }
    weights += BlockBytes(FormatOf(kType));
    tile += places * kQuantRowBlockBytes;
  }
}

// The minima of a super-block, likewise.
template <PackedType kType, bool kFine, int kRows>
inline void SuperMinima(const std::byte* weights, const std::byte* tile, size_t places,
                        size_t first, float32x4_t (&sums)[kRows][kQuarters]) {
  Clear(sums);
  for (int b = 0; b < kSuperBlock / kQuantBlock; ++b) {
#pragma GCC unroll 4
    for (int q = 0; q < kQuarters; ++q) {
      const float32x4_t minimum = vcvtq_f32_s32(UnsignedAt(weights + 16 + 4 * q));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const RowBlock<kFine> row(tile, places, PlaceOf<kFine>(first, r));
        sums[r][q] = vfmaq_f32(sums[r][q], minimum, vdupq_n_f32(row.numbers.sum));
      }
    }
    weights += BlockBytes(FormatOf(kType));
    tile += places * kQuantRowBlockBytes;
  }
}

// As QuantTile, for the formats with super-blocks. The rows' sums over super-blocks are touched
// once in 256 columns: where registers are short, it is those that go to memory.
template <PackedType kType, int kRows, bool kFine>
void SuperTile(const MatMul& m, const std::byte* weights, const std::byte* tile, size_t places,
               size_t first, float* out) {
  constexpr QuantFormat kFormat = FormatOf(kType);
  constexpr size_t kSuperTileBlocks = kSuperBlock / kQuantBlock;
  float32x4_t acc[kRows][kQuarters];
  Clear(acc);
  for (size_t super = 0; super < m.columns / kSuperBlock; ++super) {
    const std::byte* blocks = weights + kFormat.super_bytes;
    float32x4_t sums[kRows][kQuarters];
    SuperProducts<kType, kFine>(blocks, tile, places, first, sums);
#pragma GCC unroll 4
    for (int q = 0; q < kQuarters; ++q) {
      const float32x4_t scale = HalvesAt(weights + 8 * q);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) acc[r][q] = vfmaq_f32(acc[r][q], sums[r][q], scale);
    }
    if constexpr (kFormat.minima) {
      SuperMinima<kType, kFine>(blocks, tile, places, first, sums);
#pragma GCC unroll 4
      for (int q = 0; q < kQuarters; ++q) {
        const float32x4_t minimum = HalvesAt(weights + 32 + 8 * q);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) acc[r][q] = vfmsq_f32(acc[r][q], sums[r][q], minimum);
      }
    }
    weights = blocks + kSuperTileBlocks * BlockBytes(kFormat);
    tile += kSuperTileBlocks * places * kQuantRowBlockBytes;
  }
  StoreRows(m, acc, out);
}

template <PackedType kType, int kRows, bool kFine>
inline void AnyTile(const MatMul& m, const std::byte* weights, const std::byte* tile, size_t places,
                    int first, float* out) {
  const size_t place = PlaceOf<kFine>(0, first);
  out += static_cast<size_t>(first) * m.out_stride;
  if constexpr (FormatOf(kType).super_bytes == 0) {
    QuantTile<kType, kRows, kFine>(m, weights, tile, places, place, out);
  } else {
    SuperTile<kType, kRows, kFine>(m, weights, tile, places, place, out);
  }
}

template <PackedType kType, bool kFine>
void TiledMatMul(const MatMul& m) {
  constexpr int kTileRows = kRowTile / static_cast<int>(RowBlock<kFine>::kPlaces);
  const size_t group_bytes = PackedGroupBytes(kType, m.columns);
  const size_t tile_bytes = QuantTileBytes(kRowTile, m.columns);
  for (int group = 0; group < m.groups; ++group) {
    const std::byte* weights = m.weights + static_cast<size_t>(group) * group_bytes;
    const std::byte* tile = m.x_quant;
    for (int row = 0; row < m.rows; row += kTileRows, tile += tile_bytes) {
      const int rows = m.rows - row < kTileRows ? m.rows - row : kTileRows;
      const size_t places = PlaceOf<kFine>(0, rows);
      float* out = m.out + static_cast<size_t>(row) * m.out_stride + group * kGroupRows;
      int r = 0;
      for (; r + 4 <= rows; r += 4) AnyTile<kType, 4, kFine>(m, weights, tile, places, r, out);
      for (; r < rows; ++r) AnyTile<kType, 1, kFine>(m, weights, tile, places, r, out);
    }
  }
}

template <PackedType kType>
void QuantMatMul(const MatMul& m) {
  m.fine ? TiledMatMul<kType, true>(m) : TiledMatMul<kType, false>(m);
}

}  // namespace
}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_QUANT_NEON_INL_H_
