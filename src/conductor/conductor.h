// The running conductor: Core on an executor with time, metrics, sessions and waiting calls around
// it. Knows no transport; rpc_service.h is its door.
#ifndef ANTIPHON_CONDUCTOR_CONDUCTOR_H_
#define ANTIPHON_CONDUCTOR_CONDUCTOR_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "common/clock.h"
#include "common/executor.h"
#include "common/metrics.h"
#include "conductor/core.h"
#include "conductor/instruments.h"

namespace antiphon::admin::v1 {
class GetStatusResponse;
}
namespace antiphon::internal::v1 {
class AdmitReply;
class NodeDirective;
}  // namespace antiphon::internal::v1

namespace antiphon::conductor {

// A node's stream. Called on the executor. After Close the session gets no more calls.
class Session {
 public:
  virtual ~Session() = default;
  virtual void Send(const wire::NodeDirective& directive) = 0;
  virtual void Close(const absl::Status& status) = 0;
};

// A gateway that watches models. Called on the executor.
class Watcher {
 public:
  virtual ~Watcher() = default;
  virtual void Push(const wire::ModelSet& models) = 0;
};

// All methods run on the executor, unless said otherwise. Sessions and watchers are the caller's
// and outlive their registration here.
class Conductor {
 public:
  using Done = absl::AnyInvocable<void(absl::Status)>;
  struct Options {
    CoreOptions core;
    Executor* executor = nullptr;
    const Clock* clock = nullptr;
    Registry* registry = nullptr;
  };

  explicit Conductor(Options options);
  ~Conductor();
  Conductor(const Conductor&) = delete;
  Conductor& operator=(const Conductor&) = delete;

  // Starts the clockwork.
  void Start();

  SessionId Open(Session* session);
  void OnReport(SessionId id, const wire::NodeReport& report);
  // The stream has ended or was closed; forgets `session`.
  void OnEnd(SessionId id);

  void Watch(Watcher* watcher);  // pushes at once
  void Unwatch(Watcher* watcher);

  // `done` runs once, on the executor; `reply` lives until then. Just after a start, when the nodes
  // are still on their way back, a request for which there is no worker waits for two seconds.
  // UNAVAILABLE while draining: ask another conductor.
  void Admit(Request request, wire::AdmitReply* reply, Done done);
  void OnFinish(const Finish& finish);
  // Waits up to ten seconds for a worker to send it.
  void GetBlob(const std::string& digest, wire::Blob* reply, Done done);
  void FillView(wire::ClusterView& view) const { core_.FillView(view); }
  void FillStatus(admin::v1::GetStatusResponse& status) const;

  // Answers what waits, and every later Admit, with UNAVAILABLE.
  void StopAdmitting();

  // Thread-safe. JSON members for /readyz.
  std::string ReadyDetails() const;
  const Identity& self() const { return self_; }  // thread-safe

 private:
  struct WaitingAdmit {
    Request request;
    wire::AdmitReply* reply;
    Done done;
  };
  struct WaitingBlob {
    absl::Time until;
    std::string digest;
    wire::Blob* reply;
    Done done;
  };

  absl::Time Now() const { return clock_.Now(); }
  void Tick();
  void Apply(Actions& actions);
  bool HasWorkers() const;
  void Decide(const Request& request, wire::AdmitReply* reply, Done done);
  void ServeWaitingAdmits();
  void ServeWaitingBlobs();

  const Identity self_;
  Executor& executor_;
  const Clock& clock_;
  Core core_;
  Instruments instruments_;
  SessionId next_session_ = 1;
  std::map<SessionId, Session*> sessions_;
  std::set<Watcher*> watchers_;
  std::deque<WaitingAdmit> waiting_admits_;
  std::deque<WaitingBlob> waiting_blobs_;
  absl::Time started_at_;
  bool admitting_ = true;
  Executor::TimerId timer_ = 0;
  std::atomic<int> prefill_ready_{0};
  std::atomic<int> decode_ready_{0};
};

}  // namespace antiphon::conductor

#endif  // ANTIPHON_CONDUCTOR_CONDUCTOR_H_
