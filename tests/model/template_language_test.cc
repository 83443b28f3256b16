// The template language, feature by feature. Expected texts are what jinja2 3.1.6 renders; the same
// features and more are compared with it in templates_vs_jinja2.py.
#include <gtest/gtest.h>

#include <boost/json/parse.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "model/chat_template.h"

namespace antiphon::model {
namespace {

constexpr std::string_view kContext = R"({
  "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
  "add_generation_prompt": true, "bos_token": "<s>", "tools": null,
  "tool": {"name": "f", "big": 18446744073709551615, "list": [1, 2.5, null, true, "é<&>"]}
})";

// The text, or "error: " and the message.
std::string Render(std::string_view source) {
  const auto parsed = ChatTemplate::Parse(source);
  if (!parsed.ok()) return "error: " + std::string(parsed.status().message());
  const Json context =
      boost::json::parse(boost::json::string_view(kContext.data(), kContext.size()));
  const auto text = (*parsed)->Render(context.as_object(), absl::FromUnixSeconds(1767323045));
  return text.ok() ? *text : "error: " + std::string(text.status().message());
}

struct Case {
  std::string_view source;
  std::string_view text;
};

void Check(const std::vector<Case>& cases) {
  for (const Case& c : cases) EXPECT_EQ(Render(c.source), c.text) << c.source;
}

