// The sampler against an obvious implementation in double precision: what may be drawn, how often,
// and which token for a given seed and position.
#include "engine/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "common/philox.h"
#include "tests/engine/random.h"

namespace antiphon::engine {
namespace {

using Ids = std::vector<uint32_t>;

struct Request {
  SamplingParams params;
  Ids prompt, emitted, masked;
};

SampledToken Sample(Sampler& sampler, std::vector<float> logits, const Request& r) {
  return sampler.Sample(absl::MakeSpan(logits), {.params = &r.params,
                                                 .prompt_ids = r.prompt,
                                                 .emitted_ids = r.emitted,
                                                 .masked_ids = r.masked});
}
SampledToken Sample(const std::vector<float>& logits, const Request& r) {
  Sampler sampler;
  return Sample(sampler, logits, r);
}

// What sampler.h says, one step after the other: the probability of every id.
std::vector<double> Distribution(const std::vector<float>& logits, const Request& r) {
  const SamplingParams& p = r.params;
  std::vector<double> x(logits.begin(), logits.end());
  for (const auto& [id, bias] : p.logit_bias) x[id] += double{bias};
  for (uint32_t id : r.masked) x[id] = -INFINITY;
  std::map<uint32_t, int> seen, emitted;
  for (uint32_t id : r.prompt) ++seen[id];
  for (uint32_t id : r.emitted) ++seen[id], ++emitted[id];
  for (const auto& [id, times] : seen) {
    x[id] = x[id] > 0 ? x[id] / double{p.repetition_penalty} : x[id] * double{p.repetition_penalty};
  }
  for (const auto& [id, times] : emitted) {
    x[id] -= times * double{p.frequency_penalty} + double{p.presence_penalty};
  }
  Ids order(x.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return x[a] > x[b]; });
  std::vector<double> weights(x.size(), 0.0);
  if (p.temperature == 0) {
    weights[order[0]] = 1;
    return weights;
  }
  size_t kept = p.top_k > 0 ? std::min<size_t>(p.top_k, order.size()) : order.size();
  double total = 0;
  for (size_t i = 0; i < kept; ++i) {
    weights[order[i]] = std::exp((x[order[i]] - x[order[0]]) / double{p.temperature});
    total += weights[order[i]];
  }
  const double mass = double{p.top_p} * total;
  double held = 0;
  for (size_t i = 0; i < kept; ++i) {
    // Every token but the first needs the ones before it to be too few.
    if (p.top_p < 1 && i > 0 && held >= mass) weights[order[i]] = 0;
    held += weights[order[i]];
  }
  for (double& w : weights) {
    if (w < double{p.min_p}) w = 0;
  }
  const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
  for (double& w : weights) w /= sum;
  return weights;
}

struct Case {
  std::string name;
  size_t vocab;
  float spread;  // of the logits
  Request request;
};

std::vector<Case> Cases() {
  std::vector<Case> cases;
  const auto add = [&](std::string name, SamplingParams params, size_t vocab = 300,
                       float spread = 1.5f) {
    cases.push_back({std::move(name), vocab, spread, {.params = std::move(params)}});
  };
  add("plain", {});
  add("one token", {}, 1);
  add("two tokens", {}, 2);
  add("cold", {.temperature = 0.4f});
  add("hot", {.temperature = 2.5f});
  // Past one block of 64, one chunk of 1,024, and not a multiple of either.
  add("large", {}, 5003);
  add("top-k of 1", {.top_k = 1});
  add("top-k", {.top_k = 7});
  add("top-k in a large vocabulary", {.temperature = 1.5f, .top_k = 90}, 5003);
  add("top-k past the vocabulary", {.top_k = 1000});
  add("top-p", {.top_p = 0.6f});
  add("top-p of 0", {.top_p = 0});
  add("top-p close to 1", {.top_p = 0.999f});
  // A flat distribution: the nucleus has more than 1,024 tokens.
  add("wide nucleus", {.top_p = 0.9f}, 5003, 0.1f);
  add("narrow nucleus in a large vocabulary", {.top_p = 0.5f}, 5003, 3);
  add("min-p", {.min_p = 0.1f});
  add("min-p of 1", {.min_p = 1});
  add("all three", {.temperature = 1.3f, .top_k = 40, .top_p = 0.8f, .min_p = 0.05f});
  add("top-k and min-p", {.temperature = 0.7f, .top_k = 12, .min_p = 0.2f});
  add("bias", {.logit_bias = {{3, 4.5f}, {250, 3}, {17, -100}}});

  const Ids prompt = {1, 2, 3, 3, 3, 90, 91, 299}, emitted = {3, 5, 5, 5, 90, 120, 3};
  const auto add_penalty = [&](std::string name, SamplingParams params) {
    cases.push_back({std::move(name),
                     300,
                     1.5f,
                     {.params = std::move(params), .prompt = prompt, .emitted = emitted}});
  };
  add_penalty("repetition", {.repetition_penalty = 1.8f});
  add_penalty("encouraged repetition", {.repetition_penalty = 0.5f});
  add_penalty("presence", {.presence_penalty = 1.5f});
  add_penalty("frequency", {.frequency_penalty = 0.7f});
  add_penalty("rewarded frequency", {.frequency_penalty = -1});
  add_penalty("all penalties, bias and nucleus", {.temperature = 0.9f,
                                                  .top_p = 0.95f,
                                                  .repetition_penalty = 1.2f,
                                                  .presence_penalty = 0.3f,
                                                  .frequency_penalty = 0.2f,
                                                  .logit_bias = {{5, 2.0f}}});
  cases.push_back({"masked", 300, 1.5f, {.masked = {0, 7, 299}}});
  return cases;
}

// The statistic is approximately normal once standardised; six deviations are an error.
TEST(SamplerTest, DrawsFollowTheDistribution) {
  TestRandom random(1);
  for (Case& c : Cases()) {
    SCOPED_TRACE(c.name);
    const std::vector<float> logits = random.Normals(c.vocab, c.spread);
    const std::vector<double> want = Distribution(logits, c.request);
    std::vector<int> drawn(c.vocab, 0);
    const int draws = c.vocab > 1000 ? 4'000 : 20'000;
    Sampler sampler;
    for (int i = 0; i < draws; ++i) {
      c.request.params.seed = static_cast<uint64_t>(i);
      ++drawn[Sample(sampler, logits, c.request).id];
    }
    double chi_square = 0, degrees = -1, rare_expected = 0, rare_drawn = 0;
    for (size_t id = 0; id < c.vocab; ++id) {
      const double expected = want[id] * draws;
      if (want[id] == 0) {
        EXPECT_EQ(drawn[id], 0) << "id " << id << " is not to be drawn";
      } else if (expected < 8) {
        rare_expected += expected;
        rare_drawn += drawn[id];
      } else {
        chi_square += (drawn[id] - expected) * (drawn[id] - expected) / expected;
        ++degrees;
      }
    }
    if (rare_expected > 8) {
      chi_square += (rare_drawn - rare_expected) * (rare_drawn - rare_expected) / rare_expected;
      ++degrees;
    }
    EXPECT_LE(chi_square, degrees + 6 * std::sqrt(2 * std::max(degrees, 1.0)));
  }
}

// The draw inverts the cumulative distribution in the order of ids, at the counter's number.
TEST(SamplerTest, LargeNucleiEndWhereTheirMassDoes) {
  std::mt19937 random(5);
  const auto compare = [](std::vector<float> logits, float top_p) {
    std::vector<uint32_t> order(logits.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](uint32_t a, uint32_t b) { return logits[a] > logits[b]; });
    const float peak = logits[order[0]];
    const auto weight = [&](uint32_t id) { return std::exp(double{logits[id] - peak}); };
    double mass = 0;
    for (uint32_t id : order) mass += weight(id);
    double held = 0;
    size_t size = 0;
    while (size < order.size() && held < double{top_p} * mass) held += weight(order[size++]);
    order.resize(size);
    std::sort(order.begin(), order.end());
    Sampler sampler;
    for (uint64_t seed = 0; seed < 50; ++seed) {
      double passed = 0;
      size_t i = 0;
      for (; i + 1 < size; ++i) {
        passed += weight(order[i]);
        if (passed > PhiloxUniform(seed, 0) * held) break;
      }
      std::vector<float> changed = logits;
      const SamplingParams params = {.top_p = top_p, .seed = seed};
      EXPECT_EQ(sampler.Sample(absl::MakeSpan(changed), {.params = &params}).id, order[i])
          << size << " of " << logits.size() << " tokens, p " << top_p << ", seed " << seed;
    }
    return size;
  };
  size_t large = 0;
  for (float spread : {0.3f, 2.0f, 4.0f}) {
    std::vector<float> logits(20000);
    for (float& l : logits) l = std::normal_distribution<float>(0, spread)(random);
    for (float p : {0.5f, 0.9f, 0.99f}) large += compare(logits, p) > 1024;
  }
  EXPECT_GE(large, 5u);
  // All alike: the lower ids. Ever less likely: to the tail, which no bin holds.
  EXPECT_EQ(compare(std::vector<float>(5000, 1.5f), 0.75f), 3750u);
  std::vector<float> falling(3000);
  for (size_t i = 0; i < falling.size(); ++i) falling[i] = -0.001f * static_cast<float>(i);
  compare(falling, 0.9999999f);
  // A mass that was rounded up is never reached.
  for (int turn = 0; turn < 30; ++turn) {
    std::vector<float> alike(4096, -0.03f * static_cast<float>(turn));
    alike[turn] = 0;
    compare(alike, std::nextafter(1.0f, 0.0f));
  }
}

