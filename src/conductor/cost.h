// What work costs on one worker, in seconds (control.proto, CostModel).
#ifndef ANTIPHON_CONDUCTOR_COST_H_
#define ANTIPHON_CONDUCTOR_COST_H_

#include "absl/status/statusor.h"

namespace antiphon::internal::v1 {
class CostModel;
}

namespace antiphon::conductor {

struct Cost {
  double prefill_base = 0;
  double prefill_per_token = 0;
  double prefill_per_pair = 0;
  double step_base = 0;
  double step_per_row = 0;
  double step_per_context = 0;
  double bytes_per_token = 0;
  double transfer_bytes_per_s = 0;

  // `tokens` new ones behind `context` that are there already.
  double PrefillSeconds(double tokens, double context) const {
    return prefill_base + prefill_per_token * tokens +
           prefill_per_pair * (context * tokens + tokens * tokens / 2);
  }
  // One step of `rows` sequences with `context` tokens in all.
  double StepSeconds(double rows, double context) const {
    return step_base + step_per_row * rows + step_per_context * context;
  }
  // Moving the KV of `tokens` into this worker's host; infinite when no rate was measured.
  double TransferSeconds(double tokens) const;

  friend bool operator==(const Cost&, const Cost&) = default;
};

// INVALID_ARGUMENT naming the coefficient that is negative or not a number.
absl::StatusOr<Cost> CostFromProto(const internal::v1::CostModel& proto);

}  // namespace antiphon::conductor

#endif  // ANTIPHON_CONDUCTOR_COST_H_
