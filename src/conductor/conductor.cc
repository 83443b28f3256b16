#include "conductor/conductor.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <utility>

#include "antiphon/v1/admin.pb.h"
#include "antiphon/v1/control.pb.h"
#include "common/logging.h"

namespace antiphon::conductor {
namespace {

// Between two looks at the clock: not sooner, not later.
constexpr absl::Duration kTickMin = absl::Milliseconds(10);
constexpr absl::Duration kTickMax = absl::Milliseconds(500);
// Nodes reconnect within about a second; before that, "no worker" proves nothing.
constexpr absl::Duration kWarmUp = absl::Seconds(2);
constexpr size_t kWaitingAdmitsMax = 4096;
constexpr absl::Duration kBlobWait = absl::Seconds(10);
constexpr size_t kWaitingBlobsMax = 1024;

std::string KindName(wire::NodeKind kind) {
  switch (kind) {
    case wire::NODE_KIND_WORKER:
      return "worker";
    case wire::NODE_KIND_STORE:
      return "store";
    case wire::NODE_KIND_GATEWAY:
      return "gateway";
    default:
      return "unknown";
  }
}

}  // namespace

Conductor::Conductor(Options options)
    : self_(options.core.self),
      executor_(*options.executor),
      clock_(*options.clock),
      core_(std::move(options.core)),
      instruments_(*options.registry) {}

Conductor::~Conductor() {
  if (timer_ != 0) executor_.CancelTimer(timer_);
}

void Conductor::Start() {
  started_at_ = Now();
  Tick();
}

void Conductor::Tick() {
  Actions actions;
  core_.Tick(Now(), actions);
  Apply(actions);
  instruments_.OnSummary(core_.Summarise(), core_.view().index.blocks());
  ServeWaitingAdmits();
  ServeWaitingBlobs();
  absl::Time next = core_.next_tick();
  if (!waiting_admits_.empty()) next = std::min(next, started_at_ + kWarmUp);
  timer_ = executor_.PostAfter(std::clamp(next - Now(), kTickMin, kTickMax), [this] { Tick(); });
}

SessionId Conductor::Open(Session* session) {
  const SessionId id = next_session_++;
  sessions_[id] = session;
  return id;
}

void Conductor::OnReport(SessionId id, const wire::NodeReport& report) {
  Actions actions;
  const absl::Status status = core_.OnReport(id, report, Now(), actions);
  if (!status.ok()) {
    const std::string node = report.has_hello() ? report.hello().hello().node() : std::string();
    LogWarning("refused {}: {}", node.empty() ? "a node" : node, std::string(status.message()));
    actions.closes.push_back({id, status});
  }
  Apply(actions);
}

void Conductor::OnEnd(SessionId id) {
  sessions_.erase(id);
  Actions actions;
  core_.OnSessionEnd(id, Now(), actions);
  Apply(actions);
}

void Conductor::Apply(Actions& actions) {
  for (const Actions::Directive& directive : actions.directives) {
    auto it = sessions_.find(directive.session);
    if (it == sessions_.end()) continue;
    wire::NodeDirective message;
    switch (directive.kind) {
      case Actions::Kind::kAccepted:
        message.mutable_accepted()->set_conductor(self_.node.value());
        break;
      case Actions::Kind::kNeedBlobs:
        for (const std::string& digest : directive.digests) {
          message.mutable_need_blobs()->add_digests(digest);
        }
        break;
      case Actions::Kind::kResnapshot:
        message.mutable_resnapshot();
        break;
    }
    it->second->Send(message);
  }
  for (const Actions::Close& close : actions.closes) {
    auto it = sessions_.find(close.session);
    if (it == sessions_.end()) continue;
    Session* const session = it->second;
    sessions_.erase(it);
    session->Close(close.status);
  }
  if (actions.models_changed) {
    wire::ModelSet models;
    core_.FillModels(models);
    prefill_ready_ = static_cast<int>(models.prefill_ready());
    decode_ready_ = static_cast<int>(models.decode_ready());
    for (Watcher* watcher : watchers_) watcher->Push(models);
    ServeWaitingAdmits();
  }
  if (actions.blob_arrived) ServeWaitingBlobs();
}

void Conductor::Watch(Watcher* watcher) {
  watchers_.insert(watcher);
  wire::ModelSet models;
  core_.FillModels(models);
  watcher->Push(models);
}

void Conductor::Unwatch(Watcher* watcher) { watchers_.erase(watcher); }

bool Conductor::HasWorkers() const { return prefill_ready_ > 0 && decode_ready_ > 0; }

void Conductor::Admit(Request request, wire::AdmitReply* reply, Done done) {
  if (!admitting_) return done(absl::UnavailableError("this conductor is draining"));
  if (!HasWorkers() && Now() < started_at_ + kWarmUp &&
      waiting_admits_.size() < kWaitingAdmitsMax) {
    waiting_admits_.push_back({std::move(request), reply, std::move(done)});
    return;
  }
  Decide(request, reply, std::move(done));
}

void Conductor::Decide(const Request& request, wire::AdmitReply* reply, Done done) {
  const absl::Time begin = Now();
  absl::StatusOr<Decision> decision = core_.Admit(request, begin);
  if (!decision.ok()) return done(decision.status());
  instruments_.OnDecision(*decision, Now() - begin);
  if (decision->placed()) {
    core_.FillPlacement(*decision, *reply->mutable_placement());
  } else {
    LogDebug("rejected {}: {}", request.id.Hex(), decision->message);
    Core::FillRejected(*decision, *reply->mutable_rejected());
  }
  done(absl::OkStatus());
}

void Conductor::ServeWaitingAdmits() {
  if (waiting_admits_.empty()) return;
  if (admitting_ && !HasWorkers() && Now() < started_at_ + kWarmUp) return;
  std::deque<WaitingAdmit> waiting;
  waiting.swap(waiting_admits_);
  for (WaitingAdmit& admit : waiting) {
    Admit(std::move(admit.request), admit.reply, std::move(admit.done));
  }
}

void Conductor::OnFinish(const Finish& finish) {
  instruments_.OnFinish(finish, core_.OnFinish(finish, Now()));
}

void Conductor::GetBlob(const std::string& digest, wire::Blob* reply, Done done) {
  Actions actions;
  auto blob = core_.GetBlob(digest, Now(), actions);
  if (!blob.ok()) {
    done(blob.status());
  } else if (*blob != nullptr) {
    reply->set_digest(digest);
    reply->set_content(**blob);
    done(absl::OkStatus());
  } else if (waiting_blobs_.size() >= kWaitingBlobsMax) {
    done(absl::UnavailableError("too many calls wait for blobs"));
  } else {
    waiting_blobs_.push_back({Now() + kBlobWait, digest, reply, std::move(done)});
  }
  Apply(actions);
}

void Conductor::ServeWaitingBlobs() {
  if (waiting_blobs_.empty()) return;
  std::deque<WaitingBlob> waiting;
  waiting.swap(waiting_blobs_);
  for (WaitingBlob& wait : waiting) {
    Actions actions;
    auto blob = core_.GetBlob(wait.digest, Now(), actions);
    if (!blob.ok()) {
      wait.done(blob.status());
    } else if (*blob != nullptr) {
      wait.reply->set_digest(wait.digest);
      wait.reply->set_content(**blob);
      wait.done(absl::OkStatus());
    } else if (wait.until <= Now()) {
      wait.done(
          absl::UnavailableError(fmt::format("no worker has sent the blob '{}' yet", wait.digest)));
    } else {
      waiting_blobs_.push_back(std::move(wait));
    }
    Apply(actions);  // asks workers again; nothing arrives inside this call
  }
}

void Conductor::FillStatus(admin::v1::GetStatusResponse& status) const {
  wire::ClusterView view;
  core_.FillView(view);
  bool degraded = false;
  for (const wire::NodeView& node : view.nodes()) {
    admin::v1::NodeStatus& out = *status.add_nodes();
    out.set_node(node.node());
    out.set_kind(KindName(node.kind()));
    if (node.kind() == wire::NODE_KIND_WORKER) {
      out.set_role(node.role() == wire::ROLE_PREFILL ? "prefill" : "decode");
    }
    out.set_state(node.state());
    out.set_rpc_address(node.rpc_address());
    out.set_ops_address(node.ops_address());
    out.set_model(node.model());
    out.set_running(node.load().running());
    out.set_waiting(node.load().waiting());
    out.set_queue_s(node.load().queue_s());
    out.set_slots_free(node.store_load().slots_free());
    out.set_slots_cached(node.store_load().slots_cached());
    out.set_slots_pinned(node.store_load().slots_pinned());
    out.set_version(node.version());
    degraded |= node.state() != "ready";
  }
  status.set_cluster(self_.cluster);
  status.set_state(!HasWorkers() ? "down" : degraded ? "degraded" : "ok");
  status.set_indexed_blocks(view.indexed_blocks());
  status.set_admitted(view.admitted());
  status.set_rejected(view.rejected());
  status.set_version(kVersion);
}

void Conductor::StopAdmitting() {
  admitting_ = false;
  ServeWaitingAdmits();
}

std::string Conductor::ReadyDetails() const {
  const int prefill = prefill_ready_, decode = decode_ready_;
  return fmt::format("\"prefill_ready\":{},\"decode_ready\":{}{}", prefill, decode,
                     prefill > 0 && decode > 0 ? "" : ",\"degraded\":true");
}

}  // namespace antiphon::conductor
