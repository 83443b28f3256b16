#include "common/logging.h"

#include <gtest/gtest.h>

#include <boost/json.hpp>

namespace antiphon {
namespace {

const LogOptions kText = {.daemon = "gateway", .node = "gateway@h"};
const LogOptions kJson = {.daemon = "gateway", .node = "gateway@h", .format = "json"};
const absl::Time kNow = absl::FromUnixMillis(1'700'000'000'123);

TEST(LoggingTest, TextHasTheSixFieldsInOrder) {
  EXPECT_EQ(FormatLogLine(kText, false, kNow, LogLevel::kWarning, "r-1", "late"),
            "2023-11-14T22:13:20.123Z warning gateway gateway@h r-1 late");
  EXPECT_EQ(FormatLogLine(kText, false, kNow, LogLevel::kInfo, "", "hello"),
            "2023-11-14T22:13:20.123Z info gateway gateway@h - hello");
}

TEST(LoggingTest, TheJournalGetsPrioritiesAndNoTime) {
  EXPECT_EQ(FormatLogLine(kText, true, kNow, LogLevel::kError, "", "x"),
            "<3>error gateway gateway@h - x");
  EXPECT_EQ(FormatLogLine(kText, true, kNow, LogLevel::kDebug, "", "x")[1], '7');
}

TEST(LoggingTest, JsonIsOneObjectWhateverTheClientSent) {
  const std::string nasty = "a\"b\\c\nd\x01\x7f\xc2\x85\xff\xe2\x80\xae end";
  const std::string line = FormatLogLine(kJson, false, kNow, LogLevel::kInfo, nasty, nasty);
  EXPECT_EQ(line.find('\n'), std::string::npos);
  boost::json::error_code error;
  const auto value = boost::json::parse(line, error);
  ASSERT_FALSE(error) << line;
  EXPECT_EQ(value.at("level"), "info");
  EXPECT_EQ(value.at("ts"), "2023-11-14T22:13:20.123Z");
  EXPECT_EQ(value.at("daemon"), "gateway");
  EXPECT_EQ(value.at("node"), "gateway@h");
  EXPECT_EQ(value.at("req"), value.at("msg"));
  EXPECT_NE(value.at("msg").as_string().find("a\"b\\c\nd"), std::string::npos);
}

TEST(LoggingTest, NothingInTextCanBeginALineOrMoveTheCursor) {
  const std::string out =
      EscapeForLog("a\nb\rc\td\x1b[31m\x7f\xc2\x9b\xe2\x80\xa8\xe2\x80\xae", false);
  EXPECT_EQ(out, "a\\nb\\rc\\td\\u001b[31m\\u007f\\u009b\\u2028\\u202e");
}

TEST(LoggingTest, GoodUtf8PassesAndBadBytesAreShown) {
  EXPECT_EQ(EscapeForLog("grüße 日本 🙂", false), "grüße 日本 🙂");
  EXPECT_EQ(EscapeForLog("\xff\xc0\xaf\xed\xa0\x80\xf5", false),
            "\\xff\\xc0\\xaf\\xed\\xa0\\x80\\xf5");
  EXPECT_EQ(EscapeForLog("cut\xe6\x97", false), "cut\\xe6\\x97");
}

TEST(LoggingTest, AMessageHasALimit) {
  EXPECT_LT(
      FormatLogLine(kText, false, kNow, LogLevel::kInfo, "", std::string(1 << 20, 'x')).size(),
      20'000u);
}

TEST(LoggingTest, LevelsAreSetByName) {
  EXPECT_TRUE(SetLogLevel("error"));
  EXPECT_FALSE(LogEnabled(LogLevel::kWarning));
  EXPECT_FALSE(SetLogLevel("loud"));
  EXPECT_TRUE(SetLogLevel("debug"));
  EXPECT_TRUE(LogEnabled(LogLevel::kDebug));
  SetLogLevel("info");
}

}  // namespace
}  // namespace antiphon
