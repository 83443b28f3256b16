#include "conductor/prefix_index.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "absl/container/inlined_vector.h"
#include "common/status_macros.h"

namespace antiphon::conductor {
namespace {

constexpr size_t kHoldersMax = 65'000;
constexpr size_t kEntriesMin = 64;
// Up to this many entries a removed holder is swept out at once (some milliseconds); above it when
// so many have gathered.
constexpr size_t kSweepAtOnce = 1 << 20;
constexpr size_t kDeadMax = 16;
constexpr size_t kPrefetch = 16;

bool Test(const std::vector<uint64_t>& bits, uint16_t i) {
  return i / 64 < bits.size() && (bits[i / 64] >> (i % 64) & 1) != 0;
}

void Set(std::vector<uint64_t>& bits, uint16_t i) {
  if (bits.size() <= i / 64u) bits.resize(i / 64 + 1);
  bits[i / 64] |= uint64_t{1} << (i % 64);
}

void Clear(std::vector<uint64_t>& bits, uint16_t i) {
  if (i / 64 < bits.size()) bits[i / 64] &= ~(uint64_t{1} << (i % 64));
}

}  // namespace

PrefixIndex::PrefixIndex(size_t blocks_max, uint64_t seed) : blocks_max_(blocks_max), seed_(seed) {
  for (Shard& shard : shards_) shard.entries.resize(kEntriesMin);
}

PrefixIndex::Holder PrefixIndex::AddHolder() {
  if (free_holders_.empty() && held_.size() >= kHoldersMax) Sweep();
  Holder holder;
  if (!free_holders_.empty()) {
    // The lowest free number keeps the bitsets short.
    auto lowest = std::min_element(free_holders_.begin(), free_holders_.end());
    holder = *lowest;
    free_holders_.erase(lowest);
  } else if (held_.size() < kHoldersMax) {
    holder = static_cast<Holder>(held_.size());
    held_.push_back(0);
  } else {
    return kNoHolder;
  }
  Set(live_, holder);
  return holder;
}

void PrefixIndex::RemoveHolder(Holder holder) {
  if (!Test(live_, holder)) return;
  Clear(live_, holder);
  if (held_[holder] == 0) {
    free_holders_.push_back(holder);
    return;
  }
  held_[holder] = 0;
  dead_.push_back(holder);
  if (blocks_ <= kSweepAtOnce || dead_.size() >= kDeadMax) Sweep();
}

void PrefixIndex::Sweep() {
  if (dead_.empty()) return;
  for (Shard& shard : shards_) {
    for (size_t i = 0; i < shard.entries.size();) {
      Entry& entry = shard.entries[i];
      bool gone = false;
      if (!entry.empty()) {
        for (Holder holder : dead_) {
          if (Has(entry, holder)) gone = Remove(entry, holder);
          if (gone) break;
        }
      }
      if (gone) {
        EraseEntry(shard, i);  // another entry may have moved here: look again
      } else {
        ++i;
      }
    }
  }
  free_holders_.insert(free_holders_.end(), dead_.begin(), dead_.end());
  dead_.clear();
}

PrefixIndex::Hash PrefixIndex::HashOf(const BlockKey& key, const FingerprintId& fingerprint) const {
  uint64_t k[2], f[2];
  std::memcpy(k, key.bytes().data(), 16);
  std::memcpy(f, fingerprint.bytes().data(), 16);
  const uint64_t a = k[0] ^ f[0], b = k[1] ^ f[1];
  return {a, b, Place(a, b)};
}

// Keys are SHA-256 already; the multiplication only keeps a guessable key from choosing its place.
uint64_t PrefixIndex::Place(uint64_t a, uint64_t b) const {
  const uint64_t where = (a ^ seed_) * 0x9e3779b97f4a7c15u + b;
  return where ^ where >> 29;
}

const PrefixIndex::Entry* PrefixIndex::Find(const Hash& hash) const {
  const Shard& shard = shards_[hash.where >> 58];
  const size_t mask = shard.entries.size() - 1;
  for (size_t i = hash.where & mask;; i = (i + 1) & mask) {
    const Entry& entry = shard.entries[i];
    if (entry.empty()) return nullptr;
    if (entry.a == hash.a && entry.b == hash.b) return &entry;
  }
}

void PrefixIndex::Grow(Shard& shard) {
  std::vector<Entry> old(shard.entries.size() * 2);
  old.swap(shard.entries);
  const size_t mask = shard.entries.size() - 1;
  for (const Entry& entry : old) {
    if (entry.empty()) continue;
    size_t i = Place(entry.a, entry.b) & mask;
    while (!shard.entries[i].empty()) i = (i + 1) & mask;
    shard.entries[i] = entry;
  }
}

bool PrefixIndex::Insert(const BlockKey& key, const FingerprintId& fingerprint, Holder holder) {
  CHECK(Test(live_, holder));
  const Hash hash = HashOf(key, fingerprint);
  Entry* entry = Find(hash);
  if (entry == nullptr) {
    if (blocks_ >= blocks_max_) {
      ++refused_;
      return false;
    }
    Shard& shard = shards_[hash.where >> 58];
    if ((shard.used + 1) * 4 > shard.entries.size() * 3) Grow(shard);
    const size_t mask = shard.entries.size() - 1;
    size_t i = hash.where & mask;
    while (!shard.entries[i].empty()) i = (i + 1) & mask;
    entry = &shard.entries[i];
    entry->a = hash.a;
    entry->b = hash.b;
    ++shard.used;
    ++blocks_;
  }
  if (!Has(*entry, holder)) {
    Add(*entry, holder);
    ++held_[holder];
  }
  return true;
}

void PrefixIndex::Erase(const BlockKey& key, const FingerprintId& fingerprint, Holder holder) {
  const Hash hash = HashOf(key, fingerprint);
  Entry* entry = Find(hash);
  if (entry == nullptr || !Has(*entry, holder)) return;
  if (held_[holder] > 0) --held_[holder];
  if (!Remove(*entry, holder)) return;
  Shard& shard = shards_[hash.where >> 58];
  EraseEntry(shard, static_cast<size_t>(entry - shard.entries.data()));
}

bool PrefixIndex::Contains(const BlockKey& key, const FingerprintId& fingerprint,
                           Holder holder) const {
  const Entry* entry = Find(HashOf(key, fingerprint));
  return entry != nullptr && Test(live_, holder) && Has(*entry, holder);
}

// Backward shift: entries that probed past the hole move into it, so no tombstones are needed.
void PrefixIndex::EraseEntry(Shard& shard, size_t at) {
  const size_t mask = shard.entries.size() - 1;
  size_t hole = at;
  for (size_t i = (at + 1) & mask; !shard.entries[i].empty(); i = (i + 1) & mask) {
    const Entry& entry = shard.entries[i];
    const size_t home = Place(entry.a, entry.b) & mask;
    if (((i - home) & mask) >= ((i - hole) & mask)) {
      shard.entries[hole] = entry;
      hole = i;
    }
  }
  shard.entries[hole] = Entry();
  --shard.used;
  --blocks_;
}

bool PrefixIndex::Has(const Entry& entry, Holder holder) const {
  if (entry.holders[0] == kSpilled) return Test(Spill(entry), holder);
  return std::find(entry.holders.begin(), entry.holders.end(), holder) != entry.holders.end();
}

void PrefixIndex::Add(Entry& entry, Holder holder) {
  if (entry.holders[0] == kSpilled) {
    Set(Spill(entry), holder);
    return;
  }
  for (Holder& h : entry.holders) {
    if (h == kNoHolder) {
      h = holder;
      return;
    }
  }
  uint32_t spill;
  if (free_spills_.empty()) {
    spill = static_cast<uint32_t>(spills_.size());
    spills_.emplace_back();
  } else {
    spill = free_spills_.back();
    free_spills_.pop_back();
  }
  for (Holder h : entry.holders) Set(spills_[spill], h);
  Set(spills_[spill], holder);
  entry.holders = {kSpilled, 0, static_cast<Holder>(spill & 0xffff),
                   static_cast<Holder>(spill >> 16)};
}

bool PrefixIndex::Remove(Entry& entry, Holder holder) {
  if (entry.holders[0] != kSpilled) {
    // The first free place ends the list: close the gap.
    auto end = std::remove(entry.holders.begin(), entry.holders.end(), holder);
    std::fill(end, entry.holders.end(), kNoHolder);
    return entry.empty();
  }
  const uint32_t spill = SpillOf(entry);
  Bits& bits = spills_[spill];
  Clear(bits, holder);
  int count = 0;
  for (uint64_t word : bits) count += std::popcount(word);
  if (count > static_cast<int>(kInline) / 2) return false;  // hysteresis: no flapping at the edge
  entry.holders.fill(kNoHolder);
  size_t n = 0;
  for (size_t w = 0; w < bits.size(); ++w) {
    for (uint64_t word = bits[w]; word != 0; word &= word - 1) {
      entry.holders[n++] = static_cast<Holder>(w * 64 + std::countr_zero(word));
    }
  }
  Bits().swap(bits);
  free_spills_.push_back(spill);
  return entry.empty();
}

std::vector<PrefixIndex::Match> PrefixIndex::LongestPrefixes(
    absl::Span<const BlockKey> keys, const FingerprintId& fingerprint) const {
  std::vector<Match> matches;
  if (keys.empty()) return matches;
  // A ring of places that are on their way from memory while earlier ones are looked at.
  std::array<Hash, kPrefetch> ahead;
  const auto prefetch = [&](size_t i) {
    if (i >= keys.size()) return;
    const Hash hash = HashOf(keys[i], fingerprint);
    ahead[i % kPrefetch] = hash;
    const Shard& shard = shards_[hash.where >> 58];
    __builtin_prefetch(&shard.entries[hash.where & (shard.entries.size() - 1)]);
  };
  for (size_t i = 0; i < kPrefetch; ++i) prefetch(i);

  // Those that hold all so far: a bitset while they are many, a list once they are few.
  absl::InlinedVector<uint64_t, 32> many;
  absl::InlinedVector<Holder, 8> few;
  bool listed = false;
  uint32_t depth = 0;
  for (uint32_t i = 0; i < keys.size(); ++i) {
    const Entry* entry = Find(ahead[i % kPrefetch]);
    prefetch(i + kPrefetch);
    if (entry == nullptr) break;
    const bool spilled = entry->holders[0] == kSpilled;
    if (i == 0) {
      if (spilled) {
        const Bits& bits = Spill(*entry);
        many.assign(bits.begin(), bits.end());
        for (size_t w = 0; w < many.size(); ++w) many[w] &= w < live_.size() ? live_[w] : 0;
      } else {
        listed = true;
        for (Holder h : entry->holders) {
          if (h != kNoHolder && Test(live_, h)) few.push_back(h);
        }
      }
    } else if (!listed && spilled) {
      const Bits& bits = Spill(*entry);
      for (size_t w = 0; w < many.size(); ++w) {
        const uint64_t keep = w < bits.size() ? bits[w] : 0;
        for (uint64_t out = many[w] & ~keep; out != 0; out &= out - 1) {
          matches.push_back({static_cast<Holder>(w * 64 + std::countr_zero(out)), i});
        }
        many[w] &= keep;
      }
    } else {
      if (!listed) {
        listed = true;
        for (size_t w = 0; w < many.size(); ++w) {
          for (uint64_t word = many[w]; word != 0; word &= word - 1) {
            few.push_back(static_cast<Holder>(w * 64 + std::countr_zero(word)));
          }
        }
        many.clear();
      }
      size_t kept = 0;
      for (size_t n = 0; n < few.size(); ++n) {
        if (Has(*entry, few[n])) {
          few[kept++] = few[n];
        } else {
          matches.push_back({few[n], i});
        }
      }
      few.resize(kept);
    }
    depth = i + 1;
    if (listed && few.empty()) break;
  }
  for (Holder h : few) matches.push_back({h, depth});
  for (size_t w = 0; w < many.size(); ++w) {
    for (uint64_t word = many[w]; word != 0; word &= word - 1) {
      matches.push_back({static_cast<Holder>(w * 64 + std::countr_zero(word)), depth});
    }
  }
  return matches;
}

}  // namespace antiphon::conductor
