// What every runner refuses before it starts a step.
#ifndef ANTIPHON_ENGINE_CHECK_STEP_H_
#define ANTIPHON_ENGINE_CHECK_STEP_H_

#include "absl/status/status.h"
#include "engine/model_runner.h"

namespace antiphon::engine {

// INVALID_ARGUMENT naming the chunk and the field.
absl::Status CheckStep(const Step& step, const RunnerShape& shape, const KvLayout& layout);

}  // namespace antiphon::engine

#endif  // ANTIPHON_ENGINE_CHECK_STEP_H_
