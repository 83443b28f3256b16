#include "worker/metrics.h"

namespace antiphon::worker {
namespace {

const Labels kPrefill = {{"stage", "prefill"}};
const Labels kDecode = {{"stage", "decode"}};

constexpr char kRunning[] = "antiphon_requests_running";
constexpr char kRunningHelp[] = "Sequences that this worker holds and computes or serves.";
constexpr char kWaiting[] = "antiphon_requests_waiting";
constexpr char kWaitingHelp[] = "Sequences that wait, by what for.";
constexpr char kSteps[] = "antiphon_engine_steps_total";
constexpr char kStepsHelp[] = "Steps of the engine, by what they held.";
constexpr char kStepSeconds[] = "antiphon_engine_step_seconds";
constexpr char kStepSecondsHelp[] = "Duration of a step.";
constexpr char kRefused[] = "antiphon_worker_refusals_total";
constexpr char kRefusedHelp[] = "Requests that this worker refused.";
constexpr char kPrefilled[] = "antiphon_prefill_tokens_total";
constexpr char kPrefilledHelp[] =
    "Tokens prefilled by this worker, by where their KV came from; repeats after failures "
    "included.";

}  // namespace

WorkerMetrics::WorkerMetrics(Registry& r, bool prefill_role)
    : attached_(r.AddGauge("antiphon_worker_store_attached",
                           "1 while this worker is attached to the KV store of its host.")),
      running_(r.AddGauge(kRunning, kRunningHelp, kDecode)),
      waiting_prefill_(
          r.AddGauge(kWaiting, kWaitingHelp, {{"stage", "prefill"}, {"reason", "compute"}})),
      waiting_transfer_(
          r.AddGauge(kWaiting, kWaitingHelp, {{"stage", "decode"}, {"reason", "prefill"}})),
      serving_(r.AddGauge(kRunning, kRunningHelp, kPrefill)),
      slots_held_(r.AddGauge("antiphon_kv_blocks",
                             "KV blocks of this host's pool, by state, as this worker sees them.",
                             {{"state", "held"}})),
      slots_total_(r.AddGauge("antiphon_kv_blocks",
                              "KV blocks of this host's pool, by state, as this worker sees them.",
                              {{"state", "total"}})),
      waiting_tokens_(r.AddGauge("antiphon_prefill_waiting_tokens",
                                 "Prompt tokens that are not computed yet.")),
      context_tokens_(
          r.AddGauge("antiphon_decode_context_tokens", "Tokens of all running sequences.")),
      steps_prefill_(r.AddCounter(kSteps, kStepsHelp, {{"kind", "prefill"}})),
      steps_decode_(r.AddCounter(kSteps, kStepsHelp, {{"kind", "decode"}})),
      steps_mixed_(r.AddCounter(kSteps, kStepsHelp, {{"kind", "mixed"}})),
      step_seconds_prefill_(r.AddHistogram(kStepSeconds, kStepSecondsHelp, TbtBuckets(), kPrefill)),
      step_seconds_decode_(r.AddHistogram(kStepSeconds, kStepSecondsHelp, TbtBuckets(), kDecode)),
      batch_tokens_(
          r.AddHistogram("antiphon_batch_tokens", "Tokens of a step.", TokenCountBuckets())),
      last_step_(r.AddGauge("antiphon_engine_last_step_timestamp_seconds",
                            "When the last step ended; 0 before the first.")),
      preemptions_(r.AddCounter("antiphon_preemptions_total",
                                "Sequences that gave their slots up and were placed again.")),
      recomputed_(r.AddCounter("antiphon_recomputed_tokens_total",
                               "Tokens computed again for a later placement of their request.",
                               {{"reason", "placed_again"}})),
      prefilled_computed_(r.AddCounter(kPrefilled, kPrefilledHelp, {{"source", "computed"}})),
      prefilled_dram_(r.AddCounter(kPrefilled, kPrefilledHelp, {{"source", "dram"}})),
      prefilled_remote_(r.AddCounter(kPrefilled, kPrefilledHelp, {{"source", "remote"}})),
      output_tokens_(r.AddCounter("antiphon_decode_tokens_total",
                                  "Tokens that this worker sent to gateways.")),
      refused_prefill_(r.AddCounter(kRefused, kRefusedHelp, kPrefill)),
      refused_decode_(r.AddCounter(kRefused, kRefusedHelp, kDecode)),
      fetch_failures_(
          r.AddCounter("antiphon_kv_fetch_failures_total",
                       "KV handed over between hosts that failed or was not verified.")),
      store_losses_(r.AddCounter("antiphon_store_losses_total",
                                 "Times that this worker lost its KV store.")) {
  constexpr char kRole[] = "antiphon_worker_role";
  constexpr char kRoleHelp[] = "1 for the role that this worker has now.";
  r.AddGauge(kRole, kRoleHelp, {{"role", "prefill"}}).Set(prefill_role ? 1 : 0);
  r.AddGauge(kRole, kRoleHelp, {{"role", "decode"}}).Set(prefill_role ? 0 : 1);
}

void WorkerMetrics::OnStep(const StepSize& size, absl::Duration took, absl::Time wall) {
  const double seconds = absl::ToDoubleSeconds(took);
  if (size.rows > 0 && size.prefill_tokens > 0) {
    steps_mixed_.Add();
  } else {
    (size.rows > 0 ? steps_decode_ : steps_prefill_).Add();
  }
  (size.prefill_tokens > 0 ? step_seconds_prefill_ : step_seconds_decode_).Observe(seconds);
  batch_tokens_.Observe(size.rows + size.prefill_tokens);
  last_step_.Set(absl::ToDoubleSeconds(wall - absl::UnixEpoch()));
}

void WorkerMetrics::Grow(Counter& counter, uint64_t now, uint64_t& seen) {
  if (now > seen) counter.Add(static_cast<double>(now - seen));
  seen = now;
}

void WorkerMetrics::Update(const prefill::Load& prefill, const prefill::Counters& prefilled,
                           const decode::Load& decode, const decode::Counters& decoded,
                           uint32_t slots_held, uint32_t slot_count) {
  running_.Set(decode.running);
  waiting_transfer_.Set(decode.prefilling);
  waiting_prefill_.Set(prefill.waiting);
  serving_.Set(prefill.serving);
  waiting_tokens_.Set(static_cast<double>(prefill.waiting_tokens));
  context_tokens_.Set(static_cast<double>(decode.context_tokens));
  slots_held_.Set(slots_held);
  slots_total_.Set(slot_count);
  Grow(preemptions_, decoded.preempted, decode_seen_.preempted);
  Grow(output_tokens_, decoded.output_tokens, decode_seen_.output_tokens);
  Grow(refused_decode_, decoded.refused, decode_seen_.refused);
  Grow(fetch_failures_, decoded.fetch_failures, decode_seen_.fetch_failures);
  Grow(recomputed_, prefilled.recomputed_tokens, prefill_seen_.recomputed_tokens);
  Grow(prefilled_computed_, prefilled.computed_tokens, prefill_seen_.computed_tokens);
  Grow(prefilled_dram_, prefilled.dram_tokens, prefill_seen_.dram_tokens);
  Grow(prefilled_remote_, prefilled.remote_tokens, prefill_seen_.remote_tokens);
  Grow(refused_prefill_, prefilled.refused, prefill_seen_.refused);
}

}  // namespace antiphon::worker
