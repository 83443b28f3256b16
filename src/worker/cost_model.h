// The worker's predicted seconds (control.proto CostModel): measured once at start by running a few
// steps on scratch blocks, then scaled by what real steps take.
#ifndef ANTIPHON_WORKER_COST_MODEL_H_
#define ANTIPHON_WORKER_COST_MODEL_H_

#include <array>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "antiphon/v1/control.pb.h"
#include "common/clock.h"
#include "engine/model_runner.h"

namespace antiphon::worker {

// One equation: seconds = sum of coefficient[i] * terms[i].
struct Observation {
  std::array<double, 3> terms{};
  double seconds = 0;
};

// Least squares of relative errors with every coefficient >= floor[i]. At least one observation.
std::array<double, 3> FitPositive(const std::vector<Observation>& observations,
                                  const std::array<double, 3>& floor);

double PrefillSeconds(const internal::v1::CostModel& cost, double tokens, double context);
double StepSeconds(const internal::v1::CostModel& cost, double rows, double context_tokens);

// All coefficients are finite and positive, as measured ones are.
bool IsPlausible(const internal::v1::CostModel& cost);

// Runs steps on the calling thread; takes the time of about a thousand prompt tokens, less on a
// slow machine. What the steps touched is given back. The engine's errors are passed on.
absl::StatusOr<internal::v1::CostModel> MeasureCost(engine::ModelRunner& runner,
                                                    const Clock& clock);

// Scales a measured model by the recent ratio of real to predicted time. Not thread-safe.
class CostRefiner {
 public:
  explicit CostRefiner(internal::v1::CostModel measured) : measured_(std::move(measured)) {}
  // A step that held rows only, or prefill chunks only; mixed ones tell nothing apart.
  void OnRows(double rows, double context_tokens, double seconds);
  void OnPrefill(double tokens, double context, double seconds);
  internal::v1::CostModel Current() const;

 private:
  internal::v1::CostModel measured_;
  double rows_ratio_ = 1;
  double prefill_ratio_ = 1;
};

}  // namespace antiphon::worker

#endif  // ANTIPHON_WORKER_COST_MODEL_H_
