// Times one draw of the sampler from random logits: normal with a spread of 2.5, twenty of them 10
// higher.
//
//   sampler_bench
//
// Prints one line a vocabulary and kind of sampling: us a draw as median (lowest-highest) of the
// rounds, and a digest of the tokens, which no change of speed may change.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "engine/sampler.h"

namespace antiphon::engine {
namespace {

constexpr int kRounds = 9;
constexpr int kDraws = 20;  // of a round

void Time(const std::vector<float>& logits, SamplingParams params) {
  Sampler sampler;
  std::vector<float> changed;
  std::vector<double> rounds;
  uint64_t digest = 0;
  for (int round = -1; round < kRounds; ++round) {  // the first one warms up
    double seconds = 0;
    for (int i = 0; i < kDraws; ++i) {
      changed = logits;
      ++params.seed;
      const auto begin = std::chrono::steady_clock::now();
      const uint32_t id = sampler.Sample(absl::MakeSpan(changed), {.params = &params}).id;
      seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
      digest = digest * 31 + id;
    }
    if (round >= 0) rounds.push_back(1e6 * seconds / kDraws);
  }
  std::sort(rounds.begin(), rounds.end());
  std::printf(
      "%zu tokens, temperature %.1f, top-p %.2f, top-k %u, min-p %.2f: %.0f (%.0f-%.0f) us, "
      "digest %016llx\n",
      logits.size(), static_cast<double>(params.temperature), static_cast<double>(params.top_p),
      params.top_k, static_cast<double>(params.min_p), rounds[rounds.size() / 2], rounds.front(),
      rounds.back(), static_cast<unsigned long long>(digest));
}

void Run() {
  std::mt19937 random(1);
  for (size_t vocab : {49152, 128256}) {
    std::vector<float> logits(vocab);
    std::normal_distribution<float> normal(0, 2.5f);
    for (float& logit : logits) logit = normal(random);
    for (int i = 0; i < 20; ++i) logits[random() % vocab] += 10;
    Time(logits, {.temperature = 0.8f});
    Time(logits, {.temperature = 0.8f, .top_p = 0.95f});
    Time(logits, {.temperature = 1.5f, .top_p = 0.95f});
    Time(logits, {.temperature = 1.5f, .min_p = 0.02f});
    Time(logits, {.temperature = 1, .top_k = 50});
  }
}

}  // namespace
}  // namespace antiphon::engine

int main() { antiphon::engine::Run(); }
