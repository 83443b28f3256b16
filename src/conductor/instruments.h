// The conductor's metrics, all with their label values from the start.
#ifndef ANTIPHON_CONDUCTOR_INSTRUMENTS_H_
#define ANTIPHON_CONDUCTOR_INSTRUMENTS_H_

#include "absl/time/time.h"
#include "common/metrics.h"
#include "conductor/core.h"

namespace antiphon::conductor {

// Thread-safe, as its instruments are.
class Instruments {
 public:
  explicit Instruments(Registry& registry);

  void OnDecision(const Decision& decision, absl::Duration took);
  void OnFinish(const Finish& finish, const FinishOutcome& outcome);
  void OnSummary(const Summary& summary, size_t indexed_blocks);

 private:
  Counter* decisions_[kVerdicts];
  Counter* best_effort_;
  Histogram* predicted_ttft_;
  Histogram* predicted_tbt_;
  Histogram* match_ratio_;
  Histogram* route_;
  Histogram* ttft_error_[2];  // under, over
  Histogram* tbt_error_[2];
  Counter* ttft_slo_[2];  // missed, met
  Counter* tbt_slo_[2];
  Gauge* workers_[3];  // by NodeState
  Gauge* prefill_queue_;
  Gauge* decode_queue_;
  Gauge* stores_;
  Gauge* indexed_;
  Gauge* inflight_;
};

}  // namespace antiphon::conductor

#endif  // ANTIPHON_CONDUCTOR_INSTRUMENTS_H_