TEST(SamplerTest, TheDrawIsTheCountersAndNothingElse) {
  TestRandom random(2);
  Sampler sampler;
  for (Case& c : Cases()) {
    SCOPED_TRACE(c.name);
    const std::vector<float> logits = random.Normals(c.vocab, c.spread);
    for (uint64_t seed = 0; seed < 40; ++seed) {
      c.request.params.seed = seed * 0x9e3779b97f4a7c15;
      const std::vector<double> want = Distribution(logits, c.request);
      const double u = PhiloxUniform(c.request.params.seed, c.request.emitted.size());
      const uint32_t id = Sample(sampler, logits, c.request).id;
      const double below = std::accumulate(want.begin(), want.begin() + id, 0.0);
      EXPECT_LE(below, u + 1e-5);
      EXPECT_GE(below + want[id], u - 1e-5);
    }
  }
}

TEST(SamplerTest, PositionsDrawIndependently) {
  const std::vector<float> logits(16, 0.5f);
  Request request{.params = {.seed = 99}};
  std::vector<int> pairs(256, 0);
  Sampler sampler;
  uint32_t last = Sample(sampler, logits, request).id;
  constexpr int kPositions = 8'000;
  for (int i = 0; i < kPositions; ++i) {
    request.emitted.push_back(last);
    const uint32_t id = Sample(sampler, logits, request).id;
    ++pairs[last * 16 + id];
    last = id;
  }
  double chi_square = 0;
  for (int n : pairs) chi_square += (n - kPositions / 256.0) * (n - kPositions / 256.0);
  chi_square /= kPositions / 256.0;
  EXPECT_LE(chi_square, 255 + 6 * std::sqrt(2 * 255.0));
  EXPECT_GE(chi_square, 255 - 6 * std::sqrt(2 * 255.0));
}

