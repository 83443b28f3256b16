#include "tests/sim/gateway_process.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "antiphon/v1/control.pb.h"
#include "antiphon/v1/model.pb.h"
#include "common/block_key.h"
#include "common/logging.h"
#include "common/status_macros.h"
#include "tests/sim/conductor_process.h"
#include "tests/sim/identity.h"
#include "tests/sim/worker_process.h"

namespace antiphon::sim {
namespace {

// As many tokens as the model has.
std::shared_ptr<const model::Tokenizer> SmallTokenizer() {
  wire::TokenizerSpec spec;
  spec.set_model("gpt2");
  spec.set_pre("gpt-2");
  for (char c = '!'; c <= '~'; ++c) spec.add_tokens(std::string(1, c));
  for (uint32_t id = spec.tokens_size(); id < kVocab; ++id) spec.add_tokens(absl::StrCat("t", id));
  for (uint32_t id = 0; id < kVocab; ++id) spec.add_token_types(1);
  auto tokenizer = model::Tokenizer::Create(spec);
  CHECK(tokenizer.ok());
  return std::move(*tokenizer);
}

RequestId IdOfIndex(size_t index) {
  const std::string digest = Sha256Hex(absl::StrCat("request ", index));
  return *RequestId::FromBytes(digest.substr(0, RequestId::kBytes));
}

}  // namespace

GatewayProcess::GatewayProcess(Cluster* cluster)
    : Process(&cluster->world(), "gateway"), cluster_(cluster), tokenizer_(SmallTokenizer()) {}

GatewayProcess::~GatewayProcess() = default;

const gateway::Generation* GatewayProcess::Find(size_t index) const {
  auto it = running_.find(index);
  return it == running_.end() ? nullptr : it->second.generation.get();
}

void GatewayProcess::Begin(size_t index, Outcome* outcome) {
  const Ask& ask = outcome->ask;
  gateway::GenerationSpec spec;
  spec.id = IdOfIndex(index);
  spec.label = absl::StrCat("request-", index);
  spec.tenant = "default";
  spec.model = kModel;
  spec.prompt = std::make_shared<const std::vector<uint32_t>>(ask.prompt);
  spec.root = RootKey({.weights_digest = "a", .block_tokens = 4, .tenant_salt = "default"});
  spec.block_tokens = fakes::SmallLayout().block_tokens;
  spec.sampling.set_temperature(ask.temperature);
  spec.sampling.set_seed(ask.seed);
  spec.stop.set_max_tokens(ask.max_tokens);
  spec.stop.set_min_tokens(ask.min_tokens);
  for (uint32_t id : ask.stop_ids) spec.stop.add_stop_ids(id);
  spec.deadline = Now() + absl::Seconds(60);
  spec.tokenizer = tokenizer_;
  by_id_[spec.id.ToBytes()] = index;
  Running& r = running_[index];
  r.outcome = outcome;
  r.generation =
      std::make_unique<gateway::Generation>(std::move(spec), gateway::GenerationLimits{});
  r.generation->Begin(Now());
  Perform(index);
}

void GatewayProcess::Cancel(size_t index) {
  auto it = running_.find(index);
  if (it == running_.end()) return;
  it->second.generation->OnCancel(Now());
  Perform(index);
}

void GatewayProcess::Perform(size_t index) {
  Running& r = running_.at(index);
  for (gateway::Action& action : r.generation->TakeActions()) {
    if (r.outcome->ends > 0) world().violations.push_back("an action after the end");
    if (auto* admit = std::get_if<gateway::Admit>(&action)) {
      Do(index, r, *admit);
    } else if (auto* start = std::get_if<gateway::StartOn>(&action)) {
      Do(index, r, *start);
    } else if (auto* cancel = std::get_if<gateway::CancelOn>(&action)) {
      wire::GenerateDown down;
      down.mutable_cancel()->set_id(r.generation->spec().id.ToBytes());
      down.mutable_cancel()->set_epoch(cancel->epoch);
      SendDown(cancel->address, down);
    } else if (auto* report = std::get_if<gateway::Report>(&action)) {
      ConductorProcess* conductor = cluster_->conductor();
      if (conductor == nullptr) continue;
      cluster_->Connect(*this, *conductor)->Send(0, [conductor, m = report->report] {
        conductor->Finish(m);
      });
    } else if (auto* end = std::get_if<gateway::End>(&action)) {
      End(r, end->ending);
    }
  }
  ArmTimer(index, r);
}

void GatewayProcess::Do(size_t index, Running& r, gateway::Admit& action) {
  const uint32_t epoch = action.request.epoch();
  const auto answer = [this, index, epoch](const absl::StatusOr<wire::AdmitReply>& reply) {
    running_.at(index).generation->OnAdmitReply(epoch, reply, Now());
    Perform(index);
  };
  ConductorProcess* conductor = cluster_->conductor();
  if (conductor == nullptr) {
    After(world().Latency(), [answer] { answer(absl::UnavailableError("no conductor")); });
    return;
  }
  auto pipe = cluster_->Connect(*this, *conductor);
  pipe->OnBroken(0, [answer] { answer(absl::UnavailableError("the conductor is gone")); });
  pipe->Send(0, [conductor, pipe, request = action.request, answer] {
    auto reply = conductor->Admit(request);
    pipe->Send(1, [pipe, answer, reply] {
      pipe->OnBroken(0, nullptr);
      answer(reply);
    });
  });
}

void GatewayProcess::Do(size_t index, Running& r, gateway::StartOn& action) {
  const std::string address = action.address;
  auto& pipe = decodes_[address];
  if (pipe == nullptr || pipe->broken()) {
    WorkerProcess* worker = cluster_->WorkerAt(address);
    if (worker == nullptr) {
      After(world().Latency(), [this, index, address] {
        running_.at(index).generation->OnDecodeBroken(
            address, absl::UnavailableError("cannot reach decode"), Now());
        Perform(index);
      });
      return;
    }
    pipe = cluster_->Connect(*this, *worker);
    pipe->OnBroken(0, [this, address, broken = std::weak_ptr<Pipe>(pipe)] {
      if (decodes_[address] == broken.lock()) decodes_.erase(address);
      for (auto& [i, running] : running_) {
        running.generation->OnDecodeBroken(address, absl::UnavailableError("decode is gone"),
                                           Now());
        Perform(i);
      }
    });
    worker->AcceptGateway(pipe, [this](const wire::TokenBatch& batch) { OnTokens(batch); });
  }
  wire::GenerateDown down;
  *down.mutable_start() = action.start;
  SendDown(address, down);
}

void GatewayProcess::SendDown(const std::string& address, const wire::GenerateDown& down) {
  auto it = decodes_.find(address);
  WorkerProcess* worker = cluster_->WorkerAt(address);
  if (it == decodes_.end() || worker == nullptr || !it->second->Has(*worker)) return;
  it->second->Send(0, [worker, key = it->second.get(), down] { worker->Down(key, down); });
}

void GatewayProcess::OnTokens(const wire::TokenBatch& batch) {
  for (const wire::SequenceUpdate& update : batch.updates()) {
    auto it = by_id_.find(update.id());
    if (it == by_id_.end()) {
      world().violations.push_back("tokens of an unknown request");
      continue;
    }
    if (update.has_error()) {
      LogDebug("request {} epoch {}: error {} from {}: {}", it->second, update.epoch(),
               update.error().code(), update.failed_node(), update.error().message());
    }
    gateway::Generation& generation = *running_.at(it->second).generation;
    const bool stale = update.epoch() < generation.epoch();
    const size_t emitted = generation.emitted().size();
    const uint32_t replacements = generation.stats().replacements;
    generation.OnUpdate(update, Now());
    if (stale && (generation.emitted().size() != emitted ||
                  generation.stats().replacements != replacements)) {
      world().violations.push_back("the gateway heeded a stale epoch");
    }
    Perform(it->second);
  }
}

void GatewayProcess::End(Running& r, const gateway::Ending& ending) {
  Outcome& o = *r.outcome;
  if (++o.ends > 1) world().violations.push_back("two terminal events");
  o.tokens = r.generation->emitted();
  o.finished =
      ending.reason == gateway::EndReason::kStop || ending.reason == gateway::EndReason::kLength;
  o.cancelled |= ending.reason == gateway::EndReason::kCancelled;
  if (ending.reason == gateway::EndReason::kError) o.error = ending.error.message;
  o.replacements = r.generation->stats().replacements;
  if (const auto& source = r.generation->stats().prompt_source) {
    o.cached = source->dram() + source->remote();
  }
}

void GatewayProcess::ArmTimer(size_t index, Running& r) {
  const absl::Time at = r.generation->next_timer();
  if (at == r.timer || at == absl::InfiniteFuture()) return;
  r.timer = at;
  After(Until(at), [this, index, at] {
    Running& r = running_.at(index);
    if (r.timer != at) return;
    r.timer = absl::InfiniteFuture();
    r.generation->OnTimer(Now());
    Perform(index);
  });
}

}  // namespace antiphon::sim
