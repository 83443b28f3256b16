#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "common/philox.h"
#include "engine/cpu/isa.h"

namespace antiphon::engine {
namespace {

using Candidate = std::pair<float, uint32_t>;

constexpr float kMasked = -std::numeric_limits<float>::infinity();
// Log-probabilities travel as JSON numbers, which have no infinity.
constexpr float kLogprobMin = -9999.0f;
constexpr float kTemperatureMin = 1e-5f;
constexpr size_t kBlock = cpu::kMaximaBlock;  // logits that share an entry of maxima_
constexpr size_t kDrawChunk = 1024;           // logits whose weights are summed in one go
constexpr size_t kNucleusTry = 1024;          // most nuclei are smaller
constexpr size_t kBins = 2048;                // of larger ones, each of 1/64 of a nat
constexpr float kBinsOfOne = 64;

// All tables give the same bits, so the fastest may serve behind every runner.
const cpu::Kernels& Math() { return *cpu::GrantedKernels().front(); }

// Ties go to the lower id.
bool Better(const Candidate& a, const Candidate& b) {
  return a.first != b.first ? a.first > b.first : a.second < b.second;
}

double Weight(float scaled) { return std::exp(static_cast<double>(scaled)); }

// What is 32 nats below the best one or further is in the last bin.
size_t BinOf(float scaled) {
  const float bin = -scaled * kBinsOfOne;
  return bin < static_cast<float>(kBins - 1) ? static_cast<size_t>(bin) : kBins - 1;
}

}  // namespace

bool IsGreedy(const SamplingParams& params) { return params.temperature < kTemperatureMin; }

float LeastLogWeight(const SamplingParams& params) {
  return std::min(0.0f, std::log(params.min_p));
}

float EmittedPenalty(const SamplingParams& params, uint32_t count) {
  return params.frequency_penalty * static_cast<float>(count) + params.presence_penalty;
}

bool IsPlainGreedy(const SampleRequest& request) {
  const SamplingParams& p = *request.params;
  return IsGreedy(p) && !p.logprobs && p.logit_bias.empty() && request.masked_ids.empty() &&
         p.repetition_penalty == 1.0f && p.presence_penalty == 0.0f && p.frequency_penalty == 0.0f;
}

SampledToken Sampler::Sample(absl::Span<float> logits, const SampleRequest& request) {
  const SamplingParams& p = *request.params;
  SampledToken token;
  float log_total = 0;
  if (p.logprobs) {
    const float peak = logits[Math().argmax(logits.data(), logits.size())];
    log_total =
        peak + static_cast<float>(std::log(Math().sum_exp(logits.data(), logits.size(), peak)));
    if (p.top_logprobs > 0) {
      SelectTop(logits, p.top_logprobs);
      std::sort(candidates_.begin(), candidates_.end(), Better);
      token.top.reserve(candidates_.size());
      for (const auto& [logit, id] : candidates_) {
        token.top.emplace_back(id, std::max(logit - log_total, kLogprobMin));
      }
    }
  }
  Penalise(logits, request);
  token.id = IsGreedy(p) ? static_cast<uint32_t>(Math().argmax(logits.data(), logits.size()))
                         : Draw(logits, p, request.emitted_ids.size());
  if (p.logprobs) {
    const auto changed = std::find_if(changed_.begin(), changed_.end(),
                                      [&](const auto& c) { return c.first == token.id; });
    const float logit = changed == changed_.end() ? logits[token.id] : changed->second;
    token.logprob = std::max(logit - log_total, kLogprobMin);
  }
  return token;
}

void Sampler::Penalise(absl::Span<float> logits, const SampleRequest& request) {
  const SamplingParams& p = *request.params;
  changed_.clear();
  const auto remember = [&](uint32_t id) {
    if (p.logprobs) changed_.emplace_back(id, logits[id]);
  };
  for (const auto& [id, bias] : p.logit_bias) {
    remember(id);
    logits[id] += bias;
  }
  for (uint32_t id : request.masked_ids) {
    if (id >= logits.size()) continue;
    remember(id);
    logits[id] = kMasked;
  }
  const bool repetition = p.repetition_penalty != 1.0f;
  const bool counted = p.presence_penalty != 0.0f || p.frequency_penalty != 0.0f;
  if (!repetition && !counted) return;
  counts_.resize(logits.size(), 0);
  if (repetition) {
    const auto once = [&](absl::Span<const uint32_t> ids) {
      for (uint32_t id : ids) {
        if (counts_[id] != 0) continue;
        counts_[id] = 1;
        remember(id);
        float& logit = logits[id];
        logit = logit > 0 ? logit / p.repetition_penalty : logit * p.repetition_penalty;
      }
    };
    once(request.prompt_ids);
    once(request.emitted_ids);
    for (uint32_t id : request.prompt_ids) counts_[id] = 0;
    for (uint32_t id : request.emitted_ids) counts_[id] = 0;
  }
  if (counted) {
    for (uint32_t id : request.emitted_ids) ++counts_[id];
    for (uint32_t id : request.emitted_ids) {
      if (counts_[id] == 0) continue;
      remember(id);
      logits[id] -= EmittedPenalty(p, counts_[id]);
      counts_[id] = 0;
    }
  }
}

uint32_t Sampler::Draw(absl::Span<const float> logits, const SamplingParams& p, uint64_t position) {
  const size_t n = logits.size();
  const uint32_t best = static_cast<uint32_t>(Math().argmax(logits.data(), n));
  const float peak = logits[best];
  if (!(peak > kMasked)) return best;  // everything is masked
  scaled_.resize(n);
  const float inverse = 1.0f / p.temperature;
  Math().shift_scale(logits.data(), n, peak, inverse, scaled_.data());
  const double u = PhiloxUniform(p.seed, position);
  const bool top_k = p.top_k > 0 && p.top_k < n;
  const bool top_p = p.top_p < 1.0f;
  const bool min_p = p.min_p > 0.0f;
  if (!top_k && !top_p && !min_p) return DrawFromAll(u);

  const double nucleus = static_cast<double>(p.top_p);
  if (top_k) {
    SelectTop(scaled_, p.top_k);
    if (top_p) {
      double mass = 0;
      for (const Candidate& c : candidates_) mass += Weight(c.first);
      KeepNucleus(nucleus * mass);
    }
  } else if (top_p) {
    const double mass = nucleus * Math().sum_exp(scaled_.data(), n, 0);
    SelectTop(scaled_, kNucleusTry);
    double held = 0;
    for (const Candidate& c : candidates_) held += Weight(c.first);
    if (held < mass) {
      KeepLargeNucleus(mass);
    } else {
      KeepNucleus(mass);
    }
  } else {
    SelectTop(scaled_, n);
  }
  if (min_p) {
    // Relative to the best token, whose weight is 1 and which always stays.
    const float least = LeastLogWeight(p);
    candidates_.erase(std::remove_if(candidates_.begin(), candidates_.end(),
                                     [&](const Candidate& c) { return c.first < least; }),
                      candidates_.end());
  }
  // In the order of ids: the draw does not depend on how the set was found.
  const auto by_id = [](const Candidate& a, const Candidate& b) { return a.second < b.second; };
  if (!std::is_sorted(candidates_.begin(), candidates_.end(), by_id)) {
    std::sort(candidates_.begin(), candidates_.end(), by_id);
  }
  weights_.clear();
  double total = 0;
  for (const Candidate& c : candidates_) {
    weights_.push_back(Weight(c.first));
    total += weights_.back();
  }
  double passed = 0;
  uint32_t last = best;
  for (size_t i = 0; i < candidates_.size(); ++i) {
    if (weights_[i] == 0) continue;
    passed += weights_[i];
    last = candidates_[i].second;
    if (passed > u * total) break;
  }
  return last;
}

uint32_t Sampler::DrawFromAll(double u) const {
  const size_t n = scaled_.size();
  const double target = u * Math().sum_exp(scaled_.data(), n, 0);
  double passed = 0;
  uint32_t last = 0;
  for (size_t begin = 0; begin < n; begin += kDrawChunk) {
    const size_t count = std::min(kDrawChunk, n - begin);
    const double mass = Math().sum_exp(scaled_.data() + begin, count, 0);
    // Sums of chunks and of the whole round differently: the last token with weight catches that.
    if (mass == 0) continue;
    if (passed + mass <= target && begin + count < n) {
      passed += mass;
      for (size_t i = begin + count; i-- > begin;) {
        if (scaled_[i] > kMasked) {
          last = static_cast<uint32_t>(i);
          break;
        }
      }
      continue;
    }
    for (size_t i = begin; i < begin + count; ++i) {
      const double weight = Weight(scaled_[i]);
      if (weight == 0) continue;
      passed += weight;
      last = static_cast<uint32_t>(i);
      if (passed > target) return last;
    }
  }
  return last;
}

void Sampler::SelectTop(absl::Span<const float> values, size_t count) {
  count = std::min(count, values.size());
  candidates_.clear();
  // The count-th largest maximum of a block bounds the count-th largest value from below, so most
  // of the vocabulary is looked at once.
  maxima_.resize((values.size() + kBlock - 1) / kBlock);
  Math().block_maxima(values.data(), values.size(), maxima_.data());
  float bound = kMasked;
  if (count <= maxima_.size()) {
    bounds_ = maxima_;
    const auto nth = bounds_.begin() + static_cast<ptrdiff_t>(count - 1);
    std::nth_element(bounds_.begin(), nth, bounds_.end(), std::greater<float>());
    bound = *nth;
  }
  for (size_t b = 0; b < maxima_.size(); ++b) {
    if (maxima_[b] < bound) continue;
    const size_t end = std::min((b + 1) * kBlock, values.size());
    for (size_t i = b * kBlock; i < end; ++i) {
      if (values[i] >= bound) candidates_.emplace_back(values[i], static_cast<uint32_t>(i));
    }
  }
  if (count < candidates_.size()) {
    std::nth_element(candidates_.begin(), candidates_.begin() + static_cast<ptrdiff_t>(count - 1),
                     candidates_.end(), Better);
    candidates_.resize(count);
  }
}

void Sampler::KeepNucleus(double mass) {
  // The first `low` candidates are the best ones and weigh `held`, which is too little; the first
  // `high` are enough.
  size_t low = 0, high = candidates_.size();
  double held = 0;
  while (high - low > 1) {
    const size_t middle = low + (high - low) / 2;
    const auto begin = candidates_.begin();
    std::nth_element(begin + static_cast<ptrdiff_t>(low), begin + static_cast<ptrdiff_t>(middle),
                     begin + static_cast<ptrdiff_t>(high), Better);
    double part = 0;
    for (size_t i = low; i < middle; ++i) part += Weight(candidates_[i].first);
    if (held + part >= mass) {
      high = middle;
    } else {
      low = middle;
      held += part;
    }
  }
  candidates_.resize(high);
}

// Only the tokens of one bin are put in order.
void Sampler::KeepLargeNucleus(double mass) {
  weights_.assign(kBins, 0);
  for (float scaled : scaled_) {
    const size_t bin = BinOf(scaled);
    if (bin < kBins - 1) weights_[bin] += Weight(scaled);
  }
  double before = 0;
  size_t bin = 0;
  while (bin < kBins - 1 && before + weights_[bin] < mass) before += weights_[bin++];
  candidates_.clear();
  for (size_t i = 0; i < scaled_.size(); ++i) {
    if (BinOf(scaled_[i]) == bin) candidates_.emplace_back(scaled_[i], static_cast<uint32_t>(i));
  }
  if (candidates_.empty()) return SelectTop(scaled_, scaled_.size());  // the sum was rounded up
  KeepNucleus(mass - before);
  const Candidate last = *std::max_element(candidates_.begin(), candidates_.end(), Better);
  candidates_.clear();
  for (size_t i = 0; i < scaled_.size(); ++i) {
    const Candidate c = {scaled_[i], static_cast<uint32_t>(i)};
    if (!Better(last, c)) candidates_.push_back(c);
  }
}

}  // namespace antiphon::engine
