#include "model/bpe.h"

#include <algorithm>
#include <bit>
#include <queue>

namespace antiphon::model {
namespace {

// Up to here a scan for the best pair beats a heap.
constexpr size_t kShortBytes = 48;

}  // namespace

MergeTable::MergeTable(size_t merges)
    : entries_(std::bit_ceil(merges + merges / 2 + 2)),
      mask_(entries_.size() - 1),
      byte_ids_(NoBytes()) {}

size_t MergeTable::Slot(uint64_t pair) const {
  uint64_t h = pair * 0x9E3779B97F4A7C15ull;  // Fibonacci hashing
  h ^= h >> 32;
  size_t slot = h & mask_;
  while (entries_[slot].pair != pair && entries_[slot].pair != kEmpty) slot = (slot + 1) & mask_;
  return slot;
}

void MergeTable::Add(uint32_t left, uint32_t right, Merge merge) {
  const uint64_t pair = static_cast<uint64_t>(left) << 32 | right;
  entries_[Slot(pair)] = {pair, merge};
}

MergeTable::Merge MergeTable::Find(uint32_t left, uint32_t right) const {
  return entries_[Slot(static_cast<uint64_t>(left) << 32 | right)].merge;
}

void MergeTable::Encode(std::string_view piece, std::vector<uint32_t>& out) const {
  if (entries_.empty()) return;
  piece.size() <= kShortBytes ? EncodeShort(piece, out) : EncodeLong(piece, out);
}

void MergeTable::EncodeShort(std::string_view piece, std::vector<uint32_t>& out) const {
  std::array<uint32_t, kShortBytes> ids;
  std::array<Merge, kShortBytes> merges;  // merges[i]: of ids[i] and ids[i + 1]
  size_t n = 0;
  for (const char c : piece) {
    const int64_t id = byte_ids_[static_cast<uint8_t>(c)];
    if (id >= 0) ids[n++] = static_cast<uint32_t>(id);
  }
  for (size_t i = 0; i + 1 < n; ++i) merges[i] = Find(ids[i], ids[i + 1]);
  while (n > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < n; ++i) {
      if (merges[i].rank < merges[best].rank) best = i;
    }
    if (merges[best].rank == kNoRank) break;
    ids[best] = merges[best].id;
    std::copy(ids.begin() + best + 2, ids.begin() + n, ids.begin() + best + 1);
    if (best + 2 < n) {
      std::copy(merges.begin() + best + 2, merges.begin() + n - 1, merges.begin() + best + 1);
    }
    --n;
    if (best + 1 < n) merges[best] = Find(ids[best], ids[best + 1]);
    if (best > 0) merges[best - 1] = Find(ids[best - 1], ids[best]);
  }
  out.insert(out.end(), ids.begin(), ids.begin() + n);
}

void MergeTable::EncodeLong(std::string_view piece, std::vector<uint32_t>& out) const {
  struct Symbol {
    uint32_t id;
    int64_t previous;
    int64_t next;  // -1: none
    bool merged_away = false;
  };
  struct Candidate {
    uint32_t rank;
    int64_t at;  // of the left symbol
    uint32_t left_id;
    uint32_t right_id;
    uint32_t merged_id;
    bool operator<(const Candidate& other) const {  // the queue's top is the greatest
      return rank != other.rank ? rank > other.rank : at > other.at;
    }
  };
  std::vector<Symbol> symbols;
  symbols.reserve(piece.size());
  for (const char c : piece) {
    const int64_t id = byte_ids_[static_cast<uint8_t>(c)];
    if (id < 0) continue;
    const int64_t at = static_cast<int64_t>(symbols.size());
    symbols.push_back({static_cast<uint32_t>(id), at - 1, at + 1});
  }
  if (symbols.empty()) return;
  symbols.back().next = -1;

  std::priority_queue<Candidate> queue;
  const auto offer = [&](int64_t left) {
    const Symbol& l = symbols[left];
    if (l.next < 0) return;
    const uint32_t right_id = symbols[l.next].id;
    const Merge merge = Find(l.id, right_id);
    if (merge.rank != kNoRank) queue.push({merge.rank, left, l.id, right_id, merge.id});
  };
  for (size_t i = 0; i < symbols.size(); ++i) offer(static_cast<int64_t>(i));
  while (!queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    Symbol& left = symbols[top.at];
    if (left.merged_away || left.id != top.left_id || left.next < 0) continue;
    Symbol& right = symbols[left.next];
    if (right.id != top.right_id) continue;
    left.id = top.merged_id;
    right.merged_away = true;
    left.next = right.next;
    if (right.next >= 0) symbols[right.next].previous = top.at;
    if (left.previous >= 0) offer(left.previous);
    offer(top.at);
  }
  for (int64_t i = 0; i >= 0; i = symbols[i].next) out.push_back(symbols[i].id);
}

}  // namespace antiphon::model
