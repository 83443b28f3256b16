// The float kernels, written once over the sixteen lanes of a simd_*.h file. Included by exactly
// one kernels_*.cc for each instruction set, after its simd_*.h.
#ifndef ANTIPHON_ENGINE_CPU_KERNELS_INL_H_
#define ANTIPHON_ENGINE_CPU_KERNELS_INL_H_

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "engine/cpu/kernels.h"

#include "engine/cpu/exp-inl.h"

namespace antiphon::engine::cpu {
namespace {

inline float SqrtOf(float x) { return __builtin_sqrtf(x); }

// Rows are summed in column order, one chain a lane.
template <typename LoadWeights, int kRows, int kGroups>
inline void FloatTile(const MatMul& m, const std::byte* weights, size_t group_bytes,
                      size_t column_bytes, int row, int group) {
  F acc[kRows][kGroups];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) acc[r][g] = Zero();
  }
  const float* x = m.x + static_cast<size_t>(row) * m.x_stride;
  for (size_t k = 0; k < m.columns; ++k) {
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      const F w =
          LoadWeights::At(weights + static_cast<size_t>(g) * group_bytes + k * column_bytes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        acc[r][g] = Fma(w, Splat(x[static_cast<size_t>(r) * m.x_stride + k]), acc[r][g]);
      }
      Forget(x);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      float* out = m.out + static_cast<size_t>(row + r) * m.out_stride +
                   static_cast<size_t>(group + g) * kGroupRows;
      Store(out, m.add ? Add(acc[r][g], Load(out)) : acc[r][g]);
    }
  }
}

template <typename LoadWeights, int kGroups>
inline void FloatGroups(const MatMul& m, size_t column_bytes, int group) {
  const size_t group_bytes = m.columns * column_bytes;
  const std::byte* weights = m.weights + static_cast<size_t>(group) * group_bytes;
  int row = 0;
  for (; row + kFloatRows <= m.rows; row += kFloatRows) {
    FloatTile<LoadWeights, kFloatRows, kGroups>(m, weights, group_bytes, column_bytes, row, group);
  }
  for (; row < m.rows; ++row) {
    FloatTile<LoadWeights, 1, kGroups>(m, weights, group_bytes, column_bytes, row, group);
  }
}

template <typename LoadWeights>
void FloatMatMul(const MatMul& m) {
  int group = 0;
  for (; group + kFloatGroups <= m.groups; group += kFloatGroups) {
    FloatGroups<LoadWeights, kFloatGroups>(m, LoadWeights::kColumnBytes, group);
  }
  for (; group < m.groups; ++group) {
    FloatGroups<LoadWeights, 1>(m, LoadWeights::kColumnBytes, group);
  }
}

struct F32Weights {
  static constexpr size_t kColumnBytes = 64;
  static F At(const std::byte* p) { return Load(reinterpret_cast<const float*>(p)); }
};
struct F16Weights {
  static constexpr size_t kColumnBytes = 32;
  static F At(const std::byte* p) { return LoadF16(reinterpret_cast<const uint16_t*>(p)); }
};
struct Bf16Weights {
  static constexpr size_t kColumnBytes = 32;
  static F At(const std::byte* p) { return LoadBf16(reinterpret_cast<const uint16_t*>(p)); }
};

// One row of a quantised tile, as kernels.h lays it out.
struct QuantSlot {
  int8_t* values;
  QuantNumbers* numbers;
};
inline QuantSlot SlotOf(std::byte* tile, size_t block, int row, int tile_rows) {
  const size_t rows = static_cast<size_t>(tile_rows);
  std::byte* base = tile + block * rows * kQuantRowBlockBytes;
  return {reinterpret_cast<int8_t*>(base) + static_cast<size_t>(row) * kQuantBlock,
          reinterpret_cast<QuantNumbers*>(base + rows * kQuantBlock) + row};
}

void QuantizeRow(const float* x, size_t columns, int row, int tile_rows, std::byte* tile) {
  for (size_t block = 0; block < columns / kQuantBlock; ++block) {
    const F a = Load(x + block * kQuantBlock);
    const F b = Load(x + block * kQuantBlock + 16);
    const float peak = MaxOf(Max(Abs(a), Abs(b)));
    const float inverse = peak > 0 ? 127.0f / peak : 0.0f;
    const QuantSlot slot = SlotOf(tile, block, row, tile_rows);
    const int32_t half = StoreInt8(slot.values, Mul(a, Splat(inverse)));
    const int32_t sum = half + StoreInt8(slot.values + 16, Mul(b, Splat(inverse)));
    const float scale = peak * (1.0f / 127.0f);
    *slot.numbers = {scale, scale * static_cast<float>(sum), -128 * sum, -32 * half};
  }
}

