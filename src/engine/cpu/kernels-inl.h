// The float kernels, written once over the sixteen lanes of a simd_*.h file. Included by exactly one
// kernels_*.cc for each instruction set, after its simd_*.h.
#ifndef ANTIPHON_ENGINE_CPU_KERNELS_INL_H_
#define ANTIPHON_ENGINE_CPU_KERNELS_INL_H_

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "engine/cpu/kernels.h"

namespace antiphon::engine::cpu {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kLowestExp = -87.0f;  // exp below this is taken as 0 where it matters

// exp for |x| within the range of normal floats (clamped); 1 ulp. Polynomial: Cephes expf.
inline F Exp(F x) {
  x = Min(Max(x, Splat(kLowestExp)), Splat(88.0f));
  const F magic = Splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F n = Sub(Fma(x, Splat(1.44269504088896341f), magic), magic);
  F r = Fma(n, Splat(-0.693359375f), x);
  r = Fma(n, Splat(2.12194440e-4f), r);
  F p = Splat(1.9875691500e-4f);
  p = Fma(p, r, Splat(1.3981999507e-3f));
  p = Fma(p, r, Splat(8.3334519073e-3f));
  p = Fma(p, r, Splat(4.1665795894e-2f));
  p = Fma(p, r, Splat(1.6666665459e-1f));
  p = Fma(p, r, Splat(5.0000001201e-1f));
  p = Add(Fma(p, Mul(r, r), r), Splat(1.0f));
  return Mul(p, Exp2(n));
}

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
    F w[kGroups];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      w[g] = LoadWeights::At(weights + static_cast<size_t>(g) * group_bytes + k * column_bytes);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const F a = Splat(x[static_cast<size_t>(r) * m.x_stride + k]);
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) acc[r][g] = Fma(w[g], a, acc[r][g]);
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
  float* scale;
  float* sum;
  int32_t* offset;
};
inline QuantSlot SlotOf(std::byte* tile, size_t block, int row, int tile_rows) {
  const size_t rows = static_cast<size_t>(tile_rows);
  std::byte* base = tile + block * rows * kQuantRowBlockBytes;
  std::byte* numbers = base + rows * kQuantBlock;
  return {reinterpret_cast<int8_t*>(base) + static_cast<size_t>(row) * kQuantBlock,
          reinterpret_cast<float*>(numbers) + row,
          reinterpret_cast<float*>(numbers + 4 * rows) + row,
          reinterpret_cast<int32_t*>(numbers + 8 * rows) + row};
}

void QuantizeRow(const float* x, size_t columns, int row, int tile_rows, std::byte* tile) {
  for (size_t block = 0; block < columns / kQuantBlock; ++block) {
    const F a = Load(x + block * kQuantBlock);
    const F b = Load(x + block * kQuantBlock + 16);
    const float peak = MaxOf(Max(Abs(a), Abs(b)));
    const float inverse = peak > 0 ? 127.0f / peak : 0.0f;
    const QuantSlot slot = SlotOf(tile, block, row, tile_rows);
    const int32_t sum = StoreInt8(slot.values, Mul(a, Splat(inverse))) +
                        StoreInt8(slot.values + 16, Mul(b, Splat(inverse)));
    const float scale = peak * (1.0f / 127.0f);
    *slot.scale = scale;
    *slot.sum = scale * static_cast<float>(sum);
    *slot.offset = -128 * sum;
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
    const F silu = Div(g, Add(one, Exp(Sub(Zero(), g))));
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

// Attention in tiles of 64 tokens counted from position 0. Each tile yields its own maximum, sum and
// weighted values, which are then merged in ascending order, so a tile's arithmetic does not depend
// on where a chunk starts or on which thread computed it.

struct Bf16Cache {
  static F At(const std::byte* p) { return LoadBf16(reinterpret_cast<const uint16_t*>(p)); }
  static float One(const std::byte* p, int i) {
    uint16_t h;
    std::memcpy(&h, p + 2 * i, 2);
    const uint32_t bits = static_cast<uint32_t>(h) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
  }
  static constexpr int kBytes = 2;
};
struct F32Cache {
  static F At(const std::byte* p) { return Load(reinterpret_cast<const float*>(p)); }
  static float One(const std::byte* p, int i) {
    float f;
    std::memcpy(&f, p + 4 * i, 4);
    return f;
  }
  static constexpr int kBytes = 4;
};

template <typename Cache>
inline F LoadDims(const std::byte* p, int dim, int head_dim) {
  if (dim + 16 <= head_dim) return Cache::At(p + dim * Cache::kBytes);
  float tail[16] = {};
  for (int i = dim; i < head_dim; ++i) tail[i - dim] = Cache::One(p, i);
  return Load(tail);
}

// keys: [dim][64 tokens], tokens from `tokens` to the end of their vector are zero;
// values: [token][dim].
template <typename Cache>
void PackTile(const Attention& a, uint32_t first, int tokens, float* keys, float* values) {
  for (int t = 0; t < tokens; t += 16) {
    const std::byte* token[16];
    for (int i = 0; i < 16; ++i) {
      const uint32_t position = first + static_cast<uint32_t>(t + i);
      token[i] = t + i < tokens ? a.blocks[position / a.block_tokens] +
                                      (position % a.block_tokens) * a.token_bytes
                                : nullptr;
    }
    for (int dim = 0; dim < a.padded_dim; dim += 16) {
      F k[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        k[i] = token[i] != nullptr ? LoadDims<Cache>(token[i] + a.key_offset, dim, a.head_dim)
                                   : Zero();
      }
      Transpose(k);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) Store(keys + (dim + i) * kAttentionTile + t, k[i]);
      for (int i = 0; i < 16 && t + i < tokens; ++i) {
        Store(values + (t + i) * a.padded_dim + dim,
              LoadDims<Cache>(token[i] + a.value_offset, dim, a.head_dim));
      }
    }
  }
}

template <int kQueries, int kVectors>
inline void ScoreTile(const float* queries, int padded_dim, const float* keys, float* scores) {
  F acc[kQueries][kVectors];
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[q][v] = Zero();
  }
  for (int d = 0; d < padded_dim; ++d) {
    F k[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) k[v] = Load(keys + d * kAttentionTile + 16 * v);
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
      const F x = Splat(queries[q * padded_dim + d]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[q][v] = Fma(x, k[v], acc[q][v]);
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) Store(scores + q * kAttentionTile + 16 * v, acc[q][v]);
  }
}

