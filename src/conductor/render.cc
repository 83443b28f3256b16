// Core: answers as messages.
#include <algorithm>

#include "antiphon/v1/worker.pb.h"
#include "conductor/core.h"
#include "conductor/core_node.h"

namespace antiphon::conductor {

void Core::FillPlacement(const Decision& decision, wire::Placement& placement) const {
  const PrefillOption& p = decision.prefills.front();
  const Worker* prefill = view_.FindWorker(p.node);
  const Worker* decode = view_.FindWorker(decision.decodes.front().node);
  placement.set_prefill_node(prefill->id.value());
  placement.set_prefill_address(prefill->rpc_address);
  placement.set_prefill_store_incarnation(prefill->store_incarnation);
  placement.set_decode_node(decode->id.value());
  placement.set_decode_address(decode->rpc_address);
  placement.set_predicted_ttft_s(decision.predicted_ttft_s);
  placement.set_predicted_tbt_s(decision.predicted_tbt_s);
  if (decision.source_store < 0) return;
  const Store& store = view_.stores[decision.source_store];
  wire::BlockSource& source = *placement.add_sources();
  source.set_store_node(store.id.value());
  source.set_rpc_address(store.rpc_address);
  source.set_data_address(store.data_address);
  source.set_incarnation(store.incarnation);
  source.set_blocks(p.used_blocks);
}

void Core::FillRejected(const Decision& decision, wire::Rejected& rejected) {
  rejected.set_reason(static_cast<wire::Rejected::Reason>(decision.verdict));
  rejected.set_retry_after_s(decision.retry_after_s);
  rejected.set_message(decision.message);
  rejected.set_predicted_ttft_s(decision.predicted_ttft_s);
  rejected.set_predicted_tbt_s(decision.predicted_tbt_s);
  rejected.set_queue_depth(decision.queue_depth);
  rejected.set_retry_is_useless(decision.retry_is_useless);
}

void Core::FillModels(wire::ModelSet& models) const {
  if (model_ != nullptr) *models.add_cards() = model_->card;
  models.set_prefill_ready(static_cast<uint32_t>(prefill_ready_));
  models.set_decode_ready(static_cast<uint32_t>(decode_ready_));
}

void Core::FillView(wire::ClusterView& view) const {
  for (const auto& [id, node] : nodes_) {
    wire::NodeView& out = *view.add_nodes();
    out.set_node(id.value());
    out.set_kind(node->kind);
    out.set_rpc_address(node->rpc_address);
    out.set_ops_address(node->ops_address);
    out.set_state(std::string(NameOf(node->state)));
    out.set_incarnation(node->incarnation);
    out.set_version(node->version);
    if (const Worker* worker = view_.FindWorker(id)) {
      out.set_role(worker->role == WorkerRole::kPrefill ? wire::ROLE_PREFILL : wire::ROLE_DECODE);
      out.set_store_incarnation(worker->store_incarnation);
      if (model_ != nullptr) out.set_model(model_->card.name());
      wire::WorkerLoad& load = *out.mutable_load();
      load.set_running(worker->running);
      load.set_context_tokens(static_cast<uint64_t>(worker->context_tokens));
      load.set_waiting(worker->waiting);
      load.set_waiting_tokens(static_cast<uint64_t>(worker->waiting_tokens));
      load.set_queue_s(worker->queue_s);
    }
    if (node->store >= 0) {
      const Store& store = view_.stores[node->store];
      out.set_store_incarnation(store.incarnation);
      wire::StoreLoad& load = *out.mutable_store_load();
      load.set_slots_free(store.slots_free);
      load.set_slots_pinned(store.slots_pinned);
      load.set_slots_cached(store.slots_cached);
    }
  }
  view.set_indexed_blocks(view_.index.blocks());
  view.set_admitted(admitted_);
  view.set_rejected(rejected_);
}

Summary Core::Summarise() const {
  Summary summary;
  for (const auto& [id, node] : nodes_) {
    if (node->kind == wire::NODE_KIND_WORKER) ++summary.workers[static_cast<int>(node->state)];
    if (node->kind == wire::NODE_KIND_GATEWAY) ++summary.gateways;
    if (node->kind == wire::NODE_KIND_STORE && node->state == NodeState::kReady) {
      ++summary.stores_ready;
    }
  }
  summary.prefill_ready = prefill_ready_;
  summary.decode_ready = decode_ready_;
  for (const Worker& worker : view_.workers) {
    if (worker.state == NodeState::kLost) continue;
    if (worker.role == WorkerRole::kPrefill) {
      summary.prefill_queue += worker.queue_depth();
    } else {
      summary.decode_rows += worker.rows_bound;
    }
  }
  summary.flights = flights_.size();
  return summary;
}

}  // namespace antiphon::conductor
