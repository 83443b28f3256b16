// The conductor without its sockets: registrations, reports and requests in, directives and
// decisions out. Soft state only: everything comes back from the nodes' streams after a restart.
#ifndef ANTIPHON_CONDUCTOR_CORE_H_
#define ANTIPHON_CONDUCTOR_CORE_H_

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/wire.h"
#include "conductor/blob_cache.h"
#include "conductor/decide.h"
#include "conductor/validate.h"
#include "conductor/view.h"

namespace antiphon::internal::v1 {
class Blob;
class ClusterView;
class ModelCard;
class ModelSet;
class NodeReport;
class Placement;
class Rejected;
class StoreLoad;
}  // namespace antiphon::internal::v1

namespace antiphon::conductor {

struct CoreOptions {
  Identity self;
  Policy policy;
  absl::Duration node_timeout = absl::Seconds(3);  // without a report
  absl::Duration lost_kept = absl::Seconds(60);    // how long a lost node stays in the view
  absl::Duration flight_kept = absl::Minutes(15);  // of a request without a deadline
  size_t indexed_blocks_max = 16'000'000;
  size_t flights_max = 1'000'000;
  size_t nodes_max = 16'384;
  size_t blob_bytes_max = 256 << 20;
  uint64_t seed = 0;
};

// One Join stream. Numbers are the shell's, never reused.
using SessionId = uint64_t;

// What the shell does after an event.
struct Actions {
  enum class Kind { kAccepted, kNeedBlobs, kResnapshot };
  struct Directive {
    SessionId session;
    Kind kind;
    std::vector<std::string> digests;  // kNeedBlobs
  };
  struct Close {
    SessionId session;
    absl::Status status;
  };
  std::vector<Directive> directives;
  std::vector<Close> closes;
  bool models_changed = false;  // FillModels gives another answer
  bool blob_arrived = false;
};

// What a FinishReport told, against what was predicted.
struct FinishOutcome {
  bool known = false;
  bool first_token = false;  // reported for the first time
  bool finished = false;
  double predicted_ttft_s = 0;
  double predicted_tbt_s = 0;
  std::optional<bool> ttft_met;  // when finished and there is such an SLO
  std::optional<bool> tbt_met;
};

struct Summary {
  int workers[3] = {0, 0, 0};  // by NodeState
  int stores_ready = 0;
  int gateways = 0;
  int prefill_ready = 0;
  int decode_ready = 0;
  uint64_t prefill_queue = 0;  // requests
  uint64_t decode_rows = 0;
  uint64_t flights = 0;
};

// Not thread-safe: lives on one serial executor. `now` never goes back.
class Core {
 public:
  explicit Core(CoreOptions options);
  ~Core();

  // A message of a session. An error ends the session with that status: FAILED_PRECONDITION for
  // another cluster, wire version or fingerprint (both values in the text), INVALID_ARGUMENT naming
  // the field, ABORTED for a session that a newer one replaced.
  absl::Status OnReport(SessionId session, const wire::NodeReport& report, absl::Time now,
                        Actions& actions);
  void OnSessionEnd(SessionId session, absl::Time now, Actions& actions);
  // Nodes without reports are lost, forgotten requests end.
  void Tick(absl::Time now, Actions& actions);
  // When Tick has something to do, as things are.
  absl::Time next_tick() const;

  // Decides and, when placed, counts the request at its workers until it finishes. A second call
  // for one id replaces the first. ABORTED when a higher epoch was seen.
  absl::StatusOr<Decision> Admit(const Request& request, absl::Time now);
  FinishOutcome OnFinish(const Finish& finish, absl::Time now);

  // Null when absent; then asks the workers that have it, through `actions`.
  // NOT_FOUND: no registered model names this digest.
  absl::StatusOr<std::shared_ptr<const std::string>> GetBlob(const std::string& digest,
                                                             absl::Time now, Actions& actions);

  void FillPlacement(const Decision& decision, wire::Placement& placement) const;
  static void FillRejected(const Decision& decision, wire::Rejected& rejected);
  void FillModels(wire::ModelSet& models) const;
  void FillView(wire::ClusterView& view) const;

  // The last 1,000, oldest first.
  const std::deque<Decision>& decisions() const { return decisions_; }
  const View& view() const { return view_; }
  Summary Summarise() const;

 private:
  struct Node;
  struct ModelClass;
  struct Flight {
    uint32_t epoch = 0;
    NodeId prefill, decode;
    absl::Time placed_at, expires_at, started_at;
    bool started = false;
    double predicted_ttft_s = 0;
    double predicted_tbt_s = 0;
    double ttft_s = 0;
    double tokens = 0;
  };

  absl::Status OnHello(SessionId session, const wire::NodeHello& hello, absl::Time now,
                       Actions& actions);
  absl::Status CheckClass(const wire::NodeHello& hello, Actions& actions);
  void RegisterWorker(Node& node, const wire::NodeHello& hello, bool same_incarnation);
  void RegisterStore(Node& node, const wire::NodeHello& hello, bool same_incarnation);
  void AskBlobs(SessionId session, Actions& actions);
  std::vector<std::string> MissingBlobs();
  void OnLoad(Node& node, const wire::WorkerLoad& load, absl::Time now);
  void OnStoreLoad(Node& node, const wire::StoreLoad& load, absl::Time now);
  void OnEvents(Node& node, const wire::StoreEvents& events, absl::Time now, Actions& actions);
  absl::Status OnBlob(Node& node, const wire::Blob& blob, Actions& actions);
  void ForgetBlocks(Node& node);
  void SetState(Node& node);
  // When Tick calls the node silent, and when it forgets it.
  absl::Time SilentAt(const Node& node) const;
  absl::Time GoneAt(const Node& node) const;
  void Remove(const NodeId& id);
  // After nodes came, went or changed state: stores of workers, and who must hear of it.
  void Settle(Actions& actions);

  void Commit(const Request& request, const Decision& decision, absl::Time now);
  void Unplan(const RequestId& id, const Flight& flight);
  void EndFlight(const RequestId& id);

  const CoreOptions options_;
  View view_;
  BlobCache blobs_;
  std::map<NodeId, std::unique_ptr<Node>> nodes_;
  std::map<SessionId, NodeId> sessions_;
  std::unique_ptr<ModelClass> model_;
  absl::Time blobs_asked_at_ = absl::InfinitePast();
  int prefill_ready_ = 0;
  int decode_ready_ = 0;

  absl::flat_hash_map<RequestId, Flight> flights_;
  std::set<std::pair<absl::Time, RequestId>> expiries_;
  std::deque<Decision> decisions_;
  uint64_t admitted_ = 0;
  uint64_t rejected_ = 0;
};

}  // namespace antiphon::conductor

#endif  // ANTIPHON_CONDUCTOR_CORE_H_