TEST(SamplerTest, ASamplersPastDoesNotMatter) {
  TestRandom random(3);
  std::vector<Case> cases = Cases();
  std::vector<std::vector<float>> logits;
  std::vector<SampledToken> alone;
  for (Case& c : cases) {
    c.request.params.logprobs = true;
    c.request.params.top_logprobs = 3;
    c.request.params.seed = 77;
    logits.push_back(random.Normals(c.vocab, c.spread));
    alone.push_back(Sample(logits.back(), c.request));
  }
  Sampler shared;
  for (int i = 0; i < 300; ++i) {
    const size_t k = random.Below(static_cast<uint32_t>(cases.size()));
    const SampledToken token = Sample(shared, logits[k], cases[k].request);
    EXPECT_EQ(token.id, alone[k].id) << cases[k].name;
    EXPECT_EQ(token.logprob, alone[k].logprob) << cases[k].name;
    EXPECT_EQ(token.top, alone[k].top) << cases[k].name;
  }
}

TEST(SamplerTest, GreedyTakesTheBestAndTheLowerIdOfEquals) {
  std::vector<float> logits(200, 1.0f);
  const Request greedy{.params = {.temperature = 0}};
  EXPECT_EQ(Sample(logits, greedy).id, 0u);
  logits[150] = logits[170] = 2;
  EXPECT_EQ(Sample(logits, greedy).id, 150u);
  logits[199] = 2.0001f;
  EXPECT_EQ(Sample(logits, greedy).id, 199u);
  // So cold that the division would overflow.
  EXPECT_EQ(Sample(logits, {.params = {.temperature = 1e-30f}}).id, 199u);
}

TEST(SamplerTest, TiesAtAnEdgeGoToTheLowerIds) {
  const std::vector<float> logits(500, 0.25f);
  for (const SamplingParams& params :
       {SamplingParams{.top_k = 3}, SamplingParams{.top_p = 0.0058f}}) {
    std::vector<int> drawn(500, 0);
    Sampler sampler;
    Request request{.params = params};
    for (uint64_t seed = 0; seed < 200; ++seed) {
      request.params.seed = seed;
      ++drawn[Sample(sampler, logits, request).id];
    }
    EXPECT_GT(drawn[0], 0);
    EXPECT_GT(drawn[1], 0);
    EXPECT_GT(drawn[2], 0);
    EXPECT_EQ(drawn[0] + drawn[1] + drawn[2], 200);
  }
}

struct GreedyCase {
  std::string name;
  Request request;
  uint32_t want;
};

