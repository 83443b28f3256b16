// Where a request runs, or why it does not: Mooncake's Algorithm 1 (FAST'25, section 4) with every
// term in seconds, early rejection on the decode load predicted for the time when prefill ends
// (arXiv 2407.00079, section 7), and hot-block replication as the side effect of placing a request
// away from the longest prefix.
#ifndef ANTIPHON_CONDUCTOR_DECIDE_H_
#define ANTIPHON_CONDUCTOR_DECIDE_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/time/time.h"
#include "absl/types/span.h"
#include "common/ids.h"
#include "conductor/view.h"

namespace antiphon::conductor {

struct Request {
  RequestId id;
  uint32_t epoch = 1;
  std::string tenant;
  std::string model;
  std::string request_class;
  uint32_t prompt_count = 0;
  uint32_t emitted_count = 0;
  uint32_t max_tokens = 0;
  absl::Duration deadline = absl::InfiniteDuration();  // left, for the whole generation
  std::vector<BlockKey> keys;                          // full blocks of prompt and emitted tokens
  std::vector<NodeId> excluded;

  uint32_t tokens() const { return prompt_count + emitted_count; }
};

struct Policy {
  // Algorithm 1's kvcache_balancing_threshold: how many times longer the best remote prefix must be
  // than the local one before it is fetched.
  double balancing_threshold = 2.0;
  uint32_t max_queue = 1024;  // requests per prefill worker
  absl::Duration slo_ttft = absl::Seconds(30);
  absl::Duration slo_tbt = absl::InfiniteDuration();
  // Refuse what would miss its SLO on an idle cluster too, instead of serving it as best effort.
  bool strict = false;
};

// In the order of the wire's Rejected.Reason, whose numbers these are.
enum class Verdict : uint8_t {
  kPlaced = 0,
  kPredictedTtft = 1,
  kPredictedTbt = 2,
  kQueueFull = 3,
  kNoKvSpace = 4,
  kNoWorkers = 5,
  kDraining = 6,
  kUnknownModel = 7,
};
inline constexpr int kVerdicts = 8;
std::string_view NameOf(Verdict verdict);  // "placed", "predicted_ttft", ...

// One prefill worker's side of Algorithm 1.
struct PrefillOption {
  NodeId node;
  uint32_t local_blocks = 0;  // of the prefix, in its own host
  uint32_t used_blocks = 0;   // with what would be fetched
  double queue_s = 0;
  double transfer_s = 0;  // 0: nothing is fetched
  double prefill_s = 0;
  double ttft_s = 0;  // the sum
  uint32_t queue_depth = 0;
};
struct DecodeOption {
  NodeId node;
  double rows = 0;  // when this request's prefill ends, itself included
  double context_tokens = 0;
  double tbt_s = 0;
  bool same_host = false;  // as the chosen prefill worker
};

// With every term, for `antiphon explain`.
struct Decision {
  RequestId id;
  uint32_t epoch = 0;
  absl::Time at;
  uint32_t tokens = 0;
  uint32_t blocks = 0;  // full ones
  Verdict verdict = Verdict::kNoWorkers;
  bool best_effort = false;  // misses its SLO even on an idle cluster
  bool retry_is_useless = false;
  std::string message;  // of a rejection

  // The best few, best first; [0] is what was or would have been chosen.
  std::vector<PrefillOption> prefills;
  std::vector<DecodeOption> decodes;
  int source_store = -1;  // index into View::stores; -1: nothing is fetched
  NodeId source;
  uint32_t best_blocks = 0;    // longest prefix on any store
  uint32_t decode_blocks = 0;  // prefix that the decode's host holds already
  double handoff_s = 0;        // what moving KV to decode adds behind prefill's end
  double predicted_ttft_s = 0;
  double predicted_tbt_s = 0;
  double idle_ttft_s = 0;  // with empty queues
  double idle_tbt_s = 0;
  double retry_after_s = 0;  // of a rejection: 1..60
  uint32_t queue_depth = 0;
  uint32_t prefill_slots = 0;  // that it will take in each host's pool
  uint32_t decode_slots = 0;

  bool placed() const { return verdict == Verdict::kPlaced; }
};

// Pure: equal arguments give equal answers. Ties go to the shorter queue, then to the lower node
// id. Never names a node that is excluded, draining or lost, or whose store is.
Decision Decide(const Request& request, const View& view, const Policy& policy, absl::Time now);

}  // namespace antiphon::conductor

#endif  // ANTIPHON_CONDUCTOR_DECIDE_H_
