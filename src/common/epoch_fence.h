// The fence of a generation: only the gateway counts epochs, workers refuse lower ones. Remembers
// the highest epoch of the most recent generations, in bounded memory.
#ifndef ANTIPHON_COMMON_EPOCH_FENCE_H_
#define ANTIPHON_COMMON_EPOCH_FENCE_H_

#include <cstdint>
#include <list>

#include "absl/container/flat_hash_map.h"
#include "common/ids.h"

namespace antiphon {

// Not thread-safe. O(1); forgets the generation that was touched longest ago past `capacity`.
class EpochFence {
 public:
  enum class Verdict {
    kRaised,  // higher than anything seen: it is the generation's epoch from here on
    kSame,    // seen already
    kStale,   // a higher one was seen
  };

  explicit EpochFence(size_t capacity = 65536) : capacity_(capacity) {}

  Verdict Raise(const RequestId& id, uint32_t epoch) {
    auto [it, fresh] = entries_.try_emplace(id);
    Entry& entry = it->second;
    if (fresh) {
      order_.push_back(id);
      entry = {epoch, std::prev(order_.end())};
      if (order_.size() > capacity_) {
        entries_.erase(order_.front());
        order_.pop_front();
      }
      return Verdict::kRaised;
    }
    order_.splice(order_.end(), order_, entry.place);
    if (epoch < entry.epoch) return Verdict::kStale;
    if (epoch == entry.epoch) return Verdict::kSame;
    entry.epoch = epoch;
    return Verdict::kRaised;
  }

  // 0 when the generation is not remembered.
  uint32_t EpochOf(const RequestId& id) const {
    auto it = entries_.find(id);
    return it == entries_.end() ? 0 : it->second.epoch;
  }

 private:
  struct Entry {
    uint32_t epoch = 0;
    std::list<RequestId>::iterator place;
  };
  size_t capacity_;
  std::list<RequestId> order_;  // touched longest ago first
  absl::flat_hash_map<RequestId, Entry> entries_;
};

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_EPOCH_FENCE_H_
