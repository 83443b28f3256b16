#include "engine/cuda/draw_request.h"

#include <algorithm>
#include <cmath>

#include "common/philox.h"

namespace antiphon::engine::cuda {

bool DeviceDraws(const SampleRequest& request) { return !request.params->logprobs; }

Draw DrawRequests::Make(const SampleRequest& request, std::vector<LogitEdit>* edits) {
  const SamplingParams& p = *request.params;
  Draw draw = {.repetition_penalty = p.repetition_penalty,
               .inverse_temperature = IsGreedy(p) ? 0.0f : 1.0f / p.temperature,
               .top_k = p.top_k,
               .top_p = p.top_p,
               .u = PhiloxUniform(p.seed, request.emitted_ids.size())};
  if (p.min_p > 0.0f) draw.least = LeastLogWeight(p);
  const size_t first = edits->size();
  const auto edit = [&](uint32_t id) -> LogitEdit& {
    if (edit_of_[id] == 0) {
      edits->push_back({.id = id});
      edit_of_[id] = static_cast<uint32_t>(edits->size() - first);
    }
    return (*edits)[first + edit_of_[id] - 1];
  };
  for (const auto& [id, bias] : p.logit_bias) edit(id).bias += bias;
  for (uint32_t id : request.masked_ids) {
    if (id < edit_of_.size()) edit(id).masked = true;
  }
  if (p.repetition_penalty != 1.0f) {
    for (uint32_t id : request.prompt_ids) edit(id).repeated = true;
    for (uint32_t id : request.emitted_ids) edit(id).repeated = true;
  }
  if (p.presence_penalty != 0.0f || p.frequency_penalty != 0.0f) {
    for (uint32_t id : request.emitted_ids) ++edit(id).emitted;
  }
  for (size_t i = first; i < edits->size(); ++i) {
    LogitEdit& e = (*edits)[i];
    edit_of_[e.id] = 0;
    if (e.emitted > 0) e.penalty = EmittedPenalty(p, e.emitted);
  }
  draw.edit_count = static_cast<uint32_t>(edits->size() - first);
  return draw;
}

}  // namespace antiphon::engine::cuda