void QuantizeRowFine(const float* x, size_t columns, int row, int tile_rows, std::byte* tile) {
  const F magic = Splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  for (size_t block = 0; block < columns / kQuantBlock; ++block) {
    const F a = Load(x + block * kQuantBlock);
    const F b = Load(x + block * kQuantBlock + 16);
    const float peak = MaxOf(Max(Abs(a), Abs(b)));
    const float inverse = peak > 0 ? 127.0f / peak : 0.0f;
    const QuantSlot upper = SlotOf(tile, block, row, tile_rows);
    const QuantSlot lower = SlotOf(tile, block, row + 1, tile_rows);
    int32_t sum = 0;
    for (int half = 0; half < 2; ++half) {
      const F scaled = Mul(half == 0 ? a : b, Splat(inverse));
      const F rounded = Sub(Add(scaled, magic), magic);
      const F rest = Mul(Sub(scaled, rounded), Splat(256.0f));
      sum += 256 * StoreInt8(upper.values + 16 * half, rounded);
      sum += StoreInt8(lower.values + 16 * half, Min(Max(rest, Splat(-127.0f)), Splat(127.0f)));
      if (half == 0) upper.numbers->half = -32 * sum;
    }
    const float scale = peak * (1.0f / (127.0f * 256.0f));
    upper.numbers->scale = scale;
    upper.numbers->sum = scale * static_cast<float>(sum);
    upper.numbers->offset = -128 * sum;
    *lower.numbers = {};
  }
}

void RmsNorm(const float* x, const float* weight, size_t n, size_t size, float eps, float* out) {
  F squares = Zero();
  for (size_t i = 0; i < n; i += 16) {
    const F v = Load(x + i);
    squares = Fma(v, v, squares);
  }
  const float mean = Sum(squares) / static_cast<float>(size);
  const F scale = Splat(1.0f / SqrtOf(mean + eps));
  for (size_t i = 0; i < n; i += 16) Store(out + i, Mul(Mul(Load(x + i), scale), Load(weight + i)));
}

void SiluMul(const float* gate, const float* up, size_t n, float* out) {
  const F one = Splat(1.0f);
  for (size_t i = 0; i < n; i += 16) {
    const F g = Load(gate + i);
    const F power = Min(Max(Sub(Zero(), g), Splat(-80.0f)), Splat(80.0f));
    const F silu = Div(g, Add(one, ExpInRange(power)));
    Store(out + i, Mul(silu, Load(up + i)));
  }
}

void AddInto(float* x, const float* y, size_t n) {
  for (size_t i = 0; i < n; i += 16) Store(x + i, Add(Load(x + i), Load(y + i)));
}

void Rope(const float* x, const float* cos, const float* sin, size_t half, float* out) {
  size_t i = 0;
  for (; i + 16 <= half; i += 16) {
    const F a = Load(x + i), b = Load(x + half + i);
    const F c = Load(cos + i), s = Load(sin + i);
    Store(out + i, Fma(a, c, Sub(Zero(), Mul(b, s))));
    Store(out + half + i, Fma(b, c, Mul(a, s)));
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    out[i] = __builtin_fmaf(a, cos[i], 0.0f - b * sin[i]);
    out[half + i] = __builtin_fmaf(b, cos[i], a * sin[i]);
  }
}

void ToBf16(const float* x, size_t n, uint16_t* out) {
  size_t i = 0;
  for (; i + 16 <= n; i += 16) StoreBf16(out + i, Load(x + i));
  if (i == n) return;
  float tail[16] = {};
  uint16_t rounded[16];
  std::memcpy(tail, x + i, (n - i) * sizeof(float));
  StoreBf16(rounded, Load(tail));
  std::memcpy(out + i, rounded, (n - i) * sizeof(uint16_t));
}