TEST(TemplateLanguageTest, RendersTheShippedModelsTemplate) {
  EXPECT_EQ(Render("{% for message in messages %}{% if loop.first and messages[0]['role'] != "
                   "'system' %}{{ 'none' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
                   "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
                   "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"),
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n");
}

TEST(TemplateLanguageTest, ControlsWhiteSpaceAroundTags) {
  Check({
      {"a\n  {% if true %}\nb\n  {% endif %}\nc\n", "a\nb\nc"},
      {"a\n  {%- if true -%}  b  {%- endif -%}  c", "abc"},
      {"  {%+ if true %}\nx{% endif +%}\ny", "  x\ny"},
      {"  {{- 1 -}}  \n x {{ 2 }}\n\n", "1x 2\n"},
      {"  {# note #}\n x {#- note -#} y", " xy"},
      {"{% raw %}{{ x }} {% if %}{% endraw %}", "{{ x }} {% if %}"},
      {"\r\n{% if true %}\r\nx\r{% endif %}\r\ny", "\nx\ny"},
      {"{{ {'a': {'b': 1}}.a.b }}}", "1}"},
  });
}

TEST(TemplateLanguageTest, BindsOperatorsAsJinja) {
  Check({
      {"{{ 1 + 2 * 3 - 4 }} {{ 7 / 2 }} {{ 6 / 2 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 2 ** 3 ** 2 }}",
       "3 3.5 3.0 -4 2 64"},
      {"{{ 'a' ~ 1 + '2' }} {{ 1 + 2|string|length }} {{ not 1 == 2 }} {{ -5|abs }}",
       "a12 2 True 5"},
      {"{{ 1 < 2 < 3 }} {{ 1 in [1] and 2 not in [1] }} {{ 0 or 'x' }} {{ '' and 1 }}",
       "True True x "},
      {"{{ 'a' if false else 'b' }}[{{ 'a' if false }}] {{ 1 + 1 is number }}", "b[] 2"},
      {"{{ 2 ** 100 }} {{ tool.big + 1 }} {{ 10 ** 60 }}",
       "error: line 1: integer result beyond 128 bits"},
      {"{{ 'a' + 1 }}", "error: line 1: can only concatenate str (not \"int\") to str"},
      {"\n{{ 1 // 0 }}", "error: line 2: integer division by zero"},
  });
}

TEST(TemplateLanguageTest, PrintsValuesAsPython) {
  Check({
      {"{{ true }} {{ none }} {{ 1.0 }} {{ 1e16 }} {{ 1e-5 }} {{ 0.1 + 0.2 }} {{ 1e15 }}",
       "True None 1.0 1e+16 1e-05 0.30000000000000004 1000000000000000.0"},
      {"{{ [1, 'a', none, (2,), {'k': \"it's\"}] }}", "[1, 'a', None, (2,), {'k': \"it's\"}]"},
      {"{{ tool }}",
       "{'name': 'f', 'big': 18446744073709551615, 'list': [1, 2.5, None, True, 'é<&>']}"},
      {"{{ ['\\n\\x01\\u200b\\\\'] }}", "['\\n\\x01\\u200b\\\\']"},
      {"{{ range(1, 7, 2) }} {{ range(3) | list }}", "range(1, 7, 2) [0, 1, 2]"},
  });
}

TEST(TemplateLanguageTest, SubscriptsAndSlices) {
  Check({
      {"{{ 'äöü'[1] }}{{ 'hello'[::-1] }}{{ [0, 1, 2, 3][3:0:-2] }}{{ (1, 2, 3)[:2] }}",
       "öolleh[3, 1](1, 2)"},
      {"{{ messages[-1].content }}{{ messages[0]['role'] }}[{{ [1][5] }}]", "Hisystem[]"},
      {"{{ {'items': 1}.items is callable }}{{ {'items': 1}['items'] }}", "True1"},
      {"{{ [1][::0] }}", "error: line 1: slice step cannot be zero"},
  });
}

TEST(TemplateLanguageTest, TreatsUndefinedAsJinjasDefault) {
  Check({
      {"[{{ x }}]{{ x is defined }}{{ x|length }}{{ x == y }}{{ 1 in x }}{{ x|default(5) }}",
       "[]False0TrueFalse5"},
      {"{% for i in x %}{% else %}none{% endfor %}", "none"},
      {"a\n{{ x.y }}", "error: line 2: 'x' is undefined"},
      {"{{ tool.q.y }}", "error: line 1: 'dict object' has no attribute 'q'"},
      {"{{ x + 1 }}", "error: line 1: 'x' is undefined"},
      {"{{ x() }}", "error: line 1: 'x' is undefined"},
  });
}

TEST(TemplateLanguageTest, ScopesVariables) {
  Check({
      {"{% set x = 0 %}{% for i in [1, 2] %}{{ x }}{% set x = i %}{{ x }}{% endfor %}{{ x }}",
       "01020"},
      {"{% set ns = namespace(n=0) %}{% for i in [1, 2] %}{% set ns.n = ns.n + i %}{% endfor %}"
       "{{ ns.n }}",
       "3"},
      {"{% if true %}{% set x = 1 %}{% endif %}{{ x }}", "1"},
      {"{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set t %}t{{ a }}{% endset %}{{ t }}", "12t1"},
      {"{% set t | upper %}abc{% endset %}{{ t }}{% with a=1 %}{{ a }}{% endwith %}[{{ a }}]",
       "ABC1[]"},
      {"{% set tool.x = 1 %}", "error: line 1: cannot assign attribute on non-namespace object"},
  });
}

TEST(TemplateLanguageTest, Loops) {
  Check({
      {"{% for i in [5, 6, 7] %}{{ loop.index }}{{ loop.revindex0 }}{{ loop.first }}"
       "{{ loop.last }}{{ loop.previtem }}{{ loop.nextitem }} {% endfor %}",
       "12TrueFalse6 21FalseFalse57 30FalseTrue6 "},
      {"{% for i in range(9) if i is odd %}{{ loop.length }}{{ i }}{% endfor %}", "41434547"},
      {"{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}"
       "{% endif %}{{ i }}{% else %}never{% endfor %}",
       "02"},
      {"{% for k, (a, b) in {'x': (1, 2)}.items() %}{{ k }}{{ a }}{{ b }}{% endfor %}", "x12"},
      {"{% for x in [1, [2, [3]]] recursive %}{% if x is iterable %}({{ loop(x) }})"
       "{% else %}{{ x }}@{{ loop.depth }}{% endif %}{% endfor %}",
       "1@1(2@2(3@3))"},
      {"{% for i in [] %}{% else %}empty{% endfor %}", "empty"},
      {"{% for a, b in [(1, 2, 3)] %}{% endfor %}",
       "error: line 1: expected 2 values to unpack, got 3"},
      {"{% for x in none %}{% endfor %}", "error: line 1: 'NoneType' object is not iterable"},
  });
}

TEST(TemplateLanguageTest, Macros) {
  Check({
      {"{% macro f(a, b=2) %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }} {{ f(1, b=3) }} [{{ f() }}]",
       "12 13 [2]"},
      {"{% macro f(n) %}{{ n }}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }}",
       "3210"},
      {"{% macro f() %}<{{ caller(1) }}>{% endmacro %}{% call(x) f() %}{{ x }}{% endcall %}",
       "<1>"},
      {"{% macro f(a) %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, 2, x=3) }}", "(2,){'x': 3}"},
      {"{% macro g(a, b) %}{{ a }}{{ b }}{% endmacro %}{{ g(*[1], **{'b': 5}) }}", "15"},
      {"{% macro f(a) %}{% endmacro %}{{ f(1, 2) }}",
       "error: line 1: macro 'f' takes not more than 1 argument(s)"},
      {"{% filter upper %}a{{ 'b' }}{% endfilter %}{% generation %}g{% endgeneration %}", "ABg"},
  });
}

TEST(TemplateLanguageTest, SharesListsAndDictionariesByReference) {
  Check({
      {"{% set a = [1] %}{% set b = a %}{% do b.append(2) %}{{ a }}{{ a.pop(0) }}{{ b }}",
       "[1, 2]1[2]"},
      {"{% set d = {'a': 1} %}{% set ns = namespace(d=d) %}{% do ns.d.update(b=2) %}{{ d }}"
       "{{ d.pop('a') }}{{ d }}",
       "{'a': 1, 'b': 2}1{'b': 2}"},
      {"{{ {1: 'a', 1.0: 'b', true: 'c'} }}", "{1: 'c'}"},
      {"{{ {[1]: 2} }}", "error: line 1: unhashable type: 'list'"},
  });
}

TEST(TemplateLanguageTest, WritesJsonAsHuggingFace) {
  Check({
      {"{{ tool | tojson }}",
       R"({"name": "f", "big": 18446744073709551615, "list": [1, 2.5, null, true, "é<&>"]})"},
      {"{{ {'b': [], 'a': {'c': 1}} | tojson(indent=2, sort_keys=true) }}",
       "{\n  \"a\": {\n    \"c\": 1\n  },\n  \"b\": []\n}"},
      {"{{ 'ü😀' | tojson(ensure_ascii=true) }}{{ [1, 2] | tojson(separators=(',', ':')) }}",
       "\"\\u00fc\\ud83d\\ude00\"[1,2]"},
      {"{{ x | tojson }}", "error: line 1: Object of type Undefined is not JSON serializable"},
      {"{{ ('{\"a\": [1, null]}' | from_json).a }}", "[1, None]"},
      {"{{ '{' | from_json is string }}",
       "error: line 1: from_json: not valid JSON: "
       "incomplete JSON"},
  });
}

TEST(TemplateLanguageTest, HasPythonsStringMethods) {
  Check({
      {"{{ ' a b '.strip() }}|{{ 'xaxb'.lstrip('xa') }}|{{ 'a,b,c'.split(',', 1) }}|"
       "{{ ' a  b '.split() }}|{{ 'a,b,c'.rsplit(',', 1) }}",
       "a b|b|['a', 'b,c']|['a', 'b']|['a,b', 'c']"},
      {"{{ 'abc'.startswith(('x', 'ab')) }}{{ 'banana'.replace('a', 'o', 2) }}"
       "{{ 'äbc'.find('b') }}{{ 'hello wORLD'.title() }}{{ 'ß'.upper() }}",
       "Truebonona1Hello WorldSS"},
      {"{{ '{} {x:>3}|{0!r}'.format('a', x=5) }}{{ '%05.1f|%-3s|' % (2.25, 'a') }}",
       "a   5|'a'002.2|a  |"},
  });
}

TEST(TemplateLanguageTest, HasJinjasFilters) {
  Check({
      {"{{ [{'a': 1}, {'a': 2}] | selectattr('a', '>', 1) | map(attribute='a') | list }}", "[2]"},
      {"{{ [3, 1, 2] | sort(reverse=true) }}{{ {'b': 1, 'A': 2} | dictsort }}",
       "[3, 2, 1][('A', 2), ('b', 1)]"},
      {"{{ 'a\nb' | indent(2) }}{{ '5.7' | int }}{{ 2.5 | round }}{{ [1, 2] | join('-') }}",
       "a\n  b52.01-2"},
      {"{{ [] | first }}{{ ['b', 'B'] | unique | list }}{{ 'foo bar' | title }}", "['b']Foo Bar"},
      {"{{ ('<' | safe) + '<' }}{{ '<' | e }}", "<&lt;&lt;"},
      {"{{ 1 | nothing }}", "error: line 1: no filter named 'nothing'"},
      {"{{ 1 is nothing }}", "error: line 1: no test named 'nothing'"},
  });
}

TEST(TemplateLanguageTest, HasTheFunctionsOfChatTemplates) {
  EXPECT_EQ(Render("{{ raise_exception('No <tools> here') }}"), "error: No <tools> here");
  EXPECT_EQ(Render("{{ strftime_now('%Y %%') }}"), "2026 %");
  EXPECT_EQ(Render("{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}"),
            "aba");
  EXPECT_EQ(Render("{% set j = joiner() %}{{ j() }}1{{ j() }}2{{ dict(a=1).a }}"), "1, 21");
}

TEST(TemplateLanguageTest, NamesTheLineOfASyntaxError) {
  Check({
      {"a\n{% if x %}", "error: line 2: unexpected end of template, expected '{% endif %}'"},
      {"\n\n{{ 1 + }}", "error: line 3: expected an expression, got '}}'"},
      {"{% bogus %}", "error: line 1: unknown tag 'bogus'"},
      {"{{ (1 }}", "error: line 1: unexpected '}', expected ')'"},
      {"{{ 'abc }}", "error: line 1: string without an end"},
      {"{# x", "error: line 1: missing end of comment tag '#}'"},
      {"{% break %}", "error: line 1: 'break' outside of a loop"},
      {"{{ 1", "error: line 1: unexpected end of template, expected '}}'"},
      {"{% include 'x' %}", "error: line 1: unknown tag 'include'"},
      {"\xff", "error: the template is not UTF-8"},
  });
}

}  // namespace
}  // namespace antiphon::model
