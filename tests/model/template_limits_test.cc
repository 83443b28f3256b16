// Hostile templates end in a clear error, soon and within their memory.
#include <gtest/gtest.h>

#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "model/chat_template.h"

namespace antiphon::model {
namespace {

absl::Status Outcome(const std::string& source, const TemplateLimits& limits = {}) {
  const auto parsed = ChatTemplate::Parse(source);
  if (!parsed.ok()) return parsed.status();
  return (*parsed)->Render({}, absl::UnixEpoch(), limits).status();
}

std::string Times(std::string_view text, int times) {
  std::string out;
  for (int i = 0; i < times; ++i) out += text;
  return out;
}

void ExpectExhausted(const std::string& source, const TemplateLimits& limits = {}) {
  const absl::Status status = Outcome(source, limits);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << source.substr(0, 200) << "\n"
                                                                 << status;
}

TEST(TemplateLimitsTest, StopsLoopsThatMultiply) {
  ExpectExhausted(Times("{% for i in range(100000) %}", 5) + "x" + Times("{% endfor %}", 5));
  ExpectExhausted("{% for i in range(10 ** 12) %}{% endfor %}");
  ExpectExhausted("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}");
}

TEST(TemplateLimitsTest, RefusesHugeStringsBeforeMakingThem) {
  ExpectExhausted("{{ 'a' * 10 ** 9 }}");
  ExpectExhausted("{{ [1] * 10 ** 12 }}");
  ExpectExhausted("{{ 'a'.rjust(10 ** 10) }}");
  ExpectExhausted("{{ 'a'.center(10 ** 18) }}");
  ExpectExhausted("{{ 'x' | indent(10 ** 10) }}");
  ExpectExhausted("{{ [1, 2] | join('a' * 100000000) }}");
  ExpectExhausted("{% set s = 'a' * 100000 %}{{ s.replace('a', s) }}");
  ExpectExhausted("{{ [1] | batch(10 ** 15, 0) | list }}");
  ExpectExhausted("{{ [1] | slice(10 ** 15) | list }}");
  EXPECT_FALSE(Outcome("{{ '%1000000000d' % 1 }}").ok());
  EXPECT_FALSE(Outcome("{{ '{:1000000000}'.format(1) }}").ok());
}

TEST(TemplateLimitsTest, StopsValuesThatDouble) {
  ExpectExhausted(
      "{% set ns = namespace(s='abcdefgh') %}{% for i in range(64) %}"
      "{% set ns.s = ns.s ~ ns.s %}{% endfor %}");
  ExpectExhausted(
      "{% set ns = namespace(s=[1]) %}{% for i in range(64) %}"
      "{% set ns.s = ns.s + ns.s %}{% endfor %}");
  // Shared structure is small but prints, compares and serialises as a tree.
  const std::string tree =
      "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(64) %}"
      "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}";
  ExpectExhausted(tree + "{{ ns.a }}");
  ExpectExhausted(tree + "{{ ns.a | tojson }}");
  ExpectExhausted(tree + "{{ ns.a == ns.b }}");
}

TEST(TemplateLimitsTest, LimitsWhatIsWritten) {
  ExpectExhausted("{% for i in range(1000) %}0123456789{% endfor %}", {.output_bytes = 1000});
  ExpectExhausted("{% for i in range(50000) %}{{ 'x' * 10000 }}{% endfor %}");
}

TEST(TemplateLimitsTest, LimitsMemory) {
  ExpectExhausted(
      "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}"
      "{% do ns.x.append('some text' ~ i) %}{% endfor %}",
      {.memory_bytes = 1 << 20});
  ExpectExhausted("{% for i in range(100) %}{% set a = 'x' * 5000 %}{{ a }}{% endfor %}",
                  {.output_bytes = 1 << 20, .memory_bytes = 100'000});
}

TEST(TemplateLimitsTest, GivesMemoryBackThatIsNoLongerUsed) {
  EXPECT_TRUE(Outcome("{% for i in range(10000) %}{% set a = 'x' * 5000 %}{% endfor %}",
                      {.memory_bytes = 1 << 20})
                  .ok());
}

TEST(TemplateLimitsTest, StopsRecursion) {
  ExpectExhausted("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}");
  ExpectExhausted(
      "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}"
      "{{ f() }}");
  ExpectExhausted("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}");
  ExpectExhausted("{% macro f() %}{{ caller }}{% call f() %}{% endcall %}{% endmacro %}{{ f() }}");
  ExpectExhausted("{% macro f(x=f()) %}{% endmacro %}{% macro f(x=f()) %}{% endmacro %}{{ f() }}");
  ExpectExhausted("{% macro f() %}" + Times("{% if true %}", 100) + "{{ f() }}" +
                  Times("{% endif %}", 100) + "{% endmacro %}{{ f() }}");
}

TEST(TemplateLimitsTest, RefusesDeepNestingWhileParsing) {
  for (const char* open :
       {"(", "[", "{1:", "-", "not ", "f(", "x[", "1 if ", "1 + (", "~", "x|f("}) {
    EXPECT_EQ(Outcome("{{ " + Times(open, 100'000)).code(), absl::StatusCode::kInvalidArgument)
        << open;
  }
  EXPECT_EQ(Outcome(Times("{% if x %}", 100'000)).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Outcome(Times("{% for x in y %}", 100'000)).code(), absl::StatusCode::kInvalidArgument);
  for (const char* chain : {"+x", ".x", "[0]", "|f", "()", " or x", " is y"}) {
    EXPECT_EQ(Outcome("{{ x" + Times(chain, 100'000) + " }}").code(),
              absl::StatusCode::kInvalidArgument)
        << chain;
  }
}

TEST(TemplateLimitsTest, SurvivesDeepValues) {
  const std::string deep =
      "{% set ns = namespace(x=[]) %}{% for i in range(90000) %}"
      "{% set ns.x = [ns.x] %}{% endfor %}";
  EXPECT_TRUE(Outcome(deep).ok());
  EXPECT_EQ(Outcome(deep + "{{ ns.x }}").code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Outcome(deep + "{{ ns.x | tojson }}").code(), absl::StatusCode::kInvalidArgument);
}

TEST(TemplateLimitsTest, FreesCycles) {
  EXPECT_TRUE(
      Outcome("{% set a = [] %}{% do a.append(a) %}{% set d = {} %}{% do d.update(d=d, a=a) "
              "%}{% do a.append(d) %}{% set ns = namespace() %}{% set ns.ns = ns %}"
              "{% macro m() %}{% endmacro %}{% do a.append(m) %}")
          .ok());
  EXPECT_FALSE(Outcome("{% set a = [] %}{% do a.append(a) %}{{ a }}").ok());
}

TEST(TemplateLimitsTest, SearchesRepetitiveTextInLinearTime) {
  ExpectExhausted(
      "{% set s = 'a' * 3000000 %}{% set n = 'a' * 1500000 ~ 'b' %}"
      "{% for i in range(100000) %}{{ s.find(n) }}{{ s.rfind(n) }}{{ n in s }}"
      "{{ s.split(n) | length }}{{ s.replace(n, '') | length }}{% endfor %}");
}

TEST(TemplateLimitsTest, RefusesAContextThatIsTooDeepOrTooLarge) {
  const auto parsed = ChatTemplate::Parse("{{ messages | length }}");
  ASSERT_TRUE(parsed.ok());
  Json deep = JsonArray();
  for (int i = 0; i < 1000; ++i) deep = JsonArray{std::move(deep)};
  JsonObject context;
  context["messages"] = std::move(deep);
  EXPECT_FALSE((*parsed)->Render(context, absl::UnixEpoch()).ok());
  context["messages"] = JsonArray(10'000, Json("text"));
  EXPECT_TRUE((*parsed)->Render(context, absl::UnixEpoch()).ok());
  EXPECT_FALSE((*parsed)->Render(context, absl::UnixEpoch(), {.memory_bytes = 10'000}).ok());
}

}  // namespace
}  // namespace antiphon::model
