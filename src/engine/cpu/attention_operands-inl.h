// What attention multiplies: the cache's tiles of tokens, and their keys and values as floats. Part
// of kernels-inl.h.
#ifndef ANTIPHON_ENGINE_CPU_ATTENTION_OPERANDS_INL_H_
#define ANTIPHON_ENGINE_CPU_ATTENTION_OPERANDS_INL_H_

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

// Where the tokens of a tile lie: the first byte of each one's K, without `key_offset`. Past the
// last it is the last one's: pairs are read whole, and prefetched without a question.
struct TileTokens {
  const std::byte* at[kAttentionTile];
  uint32_t first = 0;
  int count = 0;
};

inline void FindTile(const Attention& a, const std::byte* const* blocks, ptrdiff_t offset,
                     uint32_t first, uint32_t end, TileTokens& tile) {
  tile.first = first;
  tile.count = end - first < kAttentionTile ? static_cast<int>(end - first) : kAttentionTile;
  uint32_t block = first / a.block_tokens;
  uint32_t within = first % a.block_tokens;
  for (int t = 0; t < tile.count; ++t) {
    tile.at[t] = blocks[block] + offset + within * a.token_bytes;
    if (++within == a.block_tokens) {
      within = 0;
      ++block;
    }
  }
  for (int t = tile.count; t < kAttentionTile; ++t) tile.at[t] = tile.at[tile.count - 1];
}

// To the second-level cache: more lines can be on their way there than to the first. Where too many
// are, the processor drops a prefetch, and what it reads of the second-level cache waits behind
// them: a tile's are spread over all that is computed of it, as evenly as its time is with each
// kind of operands.
inline void PrefetchLine(const std::byte* line) { __builtin_prefetch(line, 0, 2); }

// The lines of Attention::ahead, one after the other; behind them, or without them, one that is in
// the cache anyway.
class LinesAhead {
 public:
  LinesAhead(const Attention& a, bool used)
      : range_(a.ahead),
        end_(used ? a.ahead + a.ahead_count : a.ahead),
        rest_(reinterpret_cast<const std::byte*>(a.scratch)),
        twice_(a.ahead_twice) {
    Begin();
  }
  void Fetch() {
    PrefetchLine(at_);
    at_ += 64;
    if (twice_) {
      PrefetchLine(at_);
      at_ += 64;
    }
    if (at_ >= stop_) NextRange();
  }
  // Before the ranges are looked at again.
  void Leave() const {
    if (range_ != end_) range_->begin = at_;
  }

 private:
  void NextRange() {
    if (range_ != end_) {
      range_->begin = range_->end;
      ++range_;
    }
    Begin();
  }
  void Begin() {
    while (range_ != end_ && range_->begin >= range_->end) ++range_;
    at_ = range_ != end_ ? range_->begin : rest_;
    stop_ = range_ != end_ ? range_->end : rest_ + 1;
  }

  MemoryRange* range_;
  MemoryRange* end_;
  const std::byte* rest_;
  bool twice_;
  const std::byte* at_;
  const std::byte* stop_;
};

