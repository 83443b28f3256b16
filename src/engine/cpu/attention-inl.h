// Attention over paged K and V. Part of kernels-inl.h.
//
// The cache is walked in tiles of 64 tokens counted from position 0. Each tile yields its own
// maximum, sum and weighted values, which are then merged in ascending order: a tile's arithmetic
// depends neither on where a chunk starts nor on which queries share the pass.
#ifndef ANTIPHON_ENGINE_CPU_ATTENTION_INL_H_
#define ANTIPHON_ENGINE_CPU_ATTENTION_INL_H_

namespace antiphon::engine::cpu {
namespace {

struct Bf16Cache {
  static constexpr int kBytes = 2;
  static F At(const std::byte* p) { return LoadBf16(reinterpret_cast<const uint16_t*>(p)); }
  static float One(const std::byte* p, int i) {
    uint16_t h;
    std::memcpy(&h, p + 2 * i, 2);
    const uint32_t bits = static_cast<uint32_t>(h) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
  }
};
struct F32Cache {
  static constexpr int kBytes = 4;
  static F At(const std::byte* p) { return Load(reinterpret_cast<const float*>(p)); }
  static float One(const std::byte* p, int i) {
    float f;
    std::memcpy(&f, p + 4 * i, 4);
    return f;
  }
};

// Where the tokens of a tile lie: the first byte of each one's K, without `key_offset`.
struct TileTokens {
  const std::byte* at[kAttentionTile];
  uint32_t first = 0;
  int count = 0;
};

inline void FindTile(const Attention& a, uint32_t first, uint32_t end, TileTokens& tile) {
  tile.first = first;
  tile.count = end - first < kAttentionTile ? static_cast<int>(end - first) : kAttentionTile;
  uint32_t block = first / a.block_tokens;
  uint32_t within = first % a.block_tokens;
  for (int t = 0; t < tile.count; ++t) {
    tile.at[t] = a.blocks[block] + within * a.token_bytes;
    if (++within == a.block_tokens) {
      within = 0;
      ++block;
    }
  }
}

// A row of one head is a few lines in the midst of its token's others: no prefetcher of the
// processor's sees the stride in time.
template <typename Cache>
inline void PrefetchTile(const Attention& a, const TileTokens& tile) {
  for (int t = 0; t < tile.count; ++t) {
    for (int byte = 0; byte < a.head_dim * Cache::kBytes; byte += 64) {
      __builtin_prefetch(tile.at[t] + a.key_offset + byte, 0, 2);
      __builtin_prefetch(tile.at[t] + a.value_offset + byte, 0, 2);
    }
  }
}

template <typename Cache>
inline F LoadDims(const std::byte* p, int dim, int head_dim) {
  if (dim + 16 <= head_dim) return Cache::At(p + dim * Cache::kBytes);
  float tail[16] = {};
  for (int i = dim; i < head_dim; ++i) tail[i - dim] = Cache::One(p, i);
  return Load(tail);
}

// keys: [dim][64 tokens], from the group of 16 tokens at `t` on; lanes of a vector past the last
// token are zero.
template <typename Cache>
void PackKeys(const Attention& a, const TileTokens& tile, int t, float* keys) {
  for (; t < tile.count; t += 16) {
    const int lanes = tile.count - t < 16 ? tile.count - t : 16;
    int dim = 0;
    if constexpr (Cache::kBytes == 2) {
      // Two neighbouring dims travel through the transposition as one 32-bit lane.
      for (; lanes == 16 && dim + 32 <= a.head_dim; dim += 32) {
        F k[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          k[i] = Load(reinterpret_cast<const float*>(tile.at[t + i] + a.key_offset + 2 * dim));
        }
        Transpose(k);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          Store(keys + (dim + 2 * i) * kAttentionTile + t, LowBf16(k[i]));
          Store(keys + (dim + 2 * i + 1) * kAttentionTile + t, HighBf16(k[i]));
        }
      }
    }
    for (; dim < a.padded_dim; dim += 16) {
      F k[16];
      for (int i = 0; i < 16; ++i) {
        k[i] = i < lanes ? LoadDims<Cache>(tile.at[t + i] + a.key_offset, dim, a.head_dim) : Zero();
      }
      Transpose(k);
      for (int i = 0; i < 16; ++i) Store(keys + (dim + i) * kAttentionTile + t, k[i]);
    }
  }
}

// values: [token][dim].
template <typename Cache>
void PackValues(const Attention& a, const TileTokens& tile, float* values) {
  for (int t = 0; t < tile.count; ++t) {
    for (int dim = 0; dim < a.padded_dim; dim += 16) {
      Store(values + t * a.padded_dim + dim,
            LoadDims<Cache>(tile.at[t] + a.value_offset, dim, a.head_dim));
    }
  }
}

// Sixteen values of token `t` from dim `dim` on: unpacked before, or where the cache has them.
struct PackedValues {
  const float* values;
  int padded_dim;
  F At(int t, int dim) const { return Load(values + t * padded_dim + dim); }
};
template <typename Cache>
struct CachedValues {
  const std::byte* const* tokens;
  size_t offset;
  F At(int t, int dim) const { return Cache::At(tokens[t] + offset + dim * Cache::kBytes); }
};

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

// The scores of 16 tokens with the keys as the cache has them: transposed in registers and used at
// once, dim by dim in the order of ScoreTile. For bf16 and heads of a multiple of 32.
template <int kQueries>
inline void ScoreGroup(const Attention& a, const TileTokens& tile, int t, const float* queries,
                       float* scores) {
  F acc[kQueries];
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) acc[q] = Zero();
  for (int dim = 0; dim < a.head_dim; dim += 32) {
    F k[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      k[i] = Load(reinterpret_cast<const float*>(tile.at[t + i] + a.key_offset + 2 * dim));
    }
    Transpose(k);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const F low = LowBf16(k[i]), high = HighBf16(k[i]);
#pragma GCC unroll 4
      for (int q = 0; q < kQueries; ++q) {
        const float* x = queries + q * a.padded_dim + dim + 2 * i;
        acc[q] = Fma(Splat(x[1]), high, Fma(Splat(x[0]), low, acc[q]));
      }
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) Store(scores + q * kAttentionTile + t, acc[q]);
}

