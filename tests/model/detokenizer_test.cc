#include <memory>
#include <string>
#include <vector>

#include "antiphon/v1/model.pb.h"
#include "gtest/gtest.h"
#include "model/gguf.h"
#include "model/tokenizer.h"
#include "tests/model/gguf_builder.h"

namespace antiphon::model {
namespace {

class DetokenizerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    GgufBuilder builder;
    AddTinyTokenizer(builder, "gpt-2");
    const std::string bytes = builder.Build();
    tokenizer_ = *Tokenizer::Create(*TokenizerSpecOf(**ParseGguf(bytes)));
  }
  std::unique_ptr<Tokenizer> tokenizer_;  // of the bytes 0 to 255 and a few more
};

TEST_F(DetokenizerTest, HoldsAnUnfinishedCharacterBack) {
  Detokenizer detokenizer(tokenizer_.get(), true);
  EXPECT_EQ(detokenizer.Push(0xF0), "");
  EXPECT_EQ(detokenizer.Push(0x9F), "");
  EXPECT_EQ(detokenizer.Push(0x98), "");
  EXPECT_EQ(detokenizer.Push(0x80), "😀");
  EXPECT_EQ(detokenizer.Push('x'), "x");
  EXPECT_EQ(detokenizer.Finish(), "");
}

TEST_F(DetokenizerTest, ReplacesBytesThatCannotBecomeACharacter) {
  Detokenizer detokenizer(tokenizer_.get(), true);
  EXPECT_EQ(detokenizer.Push(0x80), "\uFFFD");
  EXPECT_EQ(detokenizer.Push(0xE2), "");
  EXPECT_EQ(detokenizer.Push(0x82), "");
  EXPECT_EQ(detokenizer.Push('a'), "\uFFFDa");
  EXPECT_EQ(detokenizer.Push(0xE2), "");
  EXPECT_EQ(detokenizer.Push(0xF0), "\uFFFD");
  EXPECT_EQ(detokenizer.Finish(), "\uFFFD");
  EXPECT_EQ(detokenizer.Finish(), "");
}

TEST_F(DetokenizerTest, SkipsControlTokensOnlyWhenAsked) {
  Detokenizer skipping(tokenizer_.get(), true);
  EXPECT_EQ(skipping.Push(262), "");
  EXPECT_EQ(skipping.Push(263), "<tool>");
  Detokenizer showing(tokenizer_.get(), false);
  EXPECT_EQ(showing.Push(262), "<|im_end|>");
}

TEST_F(DetokenizerTest, IgnoresIdsOutsideTheVocabulary) {
  Detokenizer detokenizer(tokenizer_.get(), true);
  EXPECT_EQ(detokenizer.Push(UINT32_MAX), "");
}

TEST_F(DetokenizerTest, EqualsDecodingTheWholeForEveryPairOfBytes) {
  for (uint32_t a = 0; a < 256; ++a) {
    for (uint32_t b = 0; b < 256; ++b) {
      Detokenizer detokenizer(tokenizer_.get(), true);
      std::string streamed;
      for (const uint32_t id : {a, b, 0x80u}) {
        const std::string piece = detokenizer.Push(id);
        ASSERT_EQ(FindInvalidUtf8(piece), std::string::npos);
        streamed += piece;
      }
      streamed += detokenizer.Finish();
      ASSERT_EQ(streamed, tokenizer_->Decode(std::vector<uint32_t>{a, b, 0x80u}, true))
          << a << " " << b;
    }
  }
}

}  // namespace
}  // namespace antiphon::model
