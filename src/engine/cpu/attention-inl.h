// Attention over paged K and V. Part of kernels-inl.h. Whoever includes this has chosen
// Bf16Operands, what a cache of bf16 numbers is multiplied as.
//
// The cache is walked in tiles of 64 tokens counted from position 0. Each tile yields its own
// maximum, sum and weighted values, which are then merged in ascending order: a tile's arithmetic
// depends neither on where a chunk starts nor on which queries share the pass.
//
// A cache of bf16 numbers is multiplied with queries and weights that are rounded to bf16. Scores
// are summed over pairs of dims, weighted values over pairs of tokens, of each pair the second
// first, with fused multiply-adds: that is what the processor's instruction for bf16 does
// (VDPBF16PS, Intel's manual, volume 2). Where there is one, the operands stay pairs; elsewhere
// they are widened to floats. It takes subnormal numbers, below 1.2e-38, for zeros: of a model with
// such keys, values or queries the bits might differ.
#ifndef ANTIPHON_ENGINE_CPU_ATTENTION_INL_H_
#define ANTIPHON_ENGINE_CPU_ATTENTION_INL_H_

namespace antiphon::engine::cpu {
namespace {

// Sixteen values, unpacked before.
struct PackedValues {
  static constexpr bool kTurned = false;
  const float* values;
  int padded_dim;
  struct {
    void Fetch() {}
  } ahead;
  F At(int index, int dim) const { return Load(values + index * padded_dim + dim); }
};

template <typename Operands, int kQueries, int kVectors>
inline void ScoreTile(const float* queries, int padded_dim, const float* keys, float* scores) {
  F acc[kQueries][kVectors];
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[q][v] = Zero();
  }
  const int length = padded_dim / Operands::kNumbers;
  for (int step = 0; step < length; ++step) {
    const int at = Operands::Index(step);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const F k = Load(keys + at * kAttentionTile + 16 * v);
#pragma GCC unroll 4
      for (int q = 0; q < kQueries; ++q) {
        acc[q][v] = Operands::Product(Splat(queries[q * length + at]), k, acc[q][v]);
      }
      Forget(queries);
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
template <typename Operands, int kQueries>
inline void ScoreGroup(const Attention& a, const TileTokens& tile, LinesAhead& lines_ahead, int t,
                       const float* queries, float* scores) {
  LinesAhead ahead = lines_ahead;  // in registers
  F acc[kQueries];
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) acc[q] = Zero();
  constexpr int kLines = Operands::kLinesBesideScores;
  const int length = a.padded_dim / Operands::kNumbers;
  for (int dim = 0; dim < a.head_dim; dim += 32) {
    F k[16];
    TurnPairs(a, tile, t, dim, k);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      for (int line = kLines * i / 16; line < kLines * (i + 1) / 16; ++line) ahead.Fetch();
#pragma GCC unroll 4
      for (int q = 0; q < kQueries; ++q) {
        const float* x = queries + q * length + dim / Operands::kNumbers;
        if constexpr (Operands::kNumbers == 2) {
          acc[q] = PairFma(Splat(x[i]), k[i], acc[q]);
        } else {
          acc[q] = Fma(Splat(x[2 * i + 1]), HighBf16(k[i]), acc[q]);
          acc[q] = Fma(Splat(x[2 * i]), LowBf16(k[i]), acc[q]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) Store(scores + q * kAttentionTile + t, acc[q]);
  lines_ahead = ahead;
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
};
struct StoreTo {
  float* out;
  int stride;
  void Put(int q, int dim, F values) const { Store(out + q * stride + dim, values); }
};

// Vectors of values in a line of the cache.
template <typename Operands>
constexpr int kLineVectors = 4 / Operands::Cache::kBytes;

// Vector v of the kVectors vectors of values whose dims begin at `dim`. Where two vectors come
// cheaper with their dims in another order, the sums over them have that order until InOrder.
template <int kVectors, typename Values>
[[gnu::always_inline]] inline F ValueAt(const Values& values, int at, int dim, int v) {
  if constexpr (Values::kTurned && kVectors % 2 == 0) {
    return v % 2 == 0 ? values.Front(at, dim + 16 * v) : values.Rear(at, dim + 16 * (v - 1));
  } else {
    return values.At(at, dim + 16 * v);
  }
}
template <typename Values, int kVectors>
inline void InOrder(F (&x)[kVectors]) {
  if constexpr (Values::kTurned && kVectors % 2 == 0) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v += 2) Values::TurnBack(x[v], x[v + 1]);
  }
}

// Weights x values, for kVectors vectors of dims. Query q sees visible[q] tokens, of which the
// queries have 2 * `common` in common. Tokens that a query does not see never enter its sums, not
// even with weight 0.
template <typename Operands, int kQueries, int kVectors, typename Values, typename Sink>
inline void ValueTile(const float* weights, const Values& values, int dim, const int* visible,
                      int common, const Sink& sink) {
  F acc[kQueries][kVectors];
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[q][v] = Zero();
  }
  constexpr int kSteps = 2 / Operands::kNumbers;  // of a pair
  auto ahead = values.ahead;                      // in registers
  for (int step = 0; step < common * kSteps; ++step) {
    const int at = Operands::Index(step);
    for (int v = 0; v < kVectors; v += kLineVectors<Operands>) ahead.Fetch();
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const F x = ValueAt<kVectors>(values, at, dim, v);
#pragma GCC unroll 4
      for (int q = 0; q < kQueries; ++q) {
        acc[q][v] = Operands::Product(Splat(weights[q * kAttentionTile + at]), x, acc[q][v]);
      }
      Forget(weights);
    }
  }
  if constexpr (Values::kTurned) values.ahead = ahead;
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
    int step = common * kSteps;
    for (; step < visible[q] / 2 * kSteps; ++step) {
      const int at = Operands::Index(step);
      const F w = Splat(weights[q * kAttentionTile + at]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const F x = ValueAt<kVectors>(values, at, dim, v);
        acc[q][v] = Operands::Product(w, x, acc[q][v]);
      }
    }
    if (visible[q] % 2 != 0) {
      const F w = Splat(weights[q * kAttentionTile + step]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const F x = ValueAt<kVectors>(values, step, dim, v);
        acc[q][v] = Operands::AddLone(w, x, acc[q][v]);
      }
    }
    InOrder<Values>(acc[q]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sink.Put(q, dim + 16 * v, acc[q][v]);
  }
}

template <typename Operands, int kQueries, typename Values, typename Sink>
inline void ValueTiles(const float* weights, const Values& values, const int* visible, int common,
                       int padded_dim, const Sink& sink) {
  constexpr int kMost = TileVectors(kQueries);
  int dim = 0;
  for (; dim + 16 * kMost <= padded_dim; dim += 16 * kMost) {
    ValueTile<Operands, kQueries, kMost>(weights, values, dim, visible, common, sink);
  }
  for (; dim < padded_dim; dim += 16) {
    ValueTile<Operands, kQueries, 1>(weights, values, dim, visible, common, sink);
  }
}

// The running maximum and sum of every query.
struct SoftmaxState {
  float* maxima;
  float* sums;
};

// Turns scores into weights relative to the tile's maximum; returns the maximum and the weights'
// sum. Weights past `visible` are zero up to the next even one.
template <typename Operands>
inline float SoftmaxTile(float* scores, int visible, float* sum) {
  const int whole = visible & ~15;
  F peak = Splat(-kInfinity);
  for (int t = 0; t < whole; t += 16) peak = Max(peak, Load(scores + t));
  if (whole < visible) {
    const F x = FillFrom(Load(scores + whole), visible - whole, -kInfinity);
    Store(scores + whole, x);
    peak = Max(peak, x);
  }
  const float tile_max = MaxOf(peak);
  F total = Zero();
  for (int t = 0; t < whole; t += 16) {
    const F w = ExpOfScore(Sub(Load(scores + t), Splat(tile_max)));
    total = Add(total, Operands::StoreWeights(w, scores, t));
  }
  if (whole < visible) {
    const F w = ExpOfScore(Sub(Load(scores + whole), Splat(tile_max)));
    total = Add(total, Operands::StoreWeights(FillFrom(w, visible - whole, 0), scores, whole));
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

template <typename Operands, int kQueries, typename Values>
void QueryTile(const Attention& a, const TileTokens& tile, LinesAhead& ahead, int direct, int query,
               const float* queries, const float* keys, const Values& values, float* scores,
               const SoftmaxState& state) {
  const int dim = a.padded_dim;
  queries += static_cast<size_t>(query) * dim / Operands::kNumbers;
  int visible[kQueries];
  for (int q = 0; q < kQueries; ++q) {
    const uint32_t left = a.limits[query + q] - tile.first;
    visible[q] = left < static_cast<uint32_t>(tile.count) ? static_cast<int>(left) : tile.count;
  }
  const int vectors = (visible[kQueries - 1] + 15) / 16;
  int v = 0;
  for (; v < direct && v < vectors; ++v) {
    ScoreGroup<Operands, kQueries>(a, tile, ahead, 16 * v, queries, scores);
  }
  constexpr int kMost = TileVectors(kQueries);
  while (v < vectors) {
    const float* k = keys + 16 * v;
    float* out = scores + 16 * v;
    if (kMost == 4 && vectors - v > 2 && v == 0) {
      ScoreTile<Operands, kQueries, 4>(queries, dim, k, out);
      v += 4;
    } else if (kMost > 1 && vectors - v > 1) {
      ScoreTile<Operands, kQueries, 2>(queries, dim, k, out);
      v += 2;
    } else {
      ScoreTile<Operands, kQueries, 1>(queries, dim, k, out);
      ++v;
    }
  }

  float tile_maxima[kQueries];
  float tile_sums[kQueries];
  for (int q = 0; q < kQueries; ++q) {
    if (direct > 0) {
      constexpr int kLines = Operands::kLinesBesideSoftmax;
      for (int line = kLines * q / kQueries; line < kLines * (q + 1) / kQueries; ++line) {
        ahead.Fetch();
      }
    }
    tile_maxima[q] = SoftmaxTile<Operands>(scores + q * kAttentionTile, visible[q], &tile_sums[q]);
  }
  const int common = visible[0] / 2;
  if (a.partials != nullptr) {
    const int stride = static_cast<int>(AttentionPartialFloats(a.padded_dim));
    float* partial = a.partials + (size_t{tile.first / kAttentionTile} * a.count + query) * stride;
    ValueTiles<Operands, kQueries>(scores, values, visible, common, dim, StoreTo{partial, stride});
    for (int q = 0; q < kQueries; ++q) {
      partial[q * stride + dim] = tile_maxima[q];
      partial[q * stride + dim + 1] = tile_sums[q];
    }
    return;
  }
  float factors[16];
  MergeSums<kQueries>(tile_maxima, tile_sums, query, state, factors);
  ValueTiles<Operands, kQueries>(
      scores, values, visible, common, dim,
      MergeInto{a.out + static_cast<size_t>(query) * dim, dim, factors, factors + 8});
}

template <typename Operands, int kQueries, typename Values>
inline void QueryTiles(int count, const Attention& a, const TileTokens& tile, LinesAhead& ahead,
                       int direct, int query, const float* queries, const float* keys,
                       const Values& values, float* scores, const SoftmaxState& state) {
  if (count == kQueries) {
    QueryTile<Operands, kQueries>(a, tile, ahead, direct, query, queries, keys, values, scores,
                                  state);
  } else if constexpr (kQueries > 1) {
    QueryTiles<Operands, kQueries - 1>(count, a, tile, ahead, direct, query, queries, keys, values,
                                       scores, state);
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

template <typename Operands>
void AttendOver(const Attention& a) {
  using Cache = typename Operands::Cache;
  float* keys = a.scratch;
  float* values = keys + static_cast<size_t>(a.padded_dim) * kAttentionTile;
  float* scores = values + static_cast<size_t>(a.padded_dim) * kAttentionTile;
  float* queries = scores + 4 * kAttentionTile;
  const size_t query_floats = static_cast<size_t>(a.padded_dim) / Operands::kNumbers;
  for (int q = 0; q < a.count; ++q) {
    Operands::PackQuery(a.queries + static_cast<size_t>(q) * a.padded_dim, a.padded_dim,
                        queries + static_cast<size_t>(q) * query_floats);
  }
  SoftmaxState state{};
  uint32_t first = 0, end = a.limits[a.count - 1];
  if (a.partials != nullptr) {
    first = a.first_tile * kAttentionTile;
    end = end < a.end_tile * kAttentionTile ? end : a.end_tile * kAttentionTile;
  } else {
    state = Begin(a, queries + static_cast<size_t>(a.count) * query_floats);
  }
  // Values that are read once are read where they lie.
  const bool in_place = a.count <= kTileQueries && a.head_dim == a.padded_dim;
  // So are keys, where there are registers to turn them in.
  const bool keys_in_place = kFetchesAhead<Cache> && in_place && a.head_dim % 32 == 0;
  LinesAhead ahead(a, keys_in_place);
  TileTokens tile, next;
  FindTile(a, a.blocks, 0, first, end, next);
  int start = 0;
  for (; first < end; first += kAttentionTile) {
    tile = next;
    if (first + kAttentionTile < end) {
      FindTile(a, a.blocks, 0, first + kAttentionTile, end, next);
    } else if (a.next_blocks != nullptr && !keys_in_place) {
      FindTile(a, a.next_blocks, a.next_offset, a.next_first, a.next_end, next);
    }
    while (a.limits[start] <= first) ++start;
    const int direct = keys_in_place ? (tile.count + 15) / 16 : 0;  // groups of 16 tokens
    if (!keys_in_place) PrefetchTokens<Cache>(a, next);
    Operands::PackKeys(a, tile, 16 * direct, keys);
    if (!in_place) Operands::PackValues(a, tile, values);
    const int together = in_place ? kTileQueries : kManyQueries;
    for (int q = start; q < a.count; q += together) {
      const int count = a.count - q < together ? a.count - q : together;
      if (in_place) {
        const typename Operands::CachedValues cached{a, tile, ahead};
        QueryTiles<Operands, kTileQueries>(count, a, tile, ahead, direct, q, queries, keys, cached,
                                           scores, state);
      } else {
        const PackedValues packed{values, a.padded_dim, {}};
        QueryTiles<Operands, kManyQueries>(count, a, tile, ahead, direct, q, queries, keys, packed,
                                           scores, state);
      }
    }
  }
  ahead.Leave();
  if (a.partials == nullptr) End(a, state);
}

// Merges what the tiles left of kQueries queries from `query` on, which see the same tokens: in the
// order, and with the operations, in which AttendOver merges tile by tile.
template <int kQueries>
void MergeTiles(const Attention& a, int query, const SoftmaxState& state) {
  const size_t stride = AttentionPartialFloats(a.padded_dim);
  const uint32_t tiles = (a.limits[query] + kAttentionTile - 1) / kAttentionTile;
  float* out = a.out + static_cast<size_t>(query) * a.padded_dim;
  for (uint32_t tile = 0; tile < tiles; ++tile) {
    const float* partial = a.partials + (size_t{tile} * a.count + query) * stride;
    float maxima[kQueries], sums[kQueries], factors[16];
    for (int q = 0; q < kQueries; ++q) {
      maxima[q] = partial[q * stride + a.padded_dim];
      sums[q] = partial[q * stride + a.padded_dim + 1];
    }
    MergeSums<kQueries>(maxima, sums, query, state, factors);
    const MergeInto sink{out, a.padded_dim, factors, factors + 8};
    for (int q = 0; q < kQueries; ++q) {
      for (int d = 0; d < a.padded_dim; d += 16) sink.Put(q, d, Load(partial + q * stride + d));
    }
  }
}
template <int kQueries>
inline void MergeTilesOf(int count, const Attention& a, int query, const SoftmaxState& state) {
  if (count == kQueries) {
    MergeTiles<kQueries>(a, query, state);
  } else if constexpr (kQueries > 1) {
    MergeTilesOf<kQueries - 1>(count, a, query, state);
  }
}

[[maybe_unused]] void MergeAttention(const Attention& a) {
  const SoftmaxState state = Begin(a, a.scratch);
  constexpr int kTogether = 8;  // as many as MergeSums has factors for
  for (int q = 0, count; q < a.count; q += count) {
    count = 1;
    while (count < kTogether && q + count < a.count && a.limits[q + count] == a.limits[q]) ++count;
    MergeTilesOf<kTogether>(count, a, q, state);
  }
  End(a, state);
}

void Attend(const Attention& a) {
  if (a.f32_cache) {
    AttendOver<FloatOperands<F32Cache>>(a);
  } else {
    AttendOver<Bf16Operands>(a);
  }
}

}  // namespace
}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_ATTENTION_INL_H_
