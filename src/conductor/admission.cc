// Core: requests and what became of them.
#include <spdlog/fmt/fmt.h>

#include <algorithm>

#include "conductor/core.h"
#include "conductor/core_node.h"

namespace antiphon::conductor {
namespace {

constexpr size_t kDecisionsKept = 1'000;
// A gateway may report this long after its request's deadline.
constexpr absl::Duration kFinishSlack = absl::Seconds(5);
// Weight of the newest answer in the mean duration of answers.
constexpr double kDurationWeight = 0.05;

}  // namespace

absl::StatusOr<Decision> Core::Admit(const Request& request, absl::Time now) {
  if (auto it = flights_.find(request.id); it != flights_.end()) {
    if (it->second.epoch > request.epoch) {
      return absl::AbortedError(fmt::format("epoch {} of {} is over; {} was placed since",
                                            request.epoch, request.id.Hex(), it->second.epoch));
    }
    EndFlight(request.id);
  }
  Decision decision = Decide(request, view_, options_.policy, now);
  if (decision.placed()) {
    ++admitted_;
    Commit(request, decision, now);
  } else {
    ++rejected_;
  }
  if (decisions_.size() == kDecisionsKept) decisions_.pop_front();
  decisions_.push_back(decision);
  return decision;
}

void Core::Commit(const Request& request, const Decision& decision, absl::Time now) {
  const PrefillOption& p = decision.prefills.front();
  const DecodeOption& d = decision.decodes.front();
  Worker& prefill = *view_.FindWorker(p.node);
  Worker& decode = *view_.FindWorker(d.node);
  const absl::Time prefill_starts = now + absl::Seconds(p.queue_s);
  prefill.prefills.push_back({request.id, now, p.transfer_s + p.prefill_s});
  decode.decodes.push_back({.id = request.id,
                            .starts_at = now + absl::Seconds(decision.predicted_ttft_s),
                            .context_tokens = static_cast<double>(request.tokens())});
  if (prefill.store >= 0) {
    view_.stores[prefill.store].Plan(request.id, decision.prefill_slots,
                                     prefill_starts + kReportLag);
  }
  if (decode.store >= 0) {
    view_.stores[decode.store].Plan(request.id, decision.decode_slots, now + kReportLag);
  }
  if (decision.source_store >= 0) {
    Store& source = view_.stores[decision.source_store];
    // transfer_s includes the wait for what the source sends already.
    source.egress_free_at = std::max(source.egress_free_at, now + absl::Seconds(p.transfer_s));
  }
  prefill.Refresh();
  decode.Refresh();

  if (flights_.size() >= options_.flights_max) EndFlight(expiries_.begin()->second);
  Flight flight;
  flight.epoch = request.epoch;
  flight.prefill = p.node;
  flight.decode = d.node;
  flight.placed_at = now;
  flight.expires_at =
      now + (request.deadline < options_.flight_kept ? request.deadline + kFinishSlack
                                                     : options_.flight_kept);
  flight.predicted_ttft_s = decision.predicted_ttft_s;
  flight.predicted_tbt_s = decision.predicted_tbt_s;
  flight.tokens = request.tokens();
  expiries_.emplace(flight.expires_at, request.id);
  flights_[request.id] = std::move(flight);
}

void Core::Unplan(const RequestId& id, const Flight& flight) {
  if (Worker* worker = view_.FindWorker(flight.prefill)) {
    std::erase_if(worker->prefills, [&id](const PlannedPrefill& p) { return p.id == id; });
    worker->Refresh();
    if (worker->store >= 0) view_.stores[worker->store].Unplan(id);
  }
  if (Worker* worker = view_.FindWorker(flight.decode)) {
    for (const PlannedDecode& d : worker->decodes) {
      if (d.id != id || !d.started || !worker->Reported(d)) continue;
      // Until the next report, do not count what has just ended.
      const double mean = worker->running > 0 ? worker->context_tokens / worker->running : 0;
      if (worker->running > 0) --worker->running;
      worker->context_tokens = std::max(0.0, worker->context_tokens - mean);
    }
    std::erase_if(worker->decodes, [&id](const PlannedDecode& d) { return d.id == id; });
    worker->Refresh();
    if (worker->store >= 0) view_.stores[worker->store].Unplan(id);
  }
}

void Core::EndFlight(const RequestId& id) {
  auto it = flights_.find(id);
  if (it == flights_.end()) return;
  Unplan(id, it->second);
  expiries_.erase({it->second.expires_at, id});
  flights_.erase(it);
}

FinishOutcome Core::OnFinish(const Finish& finish, absl::Time now) {
  FinishOutcome outcome;
  auto it = flights_.find(finish.id);
  if (it == flights_.end() || it->second.epoch != finish.epoch) return outcome;
  Flight& flight = it->second;
  outcome.known = true;
  outcome.predicted_ttft_s = flight.predicted_ttft_s;
  outcome.predicted_tbt_s = flight.predicted_tbt_s;
  if (finish.first_token_seen && !flight.started) {
    outcome.first_token = true;
    flight.started = true;
    flight.started_at = now;
    flight.ttft_s = finish.ttft_s;
    if (Worker* worker = view_.FindWorker(flight.prefill)) {
      std::erase_if(worker->prefills, [&](const PlannedPrefill& p) { return p.id == finish.id; });
      worker->Refresh();
    }
    if (Worker* worker = view_.FindWorker(flight.decode)) {
      for (PlannedDecode& d : worker->decodes) {
        if (d.id != finish.id) continue;
        d.started = true;
        d.starts_at = now;
      }
      worker->Refresh();
    }
  }
  if (!finish.finished) return outcome;
  outcome.finished = true;
  if (flight.started) {
    const double ttft = finish.ttft_s > 0 ? finish.ttft_s : flight.ttft_s;
    if (options_.policy.slo_ttft != absl::InfiniteDuration()) {
      outcome.ttft_met = absl::Seconds(ttft) <= options_.policy.slo_ttft;
    }
    if (options_.policy.slo_tbt != absl::InfiniteDuration() && finish.tbt_s > 0) {
      outcome.tbt_met = absl::Seconds(finish.tbt_s) <= options_.policy.slo_tbt;
    }
    const double lasted = absl::ToDoubleSeconds(now - flight.started_at);
    view_.decode_seconds =
        view_.decode_seconds == 0
            ? lasted
            : view_.decode_seconds + kDurationWeight * (lasted - view_.decode_seconds);
  }
  EndFlight(finish.id);
  return outcome;
}

}  // namespace antiphon::conductor
