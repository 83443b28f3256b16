// A model from a Hugging Face folder and from GGUF is the same model: the formats differ in names,
// in the order of dimensions, in the rows of llama's q and k and in how scaled rope is written.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <numbers>
#include <string>
#include <vector>

#include "engine/cpu/isa.h"
#include "model/gguf.h"
#include "model/hf_folder.h"
#include "tests/engine/harness.h"
#include "tests/engine/tiny_model.h"
#include "tests/model/hf_builder.h"

namespace antiphon::engine {
namespace {

using model::TensorType;

std::vector<uint32_t> Tokens(size_t n) {
  TestRandom random(7);
  std::vector<uint32_t> tokens(n);
  for (uint32_t& t : tokens) t = random.Below(model::kTinyVocabulary);
  return tokens;
}

std::vector<float> LogitsOf(const model::ModelFile& file, const std::vector<uint32_t>& tokens,
                            Activations activations) {
  const auto runner = MakeRunner(&file, {.step_tokens_max = 64, .activations = activations});
  if (runner == nullptr) return {};
  TestCache cache(runner->layout(), tokens.size());
  return AllLogits(*runner, tokens, {13, 1, 50}, cache);
}

std::unique_ptr<model::ModelFile> Open(absl::StatusOr<std::unique_ptr<model::ModelFile>> file) {
  EXPECT_TRUE(file.ok()) << file.status().ToString();
  return file.ok() ? *std::move(file) : nullptr;
}

void ExpectTheSameBits(const TinyOptions& options) {
  const std::string bytes = TinyModelFile(options);
  const auto gguf = Open(model::ParseGguf(bytes));
  const model::HfFiles files = model::HfFolderOf(*gguf);
  const auto folder = Open(model::ParseHfFolder(files));
  ASSERT_NE(folder, nullptr);
  const auto shape = model::LlamaShapeOf(*folder);
  ASSERT_TRUE(shape.ok()) << shape.status().ToString();
  EXPECT_FALSE(shape->rope_interleaved);
  const std::vector<uint32_t> tokens = Tokens(70);
  for (Activations activations : {Activations::kFast, Activations::kFloat}) {
    const std::vector<float> want = LogitsOf(*gguf, tokens, activations);
    ASSERT_FALSE(want.empty());
    EXPECT_TRUE(LogitsOf(*folder, tokens, activations) == want);
  }
}

TEST(HfModelTest, TheFolderGivesTheBitsOfTheGguf) {
  for (TensorType type : {TensorType::kF32, TensorType::kF16, TensorType::kBF16}) {
    SCOPED_TRACE(model::TensorTypeName(type));
    ExpectTheSameBits({.type = type});
    ExpectTheSameBits({.architecture = "qwen2", .type = type});
  }
}

TEST(HfModelTest, UntiedOutputsAndLinearScalingAreTheSame) {
  ExpectTheSameBits({.type = TensorType::kBF16, .tied = false});
  ExpectTheSameBits({.linear_scale = 4});
}

TEST(HfModelTest, HeadsOfAnOddWidthAreTheSame) {
  ExpectTheSameBits({.hidden = 60, .feed_forward = 100, .heads = 3, .kv_heads = 1});
}

// Old writers do not pad the header, so that the weights lie at odd addresses.
TEST(HfModelTest, WeightsMayLieAnywhere) {
  const std::string bytes = TinyModelFile({.type = TensorType::kBF16});
  const auto gguf = Open(model::ParseGguf(bytes));
  model::HfFiles files = model::HfFolderOf(*gguf);
  std::string& weights = files["model.safetensors"];
  uint64_t header = 0;
  std::memcpy(&header, weights.data(), 8);
  weights.insert(8 + header, 1, ' ');
  ++header;
  std::memcpy(weights.data(), &header, 8);
  const auto folder = Open(model::ParseHfFolder(files));
  ASSERT_NE(folder, nullptr);
  const std::vector<uint32_t> tokens = Tokens(20);
  EXPECT_TRUE(LogitsOf(*folder, tokens, Activations::kFast) ==
              LogitsOf(*gguf, tokens, Activations::kFast));
}

// The angles of Llama 3's rope, from the definition: by wave lengths, as its authors wrote it.
std::vector<double> Llama3Frequencies(size_t pairs, double base) {
  const double factor = 8, low = 1, high = 4, context = 64;
  std::vector<double> frequencies;
  for (size_t i = 0; i < pairs; ++i) {
    const double plain = std::pow(base, -static_cast<double>(i) / static_cast<double>(pairs));
    const double wave = 2 * std::numbers::pi / plain;
    if (wave < context / high) {
      frequencies.push_back(plain);
    } else if (wave > context / low) {
      frequencies.push_back(plain / factor);
    } else {
      const double smooth = (context / wave - low) / (high - low);
      frequencies.push_back((1 - smooth) * plain / factor + smooth * plain);
    }
  }
  return frequencies;
}

TEST(HfModelTest, Llama3ScalingTurnsTheAnglesOfItsDefinition) {
  const std::string bytes = TinyModelFile({});
  const auto gguf = Open(model::ParseGguf(bytes));
  for (const char* section : {"rope_scaling", "rope_parameters"}) {
    SCOPED_TRACE(section);
    model::HfFiles files = model::HfFolderOf(*gguf);
    model::JsonObject config = model::HfConfigOf(*gguf);
    config[section] = boost::json::parse(
        R"({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64})");
    files["config.json"] = boost::json::serialize(config);
    const auto folder = Open(model::ParseHfFolder(files));
    ASSERT_NE(folder, nullptr);
    const model::Tensor* divisors = folder->FindTensor("rope_freqs.weight");
    ASSERT_NE(divisors, nullptr);
    ASSERT_EQ(divisors->dims, (std::vector<uint64_t>{32}));
    const std::vector<double> want = Llama3Frequencies(32, 10000);
    for (size_t i = 0; i < want.size(); ++i) {
      float divisor = 0;
      std::memcpy(&divisor, divisors->data + 4 * i, 4);
      const double plain = std::pow(10000.0, -static_cast<double>(i) / 32);
      EXPECT_NEAR(plain / double{divisor} / want[i], 1, 1e-6) << i;
    }
    const std::vector<uint32_t> tokens = Tokens(70);
    const std::vector<float> got = LogitsOf(*folder, tokens, Activations::kFloat);
    const std::vector<double> reference = ReferenceModel(*folder).Logits(tokens);
    ASSERT_EQ(got.size(), reference.size());
    double error = 0, size = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      error += (double{got[i]} - reference[i]) * (double{got[i]} - reference[i]);
      size += reference[i] * reference[i];
    }
    EXPECT_LE(std::sqrt(error / size), 1e-5);
    EXPECT_FALSE(got == LogitsOf(*gguf, tokens, Activations::kFloat));
  }
}

}  // namespace
}  // namespace antiphon::engine