// out = out * keep[q] + (weights x values) * take[q], for kVectors vectors of dims.
template <int kQueries, int kVectors>
inline void ValueTile(const float* weights, const float* values, int tokens, int padded_dim,
                      const float* keep, const float* take, float* out) {
  F acc[kQueries][kVectors];
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[q][v] = Zero();
  }
  for (int t = 0; t < tokens; ++t) {
    F x[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) x[v] = Load(values + t * padded_dim + 16 * v);
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
      const F w = Splat(weights[q * kAttentionTile + t]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[q][v] = Fma(w, x[v], acc[q][v]);
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* o = out + q * padded_dim + 16 * v;
      Store(o, Fma(acc[q][v], Splat(take[q]), Mul(Load(o), Splat(keep[q]))));
    }
  }
}

inline float ExpOf(float x) {
  float lanes[16];
  const F d = Splat(x);
  Store(lanes, ZeroBelow(d, Splat(kLowestExp), Exp(d)));
  return lanes[0];
}

// `same_limit` is the number of visible tokens when all kQueries see equally many, which lets the
// value loop run over them together; tokens a query does not see never enter its sums.
template <int kQueries>
void QueryTile(const Attention& a, uint32_t first, int tokens, int query, const float* keys,
               const float* values, float* scores, float* maxima, float* sums) {
  const int dim = a.padded_dim;
  const float* queries = a.queries + static_cast<size_t>(query) * dim;
  float* out = a.out + static_cast<size_t>(query) * dim;
  const int vectors = (tokens + 15) / 16;
  int v = 0;
  for (; v + kTileVectors <= vectors; v += kTileVectors) {
    ScoreTile<kQueries, kTileVectors>(queries, dim, keys + 16 * v, scores + 16 * v);
  }
  for (; v < vectors; ++v) ScoreTile<kQueries, 1>(queries, dim, keys + 16 * v, scores + 16 * v);

  float keep[kQueries], take[kQueries];
  int visible[kQueries];
  bool same = true;
  for (int q = 0; q < kQueries; ++q) {
    const uint32_t left = a.limits[query + q] - first;
    visible[q] = left < static_cast<uint32_t>(tokens) ? static_cast<int>(left) : tokens;
    same = same && visible[q] == visible[0];
    float* s = scores + q * kAttentionTile;
    F peak = Splat(-kInfinity);
    for (int t = 0; t < visible[q]; t += 16) {
      const F x = FillFrom(Load(s + t), visible[q] - t, -kInfinity);
      Store(s + t, x);
      peak = Max(peak, x);
    }
    const float tile_max = MaxOf(peak);
    F total = Zero();
    for (int t = 0; t < visible[q]; t += 16) {
      const F d = Sub(Load(s + t), Splat(tile_max));
      const F w = ZeroBelow(d, Splat(kLowestExp), Exp(d));
      Store(s + t, w);
      total = Add(total, w);
    }
    const float old_max = maxima[query + q];
    const float new_max = tile_max > old_max ? tile_max : old_max;
    keep[q] = ExpOf(old_max - new_max);  // 0 before the first tile, whose old maximum is -infinity
    take[q] = ExpOf(tile_max - new_max);
    sums[query + q] = __builtin_fmaf(Sum(total), take[q], sums[query + q] * keep[q]);
    maxima[query + q] = new_max;
  }
  if (same) {
    int d = 0;
    for (; d + 16 * kTileVectors <= dim; d += 16 * kTileVectors) {
      ValueTile<kQueries, kTileVectors>(scores, values + d, visible[0], dim, keep, take, out + d);
    }
    for (; d < dim; d += 16) {
      ValueTile<kQueries, 1>(scores, values + d, visible[0], dim, keep, take, out + d);
    }
    return;
  }
  for (int q = 0; q < kQueries; ++q) {
    int d = 0;
    for (; d + 16 * kTileVectors <= dim; d += 16 * kTileVectors) {
      ValueTile<1, kTileVectors>(scores + q * kAttentionTile, values + d, visible[q], dim, keep + q,
                                 take + q, out + q * dim + d);
    }
    for (; d < dim; d += 16) {
      ValueTile<1, 1>(scores + q * kAttentionTile, values + d, visible[q], dim, keep + q, take + q,
                      out + q * dim + d);
    }
  }
}

