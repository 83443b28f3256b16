// The CUDA engine behind ModelRunner. Where there is no device the tests that need one are skipped;
// what a machine without a GPU is told is tested everywhere.
#include "engine/cuda/cuda_runner.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "engine/cpu/cpu_runner.h"
#include "model/hf_folder.h"
#include "tests/engine/golden.h"
#include "tests/engine/harness.h"
#include "tests/engine/tiny_model.h"
#include "tests/model/hf_builder.h"

namespace antiphon::engine {
namespace {

using ::testing::HasSubstr;

// `transformers` 5.19 in bfloat16 on the same weights and the same 2,048 tokens, on a CPU.
constexpr double kTransformersBf16Kl = 8.71e-4;

std::string Module() {
  const char* path = std::getenv("ANTIPHON_CUDA_MODULE");
  return path == nullptr ? "" : path;
}

bool HasDevice() {
  std::string description;
  const absl::Status status = FindCudaDevice(Module(), 0, &description);
  if (!status.ok()) std::printf("%s\n", std::string(status.message()).c_str());
  return status.ok();
}

TEST(CudaRunnerTest, SaysWhyThereIsNoDevice) {
  std::string description;
  EXPECT_THAT(
      std::string(FindCudaDevice("/nowhere/libantiphon_cuda.so", 0, &description).message()),
      HasSubstr("/nowhere/libantiphon_cuda.so"));
  const absl::Status status = FindCudaDevice(Module(), 9999, &description);
  EXPECT_FALSE(status.ok());
  EXPECT_FALSE(std::string(status.message()).empty());
  std::printf("%s\n", std::string(status.message()).c_str());
}

TEST(CudaRunnerTest, RefusesAFileThatIsNoModule) {
  const std::string path = testing::TempDir() + "/not_a_module.so";
  std::FILE* file = std::fopen(path.c_str(), "w");
  std::fputs("this is text", file);
  std::fclose(file);
  std::string description;
  const absl::Status status = FindCudaDevice(path, 0, &description);
  EXPECT_TRUE(absl::IsFailedPrecondition(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("does not load"));
}

// ||a - b|| / ||b||
double Distance(const std::vector<float>& a, const std::vector<double>& b) {
  double error = 0, size = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    error += (double{a[i]} - b[i]) * (double{a[i]} - b[i]);
    size += b[i] * b[i];
  }
  return std::sqrt(error / size);
}

class OnDevice : public testing::Test {
 protected:
  void SetUp() override {
    if (!HasDevice()) GTEST_SKIP();
  }
  static std::unique_ptr<ModelRunner> Make(const model::ModelFile* file) {
    CudaRunnerOptions options;
    options.module_path = Module();
    options.memory_fraction = 0.3;
    auto runner = MakeCudaRunner(file, options);
    EXPECT_TRUE(runner.ok()) << runner.status().ToString();
    return runner.ok() ? *std::move(runner) : nullptr;
  }
};

// Parameters of every kind in turn.
SamplingParams ParamsOf(uint32_t i) {
  SamplingParams p;
  p.seed = 100 + i;
  p.temperature = i % 11 == 0 ? 0.0f : 0.4f + 0.1f * static_cast<float>(i % 12);
  if (i % 3 == 1) p.top_p = 0.5f + 0.05f * static_cast<float>(i % 10);
  if (i % 5 == 2) p.top_k = 1 + i % 70;
  if (i % 7 == 3) p.min_p = 0.01f * static_cast<float>(1 + i % 9);
  if (i % 4 == 1) p.repetition_penalty = 1.5f;
  if (i % 4 == 2) p.presence_penalty = 1.5f;
  if (i % 8 == 4) p.frequency_penalty = 0.7f;
  if (i % 9 == 5) p.logit_bias = {{3, 100.0f}, {4, 99.5f}};
  if (i % 13 == 6) {
    p.logprobs = true;
    p.top_logprobs = 4;
  }
  return p;
}

// `count` draws behind the same tokens, in one step, against the sampler's from that step's logits.
void CompareDraws(ModelRunner& runner, const std::vector<uint32_t>& tokens, uint32_t count) {
  std::vector<SamplingParams> all;
  for (uint32_t i = 0; i < count; ++i) all.push_back(ParamsOf(i));
  Sampler sampler;
  std::set<uint32_t> different;
  // As many rows as tokens: the product then has one shape for the draws' logits and for those that
  // come back, and rounds them alike.
  const auto rows = static_cast<uint32_t>(tokens.size());
  for (uint32_t first = 0; first < count; first += rows) {
    std::vector<TestCache> caches;
    for (uint32_t i = 0; i <= rows; ++i) caches.emplace_back(runner.layout(), tokens.size());
    Step step;
    for (uint32_t i = 0; i < std::min(rows, count - first); ++i) {
      step.chunks.push_back(
          {.sequence = first + i,
           .tokens = tokens,
           .start = 0,
           .blocks = caches[i].blocks(),
           .sample = SampleRequest{
               .params = &all[first + i], .prompt_ids = tokens, .emitted_ids = tokens}});
    }
    step.chunks.push_back({.sequence = 100000 + first,
                           .tokens = tokens,
                           .start = 0,
                           .blocks = caches[rows].blocks(),
                           .want_logits = true});
    const StepResult result = RunStep(runner, step);
    const auto& logits = result.chunks.back().logits;
    const size_t vocab = runner.shape().vocab;
    ASSERT_EQ(logits.size(), tokens.size() * vocab);
    for (size_t i = 0; i + 1 < step.chunks.size(); ++i) {
      SCOPED_TRACE(first + i);
      std::vector<float> last(logits.end() - static_cast<ptrdiff_t>(vocab), logits.end());
      const SampledToken want = sampler.Sample(absl::MakeSpan(last), *step.chunks[i].sample);
      ASSERT_TRUE(result.chunks[i].sampled.has_value());
      EXPECT_EQ(result.chunks[i].sampled->id, want.id);
      EXPECT_NEAR(result.chunks[i].sampled->logprob, want.logprob, 1e-3);
      EXPECT_EQ(result.chunks[i].sampled->top.size(), want.top.size());
      different.insert(want.id);
    }
  }
  EXPECT_GT(different.size(), 5u);
}

TEST_F(OnDevice, ModelsOfEveryFormatAndFamilyMatchTheReference) {
  using model::TensorType;
  for (TensorType type : {TensorType::kF32, TensorType::kF16, TensorType::kBF16, TensorType::kQ8_0,
                          TensorType::kQ4_1, TensorType::kQ4_K, TensorType::kQ6_K}) {
    for (const char* family : {"llama", "qwen2"}) {
      SCOPED_TRACE(model::TensorTypeName(type) + " " + family);
      const TinyOptions tiny = {.architecture = family,
                                .type = type,
                                .tied = type != TensorType::kF16,
                                .rope_freqs = std::string(family) == "llama"};
      const std::string bytes = TinyModelFile(tiny);
      const auto file = model::ParseGguf(bytes);
      ASSERT_TRUE(file.ok());
      const auto runner = Make(file->get());
      ASSERT_NE(runner, nullptr);
      std::vector<uint32_t> tokens;
      for (uint32_t i = 0; i < 70; ++i) tokens.push_back(i * 31 % model::kTinyVocabulary);
      TestCache cache(runner->layout(), tokens.size());
      const std::vector<float> logits = AllLogits(*runner, tokens, {33, 20, 1}, cache);
      // Random Q4_K blocks have large means that cancel in products: their rounding weighs double.
      const double bound = type == TensorType::kQ4_K ? 5e-2 : 2e-2;
      EXPECT_LE(Distance(logits, ReferenceModel(**file).Logits(tokens)), bound);
    }
  }
}

TEST_F(OnDevice, AHuggingFaceFolderMatchesTheReference) {
  for (const char* family : {"llama", "qwen2"}) {
    SCOPED_TRACE(family);
    const std::string bytes =
        TinyModelFile({.architecture = family, .type = model::TensorType::kBF16});
    const auto gguf = model::ParseGguf(bytes);
    ASSERT_TRUE(gguf.ok());
    const model::HfFiles files = model::HfFolderOf(**gguf);
    const auto folder = model::ParseHfFolder(files);
    ASSERT_TRUE(folder.ok()) << folder.status().ToString();
    const auto runner = Make(folder->get());
    ASSERT_NE(runner, nullptr);
    std::vector<uint32_t> tokens;
    for (uint32_t i = 0; i < 70; ++i) tokens.push_back(i * 31 % model::kTinyVocabulary);
    TestCache cache(runner->layout(), tokens.size());
    const std::vector<float> logits = AllLogits(*runner, tokens, {33, 20, 1}, cache);
    EXPECT_LE(Distance(logits, ReferenceModel(**gguf).Logits(tokens)), 2e-2);
  }
}

TEST_F(OnDevice, DrawsWhatTheCpusSamplerDrawsFromTheSameLogits) {
  const std::string bytes = TinyModelFile({.type = model::TensorType::kBF16});
  const auto file = model::ParseGguf(bytes);
  ASSERT_TRUE(file.ok());
  const auto runner = Make(file->get());
  ASSERT_NE(runner, nullptr);
  CompareDraws(*runner, {5, 9, 2, 200, 17}, 200);
}

TEST_F(OnDevice, DrawsFromTheSmallModelAsTheCpusSampler) {
  if (ShippedModel() == nullptr) GTEST_SKIP() << "no ANTIPHON_MODEL";
  const auto runner = Make(ShippedModel());
  ASSERT_NE(runner, nullptr);
  // After a text, where little is likely, and after noise, where much is.
  const Golden golden = ReadGolden();
  CompareDraws(*runner, {golden.tokens.begin(), golden.tokens.begin() + 24}, 400);
  CompareDraws(*runner, {30000, 17, 41234, 9, 555, 12000, 8, 40000}, 400);
}

TEST_F(OnDevice, MakesTheChecksumsOfTheBlocksThatItWrites) {
  const std::string bytes = TinyModelFile({.type = model::TensorType::kBF16});
  const auto file = model::ParseGguf(bytes);
  ASSERT_TRUE(file.ok());
  const auto runner = Make(file->get());
  ASSERT_NE(runner, nullptr);
  ASSERT_TRUE(runner->shape().makes_checksums);
  const KvLayout& layout = runner->layout();
  std::vector<uint32_t> tokens;
  for (uint32_t i = 0; i < 41; ++i) tokens.push_back(i * 31 % model::kTinyVocabulary);
  TestCache cache(layout, tokens.size());
  // A prompt that ends inside a block, then rows behind it.
  uint32_t start = 0;
  for (uint32_t end : {39u, 40u, 41u}) {
    const uint32_t first = start / layout.block_tokens, blocks = layout.BlocksFor(end) - first;
    std::vector<uint64_t> sums(size_t{blocks} * layout.layers, 1);
    SequenceChunk chunk;
    chunk.tokens = absl::MakeConstSpan(tokens).subspan(start, end - start);
    chunk.start = start;
    chunk.blocks = cache.blocks().first(layout.BlocksFor(end));
    chunk.checksums = absl::MakeSpan(sums);
    (void)RunStep(*runner, Step{{chunk}});
    for (uint32_t b = 0; b < blocks; ++b) {
      const uint32_t filled =
          std::min(layout.block_tokens, end - (first + b) * layout.block_tokens);
      for (uint32_t layer = 0; layer < layout.layers; ++layer) {
        EXPECT_EQ(
            sums[size_t{b} * layout.layers + layer],
            LayerChecksum(layout, cache.blocks()[first + b] + layer * layout.layer_bytes(), filled))
            << "tokens up to " << end << ", block " << first + b << ", layer " << layer;
      }
    }
    start = end;
  }
}

TEST_F(OnDevice, RefusesWhatTheCpuEngineRefuses) {
  const std::string bytes = TinyModelFile({});
  const auto file = model::ParseGguf(bytes);
  ASSERT_TRUE(file.ok());
  const auto runner = Make(file->get());
  ASSERT_NE(runner, nullptr);
  const std::vector<uint32_t> tokens = {5, model::kTinyVocabulary};
  TestCache cache(runner->layout(), 2);
  const absl::Status status =
      runner->Submit({{{.tokens = tokens, .start = 0, .blocks = cache.blocks()}}});
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status.ToString();
  EXPECT_TRUE(runner->Health().ok());
}

TEST_F(OnDevice, TheSmallModelIsNoFurtherFromFloatThanTransformersInBf16) {
  const Golden golden = ReadGolden();
  if (ShippedModel() == nullptr) GTEST_SKIP() << "no ANTIPHON_MODEL";
  const auto runner = Make(ShippedModel());
  ASSERT_NE(runner, nullptr);
  ASSERT_EQ(runner->shape().vocab, golden.vocab);
  for (size_t chunk : {512, 77}) {
    TestCache cache(runner->layout(), golden.tokens.size());
    const Accuracy a = Measure(golden, AllLogits(*runner, golden.tokens, {chunk}, cache));
    std::printf("chunks of %zu: top-1 %.4f, clear %.4f, mean KL %.3e, p99 %.3e\n", chunk,
                a.agreement, a.clear_agreement, a.kl, a.kl_p99);
    EXPECT_LE(a.kl, kTransformersBf16Kl);
  }
}

}  // namespace
}  // namespace antiphon::engine
