// The worker's instruments (SURFACE.md): counters carry the stage, the role is a gauge.
#ifndef ANTIPHON_WORKER_METRICS_H_
#define ANTIPHON_WORKER_METRICS_H_

#include <cstdint>

#include "absl/time/time.h"
#include "common/metrics.h"
#include "decode/core.h"
#include "prefill/core.h"

namespace antiphon::worker {

struct StepSize {
  uint32_t rows = 0;
  uint32_t prefill_tokens = 0;
};

// Updated by the step loop; read by scrapes.
class WorkerMetrics {
 public:
  WorkerMetrics(Registry& registry, bool prefill_role);

  void OnStep(const StepSize& size, absl::Duration took, absl::Time wall);
  void Update(const prefill::Load& prefill, const prefill::Counters& prefilled,
              const decode::Load& decode, const decode::Counters& decoded, uint32_t slots_held,
              uint32_t slot_count);
  void OnStoreLost() { store_losses_.Add(); }
  void OnStoreAttached(bool attached) { attached_.Set(attached ? 1 : 0); }

 private:
  // Adds what `now` has grown by since it was seen last.
  static void Grow(Counter& counter, uint64_t now, uint64_t& seen);

  Gauge& attached_;
  Gauge& running_;
  Gauge& waiting_prefill_;
  Gauge& waiting_transfer_;
  Gauge& serving_;
  Gauge& slots_held_;
  Gauge& slots_total_;
  Gauge& waiting_tokens_;
  Gauge& context_tokens_;
  Counter& steps_prefill_;
  Counter& steps_decode_;
  Counter& steps_mixed_;
  Histogram& step_seconds_prefill_;
  Histogram& step_seconds_decode_;
  Histogram& batch_tokens_;
  Gauge& last_step_;
  Counter& preemptions_;
  Counter& recomputed_;
  Counter& prefilled_computed_;
  Counter& prefilled_dram_;
  Counter& prefilled_remote_;
  Counter& output_tokens_;
  Counter& refused_prefill_;
  Counter& refused_decode_;
  Counter& fetch_failures_;
  Counter& store_losses_;
  prefill::Counters prefill_seen_;
  decode::Counters decode_seen_;
};

}  // namespace antiphon::worker

#endif  // ANTIPHON_WORKER_METRICS_H_