template <int kQueries>
inline void QueryTiles(int count, const Attention& a, uint32_t first, int tokens, int query,
                       const float* keys, const float* values, float* scores, float* maxima,
                       float* sums) {
  if (count == kQueries) {
    QueryTile<kQueries>(a, first, tokens, query, keys, values, scores, maxima, sums);
  } else if constexpr (kQueries > 1) {
    QueryTiles<kQueries - 1>(count, a, first, tokens, query, keys, values, scores, maxima, sums);
  }
}

void Attend(const Attention& a) {
  float* keys = a.scratch;
  float* values = keys + static_cast<size_t>(a.padded_dim) * kAttentionTile;
  float* scores = values + static_cast<size_t>(a.padded_dim) * kAttentionTile;
  float* maxima = scores + 4 * kAttentionTile;
  float* sums = maxima + a.count;
  for (int q = 0; q < a.count; ++q) {
    maxima[q] = -kInfinity;
    sums[q] = 0;
  }
  std::memset(a.out, 0, sizeof(float) * static_cast<size_t>(a.count) * a.padded_dim);
  const uint32_t end = a.limits[a.count - 1];
  int start = 0;
  for (uint32_t first = 0; first < end; first += kAttentionTile) {
    const int tokens =
        end - first < kAttentionTile ? static_cast<int>(end - first) : kAttentionTile;
    while (a.limits[start] <= first) ++start;
    if (a.f32_cache) {
      PackTile<F32Cache>(a, first, tokens, keys, values);
    } else {
      PackTile<Bf16Cache>(a, first, tokens, keys, values);
    }
    for (int q = start; q < a.count; q += kTileQueries) {
      const int count = a.count - q < kTileQueries ? a.count - q : kTileQueries;
      QueryTiles<kTileQueries>(count, a, first, tokens, q, keys, values, scores, maxima, sums);
    }
  }
  for (int q = 0; q < a.count; ++q) {
    const F sum = Splat(sums[q]);
    float* out = a.out + static_cast<size_t>(q) * a.padded_dim;
    for (int d = 0; d < a.padded_dim; d += 16) Store(out + d, Div(Load(out + d), sum));
  }
}

// Fills what does not depend on the integer kernels.
constexpr Kernels FloatKernels(const char* name) {
  Kernels k{};
  k.name = name;
  k.matmul[static_cast<int>(PackedType::kF32)] = FloatMatMul<F32Weights>;
  k.matmul[static_cast<int>(PackedType::kF16)] = FloatMatMul<F16Weights>;
  k.matmul[static_cast<int>(PackedType::kBf16)] = FloatMatMul<Bf16Weights>;
  k.quantize_row = QuantizeRow;
  k.rms_norm = RmsNorm;
  k.silu_mul = SiluMul;
  k.add = AddInto;
  k.rope = Rope;
  k.to_bf16 = ToBf16;
  k.attention = Attend;
  k.argmax = ArgMax;
  k.sum_exp = SumExp;
  return k;
}

}  // namespace
}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_KERNELS_INL_H_
