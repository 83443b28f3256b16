// Which stores hold which blocks, and for a request's chain of keys how long a prefix each store
// holds. A hash table of 24-byte entries: the key and up to four holders in place; blocks that more
// stores hold (a system prompt everybody shares) spill into a bitset. Split into shards so that no
// growth moves more than 1/64 of it at once.
//
// The index is a hint: an entry that is wrong costs a miss at the worker, never a wrong token.
#ifndef ANTIPHON_CONDUCTOR_PREFIX_INDEX_H_
#define ANTIPHON_CONDUCTOR_PREFIX_INDEX_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "common/ids.h"

namespace antiphon::conductor {

// Not thread-safe.
class PrefixIndex {
 public:
  using Holder = uint16_t;
  static constexpr Holder kNoHolder = 0xffff;

  struct Match {
    Holder holder = kNoHolder;
    uint32_t blocks = 0;
  };

  // Holds at most `blocks_max` distinct blocks (about 40 bytes each at worst); more are refused.
  // `seed` decides where entries lie and nothing else.
  explicit PrefixIndex(size_t blocks_max, uint64_t seed = 0);

  // A number for one store's snapshot. kNoHolder when 65,000 are in use.
  Holder AddHolder();
  // Forgets all that the holder had; the number may come back from AddHolder later.
  void RemoveHolder(Holder holder);

  // Keys are XORed with the fingerprint: equal tokens under different KV layouts are different
  // blocks. False when the index is full.
  bool Insert(const BlockKey& key, const FingerprintId& fingerprint, Holder holder);
  void Erase(const BlockKey& key, const FingerprintId& fingerprint, Holder holder);
  bool Contains(const BlockKey& key, const FingerprintId& fingerprint, Holder holder) const;

  // For each holder of keys[0], how many leading keys it holds without a gap. In no order.
  std::vector<Match> LongestPrefixes(absl::Span<const BlockKey> keys,
                                     const FingerprintId& fingerprint) const;

  // Distinct blocks; may count those of removed holders until they are swept.
  size_t blocks() const { return blocks_; }
  size_t blocks_of(Holder holder) const { return holder < held_.size() ? held_[holder] : 0; }
  uint64_t refused() const { return refused_; }

 private:
  static constexpr size_t kInline = 4;
  static constexpr Holder kSpilled = 0xfffe;  // holders[0]: holders[2..3] number the bitset
  static constexpr size_t kShards = 64;

  struct Entry {
    uint64_t a = 0;
    uint64_t b = 0;
    std::array<Holder, kInline> holders = {kNoHolder, kNoHolder, kNoHolder, kNoHolder};
    bool empty() const { return holders[0] == kNoHolder; }
  };
  static_assert(sizeof(Entry) == 24);
  struct Shard {
    std::vector<Entry> entries;  // a power of two, linear probing, at most 3/4 full
    size_t used = 0;
  };
  struct Hash {
    uint64_t a, b, where;
  };
  using Bits = std::vector<uint64_t>;

  uint64_t Place(uint64_t a, uint64_t b) const;
  Hash HashOf(const BlockKey& key, const FingerprintId& fingerprint) const;
  const Entry* Find(const Hash& hash) const;
  Entry* Find(const Hash& hash) { return const_cast<Entry*>(std::as_const(*this).Find(hash)); }
  void Grow(Shard& shard);
  void EraseEntry(Shard& shard, size_t at);
  void Sweep();
  bool Has(const Entry& entry, Holder holder) const;
  void Add(Entry& entry, Holder holder);
  // True when the entry has no holder left.
  bool Remove(Entry& entry, Holder holder);
  Bits& Spill(const Entry& entry) { return spills_[SpillOf(entry)]; }
  const Bits& Spill(const Entry& entry) const { return spills_[SpillOf(entry)]; }
  static uint32_t SpillOf(const Entry& entry) {
    return uint32_t{entry.holders[2]} | uint32_t{entry.holders[3]} << 16;
  }

  const size_t blocks_max_;
  const uint64_t seed_;
  std::array<Shard, kShards> shards_;
  std::vector<Bits> spills_;
  std::vector<uint32_t> free_spills_;
  size_t blocks_ = 0;
  uint64_t refused_ = 0;
  std::vector<uint64_t> held_;  // by holder
  std::vector<Holder> free_holders_;
  std::vector<Holder> dead_;  // removed, still in entries
  Bits live_;
};

}  // namespace antiphon::conductor

#endif  // ANTIPHON_CONDUCTOR_PREFIX_INDEX_H_
