// What the conductor believes about its cluster: the input of every decision. Kept by Core, read by
// Decide.
#ifndef ANTIPHON_CONDUCTOR_VIEW_H_
#define ANTIPHON_CONDUCTOR_VIEW_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/time/time.h"
#include "common/ids.h"
#include "conductor/cost.h"
#include "conductor/prefix_index.h"

namespace antiphon::conductor {

enum class NodeState : uint8_t { kReady, kDraining, kLost };
enum class WorkerRole : uint8_t { kPrefill, kDecode };

std::string_view NameOf(NodeState state);
std::string_view NameOf(WorkerRole role);

// Work that was placed on a worker and that its reports may not show yet.
struct PlannedPrefill {
  RequestId id;
  absl::Time placed_at;
  double seconds = 0;  // transfer and computation
};
struct PlannedDecode {
  RequestId id;
  absl::Time starts_at;  // predicted; the real one once `started`
  double context_tokens = 0;
  bool started = false;  // its first token was reported
};

struct Worker {
  NodeId id;
  WorkerRole role = WorkerRole::kPrefill;
  NodeState state = NodeState::kReady;
  std::string rpc_address;
  uint64_t store_incarnation = 0;  // 0: attached to none
  int store = -1;                  // index into View::stores; -1: not known here
  bool store_lost = false;         // it was known and is gone: nothing can run here
  uint32_t max_sequences = 0;      // 0: no limit
  Cost cost;

  // As reported.
  absl::Time reported_at = absl::InfinitePast();
  uint32_t running = 0;
  double context_tokens = 0;
  uint32_t waiting = 0;
  double waiting_tokens = 0;
  double queue_s = 0;

  // As planned here, oldest first.
  std::vector<PlannedPrefill> prefills;
  std::vector<PlannedDecode> decodes;

  // Derived by Refresh().
  absl::Time free_at = absl::InfinitePast();  // when the prefill queue is predicted to be empty
  uint32_t rows_bound = 0;                    // decode rows when all that is planned has begun
  double context_bound = 0;

  // After a report or a change of what is planned. Work counts as reported when it was placed
  // kReportLag before the report.
  void Refresh();
  uint32_t queue_depth() const { return waiting + static_cast<uint32_t>(prefills.size()); }
  double QueueSeconds(absl::Time now) const {
    return free_at > now ? absl::ToDoubleSeconds(free_at - now) : 0;
  }
  // True when a report of this worker must show this decode already.
  bool Reported(const PlannedDecode& decode) const;
};

// A placed request reaches its worker through the gateway and, for prefill, through decode.
inline constexpr absl::Duration kReportLag = absl::Milliseconds(100);
// A decode that should have begun this long before a report is part of the report.
inline constexpr absl::Duration kStartSlack = absl::Seconds(1);

struct PlannedSlots {
  RequestId id;
  absl::Time shows_at;  // reports of the store from then on count them
  uint32_t slots = 0;
};

struct Store {
  NodeId id;  // empty: a free place
  NodeState state = NodeState::kReady;
  uint64_t incarnation = 0;
  std::string rpc_address;
  std::string data_address;
  uint32_t slot_count = 0;
  PrefixIndex::Holder holder = PrefixIndex::kNoHolder;

  bool load_known = false;
  uint32_t slots_free = 0;
  uint32_t slots_pinned = 0;
  uint32_t slots_cached = 0;
  std::vector<PlannedSlots> planned;
  uint64_t planned_slots = 0;                        // sum over `planned`
  absl::Time egress_free_at = absl::InfinitePast();  // of the transfers planned out of this host

  void Plan(const RequestId& id, uint32_t slots, absl::Time shows_at);
  void Unplan(const RequestId& id);
  // Forgets what a report made at `now` shows.
  void Settle(absl::Time now);
};

struct View {
  explicit View(size_t blocks_max, uint64_t seed) : index(blocks_max, seed) {}

  std::vector<Worker> workers;  // by id
  std::vector<Store> stores;    // places are reused
  PrefixIndex index;
  std::vector<int> store_of_holder;

  // The one model that is served; block_tokens is 0 while no worker has registered.
  std::vector<std::string> model_names;  // the name, then aliases
  FingerprintId fingerprint;
  uint32_t block_tokens = 0;
  uint32_t context_length = 0;

  double decode_seconds = 0;  // how long an answer streams, a moving mean; 0: none has finished

  Worker* FindWorker(const NodeId& id);
  const Worker* FindWorker(const NodeId& id) const {
    return const_cast<View*>(this)->FindWorker(id);
  }
};

}  // namespace antiphon::conductor

#endif  // ANTIPHON_CONDUCTOR_VIEW_H_