// What becomes of a tile's weighted values: they are merged into the query's,
// out = out * keep + values * take, or stored for a later merge.
struct MergeInto {
  float* out;  // [query][padded_dim]
  int stride;
  const float* keep;
  const float* take;
  void Put(int q, int dim, F values) const {
    float* o = out + q * stride + dim;
    Store(o, Fma(values, Splat(take[q]), Mul(Load(o), Splat(keep[q]))));
  }
  MergeInto From(int q) const { return {out + q * stride, stride, keep + q, take + q}; }
};
struct StoreTo {
  float* out;
  int stride;
  void Put(int q, int dim, F values) const { Store(out + q * stride + dim, values); }
  StoreTo From(int q) const { return {out + q * stride, stride}; }
};

// Weights x values, for kVectors vectors of dims.
template <int kQueries, int kVectors, typename Values, typename Sink>
inline void ValueTile(const float* weights, const Values& values, int dim, int tokens,
                      const Sink& sink) {
  F acc[kQueries][kVectors];
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[q][v] = Zero();
  }
  for (int t = 0; t < tokens; ++t) {
    F x[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) x[v] = values.At(t, dim + 16 * v);
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
    for (int v = 0; v < kVectors; ++v) sink.Put(q, dim + 16 * v, acc[q][v]);
  }
}

template <int kQueries, typename Values, typename Sink>
inline void ValueTiles(const float* weights, const Values& values, int tokens, int padded_dim,
                       const Sink& sink) {
  int dim = 0;
  for (; dim + 16 * kTileVectors <= padded_dim; dim += 16 * kTileVectors) {
    ValueTile<kQueries, kTileVectors>(weights, values, dim, tokens, sink);
  }
  for (; dim < padded_dim; dim += 16) {
    ValueTile<kQueries, 1>(weights, values, dim, tokens, sink);
  }
}

// The running maximum and sum of every query.
struct SoftmaxState {
  float* maxima;
  float* sums;
};

