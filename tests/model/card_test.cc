#include "model/card.h"

#include <cstdlib>
#include <string>

#include "antiphon/v1/model.pb.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/gguf.h"
#include "model/tokenizer.h"
#include "tests/model/gguf_builder.h"

namespace antiphon::model {
namespace {

using ::testing::EndsWith;
using ::testing::HasSubstr;

absl::Status ShapeStatus(const std::string& bytes) {
  const auto file = ParseGguf(bytes);
  if (!file.ok()) return file.status();
  return LlamaShapeOf(**file).status();
}

TEST(CardTest, ReadsTheShapeOfBothFamilies) {
  const std::string llama = TinyLlama().Build();
  const auto file = ParseGguf(llama);
  ASSERT_TRUE(file.ok()) << file.status();
  const auto shape = LlamaShapeOf(**file);
  ASSERT_TRUE(shape.ok()) << shape.status();
  EXPECT_EQ(shape->layers, 2u);
  EXPECT_EQ(shape->head_dim, 16u);
  EXPECT_EQ(shape->rope_dims, 16u);
  EXPECT_EQ(shape->vocab, kTinyVocabulary);
  EXPECT_TRUE(shape->rope_interleaved);
  EXPECT_TRUE(shape->tied_output);
  EXPECT_FALSE(shape->qkv_bias);
  EXPECT_EQ(shape->rope_scale, 1);

  const std::string qwen =
      TinyLlama({.architecture = "qwen2", .pre = "qwen2", .type = TensorType::kQ8_0})
          .Tensor("output.weight", TensorType::kF16, {64, kTinyVocabulary})
          .Tensor("rope_freqs.weight", TensorType::kF32, {8})
          .String("qwen2.rope.scaling.type", "linear")
          .F32("qwen2.rope.scaling.factor", 4)
          .Build();
  const auto second = ParseGguf(qwen);
  ASSERT_TRUE(second.ok()) << second.status();
  const auto other = LlamaShapeOf(**second);
  ASSERT_TRUE(other.ok()) << other.status();
  EXPECT_FALSE(other->rope_interleaved);
  EXPECT_FALSE(other->tied_output);
  EXPECT_TRUE(other->qkv_bias);
  EXPECT_TRUE(other->has_rope_freqs);
  EXPECT_EQ(other->rope_scale, 4);
}

TEST(CardTest, FillsTheCard) {
  const std::string bytes = TinyLlama({.type = TensorType::kQ4_1})
                                .String("tokenizer.chat_template", "{{ messages }}")
                                .F32("general.sampling.temp", 0.5f)
                                .I32("general.sampling.top_k", 40)
                                .Build();
  const auto file = ParseGguf(bytes);
  ASSERT_TRUE(file.ok()) << file.status();
  CardParts parts;
  const auto card = CardOf(**file, "served", parts);
  ASSERT_TRUE(card.ok()) << card.status();
  EXPECT_EQ(card->name(), "served");
  EXPECT_EQ(card->architecture(), "llama");
  EXPECT_EQ(card->display_name(), "tiny");
  EXPECT_EQ(card->quantisation(), "Q4_1");
  EXPECT_EQ(card->context_length(), 128u);
  EXPECT_EQ(card->vocab_size(), kTinyVocabulary);
  EXPECT_EQ(card->sampling().temperature(), 0.5);
  EXPECT_EQ(card->sampling().top_k(), 40);
  EXPECT_EQ(parts.chat_template_blob, "{{ messages }}");
  EXPECT_EQ(card->weights_digest().size(), 64u);
  internal::v1::TokenizerSpec spec;
  ASSERT_TRUE(spec.ParseFromString(parts.tokenizer_blob));
  EXPECT_TRUE(Tokenizer::Create(spec).ok());

  // Another weight, another digest; the same tokenizer.
  const std::string changed = bytes.substr(0, bytes.size() - 1) + "\x01";
  const auto second = ParseGguf(changed);
  ASSERT_TRUE(second.ok()) << second.status();
  const auto other = CardOf(**second, "served", parts);
  ASSERT_TRUE(other.ok()) << other.status();
  EXPECT_NE(other->weights_digest(), card->weights_digest());
  EXPECT_EQ(other->tokenizer_digest(), card->tokenizer_digest());
}

TEST(CardTest, DigestIsTheSha256OfTheFile) {
  const char* model = std::getenv("ANTIPHON_MODEL");
  if (model == nullptr) GTEST_SKIP() << "$ANTIPHON_MODEL is not set";
  const auto file = OpenModelFile(model);
  ASSERT_TRUE(file.ok()) << file.status();
  CardParts parts;
  const auto card = CardOf(**file, "small", parts);
  ASSERT_TRUE(card.ok()) << card.status();
  EXPECT_EQ(card->weights_digest(),
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53");
  EXPECT_EQ(card->parameter_count(), 134'515'008u);
  EXPECT_THAT(Inspect(**file), EndsWith("servable: yes\n"));
}

TEST(CardTest, NamesTheKeyThatCannotBeServed) {
  const std::pair<std::string, const char*> cases[] = {
      {GgufBuilder().Build(), "general.architecture is missing"},
      {TinyLlama({.architecture = "mamba"}).Build(), "general.architecture is \"mamba\""},
      {GgufBuilder().U32("general.architecture", 1).Build(),
       "general.architecture is not a string"},
      {TinyLlama({.layers = 0}).Build(), "llama.block_count is 0"},
      {TinyLlama({.layers = 1}).U32("split.count", 3).Build(), "split.count is 3"},
      {TinyLlama({.heads = 4, .kv_heads = 3}).Build(), "llama.attention.head_count_kv (3)"},
      {TinyLlama().U32("llama.rope.dimension_count", 15).Build(),
       "llama.rope.dimension_count is 15"},
      {TinyLlama().U32("llama.rope.dimension_count", 32).Build(),
       "llama.rope.dimension_count is 32"},
      {TinyLlama().U32("llama.attention.value_length", 8).Build(), "value_length (8)"},
      {TinyLlama().String("llama.rope.scaling.type", "yarn").Build(), "\"yarn\""},
      {TinyLlama().U32("llama.expert_count", 8).Build(), "llama.expert_count is 8"},
      {TinyLlama().U32("llama.attention.sliding_window", 64).Build(), "sliding_window is 64"},
      {TinyLlama().F32("llama.logit_scale", 2).Build(), "llama.logit_scale is 2"},
      {TinyLlama().U32("llama.vocab_size", 100).Build(), "tokens and tensor"},
      {GgufBuilder().String("general.architecture", "llama").Build(),
       "llama.block_count is missing"},
  };
  for (const auto& [bytes, says] : cases) {
    const absl::Status status = ShapeStatus(bytes);
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << says;
    EXPECT_THAT(std::string(status.message()), HasSubstr(says));
  }
}

TEST(CardTest, NamesTheTensorThatCannotBeServed) {
  const std::pair<std::string, const char*> cases[] = {
      {TinyLlama().Tensor("blk.0.attn_q_norm.weight", TensorType::kF32, {16}).Build(),
       "tensor blk.0.attn_q_norm.weight"},
      {TinyLlama().Tensor("blk.0.attn_q.bias", TensorType::kF32, {64}).Build(),
       "tensor blk.0.attn_k.bias is missing"},
      {TinyLlama().Tensor("output.weight", TensorType::kF32, {64, 3}).Build(),
       "tensor output.weight has dimensions [64, 3]"},
      {TinyLlama().Tensor("output.weight", TensorType::kQ8_1, {64, kTinyVocabulary}).Build(),
       "tensor output.weight has type Q8_1"},
      {TinyLlama()
           .Tensor("output.weight", static_cast<TensorType>(19), {64, kTinyVocabulary}, "data")
           .Build(),
       "type IQ1_S"},
      {TinyLlama().Tensor("rope_freqs.weight", TensorType::kF32, {16}).Build(),
       "tensor rope_freqs.weight"},
  };
  for (const auto& [bytes, says] : cases) {
    const absl::Status status = ShapeStatus(bytes);
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << says;
    EXPECT_THAT(std::string(status.message()), HasSubstr(says));
  }
}

TEST(CardTest, InspectionEndsWithTheVerdict) {
  const auto verdict = [](const std::string& bytes) { return Inspect(**ParseGguf(bytes)); };
  EXPECT_THAT(verdict(TinyLlama().Build()), EndsWith("servable: yes\n"));
  EXPECT_THAT(verdict(TinyLlama({.pre = "tekken"}).Build()),
              HasSubstr("servable: no, GGUF key tokenizer.ggml.pre is \"tekken\""));
  EXPECT_THAT(verdict(GgufBuilder().String("name\x1b[2J", "a\x1b[2J\xff").Build()),
              ::testing::Not(::testing::AnyOf(HasSubstr("\x1b"), HasSubstr("\xff"))));
}

}  // namespace
}  // namespace antiphon::model
