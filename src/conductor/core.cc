#include "conductor/core.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>

#include "common/logging.h"
#include "common/status_macros.h"
#include "conductor/core_node.h"

namespace antiphon::conductor {

Core::Core(CoreOptions options)
    : options_(std::move(options)),
      view_(options_.indexed_blocks_max, options_.seed),
      blobs_(options_.blob_bytes_max) {}

Core::~Core() = default;

absl::Status Core::OnReport(SessionId session, const wire::NodeReport& report, absl::Time now,
                            Actions& actions) {
  if (report.has_hello()) return OnHello(session, report.hello(), now, actions);
  auto known = sessions_.find(session);
  if (known == sessions_.end()) {
    return absl::InvalidArgumentError("the first message must be hello");
  }
  Node& node = *nodes_.at(known->second);
  if (node.session != session) {
    return absl::AbortedError(
        fmt::format("a newer stream of {} has replaced this one", node.id.value()));
  }
  const auto only = [&](wire::NodeKind kind, std::string_view what) {
    if (node.kind == kind) return absl::OkStatus();
    return absl::InvalidArgumentError(
        fmt::format("{} sent {}, which is not of its kind", node.id.value(), what));
  };
  switch (report.report_case()) {
    case wire::NodeReport::kLoad:
      RETURN_IF_ERROR(only(wire::NODE_KIND_WORKER, "load"));
      RETURN_IF_ERROR(CheckLoad(report.load()));
      OnLoad(node, report.load(), now);
      break;
    case wire::NodeReport::kEvents:
      RETURN_IF_ERROR(only(wire::NODE_KIND_STORE, "events"));
      RETURN_IF_ERROR(CheckEvents(report.events()));
      OnEvents(node, report.events(), now, actions);
      break;
    case wire::NodeReport::kStoreLoad:
      RETURN_IF_ERROR(only(wire::NODE_KIND_STORE, "store_load"));
      OnStoreLoad(node, report.store_load(), now);
      break;
    case wire::NodeReport::kDraining:
      node.draining = true;
      break;
    case wire::NodeReport::kBlob:
      RETURN_IF_ERROR(only(wire::NODE_KIND_WORKER, "blob"));
      RETURN_IF_ERROR(OnBlob(node, report.blob(), actions));
      break;
    default:
      break;  // a sign of life, or a newer node's, which the negotiated version lets us ignore
  }
  node.reported_at = now;
  const bool healed = std::exchange(node.silent, false);
  if (healed || report.has_draining()) {
    SetState(node);
    Settle(actions);
  }
  return absl::OkStatus();
}

absl::Status Core::OnHello(SessionId session, const wire::NodeHello& hello, absl::Time now,
                           Actions& actions) {
  if (sessions_.contains(session)) {
    return absl::InvalidArgumentError("a second hello on one stream");
  }
  RETURN_IF_ERROR(Negotiate(options_.self, hello.hello()).status());
  RETURN_IF_ERROR(CheckHello(hello));
  if (hello.kind() == wire::NODE_KIND_WORKER) RETURN_IF_ERROR(CheckClass(hello, actions));
  const NodeId id(hello.hello().node());
  bool same_incarnation = false;
  if (auto it = nodes_.find(id); it != nodes_.end()) {
    const Node& old = *it->second;
    same_incarnation = old.incarnation == hello.hello().incarnation() && old.kind == hello.kind();
    if (old.session != 0) {
      actions.closes.push_back(
          {old.session,
           absl::AbortedError(fmt::format("{} registered again from {}; are two nodes of one name?",
                                          id.value(), hello.rpc_address()))});
    }
    if (old.kind != hello.kind()) Remove(id);
  } else if (nodes_.size() >= options_.nodes_max) {
    return absl::ResourceExhaustedError(
        fmt::format("{} nodes are registered; that is the most", options_.nodes_max));
  }
  std::unique_ptr<Node>& place = nodes_[id];
  if (place == nullptr) place = std::make_unique<Node>();
  Node& node = *place;
  node.id = id;
  node.kind = hello.kind();
  node.incarnation = hello.hello().incarnation();
  node.session = session;
  node.rpc_address = hello.rpc_address();
  node.ops_address = hello.ops_address();
  node.version = hello.hello().version();
  node.draining = false;
  node.silent = false;
  node.reported_at = now;
  node.lost_at = absl::InfiniteFuture();
  sessions_[session] = id;
  actions.directives.push_back({session, Actions::Kind::kAccepted, {}});
  if (node.kind == wire::NODE_KIND_WORKER) {
    RegisterWorker(node, hello, same_incarnation);
    AskBlobs(session, actions);
  } else if (node.kind == wire::NODE_KIND_STORE) {
    node.synced = false;
    node.snapshot_asked_at = now;  // an accepted store sends one unasked
    RegisterStore(node, hello, same_incarnation);
  }
  SetState(node);
  Settle(actions);
  return absl::OkStatus();
}

absl::Status Core::CheckClass(const wire::NodeHello& hello, Actions& actions) {
  if (model_ != nullptr) {
    std::string difference = DescribeDifference(model_->fingerprint, hello.fingerprint());
    const auto compare = [&difference](const char* name, const auto& a, const auto& b) {
      if (a == b) return;
      difference += fmt::format("{}{} {} != {}", difference.empty() ? "" : "; ", name, a, b);
    };
    compare("card.name", model_->card.name(), hello.card().name());
    compare("card.tokenizer_digest", model_->card.tokenizer_digest(),
            hello.card().tokenizer_digest());
    compare("card.chat_template_digest", model_->card.chat_template_digest(),
            hello.card().chat_template_digest());
    compare("card.block_tokens", model_->card.block_tokens(), hello.card().block_tokens());
    if (difference.empty()) return absl::OkStatus();
    const bool alone = std::none_of(nodes_.begin(), nodes_.end(), [&](const auto& entry) {
      return entry.first.value() != hello.hello().node() &&
             entry.second->kind == wire::NODE_KIND_WORKER &&
             entry.second->state != NodeState::kLost;
    });
    if (!alone) {
      return absl::FailedPreconditionError(
          fmt::format("{} serves something else than the workers that are registered: {}",
                      hello.hello().node(), difference));
    }
    LogInfo("the cluster now serves {} ({}); before: {}", hello.card().name(), difference,
            model_->card.name());
    // Whoever is lost and comes back with the old model is refused then.
    std::vector<NodeId> old;
    for (const auto& [id, node] : nodes_) {
      if (node->kind != wire::NODE_KIND_WORKER || id.value() == hello.hello().node()) continue;
      if (node->session != 0) {
        actions.closes.push_back(
            {node->session, absl::FailedPreconditionError(fmt::format(
                                "the cluster serves something else by now: {}", difference))});
      }
      old.push_back(id);
    }
    for (const NodeId& id : old) Remove(id);
  }
  model_ = std::make_unique<ModelClass>();
  model_->card = hello.card();
  model_->fingerprint = hello.fingerprint();
  view_.model_names.assign(1, hello.card().name());
  view_.model_names.insert(view_.model_names.end(), hello.card().aliases().begin(),
                           hello.card().aliases().end());
  view_.fingerprint = IdOf(hello.fingerprint());
  view_.block_tokens = hello.card().block_tokens();
  view_.context_length = hello.card().context_length();
  actions.models_changed = true;
  return absl::OkStatus();
}

void Core::RegisterWorker(Node& node, const wire::NodeHello& hello, bool same_incarnation) {
  Worker* worker = view_.FindWorker(node.id);
  if (worker == nullptr) {
    auto at = std::lower_bound(view_.workers.begin(), view_.workers.end(), node.id,
                               [](const Worker& w, const NodeId& id) { return w.id < id; });
    worker = &*view_.workers.insert(at, Worker());
  } else if (!same_incarnation) {
    *worker = Worker();
  }
  worker->id = node.id;
  worker->role = hello.role() == wire::ROLE_PREFILL ? WorkerRole::kPrefill : WorkerRole::kDecode;
  worker->rpc_address = hello.rpc_address();
  worker->store_incarnation = hello.store_incarnation();
  worker->store = -1;
  worker->store_lost = false;
  worker->max_sequences = hello.max_sequences();
  worker->cost = *CostFromProto(hello.cost());  // checked by CheckHello
  worker->Refresh();
}

void Core::RegisterStore(Node& node, const wire::NodeHello& hello, bool same_incarnation) {
  if (node.store >= 0 && !same_incarnation) {
    ForgetBlocks(node);
    view_.stores[node.store] = Store();
  }
  if (node.store < 0) {
    auto free = std::find_if(view_.stores.begin(), view_.stores.end(),
                             [](const Store& s) { return s.id.empty(); });
    if (free == view_.stores.end()) free = view_.stores.insert(free, Store());
    node.store = static_cast<int>(free - view_.stores.begin());
  }
  Store& store = view_.stores[node.store];
  store.id = node.id;
  store.incarnation = node.incarnation;
  store.rpc_address = hello.rpc_address();
  store.data_address = hello.data_address();
  store.slot_count = hello.slot_count();
}

void Core::ForgetBlocks(Node& node) {
  Store& store = view_.stores[node.store];
  if (store.holder != PrefixIndex::kNoHolder) {
    view_.store_of_holder[store.holder] = -1;
    view_.index.RemoveHolder(store.holder);
    store.holder = PrefixIndex::kNoHolder;
  }
  node.synced = false;
}

void Core::OnSessionEnd(SessionId session, absl::Time now, Actions& actions) {
  auto known = sessions_.find(session);
  if (known == sessions_.end()) return;
  const NodeId id = known->second;
  sessions_.erase(known);
  auto it = nodes_.find(id);
  if (it == nodes_.end() || it->second->session != session) return;
  Node& node = *it->second;
  node.session = 0;
  node.lost_at = now;
  if (node.kind == wire::NODE_KIND_STORE) ForgetBlocks(node);
  if (node.kind == wire::NODE_KIND_GATEWAY) {
    Remove(id);
    return;
  }
  SetState(node);
  Settle(actions);
}

void Core::SetState(Node& node) {
  const NodeState before = node.state;
  node.state = node.session == 0 || node.silent ? NodeState::kLost
               : node.draining                  ? NodeState::kDraining
                                                : NodeState::kReady;
  if (before != node.state) {
    LogInfo("{} is {}{}", node.id.value(), NameOf(node.state),
            node.state == NodeState::kLost
                ? (node.silent ? ": it stopped reporting" : ": its stream ended")
                : "");
  }
  if (Worker* worker = view_.FindWorker(node.id)) worker->state = node.state;
  if (node.store >= 0) view_.stores[node.store].state = node.state;
}

void Core::Remove(const NodeId& id) {
  auto it = nodes_.find(id);
  if (it == nodes_.end()) return;
  if (it->second->store >= 0) {
    ForgetBlocks(*it->second);
    view_.stores[it->second->store] = Store();
  }
  std::erase_if(view_.workers, [&id](const Worker& w) { return w.id == id; });
  sessions_.erase(it->second->session);
  nodes_.erase(it);
}

void Core::Settle(Actions& actions) {
  std::map<uint64_t, int> places;
  for (size_t s = 0; s < view_.stores.size(); ++s) {
    if (!view_.stores[s].id.empty()) {
      places[view_.stores[s].incarnation] = static_cast<int>(s);
    }
  }
  int prefill = 0, decode = 0;
  for (Worker& worker : view_.workers) {
    if (auto it = places.find(worker.store_incarnation); it != places.end()) {
      worker.store = it->second;
      worker.store_lost = false;
    } else if (worker.store >= 0) {
      // It was here and is gone; the worker registers anew when it has attached to the next one.
      worker.store = -1;
      worker.store_lost = true;
    }
    const bool ready = worker.state == NodeState::kReady && !worker.store_lost &&
                       (worker.store < 0 || view_.stores[worker.store].state == NodeState::kReady);
    if (ready) ++(worker.role == WorkerRole::kPrefill ? prefill : decode);
  }
  if (prefill != prefill_ready_ || decode != decode_ready_) actions.models_changed = true;
  prefill_ready_ = prefill;
  decode_ready_ = decode;
}

// Gateways have nothing to report; their stream's end says it all.
absl::Time Core::SilentAt(const Node& node) const {
  if (node.kind == wire::NODE_KIND_GATEWAY || node.session == 0 || node.silent) {
    return absl::InfiniteFuture();
  }
  return node.reported_at + options_.node_timeout;
}

absl::Time Core::GoneAt(const Node& node) const {
  if (node.kind == wire::NODE_KIND_GATEWAY || node.session != 0) return absl::InfiniteFuture();
  return node.lost_at + options_.lost_kept;
}

absl::Time Core::next_tick() const {
  absl::Time next = expiries_.empty() ? absl::InfiniteFuture() : expiries_.begin()->first;
  for (const auto& [id, node] : nodes_) next = std::min({next, SilentAt(*node), GoneAt(*node)});
  return next;
}

void Core::Tick(absl::Time now, Actions& actions) {
  bool changed = false;
  std::vector<NodeId> gone;
  for (const auto& [id, node] : nodes_) {
    if (SilentAt(*node) <= now) {
      node->silent = true;
      SetState(*node);
      changed = true;
    }
    if (GoneAt(*node) <= now) gone.push_back(id);
  }
  for (const NodeId& id : gone) Remove(id);
  if (changed || !gone.empty()) Settle(actions);
  while (!expiries_.empty() && expiries_.begin()->first <= now) {
    EndFlight(expiries_.begin()->second);
  }
}

}  // namespace antiphon::conductor
