#include "conductor/view.h"

#include <algorithm>

namespace antiphon::conductor {

std::string_view NameOf(NodeState state) {
  switch (state) {
    case NodeState::kReady:
      return "ready";
    case NodeState::kDraining:
      return "draining";
    case NodeState::kLost:
      return "lost";
  }
  return "lost";
}

std::string_view NameOf(WorkerRole role) {
  return role == WorkerRole::kPrefill ? "prefill" : "decode";
}

bool Worker::Reported(const PlannedDecode& decode) const {
  return decode.started ? decode.starts_at + kReportLag <= reported_at
                        : decode.starts_at + kStartSlack <= reported_at;
}

void Worker::Refresh() {
  std::erase_if(prefills, [this](const PlannedPrefill& p) {
    return p.placed_at + kReportLag <= reported_at;
  });
  // A worker that does not predict its queue has at least its tokens to compute.
  const double reported_s = queue_s > 0 ? queue_s : cost.prefill_per_token * waiting_tokens;
  free_at = reported_at + absl::Seconds(reported_s);  // infinite past plus anything stays
  for (const PlannedPrefill& p : prefills) {
    free_at = std::max(free_at, p.placed_at) + absl::Seconds(p.seconds);
  }
  rows_bound = running;
  context_bound = context_tokens;
  for (const PlannedDecode& d : decodes) {
    if (Reported(d)) continue;
    ++rows_bound;
    context_bound += d.context_tokens;
  }
}

void Store::Plan(const RequestId& id, uint32_t slots, absl::Time shows_at) {
  planned.push_back({id, shows_at, slots});
  planned_slots += slots;
}

void Store::Unplan(const RequestId& id) {
  std::erase_if(planned, [&](const PlannedSlots& p) {
    if (p.id != id) return false;
    planned_slots -= p.slots;
    return true;
  });
}

void Store::Settle(absl::Time now) {
  std::erase_if(planned, [&](const PlannedSlots& p) {
    if (p.shows_at > now) return false;
    planned_slots -= p.slots;
    return true;
  });
}

Worker* View::FindWorker(const NodeId& id) {
  auto it = std::lower_bound(workers.begin(), workers.end(), id,
                             [](const Worker& w, const NodeId& key) { return w.id < key; });
  return it != workers.end() && it->id == id ? &*it : nullptr;
}

}  // namespace antiphon::conductor