TEST(SamplerTest, PenaltiesBiasAndMasksChangeTheBest) {
  // Best 0, then 1, 2, 3; id 4 is negative.
  const std::vector<float> logits = {4, 3, 2, 1, -1};
  const std::vector<GreedyCase> cases = {
      {"none", {}, 0},
      {"bias lifts", {.params = {.logit_bias = {{4, 5.5f}}}}, 4},
      {"bias bans", {.params = {.logit_bias = {{0, -100}}}}, 1},
      {"masks", {.masked = {0, 1}}, 2},
      {"a mask past the vocabulary", {.masked = {0, 77}}, 1},
      {"a mask is stronger than bias", {.params = {.logit_bias = {{0, 100}}}, .masked = {0}}, 1},
      {"repetition counts the prompt", {.params = {.repetition_penalty = 2}, .prompt = {0}}, 1},
      {"repetition counts a token once",
       {.params = {.repetition_penalty = 1.3f}, .prompt = {0, 0, 0}, .emitted = {0, 0}},
       0},
      {"presence ignores the prompt", {.params = {.presence_penalty = 2}, .prompt = {0}}, 0},
      {"presence counts once", {.params = {.presence_penalty = 0.9f}, .emitted = {0, 0, 0}}, 0},
      {"presence", {.params = {.presence_penalty = 1.1f}, .emitted = {0}}, 1},
      {"frequency ignores the prompt", {.params = {.frequency_penalty = 2}, .prompt = {0, 0}}, 0},
      {"frequency once", {.params = {.frequency_penalty = 0.6f}, .emitted = {0}}, 0},
      {"frequency twice", {.params = {.frequency_penalty = 0.6f}, .emitted = {0, 0}}, 1},
      {"all are tired",
       {.params = {.repetition_penalty = 1.5f, .presence_penalty = 1, .frequency_penalty = 1},
        .emitted = {0, 1, 2}},
       3},
  };
  for (GreedyCase c : cases) {
    SCOPED_TRACE(c.name);
    c.request.params.temperature = 0;
    EXPECT_EQ(Sample(logits, c.request).id, c.want);
  }
  // A negative logit gets worse too: 4 would win otherwise.
  Request negative{.params = {.temperature = 0, .repetition_penalty = 4}, .prompt = {1}};
  EXPECT_EQ(Sample({-2, -1, -3}, negative).id, 0u);
}

TEST(SamplerTest, LogprobsAreTheModelsOwnAndSumToOne) {
  TestRandom random(4);
  constexpr uint32_t kVocab = 1500;
  const std::vector<float> logits = random.Normals(kVocab, 3);
  double total = 0;
  for (float x : logits) total += std::exp(double{x});
  Request request{.params = {.temperature = 0.3f,
                             .top_p = 0.5f,
                             .repetition_penalty = 1.5f,
                             .presence_penalty = 1,
                             .frequency_penalty = 1,
                             .logit_bias = {{1200, 30}, {8, -3}},
                             .seed = 5,
                             .logprobs = true,
                             .top_logprobs = kVocab + 10},
                  .prompt = {8, 9},
                  .emitted = {1200, 8},
                  .masked = {44}};
  const SampledToken token = Sample(logits, request);
  EXPECT_EQ(token.id, 1200u) << "the bias decides";
  ASSERT_EQ(token.top.size(), kVocab);
  double sum = 0;
  Ids ids;
  for (size_t i = 0; i < token.top.size(); ++i) {
    const auto& [id, logprob] = token.top[i];
    EXPECT_GE(token.top[i > 0 ? i - 1 : 0].second, logprob);
    EXPECT_NEAR(logprob, double{logits[id]} - std::log(total), 1e-5);
    sum += std::exp(double{logprob});
    ids.push_back(id);
    if (id == token.id) {
      EXPECT_EQ(token.logprob, logprob);
    }
  }
  EXPECT_NEAR(sum, 1, 1e-5);
  std::sort(ids.begin(), ids.end());
  for (uint32_t i = 0; i < kVocab; ++i) ASSERT_EQ(ids[i], i);

  request.params.top_logprobs = 5;
  const SampledToken five = Sample(logits, request);
  ASSERT_EQ(five.top.size(), 5u);
  for (size_t i = 0; i < 5; ++i) EXPECT_EQ(five.top[i], token.top[i]);
  request.params.logprobs = false;
  EXPECT_TRUE(Sample(logits, request).top.empty());
  EXPECT_EQ(Sample(logits, request).id, token.id) << "asking does not change the draw";
}

TEST(SamplerTest, ImpossibleTokensHaveAFiniteLogprob) {
  const std::vector<float> logits = {0, -INFINITY, 1};
  const SampledToken token =
      Sample(logits, {.params = {.temperature = 0, .logprobs = true, .top_logprobs = 3}});
  EXPECT_EQ(token.id, 2u);
  ASSERT_EQ(token.top.size(), 3u);
  EXPECT_EQ(token.top[2], (std::pair<uint32_t, float>{1, -9999.0f}));
}

}  // namespace
}  // namespace antiphon::engine
