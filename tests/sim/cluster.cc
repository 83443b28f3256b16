#include "tests/sim/cluster.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "tests/sim/conductor_process.h"
#include "tests/sim/gateway_process.h"
#include "tests/sim/store_process.h"
#include "tests/sim/worker_process.h"

namespace antiphon::sim {

Cluster::Cluster(World* world, ClusterShape shape) : world_(world), shape_(std::move(shape)) {
  const auto add = [this](std::string name, auto make) {
    slots_.push_back(std::make_unique<Slot>());
    slots_.back()->name = std::move(name);
    slots_.back()->make = std::move(make);
    return slots_.back().get();
  };
  conductor_ = add("conductor", [this] { return std::make_unique<ConductorProcess>(this); });
  for (uint32_t host = 0; host < shape_.hosts; ++host) {
    Slot* slot = add(absl::StrCat("store-", host),
                     [this, host] { return std::make_unique<StoreProcess>(this, host); });
    stores_.push_back(slot);
    by_address_[StoreProcess::RpcAddress(host)] = slot;
    by_address_[StoreProcess::DataAddress(host)] = slot;
  }
  const auto add_workers = [&](WorkerProcess::Role role, const std::vector<uint32_t>& hosts) {
    for (uint32_t i = 0; i < hosts.size(); ++i) {
      by_address_[WorkerProcess::Address(role, i)] =
          add(WorkerProcess::Address(role, i), [this, role, i, host = hosts[i]] {
            return std::make_unique<WorkerProcess>(this, role, i, host);
          });
    }
  };
  add_workers(WorkerProcess::Role::kPrefill, shape_.prefill_hosts);
  add_workers(WorkerProcess::Role::kDecode, shape_.decode_hosts);
  for (auto& slot : slots_) StartSlot(*slot);
  gateway_ = std::make_unique<GatewayProcess>(this);
}

Cluster::~Cluster() {
  for (auto& slot : slots_) slot->process.reset();
}

void Cluster::StartSlot(Slot& slot) {
  slot.restarting = false;
  if (slot.process == nullptr) slot.process = slot.make();
}

size_t Cluster::Start(Ask ask) {
  outcomes_.push_back(std::make_unique<Outcome>());
  outcomes_.back()->ask = std::move(ask);
  gateway_->Begin(outcomes_.size() - 1, outcomes_.back().get());
  return outcomes_.size() - 1;
}

void Cluster::Cancel(size_t request) {
  if (outcomes_[request]->ends > 0) return;
  outcomes_[request]->cancelled = true;
  ++world_->counts["cancels"];
  gateway_->Cancel(request);
}

bool Cluster::all_ended() const {
  return std::all_of(outcomes_.begin(), outcomes_.end(), [](const auto& o) { return o->ends > 0; });
}

void Cluster::Kill(size_t process, absl::Duration down) {
  Slot& slot = *slots_[process];
  if (slot.process == nullptr) return;
  ++world_->counts[absl::StrCat("kills of ", slot.name.substr(0, slot.name.find('-')))];
  std::unique_ptr<Process> dead = std::move(slot.process);
  std::vector<std::shared_ptr<Pipe>> its;
  for (const auto& weak : pipes_) {
    if (auto pipe = weak.lock(); pipe != nullptr && pipe->Has(*dead)) its.push_back(pipe);
  }
  dead.reset();
  for (const auto& pipe : its) pipe->Break();
  slot.restarting = true;
  world_->At(down, [this, &slot] {
    if (slot.restarting) StartSlot(slot);
  });
}

void Cluster::Pause(size_t process, absl::Duration d) {
  Slot& slot = *slots_[process];
  if (slot.process == nullptr) return;
  ++world_->counts["pauses"];
  slot.process->Pause(d);
}

void Cluster::BreakSomeStream() {
  std::vector<std::shared_ptr<Pipe>> live;
  for (const auto& weak : pipes_) {
    auto pipe = weak.lock();
    if (pipe == nullptr || pipe->broken()) continue;
    // The socket between a worker and its host's store breaks only with one of them.
    const bool local = std::any_of(stores_.begin(), stores_.end(), [&](const Slot* store) {
      return store->process != nullptr && pipe->Has(*store->process);
    });
    if (!local) live.push_back(std::move(pipe));
  }
  if (live.empty()) return;
  ++world_->counts["broken streams"];
  live[world_->Below(live.size())]->Break();
}

void Cluster::SpoilHandoff(const Pipe& call) {
  Process* decode = call.at(0);
  Process* prefill = call.at(1);
  if (decode == nullptr || prefill == nullptr) return;
  ++world_->counts["spoiled handoffs"];
  decode->Pause(absl::Milliseconds(300 + world_->Below(2000)));
  // Behind what its step still sends.
  world_->At(absl::Milliseconds(20) * world_->Uniform(), [this, prefill, life = prefill->life()] {
    if (life.expired()) return;
    for (size_t i = 0; i < slots_.size(); ++i) {
      if (slots_[i]->process.get() == prefill) Kill(i, absl::Milliseconds(20));
    }
  });
}

void Cluster::Heal() {
  for (auto& slot : slots_) {
    StartSlot(*slot);
    slot->process->Resume();
  }
}

std::shared_ptr<Pipe> Cluster::Connect(Process& from, Process& to) {
  auto pipe = Pipe::Open(from, to);
  if (pipes_.size() >= 64) {
    std::erase_if(pipes_, [](const auto& weak) { return weak.expired(); });
    std::erase_if(half_closes_, [this](const auto& entry) {
      return std::none_of(pipes_.begin(), pipes_.end(),
                          [&](const auto& weak) { return weak.lock().get() == entry.first; });
    });
  }
  pipes_.push_back(pipe);
  return pipe;
}

void Cluster::HalfClosed(const Pipe* pipe) {
  auto it = half_closes_.find(pipe);
  if (it == half_closes_.end()) return;
  auto hear = std::move(it->second);
  half_closes_.erase(it);
  hear();
}

WorkerProcess* Cluster::WorkerAt(const std::string& address) {
  auto it = by_address_.find(address);
  return it == by_address_.end() ? nullptr
                                 : dynamic_cast<WorkerProcess*>(it->second->process.get());
}

StoreProcess* Cluster::StoreAt(const std::string& address) {
  auto it = by_address_.find(address);
  return it == by_address_.end() ? nullptr : dynamic_cast<StoreProcess*>(it->second->process.get());
}

StoreProcess* Cluster::StoreOf(uint32_t host) {
  return static_cast<StoreProcess*>(stores_[host]->process.get());
}

ConductorProcess* Cluster::conductor() {
  return static_cast<ConductorProcess*>(conductor_->process.get());
}

void Cluster::CheckInvariants() {
  for (const Slot* slot : stores_) {
    if (slot->process == nullptr) continue;
    const auto* core = static_cast<StoreProcess*>(slot->process.get())->node().core();
    if (core == nullptr) continue;
    if (absl::Status s = core->CheckInvariants(); !s.ok()) {
      world_->violations.push_back(absl::StrCat(slot->name, ": ", s.ToString()));
    }
  }
}

std::string Cluster::Leaks() const {
  std::string out;
  for (const auto& slot : slots_) {
    const Process* process = slot->process.get();
    if (const auto* store = dynamic_cast<const StoreProcess*>(process)) {
      const auto* core = store->node().core();
      if (core == nullptr) continue;
      const kvstore::CoreStats stats = core->stats();
      if (stats.pins != 0 || stats.reserved != 0 || stats.retired != 0) {
        absl::StrAppend(&out, slot->name, " holds ", stats.pins, " pins, ", stats.reserved,
                        " reserved and ", stats.retired, " retired slots; ");
      }
      if (store->node().fetch_count() != 0) {
        absl::StrAppend(&out, slot->name, " has ", store->node().fetch_count(), " fetches; ");
      }
    } else if (const auto* worker = dynamic_cast<const WorkerProcess*>(process)) {
      absl::StrAppend(&out, worker->Leaks());
    } else if (const auto* conductor = dynamic_cast<const ConductorProcess*>(process)) {
      const conductor::Summary summary = conductor->core().Summarise();
      if (summary.prefill_ready != static_cast<int>(shape_.prefill_hosts.size()) ||
          summary.decode_ready != static_cast<int>(shape_.decode_hosts.size())) {
        absl::StrAppend(&out, "the conductor sees ", summary.prefill_ready, " prefill and ",
                        summary.decode_ready, " decode workers; ");
      }
    }
  }
  return out;
}

}  // namespace antiphon::sim
