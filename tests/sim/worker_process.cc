#include "tests/sim/worker_process.h"

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "tests/sim/conductor_process.h"
#include "tests/sim/identity.h"

namespace antiphon::sim {

std::string WorkerProcess::Address(Role role, uint32_t index) {
  return absl::StrCat(role == Role::kPrefill ? "prefill-" : "decode-", index, ":7404");
}

WorkerProcess::WorkerProcess(Cluster* cluster, Role role, uint32_t index, uint32_t host)
    : Process(&cluster->world(),
              absl::StrCat(role == Role::kPrefill ? "prefill-" : "decode-", index)),
      cluster_(cluster),
      role_(role),
      index_(index),
      host_(host),
      identity_(IdentityOf(name(), cluster->NextIncarnation())),
      runner_(fakes::SmallLayout(), {.vocab = kVocab,
                                     .context = kContext,
                                     .step_tokens_max = 64,
                                     .makes_checksums = index % 2 == 1}) {
  const bool makes_checksums = runner_.shape().makes_checksums;
  if (role_ == Role::kPrefill) {
    prefill_ = std::make_unique<prefill::PrefillCore>(
        prefill::CoreOptions{.layout = fakes::SmallLayout(),
                             .vocab = kVocab,
                             .context = kContext,
                             .publish_layers = 1,
                             .seconds_per_token = 0.0002,
                             .engine_makes_checksums = makes_checksums});
  } else {
    decode_ = std::make_unique<decode::DecodeCore>(
        decode::CoreOptions{.self = NodeId(name()),
                            .layout = fakes::SmallLayout(),
                            .vocab = kVocab,
                            .context = kContext,
                            .sequences_max = cluster->shape().sequences_max,
                            .engine_makes_checksums = makes_checksums});
  }
  After(absl::ZeroDuration(), [this] { AttachStore(); });
  After(absl::Milliseconds(20), [this] { Tick(); });
  After(absl::Milliseconds(100), [this] { Report(); });
}

void WorkerProcess::AttachStore() {
  store_ = cluster_->StoreOf(host_);
  if (store_ == nullptr) {
    After(absl::Milliseconds(50), [this] { AttachStore(); });
    return;
  }
  store_pipe_ = cluster_->Connect(*this, *store_);
  store_memory_ = store_->memory();
  session_ =
      store_->Accept(store_pipe_, [this](const wire::StoreReply& reply) { OnStoreReply(reply); });
  store_pipe_->OnBroken(0, [this] {
    if (attached_) {
      attached_ = false;
      const absl::Status why = absl::UnavailableError("the store of this host is gone");
      if (prefill_ != nullptr) prefill_->OnStoreLost(why, Now());
      if (decode_ != nullptr) decode_->OnStoreLost(why, Now());
      Perform();
    }
    store_ = nullptr;
    if (control_ != nullptr) control_->Close(0);
    accepted_ = false;
    After(absl::Milliseconds(50), [this] { AttachStore(); });
  });
  wire::StoreRequest request;
  request.set_id(~uint64_t{0});  // the cores' ids ascend from 1
  *request.mutable_attach()->mutable_hello() = MakeHello(identity_);
  *request.mutable_attach()->mutable_layout() = LayoutToProto(fakes::SmallLayout());
  *request.mutable_attach()->mutable_fingerprint() = SimFingerprint();
  SendStore(request);
}

void WorkerProcess::SendStore(const wire::StoreRequest& request) {
  if (store_pipe_ == nullptr) return;
  store_pipe_->Send(
      0, [store = store_, session = session_, request] { store->node().Handle(session, request); });
}

void WorkerProcess::OnStoreReply(const wire::StoreReply& reply) {
  if (reply.has_attached()) {
    attached_ = true;
    store_incarnation_ = reply.attached().hello().incarnation();
    // The reply brought it along, as the descriptor of the pool; the store may be dead already.
    Memory memory = store_memory_;
    mapped_.push_back(memory);
    const size_t slot_bytes = reply.attached().slot_bytes();
    auto payload = [memory, slot_bytes](uint32_t slot) {
      return memory->data() + slot * slot_bytes + kSlotHeaderBytes;
    };
    if (prefill_ != nullptr) {
      prefill_->OnStoreAttached({.incarnation = store_incarnation_,
                                 .data_address = reply.attached().data_address(),
                                 .payload = payload});
    } else {
      decode_->OnStoreAttached({.incarnation = store_incarnation_, .payload = payload});
    }
    Perform();
    JoinConductor();
    return;
  }
  if (!attached_) return;
  if (absl::StrContains(reply.status().message(), "has no generation")) {
    ++world().counts["stale slots refused"];
  }
  if (prefill_ != nullptr) prefill_->OnStoreReply(reply, Now());
  if (decode_ != nullptr) decode_->OnStoreReply(reply, Now());
  Perform();
}

void WorkerProcess::JoinConductor() {
  if (!attached_) return;
  ConductorProcess* conductor = cluster_->conductor();
  if (conductor == nullptr) {
    After(absl::Milliseconds(200), [this] { JoinConductor(); });
    return;
  }
  accepted_ = false;
  control_ = cluster_->Connect(*this, *conductor);
  control_->OnBroken(0, [this] {
    accepted_ = false;
    After(absl::Milliseconds(100), [this] { JoinConductor(); });
  });
  wire::NodeReport report;
  wire::NodeHello& hello = *report.mutable_hello();
  *hello.mutable_hello() = MakeHello(identity_);
  hello.set_kind(wire::NODE_KIND_WORKER);
  hello.set_rpc_address(Address(role_, index_));
  hello.set_role(role_ == Role::kPrefill ? wire::ROLE_PREFILL : wire::ROLE_DECODE);
  *hello.mutable_card() = SimCard();
  *hello.mutable_fingerprint() = SimFingerprint();
  *hello.mutable_cost() = SimCost();
  hello.set_store_incarnation(store_incarnation_);
  hello.set_max_sequences(cluster_->shape().sequences_max);
  conductor->Accept(control_, [this](const wire::NodeDirective& directive) {
    if (directive.has_accepted()) accepted_ = true;
  });
  conductor->Deliver(control_, report);
}

void WorkerProcess::Report() {
  wire::NodeReport report;
  wire::WorkerLoad& load = *report.mutable_load();
  if (prefill_ != nullptr) {
    load.set_waiting(prefill_->load().waiting);
    load.set_waiting_tokens(prefill_->load().waiting_tokens);
    load.set_queue_s(static_cast<double>(prefill_->load().waiting_tokens) * 0.0002);
  } else {
    load.set_running(decode_->load().running);
    load.set_context_tokens(decode_->load().context_tokens);
  }
  if (accepted_) ConductorProcess::Deliver(cluster_, control_, report);
  After(absl::Milliseconds(200), [this] { Report(); });
}

void WorkerProcess::Tick() {
  if (prefill_ != nullptr) prefill_->Tick(Now());
  if (decode_ != nullptr) decode_->Tick(Now());
  Perform();
  After(absl::Milliseconds(20), [this] { Tick(); });
}

void WorkerProcess::Perform() {
  if (prefill_ != nullptr) {
    PerformPrefill();
  } else {
    PerformDecode();
  }
  MaybeStep();
}

void WorkerProcess::PerformPrefill() {
  for (prefill::Action& action : prefill_->TakeActions()) {
    if (auto* call = std::get_if<prefill::StoreCall>(&action)) {
      SendStore(call->request);
    } else if (auto* send = std::get_if<prefill::Send>(&action)) {
      auto it = incoming_.find(send->stream);
      if (it == incoming_.end()) continue;
      CheckEpoch(it->second.id, it->second.epoch, "prefill");
      it->second.pipe->Send(1, [up = it->second.up, m = send->message] { up(m); });
      if (send->message.ready().blocks_size() > 0 && world().Chance(world().faults.handoffs)) {
        cluster_->SpoilHandoff(*it->second.pipe);
      }
    } else {
      auto& end = std::get<prefill::End>(action);
      auto it = incoming_.find(end.stream);
      if (it == incoming_.end()) continue;
      it->second.pipe->Send(1, [f = it->second.end, status = end.status] { f(status); });
      it->second.pipe->OnBroken(1, nullptr);
      incoming_.erase(it);
    }
  }
}

void WorkerProcess::PerformDecode() {
  for (decode::Action& action : decode_->TakeActions()) {
    if (auto* call = std::get_if<decode::StoreCall>(&action)) {
      SendStore(call->request);
    } else if (auto* send = std::get_if<decode::SendTokens>(&action)) {
      auto it = gateways_.find(send->gateway);
      if (it == gateways_.end()) continue;
      for (const wire::SequenceUpdate& update : send->batch.updates()) {
        if (update.ids_size() > 0) CheckEpoch(update.id(), update.epoch(), "decode");
      }
      it->second.pipe->Send(1, [f = it->second.deliver, batch = send->batch] { f(batch); });
    } else if (auto* open = std::get_if<decode::OpenPrefill>(&action)) {
      OpenPrefill(*open);
    } else if (auto* half = std::get_if<decode::HalfClosePrefill>(&action)) {
      auto it = prefills_.find(half->prefill);
      if (it == prefills_.end()) continue;
      it->second->Send(
          0, [pipe = it->second, cluster = cluster_] { cluster->HalfClosed(pipe.get()); });
    } else {
      const uint64_t handle = std::get<decode::CancelPrefill>(action).prefill;
      auto it = prefills_.find(handle);
      if (it == prefills_.end()) continue;
      it->second->Close(0);
      prefills_.erase(it);
    }
  }
}

void WorkerProcess::OpenPrefill(const decode::OpenPrefill& open) {
  const uint64_t handle = open.prefill;
  WorkerProcess* peer = cluster_->WorkerAt(open.address);
  const auto fail = [this, handle](const absl::Status& status) {
    if (prefills_.erase(handle) == 0) return;
    decode_->OnPrefillEnd(handle, status, Now());
    Perform();
  };
  if (peer == nullptr) {
    After(world().Latency(), [this, handle] {
      decode_->OnPrefillEnd(handle, absl::UnavailableError("cannot reach prefill"), Now());
      Perform();
    });
    return;
  }
  auto pipe = cluster_->Connect(*this, *peer);
  prefills_[handle] = pipe;
  pipe->OnBroken(0, [fail] { fail(absl::UnavailableError("the stream to prefill broke")); });
  const auto up = [this, handle](const wire::PrefillUp& message) {
    if (!prefills_.contains(handle)) return;
    decode_->OnPrefillUp(handle, message, Now());
    Perform();
  };
  const auto end = [this, handle, fail](const absl::Status& status) {
    auto it = prefills_.find(handle);
    if (it == prefills_.end()) return;
    it->second->OnBroken(0, nullptr);
    fail(status);
  };
  pipe->Send(0, [peer, pipe, message = open.open, up, end] {
    peer->AcceptPrefill(pipe, peer->next_stream_++, message, up, end);
  });
}

void WorkerProcess::AcceptPrefill(std::shared_ptr<Pipe> pipe, uint64_t stream,
                                  const wire::PrefillOpen& open,
                                  std::function<void(const wire::PrefillUp&)> up,
                                  std::function<void(const absl::Status&)> end) {
  pipe->OnBroken(1, [this, stream] {
    if (incoming_.erase(stream) == 0) return;
    prefill_->OnBroken(stream);
    Perform();
  });
  cluster_->OnHalfClose(pipe.get(), [this, stream] {
    if (!incoming_.contains(stream)) return;
    prefill_->OnHalfClose(stream, Now());
    Perform();
  });
  incoming_[stream] = {std::move(pipe), std::move(up), std::move(end), open.id(), open.epoch()};
  SeeEpoch(open.id(), open.epoch());
  prefill_->OnOpen(stream, open, Now());
  Perform();
}

void WorkerProcess::AcceptGateway(std::shared_ptr<Pipe> pipe,
                                  std::function<void(const wire::TokenBatch&)> deliver) {
  const uint64_t id = next_stream_++;
  const Pipe* key = pipe.get();
  gateway_of_[key] = id;
  pipe->OnBroken(1, [this, id, key] {
    gateway_of_.erase(key);
    gateways_.erase(id);
    decode_->OnGatewayBroken(id);
    Perform();
  });
  gateways_[id] = {std::move(pipe), std::move(deliver)};
}

void WorkerProcess::Down(const Pipe* pipe, const wire::GenerateDown& down) {
  auto it = gateway_of_.find(pipe);
  if (it == gateway_of_.end()) return;
  if (down.has_start()) {
    SeeEpoch(down.start().id(), down.start().epoch());
    decode_->OnStart(it->second, down.start(), Now());
  }
  if (down.has_cancel()) decode_->OnCancel(it->second, down.cancel());
  Perform();
}

void WorkerProcess::SeeEpoch(const std::string& id, uint32_t epoch) {
  uint32_t& highest = epochs_[id];
  if (epoch < highest) ++world().counts["stale epochs"];
  highest = std::max(highest, epoch);
}

void WorkerProcess::CheckEpoch(const std::string& id, uint32_t epoch, const char* work) {
  if (epoch >= epochs_[id]) return;
  world().violations.push_back(absl::StrCat(name(), ": ", work, " of a stale epoch"));
}

absl::Duration WorkerProcess::LayerTime() {
  return absl::Microseconds(100) +
         absl::Microseconds(20) * static_cast<double>(step_tokens_) * (0.5 + world().Uniform());
}

void WorkerProcess::MaybeStep() {
  if (stepping_ || !attached_) return;
  engine::Step step;
  if (prefill_ != nullptr) {
    prefill_->Plan(cluster_->shape().chunk_tokens, Now(), step.chunks);
  } else {
    decode_->Plan(Now(), step.chunks);
  }
  if (prefill_ != nullptr) {
    PerformPrefill();
  } else {
    PerformDecode();
  }
  if (step.chunks.empty()) return;
  step_tokens_ = 0;
  for (const auto& chunk : step.chunks) step_tokens_ += chunk.tokens.size();
  const absl::Status status = runner_.Submit(std::move(step));
  if (!status.ok()) {
    world().violations.push_back("a planned step is malformed: " + status.ToString());
    return;
  }
  stepping_ = true;
  After(LayerTime(), [this] { RunLayer(); });
}

void WorkerProcess::RunLayer() {
  runner_.AdvanceLayer();
  if (!runner_.Progress().finished) {
    if (prefill_ != nullptr) prefill_->OnProgress(runner_.Progress().layers_done);
    Perform();
    After(LayerTime(), [this] { RunLayer(); });
    return;
  }
  stepping_ = false;
  auto result = runner_.Take();
  const absl::Span<const engine::ChunkResult> chunks = result->chunks;
  if (prefill_ != nullptr) {
    prefill_->OnStepDone(chunks, Now());
    prefill_->CommitStep();
  } else {
    decode_->OnStepDone(chunks, Now());
  }
  // Pools of lost stores are unmapped now that no step can touch them.
  if (mapped_.size() > 1) mapped_.erase(mapped_.begin(), mapped_.end() - 1);
  Perform();
}

std::string WorkerProcess::Leaks() const {
  std::string out;
  if (prefill_ != nullptr && !prefill_->idle()) absl::StrAppend(&out, name(), " is not idle; ");
  if (decode_ != nullptr && !decode_->idle()) absl::StrAppend(&out, name(), " is not idle; ");
  if (!prefills_.empty()) absl::StrAppend(&out, name(), " has open prefill calls; ");
  if (!incoming_.empty()) absl::StrAppend(&out, name(), " has open prefill streams; ");
  return out;
}

}  // namespace antiphon::sim
