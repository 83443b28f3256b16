// What every runner refuses before it starts a step, and what a failed one means.
#ifndef ANTIPHON_ENGINE_CHECK_STEP_H_
#define ANTIPHON_ENGINE_CHECK_STEP_H_

#include "absl/status/status.h"
#include "engine/model_runner.h"

namespace antiphon::engine {

// INVALID_ARGUMENT naming the chunk and the field.
absl::Status CheckStep(const Step& step, const RunnerShape& shape, const KvLayout& layout);

// What sequences end with when their step failed: UNAVAILABLE when another worker can go on with
// them (the device or a rank is lost, or too small for this step), else INTERNAL.
absl::Status EndOfSequences(const absl::Status& step);

}  // namespace antiphon::engine

#endif  // ANTIPHON_ENGINE_CHECK_STEP_H_
