// What a step takes from the heap once the engine is warm: every allocation of the process is
// counted here, by replacing operator new.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "engine/cpu/cpu_runner.h"
#include "engine/sampler.h"
#include "tests/engine/harness.h"
#include "tests/engine/random.h"
#include "tests/engine/tiny_model.h"

namespace {

std::atomic<uint64_t> allocations = 0;

}  // namespace

// All forms but the array ones, which call these, or are a pair of their own in a sanitizer's run
// time. Not inlined: g++ 12 would take free for the wrong partner of new.
[[gnu::noinline]] void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  ++allocations;
  return std::malloc(bytes);
}
[[gnu::noinline]] void* operator new(size_t bytes, std::align_val_t alignment,
                                     const std::nothrow_t&) noexcept {
  ++allocations;
  const size_t unit = static_cast<size_t>(alignment);
  return std::aligned_alloc(unit, (bytes + unit - 1) / unit * unit);
}
[[gnu::noinline]] void* operator new(size_t bytes) {
  if (void* memory = operator new(bytes, std::nothrow); memory != nullptr) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(size_t bytes, std::align_val_t alignment) {
  void* memory = operator new(bytes, alignment, std::nothrow);
  if (memory != nullptr) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, const std::nothrow_t&) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, std::align_val_t) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, size_t, std::align_val_t) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, std::align_val_t,
                                       const std::nothrow_t&) noexcept {
  std::free(memory);
}

namespace antiphon::engine {
namespace {

// Greedy and drawn, with everything that the sampler keeps lists for.
std::vector<SamplingParams> AllKinds() {
  return {{.temperature = 0},
          {.temperature = 0.8f},
          {.top_p = 0.95f},
          {.temperature = 1.5f, .top_p = 0.95f},
          {.top_k = 50},
          {.min_p = 0.02f},
          {.repetition_penalty = 1.2f},
          {.frequency_penalty = 0.3f},
          {.logit_bias = {{5, 2.0f}}}};
}

TEST(AllocationsTest, AWarmSamplerTakesNothing) {
  const std::vector<float> logits = TestRandom(5).Normals(49152, 3);
  const std::vector<SamplingParams> kinds = AllKinds();
  const std::vector<uint32_t> prompt = {1, 2, 3}, emitted = {3, 7, 7};
  Sampler sampler;
  std::vector<float> x;
  const auto taken = [&](const SamplingParams& params) {
    x = logits;
    const uint64_t before = allocations;
    sampler.Sample(absl::MakeSpan(x),
                   {.params = &params, .prompt_ids = prompt, .emitted_ids = emitted});
    return allocations - before;
  };
  uint64_t cold = 0;
  for (const SamplingParams& params : kinds) cold += taken(params);
  EXPECT_GT(cold, 0u);
  for (size_t i = 0; i < kinds.size(); ++i) EXPECT_EQ(taken(kinds[i]), 0u) << "kind " << i;
}

// Of a step that was made beforehand, from Submit until its result is taken, on all threads: the
// list of the rows' results, which the caller keeps, and nothing else. Of two threads either may
// meet a kind of draw for the first time in any step, so the least of them counts.
class WarmStepTest : public testing::TestWithParam<std::tuple<model::TensorType, int>> {};

TEST_P(WarmStepTest, TakesTheListOfResultsAlone) {
  constexpr uint32_t kContext = 700;
  const auto [type, threads] = GetParam();
  const std::string bytes = TinyModelFile({.type = type});
  absl::StatusOr<std::unique_ptr<model::ModelFile>> file = model::ParseGguf(bytes);
  ASSERT_TRUE(file.ok()) << file.status().ToString();
  const std::unique_ptr<ModelRunner> runner =
      MakeRunner(file->get(), {.step_tokens_max = kContext, .threads = threads});
  ASSERT_NE(runner, nullptr);
  std::vector<uint32_t> tokens(kContext + 1);
  TestRandom random(3);
  for (uint32_t& token : tokens) token = random.Below(runner->shape().vocab);
  const std::vector<SamplingParams> kinds = AllKinds();
  std::vector<std::unique_ptr<TestCache>> caches;
  const auto chunk = [&](size_t i, uint32_t start, uint32_t count) {
    return SequenceChunk{.sequence = i,
                         .tokens = absl::MakeConstSpan(tokens).subspan(start, count),
                         .start = start,
                         .blocks = caches[i]->blocks(),
                         .sample = SampleRequest{.params = &kinds[i % kinds.size()]}};
  };
  for (const size_t rows : {1, 4, 16}) {
    while (caches.size() < rows) {
      caches.push_back(std::make_unique<TestCache>(runner->layout(), tokens.size()));
      RunStep(*runner, Step{{chunk(caches.size() - 1, 0, kContext)}});
    }
    std::vector<SequenceChunk> chunks;
    for (size_t i = 0; i < rows; ++i) chunks.push_back(chunk(i, kContext, 1));
    uint64_t least = UINT64_MAX, most = 0;
    for (int i = 0; i < 20; ++i) {
      Step step{chunks};
      const uint64_t before = allocations;
      const StepResult result = RunStep(*runner, std::move(step));
      const uint64_t taken = allocations - before;
      ASSERT_EQ(result.chunks.size(), rows);
      if (i == 0) continue;  // grows its lists
      least = std::min(least, taken);
      most = std::max(most, taken);
    }
    EXPECT_EQ(threads == 1 ? most : least, 1u) << rows << " rows";
  }
}

INSTANTIATE_TEST_SUITE_P(FormatsAndThreads, WarmStepTest,
                         testing::Combine(testing::Values(model::TensorType::kQ4_0,
                                                          model::TensorType::kQ4_K,
                                                          model::TensorType::kBF16),
                                          testing::Values(1, 2)),
                         [](const auto& info) {
                           return model::TensorTypeName(std::get<0>(info.param)) + "_" +
                                  std::to_string(std::get<1>(info.param));
                         });

}  // namespace
}  // namespace antiphon::engine