// Whether lines ahead are fetched beside keys and values that are read where they lie.
template <typename Cache>
constexpr bool kFetchesAhead = Cache::kBytes == 2 && kTransposesInRegisters;
// Keys and values of a tile, in one burst.
template <typename Cache>
inline void PrefetchTokens(const Attention& a, const TileTokens& tile) {
  for (int t = 0; t < tile.count; ++t) {
    for (int byte = 0; byte < a.head_dim * Cache::kBytes; byte += 64) {
      PrefetchLine(tile.at[t] + a.key_offset + byte);
      PrefetchLine(tile.at[t] + a.value_offset + byte);
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

// Thirty-two dims of sixteen tokens, as pairs: k[i] has dims dim + 2i and dim + 2i + 1 of all
// tokens. Lanes past the last token have its.
[[gnu::always_inline]] inline void TurnPairs(const Attention& a, const TileTokens& tile, int t,
                                             int dim, F (&k)[16]) {
  const size_t offset = a.key_offset + 2 * static_cast<size_t>(dim);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) k[i] = Load(reinterpret_cast<const float*>(tile.at[t + i] + offset));
  Transpose(k);
}

// What the products of a tile are made of, and how. Both kinds run over steps: `Index` is the place
// of a step in the operands, whose numbers lie one after the other.
//
// One number a step.
template <typename TheCache>
struct FloatOperands {
  using Cache = TheCache;
  static constexpr bool kRounds = Cache::kBytes == 2;
  static constexpr int kNumbers = 1;  // a step
  static int Index(int step) { return step ^ 1; }
  static F Product(F a, F b, F sum) { return Fma(a, b, sum); }

  // queries: [dim].
  static void PackQuery(const float* query, int padded_dim, float* out) {
    for (int d = 0; d < padded_dim; d += 16) {
      const F x = Load(query + d);
      Store(out + d, kRounds ? RoundBf16(x) : x);
    }
  }
  // keys: [dim][64 tokens], from the group of 16 tokens at `t` on. What the lanes of a vector past
  // the last token have is never used.
  static void PackKeys(const Attention& a, const TileTokens& tile, int t, float* keys) {
    for (; t < tile.count; t += 16) {
      int dim = 0;
      F k[16];
      if constexpr (Cache::kBytes == 2) {
        for (; dim + 32 <= a.head_dim; dim += 32) {
          TurnPairs(a, tile, t, dim, k);
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) {
            Store(keys + (dim + 2 * i) * kAttentionTile + t, LowBf16(k[i]));
            Store(keys + (dim + 2 * i + 1) * kAttentionTile + t, HighBf16(k[i]));
          }
        }
      }
      const int lanes = tile.count - t;
      for (; dim < a.padded_dim; dim += 16) {
        for (int i = 0; i < 16; ++i) {
          k[i] =
              i < lanes ? LoadDims<Cache>(tile.at[t + i] + a.key_offset, dim, a.head_dim) : Zero();
        }
        Transpose(k);
        for (int i = 0; i < 16; ++i) Store(keys + (dim + i) * kAttentionTile + t, k[i]);
      }
    }
  }
  // values: [token][dim].
  static void PackValues(const Attention& a, const TileTokens& tile, float* values) {
    for (int t = 0; t < tile.count; ++t) {
      for (int dim = 0; dim < a.padded_dim; dim += 16) {
        Store(values + t * a.padded_dim + dim,
              LoadDims<Cache>(tile.at[t] + a.value_offset, dim, a.head_dim));
      }
    }
  }
  // Values where the cache has them. Whole vectors only.
  struct CachedValues {
    static constexpr bool kTurned = kRounds;
    const Attention& a;
    const TileTokens& tile;
    LinesAhead& ahead;
    F At(int t, int dim) const {
      return Cache::At(tile.at[t] + a.value_offset + dim * Cache::kBytes);
    }
    // Of 32 dims of bf16 numbers the even ones, and the odd.
    F Front(int t, int dim) const { return LowBf16(Pairs(t, dim)); }
    F Rear(int t, int dim) const { return HighBf16(Pairs(t, dim)); }
    F Pairs(int t, int dim) const {
      const std::byte* p = tile.at[t] + a.value_offset + 2 * dim;
      Forget(p);
      return Load(reinterpret_cast<const float*>(p));
    }
    static void TurnBack(F& even, F& odd) { Interleave(even, odd); }
  };
  // Lines ahead that are fetched beside 32 dims of 16 tokens' scores, and beside a tile's softmax;
  // beside sums over values it is as many as they read, or half of it where a step reads two.
  static constexpr int kLinesBesideScores = 16;
  static constexpr int kLinesBesideSoftmax = 0;
  // The product of a pair whose second token is not seen.
  static F AddLone(F weight, F value, F sum) { return Fma(weight, value, Add(sum, Zero())); }
  // Rounds sixteen weights, stores them where the products find them and returns them. Never
  // writes past the floats from t on.
  static F StoreWeights(F x, float* weights, int t) {
    const F rounded = kRounds ? RoundBf16(x) : x;
    Store(weights + t, rounded);
    return rounded;
  }
};

}  // namespace
}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_ATTENTION_OPERANDS_INL_H_
