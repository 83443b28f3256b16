#include "gateway/stop_text.h"

#include <gtest/gtest.h>

#include <random>

namespace antiphon::gateway {
namespace {

struct Outcome {
  std::string text;
  std::string match;
  bool operator==(const Outcome&) const = default;
};

// Feeds `text` cut at `cuts`.
Outcome Feed(const std::vector<std::string>& stops, bool include, const std::string& text,
             const std::vector<size_t>& cuts) {
  StopText stop(stops, include);
  Outcome out;
  size_t from = 0;
  for (size_t i = 0; i <= cuts.size(); ++i) {
    const size_t to = i < cuts.size() ? cuts[i] : text.size();
    const StopText::Result r = stop.Push(text.substr(from, to - from));
    from = to;
    out.text += r.text;
    if (r.match) {
      out.match = *r.match;
      return out;
    }
  }
  out.text += stop.Finish();
  return out;
}

TEST(StopTextTest, FindsAStopStringAcrossPieces) {
  EXPECT_EQ(Feed({"END"}, false, "abENDcd", {3, 4}), (Outcome{"ab", "END"}));
  EXPECT_EQ(Feed({"END"}, true, "abENDcd", {3, 4}), (Outcome{"abEND", "END"}));
}

TEST(StopTextTest, HoldsBackOnlyWhatMayBecomeAStopString) {
  StopText stop({"END"}, false);
  EXPECT_EQ(stop.Push("abE").text, "ab");
  EXPECT_EQ(stop.Push("N").text, "");
  EXPECT_EQ(stop.Push("x").text, "ENx");
  EXPECT_EQ(stop.Push("EN").text, "");
  EXPECT_EQ(stop.Finish(), "EN");
}

TEST(StopTextTest, LetsTextThroughThatIsNotArmed) {
  StopText stop({"aa"}, false);
  EXPECT_EQ(stop.Push("aaa", false).text, "aaa");
  EXPECT_FALSE(stop.Push("b").match.has_value());
  EXPECT_TRUE(stop.Push("caa").match.has_value());
}

TEST(StopTextTest, GivesNothingAfterTheMatch) {
  StopText stop({"x"}, false);
  EXPECT_EQ(stop.Push("axb").text, "a");
  EXPECT_EQ(stop.Push("more").text, "");
  EXPECT_EQ(stop.Finish(), "");
}

// The reference looks at every prefix of the whole text.
Outcome Reference(const std::vector<std::string>& stops, bool include, const std::string& text) {
  for (size_t end = 1; end <= text.size(); ++end) {
    size_t longest = 0;
    for (const std::string& s : stops) {
      if (s.size() <= end && text.compare(end - s.size(), s.size(), s) == 0) {
        longest = std::max(longest, s.size());
      }
    }
    if (longest > 0) {
      return {text.substr(0, include ? end : end - longest), text.substr(end - longest, longest)};
    }
  }
  return {text, ""};
}

TEST(StopTextTest, GivesTheSameForEveryWayToCutTheText) {
  std::mt19937 random(7);
  const auto draw = [&](size_t low, size_t high) {
    std::string s(low + random() % (high - low + 1), ' ');
    for (char& c : s) c = static_cast<char>('a' + random() % 2);
    return s;
  };
  for (int round = 0; round < 20000; ++round) {
    std::vector<std::string> stops(1 + random() % 3);
    for (std::string& s : stops) s = draw(2, 5);
    const std::string text = draw(0, 14);
    const bool include = random() % 2 == 0;
    std::vector<size_t> cuts;
    for (size_t i = 0; i < text.size(); ++i) {
      if (random() % 2 == 0) cuts.push_back(i);
    }
    ASSERT_EQ(Feed(stops, include, text, cuts), Reference(stops, include, text)) << text;
  }
}

}  // namespace
}  // namespace antiphon::gateway