// Turns scores into weights relative to the tile's maximum; returns the maximum, adds up `sum`.
inline float SoftmaxTile(float* scores, int visible, float* sum) {
  F peak = Splat(-kInfinity);
  for (int t = 0; t < visible; t += 16) {
    const F x = FillFrom(Load(scores + t), visible - t, -kInfinity);
    Store(scores + t, x);
    peak = Max(peak, x);
  }
  const float tile_max = MaxOf(peak);
  F total = Zero();
  for (int t = 0; t < visible; t += 16) {
    const F d = Sub(Load(scores + t), Splat(tile_max));
    const F w = ZeroBelow(d, Splat(kLowestExp), Exp(d));
    Store(scores + t, w);
    total = Add(total, w);
  }
  *sum = Sum(total);
  return tile_max;
}

// Merges the maxima and sums of a tile into those of kQueries queries from `query` on. Factors of
// what there was: factors[q]; of what the tile adds: factors[8 + q].
template <int kQueries>
inline void MergeSums(const float* tile_maxima, const float* tile_sums, int query,
                      const SoftmaxState& state, float* factors) {
  float shifts[16] = {};  // of old and tile maxima below the new ones
  for (int q = 0; q < kQueries; ++q) {
    const float old_max = state.maxima[query + q];
    const float new_max = tile_maxima[q] > old_max ? tile_maxima[q] : old_max;
    shifts[q] = old_max - new_max;  // -infinity before the first tile, whose factor is then 0
    shifts[8 + q] = tile_maxima[q] - new_max;
    state.maxima[query + q] = new_max;
  }
  const F shift = Load(shifts);
  Store(factors, ZeroBelow(shift, Splat(kLowestExp), Exp(shift)));
  for (int q = 0; q < kQueries; ++q) {
    float& sum = state.sums[query + q];
    sum = __builtin_fmaf(tile_sums[q], factors[8 + q], sum * factors[q]);
  }
}

template <int kQueries, typename Values>
void QueryTile(const Attention& a, const TileTokens& tile, int direct, int query, const float* keys,
               const Values& values, float* scores, const SoftmaxState& state) {
  const int dim = a.padded_dim;
  const float* queries = a.queries + static_cast<size_t>(query) * dim;
  const int vectors = (tile.count + 15) / 16;
  int v = 0;
  for (; v < direct; ++v) ScoreGroup<kQueries>(a, tile, 16 * v, queries, scores);
  for (; v + kTileVectors <= vectors; v += kTileVectors) {
    ScoreTile<kQueries, kTileVectors>(queries, dim, keys + 16 * v, scores + 16 * v);
  }
  for (; v < vectors; ++v) ScoreTile<kQueries, 1>(queries, dim, keys + 16 * v, scores + 16 * v);

  float tile_maxima[kQueries];
  float tile_sums[kQueries];
  int visible[kQueries];
  bool same = true;
  for (int q = 0; q < kQueries; ++q) {
    const uint32_t left = a.limits[query + q] - tile.first;
    visible[q] = left < static_cast<uint32_t>(tile.count) ? static_cast<int>(left) : tile.count;
    same = same && visible[q] == visible[0];
    tile_maxima[q] = SoftmaxTile(scores + q * kAttentionTile, visible[q], &tile_sums[q]);
  }
  // Tokens that a query does not see never enter its sums, not even with weight 0.
  const auto add = [&](const auto& sink) {
    if (same) return ValueTiles<kQueries>(scores, values, visible[0], dim, sink);
    for (int q = 0; q < kQueries; ++q) {
      ValueTiles<1>(scores + q * kAttentionTile, values, visible[q], dim, sink.From(q));
    }
  };
  if (a.partials != nullptr) {
    const int stride = static_cast<int>(AttentionPartialFloats(a.padded_dim));
    float* partial = a.partials + (size_t{tile.first / kAttentionTile} * a.count + query) * stride;
    add(StoreTo{partial, stride});
    for (int q = 0; q < kQueries; ++q) {
      partial[q * stride + dim] = tile_maxima[q];
      partial[q * stride + dim + 1] = tile_sums[q];
    }
    return;
  }
  float factors[16];
  MergeSums<kQueries>(tile_maxima, tile_sums, query, state, factors);
  add(MergeInto{a.out + static_cast<size_t>(query) * dim, dim, factors, factors + 8});
}

template <int kQueries, typename Values>
inline void QueryTiles(int count, const Attention& a, const TileTokens& tile, int direct, int query,
                       const float* keys, const Values& values, float* scores,
                       const SoftmaxState& state) {
  if (count == kQueries) {
    QueryTile<kQueries>(a, tile, direct, query, keys, values, scores, state);
  } else if constexpr (kQueries > 1) {
    QueryTiles<kQueries - 1>(count, a, tile, direct, query, keys, values, scores, state);
  }
}

