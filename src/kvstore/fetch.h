// The order of work of the two fetches. Pure: what to copy next, what may be reported, when it is
// over. The shell (node.h) pulls, verifies and pins.
#ifndef ANTIPHON_KVSTORE_FETCH_H_
#define ANTIPHON_KVSTORE_FETCH_H_

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "common/ids.h"

namespace antiphon::kvstore {

// Some layers of one slot of another store, to be copied into a slot of ours.
struct LayerCopy {
  SlotId source;
  SlotId dest;
  uint32_t first_layer = 0;
  uint32_t tokens = 0;
  std::vector<uint64_t> checksums;  // one for each layer
  uint64_t tag = 0;
};

// FetchOpen/Extend/Close: copies layers as they become ready elsewhere. Progress is reported in the
// order of tags though copies may end in any order. A copy whose checksum fails is tried once more
// (the first pull may have raced with a writer), then the fetch fails.
class StreamFetch {
 public:
  static constexpr int kInFlightMax = 32;
  static constexpr size_t kQueuedMax = 1 << 16;

  // INVALID_ARGUMENT: tags do not ascend; RESOURCE_EXHAUSTED: too many queued; the end's status
  // when it has ended.
  absl::Status Extend(std::vector<LayerCopy> copies);
  // Copies to start now; each must be answered by Done(tag).
  std::vector<LayerCopy> TakeStarts();
  void Done(uint64_t tag, const absl::Status& status);
  // Nothing starts any more; the shell cancels what is in flight. The first status stays.
  void End(absl::Status status);

  struct Progress {
    uint64_t done_tag = 0;
    absl::Status status;  // not ok: the fetch is over and nothing writes to its slots
  };
  // What is new since the last call. The end is told only when nothing is in flight.
  std::optional<Progress> TakeProgress();

  bool ended() const { return ended_; }
  bool idle() const { return in_flight_.empty(); }

 private:
  struct Flight {
    LayerCopy copy;
    int attempts = 1;
  };
  std::deque<Flight> queued_;
  std::map<uint64_t, Flight> in_flight_;  // by tag
  std::map<uint64_t, bool> open_;         // tags not yet reported; true: done
  uint64_t last_tag_ = 0;
  uint64_t done_tag_ = 0;
  uint64_t told_tag_ = 0;
  bool ended_ = false;
  bool told_end_ = false;
  absl::Status status_;
};

// FetchPrefix: copies blocks 0..n-1 of a lease, of which only a prefix may enter the index.
class PrefixFetch {
 public:
  static constexpr int kInFlightMax = 16;

  explicit PrefixFetch(uint32_t blocks) : limit_(blocks), state_(blocks, State::kWaiting) {}

  // Blocks to start now; each must be answered by Done.
  std::vector<uint32_t> TakeStarts();
  // Not ok: this block and all behind it will not enter. The shell may cancel those.
  void Done(uint32_t block, bool ok);
  // Nothing starts any more; blocks that end well still enter while the prefix is unbroken.
  void End() { ended_ = true; }

  // The next blocks that may enter the index, in order, each told once.
  std::vector<uint32_t> TakeVerified();
  uint32_t limit() const { return limit_; }  // no block from here on will enter
  bool finished() const;

 private:
  enum class State : uint8_t { kWaiting, kInFlight, kOk, kBad };
  uint32_t limit_;
  uint32_t next_ = 0;      // to start
  uint32_t verified_ = 0;  // told
  int in_flight_ = 0;
  bool ended_ = false;
  std::vector<State> state_;
};

}  // namespace antiphon::kvstore

#endif  // ANTIPHON_KVSTORE_FETCH_H_
