#include "conductor/instruments.h"

#include <cmath>

namespace antiphon::conductor {
namespace {

std::vector<double> RatioBuckets() { return {0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1}; }

std::vector<double> RouteBuckets() {
  return {5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 1e-1};
}

}  // namespace

Instruments::Instruments(Registry& registry) {
  constexpr char kDecisions[] = "antiphon_admission_decisions_total";
  constexpr char kDecisionsHelp[] = "Requests that were placed or rejected, by reason.";
  for (int v = 0; v < kVerdicts; ++v) {
    const auto verdict = static_cast<Verdict>(v);
    const bool placed = verdict == Verdict::kPlaced;
    decisions_[v] =
        &registry.AddCounter(kDecisions, kDecisionsHelp,
                             {{"decision", placed ? "admit" : "reject"},
                              {"reason", placed ? "within_slo" : std::string(NameOf(verdict))}});
  }
  best_effort_ = &registry.AddCounter(kDecisions, kDecisionsHelp,
                                      {{"decision", "admit"}, {"reason", "best_effort"}});
  predicted_ttft_ =
      &registry.AddHistogram("antiphon_predicted_ttft_seconds",
                             "Time to first token predicted at placement.", TtftBuckets());
  predicted_tbt_ =
      &registry.AddHistogram("antiphon_predicted_tbt_seconds",
                             "Time between tokens predicted at placement.", TbtBuckets());
  match_ratio_ = &registry.AddHistogram(
      "antiphon_prefix_match_ratio",
      "Part of a placed request's full blocks that its prefill worker need not compute.",
      RatioBuckets());
  route_ = &registry.AddHistogram("antiphon_route_duration_seconds",
                                  "Time to decide where a request runs.", RouteBuckets());
  constexpr const char* kSides[] = {"under", "over"};
  constexpr const char* kMet[] = {"false", "true"};
  for (int i = 0; i < 2; ++i) {
    constexpr char kError[] = "antiphon_prediction_error_seconds";
    constexpr char kErrorHelp[] = "By how much a prediction was wrong; under: reality took longer.";
    ttft_error_[i] = &registry.AddHistogram(kError, kErrorHelp, TtftBuckets(),
                                            {{"kind", "ttft"}, {"side", kSides[i]}});
    tbt_error_[i] = &registry.AddHistogram(kError, kErrorHelp, TtftBuckets(),
                                           {{"kind", "tbt"}, {"side", kSides[i]}});
    constexpr char kSlo[] = "antiphon_slo_attainment_total";
    constexpr char kSloHelp[] = "Finished requests that met or missed an SLO that is set.";
    ttft_slo_[i] = &registry.AddCounter(kSlo, kSloHelp, {{"slo", "ttft"}, {"met", kMet[i]}});
    tbt_slo_[i] = &registry.AddCounter(kSlo, kSloHelp, {{"slo", "tbt"}, {"met", kMet[i]}});
  }
  for (int s = 0; s < 3; ++s) {
    workers_[s] = &registry.AddGauge("antiphon_worker_state", "Workers by state.",
                                     {{"state", std::string(NameOf(static_cast<NodeState>(s)))}});
  }
  constexpr char kQueue[] = "antiphon_queue_depth";
  constexpr char kQueueHelp[] = "Requests in prefill queues; sequences at decode workers.";
  prefill_queue_ = &registry.AddGauge(kQueue, kQueueHelp, {{"role", "prefill"}});
  decode_queue_ = &registry.AddGauge(kQueue, kQueueHelp, {{"role", "decode"}});
  stores_ = &registry.AddGauge("antiphon_stores_ready", "Stores that report.");
  indexed_ = &registry.AddGauge("antiphon_indexed_blocks", "Blocks in the prefix index.");
  inflight_ = &registry.AddGauge("antiphon_placed_requests",
                                 "Placed requests whose end was not reported yet.");
}

void Instruments::OnDecision(const Decision& decision, absl::Duration took) {
  route_->Observe(absl::ToDoubleSeconds(took));
  (decision.best_effort && decision.placed() ? best_effort_
                                             : decisions_[static_cast<int>(decision.verdict)])
      ->Add();
  if (!decision.placed()) return;
  predicted_ttft_->Observe(decision.predicted_ttft_s);
  predicted_tbt_->Observe(decision.predicted_tbt_s);
  if (decision.blocks > 0) {
    match_ratio_->Observe(static_cast<double>(decision.prefills.front().used_blocks) /
                          decision.blocks);
  }
}

void Instruments::OnFinish(const Finish& finish, const FinishOutcome& outcome) {
  if (!outcome.known) return;
  if (outcome.first_token && finish.ttft_s > 0) {
    const double over = outcome.predicted_ttft_s - finish.ttft_s;
    ttft_error_[over >= 0]->Observe(std::abs(over));
  }
  if (!outcome.finished) return;
  if (finish.tbt_s > 0) {
    const double over = outcome.predicted_tbt_s - finish.tbt_s;
    tbt_error_[over >= 0]->Observe(std::abs(over));
  }
  if (outcome.ttft_met) ttft_slo_[*outcome.ttft_met]->Add();
  if (outcome.tbt_met) tbt_slo_[*outcome.tbt_met]->Add();
}

void Instruments::OnSummary(const Summary& summary, size_t indexed_blocks) {
  for (int s = 0; s < 3; ++s) workers_[s]->Set(summary.workers[s]);
  prefill_queue_->Set(static_cast<double>(summary.prefill_queue));
  decode_queue_->Set(static_cast<double>(summary.decode_rows));
  stores_->Set(summary.stores_ready);
  indexed_->Set(static_cast<double>(indexed_blocks));
  inflight_->Set(static_cast<double>(summary.flights));
}

}  // namespace antiphon::conductor
