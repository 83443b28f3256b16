#include "tests/sim/conductor_process.h"

#include <utility>

#include "conductor/validate.h"
#include "tests/sim/identity.h"

namespace antiphon::sim {

ConductorProcess::ConductorProcess(Cluster* cluster)
    : Process(&cluster->world(), "conductor"),
      cluster_(cluster),
      core_({.self = IdentityOf("conductor", cluster->NextIncarnation()),
             .indexed_blocks_max = 1 << 16,
             .flights_max = 1 << 12,
             .seed = 7}) {
  After(absl::Milliseconds(50), [this] { Tick(); });
}

void ConductorProcess::Accept(std::shared_ptr<Pipe> pipe,
                              std::function<void(const wire::NodeDirective&)> deliver) {
  // The stream exists for the conductor once its first message arrives; the number is taken here so
  // that the order of messages is the pipe's alone.
  const conductor::SessionId id = next_session_++;
  by_pipe_[pipe.get()] = id;
  const Pipe* key = pipe.get();
  pipe->OnBroken(1, [this, id, key] {
    by_pipe_.erase(key);
    if (sessions_.erase(id) == 0) return;
    conductor::Actions actions;
    core_.OnSessionEnd(id, Now(), actions);
    Perform(actions);
  });
  sessions_[id] = {std::move(pipe), std::move(deliver)};
}

void ConductorProcess::Deliver(const std::shared_ptr<Pipe>& pipe, const wire::NodeReport& report) {
  pipe->Send(0, [this, key = pipe.get(), report] { OnReport(key, report); });
}

void ConductorProcess::Deliver(Cluster* cluster, const std::shared_ptr<Pipe>& pipe,
                               const wire::NodeReport& report) {
  ConductorProcess* conductor = cluster->conductor();
  if (conductor != nullptr && pipe != nullptr && pipe->Has(*conductor)) {
    conductor->Deliver(pipe, report);
  }
}

void ConductorProcess::OnReport(const Pipe* pipe, const wire::NodeReport& report) {
  auto it = by_pipe_.find(pipe);
  if (it == by_pipe_.end()) return;
  const conductor::SessionId id = it->second;
  conductor::Actions actions;
  const absl::Status status = core_.OnReport(id, report, Now(), actions);
  if (!status.ok()) {
    world().counts["reports refused"]++;
    actions.closes.push_back({id, status});
  }
  Perform(actions);
}

void ConductorProcess::Perform(const conductor::Actions& actions) {
  for (const auto& directive : actions.directives) {
    auto it = sessions_.find(directive.session);
    if (it == sessions_.end()) continue;
    wire::NodeDirective message;
    switch (directive.kind) {
      case conductor::Actions::Kind::kAccepted:
        message.mutable_accepted()->set_conductor(name());
        break;
      case conductor::Actions::Kind::kResnapshot:
        message.mutable_resnapshot();
        world().counts["resnapshots"]++;
        break;
      case conductor::Actions::Kind::kNeedBlobs:
        continue;  // the simulated gateway renders no text
    }
    it->second.pipe->Send(1, [deliver = it->second.deliver, message] { deliver(message); });
  }
  for (const auto& close : actions.closes) {
    auto it = sessions_.find(close.session);
    if (it == sessions_.end()) continue;
    auto pipe = it->second.pipe;
    by_pipe_.erase(pipe.get());
    sessions_.erase(it);
    conductor::Actions more;
    core_.OnSessionEnd(close.session, Now(), more);
    pipe->Close(1);
    Perform(more);
  }
}

absl::StatusOr<wire::AdmitReply> ConductorProcess::Admit(const wire::AdmitRequest& proto) {
  auto request = conductor::RequestFromProto(proto);
  if (!request.ok()) return request.status();
  auto decision = core_.Admit(*request, Now());
  if (!decision.ok()) return decision.status();
  wire::AdmitReply reply;
  if (decision->placed()) {
    core_.FillPlacement(*decision, *reply.mutable_placement());
  } else {
    conductor::Core::FillRejected(*decision, *reply.mutable_rejected());
  }
  return reply;
}

void ConductorProcess::Finish(const wire::FinishReport& report) {
  if (auto finish = conductor::FinishFromProto(report); finish.ok()) {
    core_.OnFinish(*finish, Now());
  } else {
    world().violations.push_back("a gateway's report is malformed: " + finish.status().ToString());
  }
}

void ConductorProcess::Tick() {
  conductor::Actions actions;
  core_.Tick(Now(), actions);
  if (core_.next_tick() <= Now()) world().violations.push_back("the conductor's tick did not end");
  Perform(actions);
  After(absl::Milliseconds(50), [this] { Tick(); });
}

}  // namespace antiphon::sim