size_t ArgMax(const float* x, size_t n) {
  F best = Splat(-kInfinity);
  size_t i = 0;
  for (; i + 16 <= n; i += 16) best = Max(Load(x + i), best);  // a NaN on the left gives `best`
  float top = MaxOf(best);
  for (; i < n; ++i) top = x[i] > top ? x[i] : top;
  for (size_t k = 0; k < n; ++k) {
    if (x[k] == top) return k;
  }
  return 0;
}

void BlockMaxima(const float* x, size_t n, float* out) {
  size_t i = 0;
  for (; i + kMaximaBlock <= n; i += kMaximaBlock) {
    *out++ = MaxOf(Max(Load(x + i), Load(x + i + 16)));
  }
  if (i == n) return;
  float top = x[i];
  for (; i < n; ++i) top = x[i] > top ? x[i] : top;
  *out = top;
}

void ShiftScale(const float* x, size_t n, float shift, float scale, float* out) {
  const F s = Splat(shift), f = Splat(scale);
  size_t i = 0;
  for (; i + 16 <= n; i += 16) Store(out + i, Mul(Sub(Load(x + i), s), f));
  for (; i < n; ++i) out[i] = (x[i] - shift) * scale;
}

double SumExp(const float* x, size_t n, float shift) {
  double total = 0;
  const F s = Splat(shift);
  size_t i = 0;
  while (i < n) {
    // Floats within 64 vectors, doubles across them.
    F part = Zero();
    for (int k = 0; k < 64 && i < n; ++k, i += 16) {
      F v;
      if (n - i >= 16) {
        v = Load(x + i);
      } else {
        float tail[16];
        for (size_t j = 0; j < 16; ++j) tail[j] = i + j < n ? x[i + j] : -kInfinity;
        v = Load(tail);
      }
      const F d = Sub(v, s);
      part = Add(part, ZeroBelow(d, Splat(kLowestExp), Exp(d)));
    }
    total += static_cast<double>(Sum(part));
  }
  return total;
}

}  // namespace
}  // namespace antiphon::engine::cpu

#include "engine/cpu/attention_operands-inl.h"

namespace antiphon::engine::cpu {
namespace {

using Bf16Operands = FloatOperands<Bf16Cache>;

}  // namespace
}  // namespace antiphon::engine::cpu

#include "engine/cpu/attention-inl.h"

namespace antiphon::engine::cpu {
namespace {

// Each kernels_*.cc has one for the integer formats.
template <PackedType kType>
void QuantMatMul(const MatMul& m);

constexpr Kernels MakeTable(const char* name) {
  Kernels k{};
  k.name = name;
  k.matmul[static_cast<int>(PackedType::kF32)] = FloatMatMul<F32Weights>;
  k.matmul[static_cast<int>(PackedType::kF16)] = FloatMatMul<F16Weights>;
  k.matmul[static_cast<int>(PackedType::kBf16)] = FloatMatMul<Bf16Weights>;
  k.matmul[static_cast<int>(PackedType::kQ8_0)] = QuantMatMul<PackedType::kQ8_0>;
  k.matmul[static_cast<int>(PackedType::kQ4_0)] = QuantMatMul<PackedType::kQ4_0>;
  k.matmul[static_cast<int>(PackedType::kQ4_1)] = QuantMatMul<PackedType::kQ4_1>;
  k.matmul[static_cast<int>(PackedType::kQ5_0)] = QuantMatMul<PackedType::kQ5_0>;
  k.matmul[static_cast<int>(PackedType::kQ5_1)] = QuantMatMul<PackedType::kQ5_1>;
  k.matmul[static_cast<int>(PackedType::kQ4_K)] = QuantMatMul<PackedType::kQ4_K>;
  k.matmul[static_cast<int>(PackedType::kQ5_K)] = QuantMatMul<PackedType::kQ5_K>;
  k.matmul[static_cast<int>(PackedType::kQ6_K)] = QuantMatMul<PackedType::kQ6_K>;
  k.quantize_row = QuantizeRow;
  k.quantize_row_fine = QuantizeRowFine;
  k.rms_norm = RmsNorm;
  k.silu_mul = SiluMul;
  k.add = AddInto;
  k.rope = Rope;
  k.to_bf16 = ToBf16;
  k.attention = Attend;
  k.merge_attention = MergeAttention;
  k.argmax = ArgMax;
  k.block_maxima = BlockMaxima;
  k.shift_scale = ShiftScale;
  k.sum_exp = SumExp;
  return k;
}

}  // namespace
}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_KERNELS_INL_H_
