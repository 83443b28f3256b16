// The whole forward pass on small models against double precision, in every weight format and for
// what the families differ in.
#include "tests/engine/tiny_model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "engine/cpu/isa.h"
#include "tests/engine/harness.h"

namespace antiphon::engine {
namespace {

using model::TensorType;

const std::vector<TensorType>& AllTypes() {
  static const auto* const types = new std::vector<TensorType>{
      TensorType::kF32,  TensorType::kF16,  TensorType::kBF16, TensorType::kQ8_0,
      TensorType::kQ4_0, TensorType::kQ4_1, TensorType::kQ5_0, TensorType::kQ5_1,
      TensorType::kQ4_K, TensorType::kQ5_K, TensorType::kQ6_K};
  return *types;
}

std::vector<uint32_t> Tokens(size_t n) {
  TestRandom random(7);
  std::vector<uint32_t> tokens(n);
  for (uint32_t& t : tokens) t = random.Below(model::kTinyVocabulary);
  return tokens;
}

struct TinyRun {
  explicit TinyRun(const TinyOptions& options) : bytes(TinyModelFile(options)) {
    auto parsed = model::ParseGguf(bytes);
    EXPECT_TRUE(parsed.ok()) << parsed.status().ToString();
    file = *std::move(parsed);
  }
  std::vector<float> Logits(CpuRunnerOptions options, const std::vector<uint32_t>& tokens,
                            const std::vector<size_t>& chunks = {13, 1, 50}) const {
    options.step_tokens_max =
        std::max(64u, static_cast<uint32_t>(*std::max_element(chunks.begin(), chunks.end())));
    const std::unique_ptr<ModelRunner> runner = MakeRunner(file.get(), options);
    if (runner == nullptr) return {};
    TestCache cache(runner->layout(), tokens.size());
    return AllLogits(*runner, tokens, chunks, cache);
  }
  std::string bytes;
  std::unique_ptr<model::ModelFile> file;
};

// Root mean square of the difference over that of the reference.
double RelativeError(const std::vector<float>& got, const std::vector<double>& want) {
  EXPECT_EQ(got.size(), want.size());
  if (got.size() != want.size()) return INFINITY;
  double error = 0, size = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    error += (double{got[i]} - want[i]) * (double{got[i]} - want[i]);
    size += want[i] * want[i];
  }
  return std::sqrt(error / size);
}

void ExpectCloseToReference(const TinyOptions& options, double fast_error = 0.03) {
  const TinyRun run(options);
  const std::vector<uint32_t> tokens = Tokens(70);
  const std::vector<double> want = ReferenceModel(*run.file).Logits(tokens);
  EXPECT_LE(RelativeError(run.Logits({.activations = Activations::kFloat}, tokens), want), 1e-5);
  EXPECT_LE(RelativeError(run.Logits({}, tokens), want), fast_error);
}

TEST(TinyModelTest, EveryWeightFormatGivesTheReferencesLogits) {
  for (TensorType type : AllTypes()) {
    SCOPED_TRACE(model::TensorTypeName(type));
    // The products of the K formats are as close as those of the others (kernels_test); their
    // models here are wider and make more of the rounding of activations, queries and weights of
    // attention.
    const bool k_format = model::TraitsOf(type).block_elements == 256;
    ExpectCloseToReference({.type = type}, k_format ? 0.045 : 0.03);
  }
}

TEST(TinyModelTest, AnAwaitIsInterrupted) {
  const TinyRun run({});
  const std::unique_ptr<ModelRunner> runner = MakeRunner(run.file.get(), {});
  ASSERT_NE(runner, nullptr);
  constexpr absl::Duration kLong = absl::Seconds(60);
  const absl::Time begin = absl::Now();
  runner->Interrupt();  // ahead of it
  EXPECT_FALSE(runner->Await({}, kLong).finished);
  std::thread other([&] {
    absl::SleepFor(absl::Milliseconds(20));
    runner->Interrupt();
  });
  EXPECT_FALSE(runner->Await({}, kLong).finished);
  other.join();
  EXPECT_LT(absl::Now() - begin, kLong / 2);
  // Each ends one: the next waits again.
  const absl::Time again = absl::Now();
  runner->Await({}, absl::Milliseconds(30));
  EXPECT_GE(absl::Now() - again, absl::Milliseconds(30));
}

TEST(TinyModelTest, Qwen2AddsItsBiasesAndRotatesHalves) {
  ExpectCloseToReference({.architecture = "qwen2"});
  ExpectCloseToReference({.architecture = "qwen2", .type = TensorType::kQ8_0});
}

TEST(TinyModelTest, AnUntiedOutputIsUsed) {
  ExpectCloseToReference({.type = TensorType::kQ4_1, .tied = false});
}

TEST(TinyModelTest, RopeDivisorsAndLinearScalingTurnTheAngles) {
  ExpectCloseToReference({.rope_freqs = true});
  ExpectCloseToReference({.linear_scale = 4});
}

TEST(TinyModelTest, PartOfAHeadMayBeRotated) {
  ExpectCloseToReference({.rope_dims = 32});
  ExpectCloseToReference({.architecture = "qwen2", .rope_dims = 16});
}

TEST(TinyModelTest, OddWidthsArePadded) {
  // Heads of 20, rows of 60 and 100: no multiple of 16 anywhere.
  ExpectCloseToReference({.hidden = 60, .feed_forward = 100, .heads = 3, .kv_heads = 1});
  ExpectCloseToReference(
      {.type = TensorType::kBF16, .hidden = 144, .feed_forward = 200, .heads = 3, .kv_heads = 3});
}

TEST(TinyModelTest, EveryInstructionSetGivesTheSameBits) {
  const std::vector<uint32_t> tokens = Tokens(70);
  for (TensorType type : AllTypes()) {
    SCOPED_TRACE(model::TensorTypeName(type));
    const TinyRun run({.type = type});
    const std::vector<float> want = run.Logits({.instruction_set = "scalar"}, tokens);
    for (const cpu::Kernels* kernels : cpu::GrantedKernels()) {
      EXPECT_EQ(run.Logits({.instruction_set = kernels->name}, tokens), want) << kernels->name;
    }
  }
}

TEST(TinyModelTest, ChunksAndThreadsDoNotChangeABitInAnyFormat) {
  const std::vector<uint32_t> tokens = Tokens(70);
  for (TensorType type : AllTypes()) {
    SCOPED_TRACE(model::TensorTypeName(type));
    const TinyRun run({.type = type});
    const std::vector<float> want = run.Logits({.threads = 1}, tokens);
    for (const std::vector<size_t>& chunks :
         {std::vector<size_t>{1}, {64, 6}, {17, 2, 31}, {5, 16}}) {
      EXPECT_TRUE(run.Logits({.threads = 3}, tokens, chunks) == want) << chunks[0];
    }
  }
}

// Past 1,024 tokens a lone row's context is cut into pieces, as many as the threads call for.
TEST(TinyModelTest, ThreadsShareALongContextWithoutChangingABit) {
  const std::vector<uint32_t> tokens = Tokens(1500);
  const TinyRun run({.heads = 4, .kv_heads = 2});
  const std::vector<float> want = run.Logits({.threads = 1}, tokens);
  for (int threads : {2, 3, 5}) {
    EXPECT_TRUE(run.Logits({.threads = threads}, tokens) == want) << threads;
  }
}

// Enough rows for strips, which see each other's keys.
TEST(TinyModelTest, ALongChunkIsEqualToShortOnes) {
  const TinyRun run({.type = TensorType::kQ4_0});
  const std::vector<uint32_t> tokens = Tokens(1300);
  const std::vector<float> want = run.Logits({.threads = 1}, tokens, {20});
  for (int threads : {1, 2, 5}) {
    for (size_t chunk : {511, 512, 600, 1300}) {
      EXPECT_EQ(run.Logits({.threads = threads}, tokens, {chunk}), want)
          << chunk << " tokens on " << threads << " threads";
    }
  }
}

// As few strips as there may be, on more threads than there are cores: a thread that loses its core
// leaves a strip behind while the others run ahead.
TEST(TinyModelTest, StripsWaitForWhatTheyRead) {
  const TinyRun run({.type = TensorType::kQ4_0, .layers = 6, .hidden = 64, .feed_forward = 64});
  const std::vector<uint32_t> tokens = Tokens(512);
  const std::vector<float> want = run.Logits({.threads = 1}, tokens, {20});
  for (int threads : {2, 4, 8}) {
    CpuRunnerOptions options{.threads = threads};
    options.step_tokens_max = 32 * static_cast<uint32_t>(threads);
    const std::unique_ptr<ModelRunner> runner = MakeRunner(run.file.get(), options);
    ASSERT_NE(runner, nullptr);
    for (int i = 0; i < 50; ++i) {
      TestCache cache(runner->layout(), tokens.size());
      ASSERT_TRUE(AllLogits(*runner, tokens, {options.step_tokens_max}, cache) == want)
          << threads << " threads, round " << i;
    }
  }
}

// With few rows, strips, and buffers that steps take to be zero where nobody has written.
TEST(TinyModelTest, ResultsAreTheSameWhenScratchWasGivenBack) {
  const TinyRun run({.type = TensorType::kQ4_0});
  const std::vector<uint32_t> tokens = Tokens(150);
  const std::vector<size_t> chunks = {13, 1, 130, 6};
  CpuRunnerOptions options{.threads = 2};
  options.step_tokens_max = 150;
  const std::unique_ptr<ModelRunner> runner = MakeRunner(run.file.get(), options);
  ASSERT_NE(runner, nullptr);
  TestCache cache(runner->layout(), tokens.size());
  const std::vector<float> before = AllLogits(*runner, tokens, chunks, cache);
  runner->ReleaseScratch();
  EXPECT_EQ(AllLogits(*runner, tokens, chunks, cache), before);
}

// Of the blocks that chunks write to, when somebody wants them, layer by layer: in strips, in few
// rows together, and of rows that end a block or do not.
TEST(TinyModelTest, ChecksumsAreThoseOfTheBytes) {
  constexpr uint32_t kLayers = 3;
  const TinyRun run({.type = TensorType::kQ4_0, .layers = kLayers});
  const std::vector<uint32_t> tokens = Tokens(400);
  struct Part {
    size_t sequence;
    uint32_t start, end;
    bool wanted;
  };
  const std::vector<std::vector<Part>> steps = {
      {{0, 0, 5, true}},                                          // few rows
      {{0, 5, 250, true}, {1, 0, 33, false}, {2, 0, 100, true}},  // strips
      {{0, 250, 251, true}, {1, 33, 50, true}, {2, 100, 101, true}},
      {{0, 251, 256, true}},
      {{0, 256, 257, true}, {1, 50, 51, false}},
      {{1, 51, 400, true}},
      {{0, 257, 258, false}}};
  for (const int threads : {1, 2, 3}) {
    CpuRunnerOptions options{.threads = threads};
    options.step_tokens_max = 400;
    const std::unique_ptr<ModelRunner> runner = MakeRunner(run.file.get(), options);
    ASSERT_NE(runner, nullptr);
    EXPECT_TRUE(runner->shape().makes_checksums);
    const KvLayout& layout = runner->layout();
    std::vector<TestCache> caches(3, TestCache(layout, 1));
    for (TestCache& cache : caches) cache = TestCache(layout, tokens.size());
    for (size_t number = 0; number < steps.size(); ++number) {
      const std::vector<Part>& parts = steps[number];
      SCOPED_TRACE(testing::Message() << "step " << number << " on " << threads << " threads");
      Step step;
      std::vector<std::vector<uint64_t>> sums(parts.size());
      for (size_t i = 0; i < parts.size(); ++i) {
        const Part& part = parts[i];
        const uint32_t first = part.start / layout.block_tokens;
        SequenceChunk chunk;
        chunk.tokens = absl::MakeConstSpan(tokens).subspan(part.start, part.end - part.start);
        chunk.start = part.start;
        chunk.blocks = caches[part.sequence].blocks();
        if (part.wanted) sums[i].resize((layout.BlocksFor(part.end) - first) * size_t{kLayers});
        chunk.checksums = absl::MakeSpan(sums[i]);
        step.chunks.push_back(chunk);
      }
      ASSERT_TRUE(runner->Submit(std::move(step)).ok());
      // What was there when the engine said that layers were done, and at the end.
      std::vector<std::pair<uint32_t, std::vector<std::vector<uint64_t>>>> seen;
      StepProgress progress;
      while (!progress.finished) {
        progress = runner->Await(progress, absl::Seconds(60));
        if (progress.finished) break;
        std::vector<std::vector<uint64_t>> now;
        for (const std::vector<uint64_t>& of_chunk : sums) {
          std::vector<uint64_t>& known = now.emplace_back(of_chunk.size());
          for (size_t k = 0; k < known.size(); ++k) {
            if (k % kLayers < progress.layers_done) known[k] = of_chunk[k];
          }
        }
        seen.emplace_back(progress.layers_done, std::move(now));
      }
      ASSERT_TRUE(runner->Take().ok());
      seen.emplace_back(kLayers, sums);
      for (const auto& [layers, was] : seen) {
        for (size_t i = 0; i < parts.size(); ++i) {
          const uint32_t first = parts[i].start / layout.block_tokens;
          for (size_t k = 0; k < was[i].size(); ++k) {
            const auto block = first + static_cast<uint32_t>(k / kLayers);
            const auto layer = static_cast<uint32_t>(k % kLayers);
            if (layer >= layers) continue;
            const uint32_t filled =
                std::min(layout.block_tokens, parts[i].end - block * layout.block_tokens);
            const std::byte* payload = caches[parts[i].sequence].blocks()[block];
            EXPECT_EQ(was[i][k],
                      LayerChecksum(layout, payload + layer * layout.layer_bytes(), filled))
                << "chunk " << i << ", block " << block << ", layer " << layer << " of " << layers;
          }
        }
      }
    }
  }
}

// Of many rows the last layer computes only those that are asked for, wherever they stand.
TEST(TinyModelTest, ChunksOfEveryKindShareAStep) {
  const TinyRun run({.type = TensorType::kQ4_0, .layers = 3});
  CpuRunnerOptions options{.threads = 2};
  options.step_tokens_max = 512;
  const std::unique_ptr<ModelRunner> runner = MakeRunner(run.file.get(), options);
  ASSERT_NE(runner, nullptr);
  const SamplingParams greedy{.temperature = 0, .logprobs = true};
  struct Kind {
    size_t start, count;
    bool logits, sample;
  };
  const std::vector<Kind> kinds = {
      {0, 70, false, false}, {33, 1, false, true}, {64, 1, true, true},   {0, 40, true, false},
      {0, 75, false, true},  {10, 1, false, true}, {30, 90, false, false}};
  const std::vector<uint32_t> tokens = Tokens(150);
  const auto run_step = [&](const std::vector<Kind>& of, std::vector<TestCache>& caches) {
    Step step;
    for (size_t i = 0; i < of.size(); ++i) {
      SequenceChunk chunk;
      chunk.tokens = absl::MakeConstSpan(tokens).subspan(of[i].start, of[i].count);
      chunk.start = static_cast<uint32_t>(of[i].start);
      chunk.blocks = caches[i].blocks();
      chunk.want_logits = of[i].logits;
      if (of[i].sample) chunk.sample = SampleRequest{.params = &greedy};
      step.chunks.push_back(chunk);
    }
    EXPECT_TRUE(runner->Submit(std::move(step)).ok());
    StepProgress progress;
    while (!progress.finished) {
      const StepProgress seen = progress;
      progress = runner->Await(progress, absl::Seconds(60));
      EXPECT_GE(progress.layers_done, seen.layers_done);
    }
    EXPECT_EQ(progress.layers_done, 3u);
    return *runner->Take();
  };
  const auto make_caches = [&](const std::vector<Kind>& of) {
    std::vector<TestCache> caches;
    for (const Kind& kind : of) {
      TestCache cache(runner->layout(), tokens.size());
      if (kind.start > 0) {
        AllLogits(*runner, absl::MakeConstSpan(tokens).first(kind.start), {50}, cache);
      }
      caches.push_back(std::move(cache));
    }
    return caches;
  };
  std::vector<TestCache> together = make_caches(kinds);
  const StepResult result = run_step(kinds, together);
  for (size_t i = 0; i < kinds.size(); ++i) {
    std::vector<TestCache> alone = make_caches({kinds[i]});
    const StepResult want = run_step({kinds[i]}, alone);
    EXPECT_TRUE(result.chunks[i].logits == want.chunks[0].logits) << i;
    EXPECT_EQ(result.chunks[i].logits.empty(), !kinds[i].logits) << i;
    ASSERT_EQ(result.chunks[i].sampled.has_value(), kinds[i].sample) << i;
    if (kinds[i].sample) {
      EXPECT_EQ(result.chunks[i].sampled->id, want.chunks[0].sampled->id) << i;
      EXPECT_EQ(result.chunks[i].sampled->logprob, want.chunks[0].sampled->logprob) << i;
    }
    EXPECT_TRUE(together[i].memory() == alone[0].memory()) << i;
  }
}

TEST(TinyModelTest, ATensorOfAWrongSizeIsNamed) {
  model::GgufBuilder builder = model::TinyLlama({.hidden = 64});
  const std::string bytes = builder.Build();
  const auto file = model::ParseGguf(bytes);
  ASSERT_TRUE(file.ok());
  std::string broken = bytes;
  const size_t at = broken.find("blk.1.ffn_up.weight");
  ASSERT_NE(at, std::string::npos);
  broken.replace(at, 19, "blk.1.ffn_xx.weight");
  const auto renamed = model::ParseGguf(broken);
  ASSERT_TRUE(renamed.ok());
  const auto runner = MakeCpuRunner(renamed->get(), {});
  ASSERT_FALSE(runner.ok());
  EXPECT_EQ(runner.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(std::string(runner.status().message()).find("blk.1.ffn_"), std::string::npos)
      << runner.status().ToString();
}

}  // namespace
}  // namespace antiphon::engine
