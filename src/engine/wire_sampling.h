// Sampling as it travels (worker.proto) to what the sampler takes.
#ifndef ANTIPHON_ENGINE_WIRE_SAMPLING_H_
#define ANTIPHON_ENGINE_WIRE_SAMPLING_H_

#include <algorithm>
#include <cmath>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "antiphon/v1/worker.pb.h"
#include "engine/sampler.h"

namespace antiphon::engine {

inline constexpr uint32_t kTopLogprobsMax = 128;

// A zero top_p or repetition penalty is an absent one. INVALID_ARGUMENT naming the field when a
// number is not finite or an id is not of the vocabulary.
inline absl::StatusOr<SamplingParams> SamplingFromProto(const internal::v1::Sampling& s,
                                                        uint32_t vocab) {
  const auto bad = [](const char* field, double value, const char* expected) {
    return absl::InvalidArgumentError(
        absl::StrCat("sampling.", field, " is ", value, "; ", expected));
  };
  if (!(s.temperature() >= 0) || !std::isfinite(s.temperature())) {
    return bad("temperature", s.temperature(), "it must be 0 or more");
  }
  if (!(s.top_p() >= 0 && s.top_p() <= 1)) {
    return bad("top_p", s.top_p(), "it must be between 0 and 1");
  }
  if (!(s.min_p() >= 0 && s.min_p() <= 1)) {
    return bad("min_p", s.min_p(), "it must be between 0 and 1");
  }
  if (!(s.repetition_penalty() >= 0) || !std::isfinite(s.repetition_penalty())) {
    return bad("repetition_penalty", s.repetition_penalty(), "it must be positive");
  }
  if (!std::isfinite(s.presence_penalty())) {
    return bad("presence_penalty", s.presence_penalty(), "it must be finite");
  }
  if (!std::isfinite(s.frequency_penalty())) {
    return bad("frequency_penalty", s.frequency_penalty(), "it must be finite");
  }
  if (s.top_logprobs() > kTopLogprobsMax) {
    return bad("top_logprobs", s.top_logprobs(), "at most 128 are served");
  }
  SamplingParams params;
  params.temperature = static_cast<float>(s.temperature());
  params.top_k = s.top_k();
  params.top_p = s.top_p() == 0 ? 1.0f : static_cast<float>(s.top_p());
  params.min_p = static_cast<float>(s.min_p());
  params.repetition_penalty =
      s.repetition_penalty() == 0 ? 1.0f : static_cast<float>(s.repetition_penalty());
  params.presence_penalty = static_cast<float>(s.presence_penalty());
  params.frequency_penalty = static_cast<float>(s.frequency_penalty());
  for (const auto& [id, bias] : s.logit_bias()) {
    if (id >= vocab) return bad("logit_bias", id, "it is not an id of the vocabulary");
    if (std::isnan(bias)) return bad("logit_bias", bias, "it must be a number");
    params.logit_bias.emplace_back(id, bias);
  }
  // A protobuf map has no order; ours is by id in every process.
  std::sort(params.logit_bias.begin(), params.logit_bias.end());
  params.seed = s.seed();
  params.logprobs = s.logprobs();
  params.top_logprobs = s.top_logprobs();
  return params;
}

inline internal::v1::TokenLogprobs LogprobsToProto(const SampledToken& token) {
  internal::v1::TokenLogprobs out;
  out.set_logprob(token.logprob);
  for (const auto& [id, logprob] : token.top) {
    out.add_top_ids(id);
    out.add_top_logprobs(logprob);
  }
  return out;
}

}  // namespace antiphon::engine

#endif  // ANTIPHON_ENGINE_WIRE_SAMPLING_H_
