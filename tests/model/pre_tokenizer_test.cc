#include "model/pre_tokenizer.h"

#include <string>
#include <string_view>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/unicode.h"

namespace antiphon::model {
namespace {

using ::testing::ElementsAre;

std::vector<std::string> Pieces(PreTokenizer pre, std::string_view text) {
  std::vector<std::string> pieces;
  for (size_t at = 0; at < text.size();) {
    const size_t end = PieceEnd(pre, text, at);
    EXPECT_GT(end, at);
    pieces.emplace_back(text.substr(at, end - at));
    at = end;
  }
  return pieces;
}

TEST(PreTokenizerTest, Gpt2KeepsTheSpaceWithTheWord) {
  EXPECT_THAT(Pieces(PreTokenizer::kGpt2, "I'm  here, 12345!\n\nIT'S"),
              ElementsAre("I", "'m", " ", " here", ",", " 12345", "!", "\n", "\n", "IT", "'", "S"));
  EXPECT_THAT(Pieces(PreTokenizer::kGpt2, "a   "), ElementsAre("a", "   "));
}

TEST(PreTokenizerTest, SmolLmCutsEveryDigitFirst) {
  EXPECT_THAT(Pieces(PreTokenizer::kSmolLm, "a  12 b"), ElementsAre("a", "  ", "1", "2", " b"));
  EXPECT_THAT(Pieces(PreTokenizer::kGpt2, "a  12 b"), ElementsAre("a", " ", " 12", " b"));
}

// U+11DE0 is a digit of Unicode 17: the digit splitter knows it, the regular expressions do not.
TEST(PreTokenizerTest, SmolLmCutsDigitsYoungerThanTheRegularExpressions) {
  EXPECT_THAT(Pieces(PreTokenizer::kSmolLm, "! \U00011DE0"), ElementsAre("!", " ", "\U00011DE0"));
  EXPECT_THAT(Pieces(PreTokenizer::kGpt2, "! \U00011DE0"), ElementsAre("!", " \U00011DE0"));
}

TEST(PreTokenizerTest, LlamaTakesOneSignWithAWordAndThreeDigits) {
  EXPECT_THAT(Pieces(PreTokenizer::kLlamaBpe, "(foo) 12345 \n\n  x!?\r\n 'LL 'ſ"),
              ElementsAre("(foo", ")", " ", "123", "45", " \n\n", " ", " x", "!?\r\n", " '", "LL",
                          " '", "ſ"));
  EXPECT_THAT(Pieces(PreTokenizer::kLlamaBpe, "he'LL it'ſ"),
              ElementsAre("he", "'LL", " it", "'\u017F"));
}

TEST(PreTokenizerTest, QwenTakesDigitsOneByOne) {
  EXPECT_THAT(Pieces(PreTokenizer::kQwen2, "v12.5"), ElementsAre("v", "1", "2", ".", "5"));
}

TEST(PreTokenizerTest, LlamaCppsDefaultIsNoneOfOurs) {
  EXPECT_EQ(PreTokenizerNamed("default"), std::nullopt);
  EXPECT_EQ(PreTokenizerNamed(""), std::nullopt);
  for (const auto pre : {PreTokenizer::kGpt2, PreTokenizer::kSmolLm, PreTokenizer::kLlamaBpe,
                         PreTokenizer::kQwen2}) {
    EXPECT_EQ(PreTokenizerNamed(NameOf(pre)), pre);
  }
}

TEST(UnicodeTest, StepsOverBrokenCharactersByTheirLongestPart) {
  using Kind = Utf8Step::Kind;
  const auto step = [](std::string_view text) { return StepUtf8(text, 0); };
  EXPECT_EQ(step("\xE2\x82\xAC").bytes, 3u);
  EXPECT_EQ(step("\xE2\x82").kind, Kind::kUnfinished);
  for (const auto& [text, bytes] :
       std::vector<std::pair<std::string, uint32_t>>{{"\x80", 1},
                                                     {"\xC0\x80", 1},
                                                     {"\xC1\xBF", 1},
                                                     {"\xE0\x80\x80", 1},
                                                     {"\xED\xA0\x80", 1},
                                                     {"\xF0\x8F\xBF\xBF", 1},
                                                     {"\xF4\x90\x80\x80", 1},
                                                     {"\xF5", 1},
                                                     {"\xFF", 1},
                                                     {"\xE2\x82(", 2},
                                                     {"\xF0\x9F\x98(", 3},
                                                     {"\xC3(", 1}}) {
    EXPECT_EQ(step(text).kind, Kind::kInvalid) << text;
    EXPECT_EQ(step(text).bytes, bytes) << text;
  }
}

TEST(UnicodeTest, ComposesToNormalFormC) {
  EXPECT_EQ(NormalizeNfc("plain é"), "plain é");
  EXPECT_EQ(NormalizeNfc("e\u0301"), "é");
  EXPECT_EQ(NormalizeNfc("\u212B"), "Å");
  EXPECT_EQ(NormalizeNfc("q\u0307\u0323"), "q\u0323\u0307");
  EXPECT_EQ(NormalizeNfc("\u1100\u1161\u11A8"), "각");
  EXPECT_EQ(NormalizeNfc("\u0958"), "\u0915\u093C");  // excluded from composition
  EXPECT_EQ(NormalizeNfc("a\u0315\u0300"), "à\u0315");
}

}  // namespace
}  // namespace antiphon::model
