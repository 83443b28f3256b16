// What the device is told to do to logits is what the sampler does to them.
#include "engine/cuda/draw_request.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <set>

#include "common/philox.h"
#include "engine/cpu/isa.h"
#include "engine/cuda/arithmetic.h"

namespace antiphon::engine::cuda {
namespace {

constexpr uint32_t kVocab = 300;

struct Request {
  SamplingParams params;
  std::vector<uint32_t> prompt, emitted, masked;
  SampleRequest Face() const {
    return {.params = &params, .prompt_ids = prompt, .emitted_ids = emitted, .masked_ids = masked};
  }
};

Request RandomRequest(std::mt19937& random) {
  const auto below = [&](uint32_t n) { return static_cast<uint32_t>(random() % n); };
  const auto ids = [&](uint32_t count) {
    std::vector<uint32_t> out(count);
    for (uint32_t& id : out) id = below(40);  // some come twice
    return out;
  };
  Request r;
  r.prompt = ids(below(30));
  r.emitted = ids(below(30));
  r.params.temperature = 0;
  if (below(2) == 0) r.params.repetition_penalty = 0.5f + 0.1f * static_cast<float>(below(15));
  if (below(2) == 0) r.params.presence_penalty = 0.3f * static_cast<float>(below(9)) - 1.2f;
  if (below(2) == 0) r.params.frequency_penalty = 0.3f * static_cast<float>(below(9)) - 1.2f;
  if (below(2) == 0) r.masked = {below(40), below(40), kVocab, 0xffffffffu};
  std::set<uint32_t> biased;
  for (uint32_t i = below(5); i-- > 0;) biased.insert(below(40));
  for (uint32_t id : biased) {
    r.params.logit_bias.emplace_back(id, 0.7f * static_cast<float>(below(9)) - 2.8f);
  }
  return r;
}

TEST(DrawRequestTest, EditedLogitsAreThoseOfTheSampler) {
  std::mt19937 random(1);
  DrawRequests requests(kVocab);
  Sampler sampler;
  for (int turn = 0; turn < 2000; ++turn) {
    const Request request = RandomRequest(random);
    std::vector<float> logits(kVocab);
    for (float& l : logits) l = std::normal_distribution<float>(0, 2)(random);
    std::vector<float> want = logits;
    // The sampler changes the logits that it is given.
    const uint32_t token = sampler.Sample(absl::MakeSpan(want), request.Face()).id;
    std::vector<LogitEdit> edits(3);  // of others
    const Draw draw = requests.Make(request.Face(), &edits);
    ASSERT_EQ(draw.edit_count + 3, edits.size());
    for (size_t i = 3; i < edits.size(); ++i) {
      float& logit = logits[edits[i].id];
      logit = EditedLogit(logit, edits[i], draw.repetition_penalty);
    }
    ASSERT_EQ(logits, want) << turn;
    Best best = {-INFINITY, 0xffffffffu};
    for (uint32_t i = 0; i < kVocab; ++i) best = Better(best, {logits[i], i});
    ASSERT_EQ(best.id, token);
    EXPECT_EQ(draw.inverse_temperature, 0.0f);
  }
}

TEST(DrawRequestTest, WorksOutWhatTheDrawNeeds) {
  Request request;
  request.params = {.temperature = 0.5f, .top_k = 7, .top_p = 0.9f, .min_p = 0.1f, .seed = 42};
  request.emitted = {1, 2, 3};
  DrawRequests requests(kVocab);
  std::vector<LogitEdit> edits;
  Draw draw = requests.Make(request.Face(), &edits);
  EXPECT_EQ(draw.inverse_temperature, 2.0f);
  EXPECT_EQ(draw.top_k, 7u);
  EXPECT_EQ(draw.top_p, 0.9f);
  EXPECT_EQ(draw.least, std::log(0.1f));
  EXPECT_EQ(draw.u, PhiloxUniform(42, 3));
  EXPECT_TRUE(edits.empty());  // no penalties: what was emitted does not matter
  request.params.min_p = 0;
  draw = requests.Make(request.Face(), &edits);
  EXPECT_EQ(draw.least, -std::numeric_limits<float>::infinity());
  request.params.min_p = 3;  // the best token always stays
  EXPECT_EQ(requests.Make(request.Face(), &edits).least, 0.0f);
  EXPECT_TRUE(DeviceDraws(request.Face()));
  request.params.logprobs = true;
  EXPECT_FALSE(DeviceDraws(request.Face()));
}

TEST(DrawRequestTest, TheExponentialHasTheBitsOfTheCpusKernels) {
  const cpu::Kernels& math = *cpu::GrantedKernels().front();
  const auto check = [&](float x) {
    const float want = static_cast<float>(math.sum_exp(&x, 1, 0));
    const float got = SamplerExp(x);
    ASSERT_EQ(std::memcmp(&want, &got, sizeof(want)), 0) << x << ": " << want << ", " << got;
  };
  std::mt19937 random(2);
  for (int i = 0; i < 200000; ++i) check(-88.0f * static_cast<float>(random()) / 4294967296.0f);
  for (float x : {0.0f, -0.0f, -1e-30f, -87.0f, -87.00001f, -1e30f}) check(x);
  check(-std::numeric_limits<float>::infinity());
}

}  // namespace
}  // namespace antiphon::engine::cuda