inline SoftmaxState Begin(const Attention& a, float* maxima) {
  const SoftmaxState state{maxima, maxima + a.count};
  for (int q = 0; q < a.count; ++q) {
    state.maxima[q] = -kInfinity;
    state.sums[q] = 0;
  }
  std::memset(a.out, 0, sizeof(float) * static_cast<size_t>(a.count) * a.padded_dim);
  return state;
}
inline void End(const Attention& a, const SoftmaxState& state) {
  for (int q = 0; q < a.count; ++q) {
    const F sum = Splat(state.sums[q]);
    float* out = a.out + static_cast<size_t>(q) * a.padded_dim;
    for (int d = 0; d < a.padded_dim; d += 16) Store(out + d, Div(Load(out + d), sum));
  }
}

template <typename Cache>
void AttendOver(const Attention& a) {
  float* keys = a.scratch;
  float* values = keys + static_cast<size_t>(a.padded_dim) * kAttentionTile;
  float* scores = values + static_cast<size_t>(a.padded_dim) * kAttentionTile;
  SoftmaxState state{};
  uint32_t first = 0, end = a.limits[a.count - 1];
  if (a.partials != nullptr) {
    first = a.first_tile * kAttentionTile;
    end = end < a.end_tile * kAttentionTile ? end : a.end_tile * kAttentionTile;
  } else {
    state = Begin(a, scores + 4 * kAttentionTile);
  }
  // Values that are read once are read where they lie.
  const bool in_place = a.count <= kTileQueries && a.head_dim == a.padded_dim;
  // So are keys, where there are registers to turn them in.
  const bool keys_in_place =
      kTransposesInRegisters && in_place && Cache::kBytes == 2 && a.head_dim % 32 == 0;
  TileTokens tile, next;
  FindTile(a, first, end, next);
  int start = 0;
  for (; first < end; first += kAttentionTile) {
    tile = next;
    if (first + kAttentionTile < end) {
      FindTile(a, first + kAttentionTile, end, next);
      PrefetchTile<Cache>(a, next);
    }
    while (a.limits[start] <= first) ++start;
    const int direct = keys_in_place ? tile.count / 16 : 0;  // groups of 16 tokens
    PackKeys<Cache>(a, tile, 16 * direct, keys);
    if (!in_place) PackValues<Cache>(a, tile, values);
    for (int q = start; q < a.count; q += kTileQueries) {
      const int count = a.count - q < kTileQueries ? a.count - q : kTileQueries;
      if (in_place) {
        QueryTiles<kTileQueries>(count, a, tile, direct, q, keys,
                                 CachedValues<Cache>{tile.at, a.value_offset}, scores, state);
      } else {
        QueryTiles<kTileQueries>(count, a, tile, direct, q, keys,
                                 PackedValues{values, a.padded_dim}, scores, state);
      }
    }
  }
  if (a.partials == nullptr) End(a, state);
}

// In the order, and with the operations, in which AttendOver merges tile by tile.
void MergeAttention(const Attention& a) {
  const SoftmaxState state = Begin(a, a.scratch);
  const size_t stride = AttentionPartialFloats(a.padded_dim);
  for (int q = 0; q < a.count; ++q) {
    const uint32_t tiles = (a.limits[q] + kAttentionTile - 1) / kAttentionTile;
    for (uint32_t tile = 0; tile < tiles; ++tile) {
      const float* partial = a.partials + (size_t{tile} * a.count + q) * stride;
      float factors[16];
      MergeSums<1>(partial + a.padded_dim, partial + a.padded_dim + 1, q, state, factors);
      const MergeInto sink{a.out + static_cast<size_t>(q) * a.padded_dim, a.padded_dim, factors,
                           factors + 8};
      for (int d = 0; d < a.padded_dim; d += 16) sink.Put(0, d, Load(partial + d));
    }
  }
  End(a, state);
}

void Attend(const Attention& a) {
  if (a.f32_cache) {
    AttendOver<F32Cache>(a);
  } else {
    AttendOver<Bf16Cache>(a);
  }
}

}  // namespace
}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_ATTENTION_INL_H_
