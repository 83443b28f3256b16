// From logits to a token. Counter-based: the draw depends on (seed, position) alone, so a resumed
// stream draws what it would have drawn. The same sampler runs behind every runner.
//
// Order (vLLM's): logit bias and masks, repetition penalty (prompt and emitted tokens), presence
// and frequency penalties (emitted tokens), greedy when temperature is 0, else temperature, top-k,
// top-p, min-p, one draw. Ties go to the lower id.
#ifndef ANTIPHON_ENGINE_SAMPLER_H_
#define ANTIPHON_ENGINE_SAMPLER_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/types/span.h"

namespace antiphon::engine {

struct SamplingParams {
  float temperature = 1;  // 0: greedy
  uint32_t top_k = 0;     // 0: off
  float top_p = 1;
  float min_p = 0;
  float repetition_penalty = 1;
  float presence_penalty = 0;
  float frequency_penalty = 0;
  std::vector<std::pair<uint32_t, float>> logit_bias;
  uint64_t seed = 0;
  bool logprobs = false;
  uint32_t top_logprobs = 0;
};

struct SampleRequest {
  const SamplingParams* params = nullptr;
  absl::Span<const uint32_t> prompt_ids;   // for the repetition penalty
  absl::Span<const uint32_t> emitted_ids;  // the token drawn has index emitted_ids.size()
  absl::Span<const uint32_t> masked_ids;   // never drawn (stop ids before min_tokens)
};

struct SampledToken {
  uint32_t id = 0;
  float logprob = 0;  // of the model's own distribution (before penalties and temperature)
  std::vector<std::pair<uint32_t, float>> top;  // top_logprobs alternatives, best first
};

// Below some temperature the division would overflow; the distribution is a point long before.
bool IsGreedy(const SamplingParams& params);
// The logarithm of min_p: of the least weight that may be drawn where the best one has 1.
float LeastLogWeight(const SamplingParams& params);
// What a token loses that was emitted `count` times, count > 0.
float EmittedPenalty(const SamplingParams& params, uint32_t count);

// Whether the draw is the lowest index of the largest logit and nothing else is told of it.
bool IsPlainGreedy(const SampleRequest& request);

// Scratch is reused from call to call; one Sampler per thread.
class Sampler {
 public:
  // `logits` is changed in place.
  SampledToken Sample(absl::Span<float> logits, const SampleRequest& request);

 private:
  // Bias, masks and penalties; remembers what it changed when the model's own values are wanted.
  void Penalise(absl::Span<float> logits, const SampleRequest& request);
  uint32_t Draw(absl::Span<const float> logits, const SamplingParams& params, uint64_t position);
  uint32_t DrawFromAll(double u) const;
  // candidates_ becomes the `count` best of `values`, in no order.
  void SelectTop(absl::Span<const float> values, size_t count);
  // Keeps the fewest best candidates whose weights reach `mass`.
  void KeepNucleus(double mass);
  // candidates_ becomes the nucleus of all that is in scaled_.
  void KeepLargeNucleus(double mass);

  std::vector<std::pair<float, uint32_t>> candidates_;
  std::vector<std::pair<uint32_t, float>> changed_;  // (id, the model's logit), first change first
  std::vector<float> scaled_;                        // (logit - best) / temperature
  std::vector<float> maxima_, bounds_;
  std::vector<double> weights_;
  std::vector<uint32_t> counts_;  // by id; all zero between calls
};

}  // namespace antiphon::engine

#endif  // ANTIPHON_ENGINE_SAMPLER_H_
