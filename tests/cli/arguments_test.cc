#include "cli/arguments.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace antiphon::cli {
namespace {

using ::testing::HasSubstr;

const Syntax kSyntax = {.values = {"model", "listen", "output"},
                        .switches = {"help"},
                        .config_keys = true,
                        .positional_max = 1};

std::string ErrorOf(const std::vector<std::string>& arguments) {
  return std::string(ParseArguments(arguments, kSyntax).status().message());
}

TEST(ArgumentsTest, ReadsEveryForm) {
  const auto a = ParseArguments(
      {"--model", "m", "--listen=h:1", "--a.b=c", "--d.e", "f", "-o", "json", "--help", "word"},
      kSyntax);
  ASSERT_TRUE(a.ok()) << a.status();
  EXPECT_EQ(a->Get("model"), "m");
  EXPECT_EQ(a->Get("listen"), "h:1");
  EXPECT_EQ(a->Get("output"), "json");
  EXPECT_EQ(a->switches.count("help"), 1u);
  EXPECT_EQ(a->config_keys.size(), 2u);
  EXPECT_EQ(a->positional, std::vector<std::string>{"word"});
}

TEST(ArgumentsTest, TwoDashesEndTheFlags) {
  const auto a = ParseArguments({"--", "--model"}, kSyntax);
  ASSERT_TRUE(a.ok());
  EXPECT_EQ(a->positional, std::vector<std::string>{"--model"});
}

TEST(ArgumentsTest, NamesWhatItDoesNotKnowAndTheNearest) {
  EXPECT_EQ(ErrorOf({"--modle", "x"}), "unknown flag --modle; did you mean --model?");
  EXPECT_EQ(ErrorOf({"--zzzzzzz"}), "unknown flag --zzzzzzz");
  EXPECT_EQ(ErrorOf({"-x"}), "unknown flag -x");
  EXPECT_EQ(ErrorOf({"a", "b"}), "unexpected argument 'b'");
  EXPECT_EQ(ErrorOf({"--model"}), "--model needs a value");
  EXPECT_EQ(ErrorOf({"--help=1"}), "--help takes no value");
}

TEST(ArgumentsTest, NumbersHaveARange) {
  Arguments a;
  EXPECT_EQ(*IntFlag(a, "n", 7, 1, 9), 7);
  for (const char* bad : {"", "0", "10", "x", "1x", "99999999999", "-1"}) {
    a.values["n"] = bad;
    EXPECT_THAT(std::string(IntFlag(a, "n", 7, 1, 9).status().message()),
                HasSubstr("--n must be a whole number from 1 to 9"));
  }
}

}  // namespace
}  // namespace antiphon::cli
