#include "gateway/api_text.h"

#include <gtest/gtest.h>

#include <boost/json.hpp>

#include "common/block_key.h"
#include "common/wire.h"
#include "gateway/json_text.h"
#include "tests/gateway/model_fixture.h"

namespace antiphon::gateway {
namespace {

namespace json = boost::json;

// Strict: also refuses text that is not valid UTF-8.
json::value Parse(std::string_view text) {
  json::error_code ec;
  json::value value = json::parse(json::string_view(text.data(), text.size()), ec);
  EXPECT_FALSE(ec) << ec.message() << " in " << text;
  return value;
}

std::string Fingerprint() {
  return "fp_" + Sha256Hex(std::string("00ff") + kVersion).substr(0, 12);
}

#define EXPECT_JSON(actual, expected)                                      \
  do {                                                                     \
    const json::value a = Parse(actual);                                   \
    EXPECT_TRUE(a == Parse(expected)) << json::serialize(a) << "\n\n"      \
                                      << json::serialize(Parse(expected)); \
  } while (false)

AnswerHead Head(bool chat) {
  return {.chat = chat,
          .id = chat ? "chatcmpl-0123" : "cmpl-0123",
          .created = 1700000001,
          .model = TestModel()};
}

OutputToken Token(uint32_t id, float logprob, std::vector<std::pair<uint32_t, float>> top = {}) {
  OutputToken token{.id = id};
  token.logprobs.set_logprob(logprob);
  for (const auto& [top_id, value] : top) {
    token.logprobs.add_top_ids(top_id);
    token.logprobs.add_top_logprobs(value);
  }
  return token;
}

ChoiceDelta DeltaOf(uint32_t choice, bool first, std::string text,
                    std::vector<OutputToken> tokens = {}) {
  ChoiceDelta delta{.choice = choice, .first = first};
  delta.delta.text = std::move(text);
  delta.delta.tokens = std::move(tokens);
  delta.usage = {.prompt_tokens = 7, .completion_tokens = 2, .cached_tokens = 3};
  return delta;
}

ChoiceEnd EndOf(uint32_t choice, EndReason reason) {
  ChoiceEnd end{.choice = choice};
  end.ending.reason = reason;
  end.usage = {.prompt_tokens = 7, .completion_tokens = 9, .cached_tokens = 3};
  return end;
}

// The payloads of the events in `text`, each framed as "data: PAYLOAD\n\n" on one line.
std::vector<std::string> Events(std::string_view text) {
  std::vector<std::string> events;
  while (!text.empty()) {
    EXPECT_TRUE(text.starts_with("data: ")) << text;
    const size_t end = text.find("\n\n");
    if (end == std::string_view::npos || !text.starts_with("data: ")) {
      ADD_FAILURE() << "not an event: " << text;
      break;
    }
    events.emplace_back(text.substr(6, end - 6));
    EXPECT_EQ(events.back().find_first_of("\r\n"), std::string::npos);
    text.remove_prefix(end + 2);
  }
  return events;
}

std::string ChatChunk(const std::string& choices, const std::string& more = "") {
  return R"({"id":"chatcmpl-0123","object":"chat.completion.chunk","created":1700000001,)"
         R"("model":"tiny","system_fingerprint":")" +
         Fingerprint() + R"(","choices":[)" + choices + "]" + more + "}";
}
std::string TextChunk(const std::string& choices, const std::string& more = "") {
  return R"({"id":"cmpl-0123","object":"text_completion","created":1700000001,)"
         R"("model":"tiny","system_fingerprint":")" +
         Fingerprint() + R"(","choices":[)" + choices + "]" + more + "}";
}

constexpr char kUsage[] =
    R"({"prompt_tokens":7,"completion_tokens":9,"total_tokens":16,"prompt_tokens_details":{"cached_tokens":3}})";
constexpr Usage kEndUsage = {.prompt_tokens = 7, .completion_tokens = 9, .cached_tokens = 3};

TEST(ApiTextTest, AWholeChatAnswer) {
  WholeAnswer answer;
  answer.Add(DeltaOf(0, true, "Hel"));
  answer.Add(DeltaOf(1, true, "Other"));
  answer.Add(DeltaOf(0, false, "lo"));
  answer.Add(EndOf(0, EndReason::kStop));
  answer.Add(EndOf(1, EndReason::kLength));
  EXPECT_EQ(
      answer.Render(Head(true), kEndUsage),
      R"({"id":"chatcmpl-0123","object":"chat.completion","created":1700000001,"model":"tiny",)"
      R"("system_fingerprint":")" +
          Fingerprint() +
          R"(","choices":[)"
          R"({"index":0,"message":{"role":"assistant","content":"Hello","refusal":null},)"
          R"("logprobs":null,"finish_reason":"stop","stop_reason":null},)"
          R"({"index":1,"message":{"role":"assistant","content":"Other","refusal":null},)"
          R"("logprobs":null,"finish_reason":"length","stop_reason":null}],"usage":)" +
          kUsage + "}");
}

TEST(ApiTextTest, AWholeCompletion) {
  WholeAnswer answer;
  answer.Add(DeltaOf(0, true, "text", {Token('t', 0), Token('e', 0)}));
  ChoiceEnd end = EndOf(0, EndReason::kStop);
  end.ending.stop_string = "\n\"END\"";
  answer.Add(end);
  AnswerHead head = Head(false);
  head.return_token_ids = true;
  EXPECT_JSON(answer.Render(head, kEndUsage),
              TextChunk(R"({"index":0,"text":"text","logprobs":null,"finish_reason":"stop",)"
                        R"("stop_reason":"\n\"END\"","token_ids":[116,101]})",
                        std::string(R"(,"usage":)") + kUsage));
}

TEST(ApiTextTest, TheStopReasonIsATokenWhenOneStopped) {
  WholeAnswer answer;
  answer.Add(DeltaOf(0, true, ""));
  ChoiceEnd end = EndOf(0, EndReason::kStop);
  end.ending.stop_token = 65;
  answer.Add(end);
  const json::value whole = Parse(answer.Render(Head(true), kEndUsage));
  EXPECT_EQ(whole.at("choices").at(0).at("stop_reason"), 65);
}

TEST(ApiTextTest, AChatStream) {
  EventStream stream(Head(true), /*include_usage=*/true, /*continuous_usage=*/false);
  const auto first = Events(stream.Render(DeltaOf(0, true, "Hi")));
  ASSERT_EQ(first.size(), 2u);
  EXPECT_EQ(first[0], ChatChunk(R"({"index":0,"delta":{"role":"assistant","content":""},)"
                                R"("logprobs":null,"finish_reason":null})"));
  EXPECT_EQ(first[1], ChatChunk(R"({"index":0,"delta":{"content":"Hi"},"logprobs":null,)"
                                R"("finish_reason":null})"));
  const auto second = Events(stream.Render(DeltaOf(0, false, " there")));
  ASSERT_EQ(second.size(), 1u);
  EXPECT_EQ(second[0], ChatChunk(R"({"index":0,"delta":{"content":" there"},"logprobs":null,)"
                                 R"("finish_reason":null})"));
  const auto end = Events(stream.Render(EndOf(0, EndReason::kLength)));
  ASSERT_EQ(end.size(), 1u);
  EXPECT_EQ(end[0], ChatChunk(R"({"index":0,"delta":{},"logprobs":null,"finish_reason":"length",)"
                              R"("stop_reason":null})"));
  const auto done = Events(stream.RenderDone(kEndUsage));
  ASSERT_EQ(done.size(), 2u);
  EXPECT_EQ(done[0], ChatChunk("", std::string(R"(,"usage":)") + kUsage));
  EXPECT_EQ(done[1], "[DONE]");
  for (const auto& event : {first[0], first[1], second[0], end[0], done[0]}) Parse(event);
}

TEST(ApiTextTest, EveryChoiceOfAStreamBeginsWithItsRole) {
  EventStream stream(Head(true), false, false);
  for (uint32_t choice : {0u, 1u, 2u}) {
    const auto events = Events(stream.Render(DeltaOf(choice, true, "")));
    ASSERT_EQ(events.size(), 1u);  // a token without text: the role alone
    const json::value event = Parse(events[0]);
    EXPECT_EQ(event.at("choices").at(0).at("index"), choice);
    EXPECT_EQ(event.at("choices").at(0).at("delta").at("role"), "assistant");
  }
  EXPECT_EQ(stream.Render(DeltaOf(0, false, "")), "");  // nothing to say
  EXPECT_EQ(stream.RenderDone(kEndUsage), "data: [DONE]\n\n");
}

TEST(ApiTextTest, ACompletionStream) {
  EventStream stream(Head(false), false, false);
  const auto first = Events(stream.Render(DeltaOf(0, true, "")));
  ASSERT_EQ(first.size(), 1u) << "the first token opens the stream, text or not";
  EXPECT_EQ(first[0], TextChunk(R"({"index":0,"text":"","logprobs":null,"finish_reason":null})"));
  const auto second = Events(stream.Render(DeltaOf(0, false, "word")));
  ASSERT_EQ(second.size(), 1u);
  EXPECT_EQ(second[0],
            TextChunk(R"({"index":0,"text":"word","logprobs":null,"finish_reason":null})"));
  const auto end = Events(stream.Render(EndOf(0, EndReason::kStop)));
  ASSERT_EQ(end.size(), 1u);
  EXPECT_EQ(end[0], TextChunk(R"({"index":0,"text":"","logprobs":null,"finish_reason":"stop",)"
                              R"("stop_reason":null})"));
}

TEST(ApiTextTest, ContinuousUsageIsInEveryChunk) {
  EventStream stream(Head(true), true, true);
  const auto events =
      Events(stream.Render(DeltaOf(0, true, "x")) + stream.Render(EndOf(0, EndReason::kStop)) +
             stream.RenderDone(kEndUsage));
  ASSERT_EQ(events.size(), 5u);
  const int completion[] = {2, 2, 9, 9};
  for (int i = 0; i < 4; ++i) {
    const json::value event = Parse(events[static_cast<size_t>(i)]);
    EXPECT_EQ(event.at("usage").at("completion_tokens"), completion[i]);
    EXPECT_EQ(event.at("usage").at("total_tokens"), completion[i] + 7);
  }
}

TEST(ApiTextTest, ChatLogprobs) {
  AnswerHead head = Head(true);
  head.logprobs = true;
  // The second token is the first byte of a character; the third is hidden by a stop string.
  std::vector<OutputToken> tokens = {Token('a', -0.5f, {{'a', -0.5f}, {'"', -1.25f}}),
                                     Token(0xc3, -2.0f), Token('z', -3.0f)};
  tokens[2].shown = false;
  const std::string expected =
      R"({"content":[{"token":"a","logprob":-0.5,"bytes":[97],"top_logprobs":[)"
      R"({"token":"a","logprob":-0.5,"bytes":[97]},{"token":"\"","logprob":-1.25,"bytes":[34]}]},)"
      R"({"token":"�","logprob":-2.0,"bytes":[195],"top_logprobs":[]}],"refusal":null})";
  WholeAnswer answer;
  answer.Add(DeltaOf(0, true, "a", tokens));
  answer.Add(EndOf(0, EndReason::kStop));
  const json::value whole = Parse(answer.Render(head, kEndUsage));
  EXPECT_TRUE(whole.at("choices").at(0).at("logprobs") == Parse(expected))
      << json::serialize(whole);
  EventStream stream(head, false, false);
  const auto events = Events(stream.Render(DeltaOf(0, true, "a", tokens)));
  ASSERT_EQ(events.size(), 2u);
  EXPECT_TRUE(Parse(events[1]).at("choices").at(0).at("logprobs") == Parse(expected));
  // Tokens without text have their logprobs sent all the same.
  const auto silent = Events(stream.Render(DeltaOf(0, false, "", {Token(0xa9, -1.0f)})));
  ASSERT_EQ(silent.size(), 1u);
  const json::value event = Parse(silent[0]);
  EXPECT_EQ(event.at("choices").at(0).at("delta").at("content"), "");
  EXPECT_EQ(event.at("choices").at(0).at("logprobs").at("content").as_array().size(), 1u);
}

TEST(ApiTextTest, CompletionLogprobsPointIntoTheText) {
  AnswerHead head = Head(false);
  head.logprobs = true;
  const float impossible = -std::numeric_limits<float>::infinity();
  // "é" in two tokens, then "b": text_offset counts characters, as clients index the text.
  const std::vector<OutputToken> one = {Token('a', -1.5f, {{'a', -1.5f}, {'b', impossible}})};
  const std::vector<OutputToken> two = {Token(0xc3, -1.0f), Token(0xa9, -0.25f)};
  const std::vector<OutputToken> three = {Token('b', -2.0f)};
  WholeAnswer answer;
  answer.Add(DeltaOf(0, true, "a", one));
  answer.Add(DeltaOf(0, false, "é", two));
  answer.Add(DeltaOf(0, false, "b", three));
  answer.Add(EndOf(0, EndReason::kStop));
  const json::value whole = Parse(answer.Render(head, kEndUsage));
  EXPECT_TRUE(whole.at("choices").at(0).at("logprobs") ==
              Parse(R"({"tokens":["a","�","�","b"],"token_logprobs":[-1.5,-1.0,-0.25,-2.0],)"
                    R"("top_logprobs":[{"a":-1.5,"b":-9999.0},{},{},{}],)"
                    R"("text_offset":[0,1,2,2]})"))
      << json::serialize(whole);
  // Offsets go on from event to event, for each choice.
  EventStream stream(head, false, false);
  stream.Render(DeltaOf(0, true, "a", one));
  stream.Render(DeltaOf(0, false, "é", two));
  stream.Render(DeltaOf(1, true, "a", one));
  const json::value last = Parse(Events(stream.Render(DeltaOf(0, false, "b", three)))[0]);
  EXPECT_EQ(last.at("choices").at(0).at("logprobs").at("text_offset").at(0), 2);
  const json::value other = Parse(Events(stream.Render(DeltaOf(1, false, "b", three)))[0]);
  EXPECT_EQ(other.at("choices").at(0).at("logprobs").at("text_offset").at(0), 1);
}

TEST(ApiTextTest, CompletionTopLogprobsNameEachTextOnce) {
  AnswerHead head = Head(false);
  head.logprobs = true;
  WholeAnswer answer;
  // All three lone bytes read as U+FFFD; the likeliest one is kept.
  answer.Add(
      DeltaOf(0, true, "a", {Token('a', -1, {{0xc3, -0.5f}, {0xa9, -1.5f}, {0xff, -2.5f}})}));
  answer.Add(EndOf(0, EndReason::kStop));
  const std::string text = answer.Render(head, kEndUsage);
  EXPECT_NE(text.find(R"("top_logprobs":[{"�":-0.5}])"), std::string::npos) << text;
}

TEST(ApiTextTest, TextIsEscapedAndStaysUtf8) {
  std::string text;
  for (int c = 0; c < 0x80; ++c) text += static_cast<char>(c);
  text += "é漢😀\u2028\u2029\ufeff";
  WholeAnswer answer;
  answer.Add(DeltaOf(0, true, text));
  answer.Add(EndOf(0, EndReason::kStop));
  for (const bool chat : {false, true}) {
    const json::value whole = Parse(answer.Render(Head(chat), kEndUsage));
    const json::value& choice = whole.at("choices").at(0);
    const json::value& got = chat ? choice.at("message").at("content") : choice.at("text");
    EXPECT_EQ(std::string_view(got.as_string().data(), got.as_string().size()), text);
    EventStream stream(Head(chat), false, false);
    const auto events = Events(stream.Render(DeltaOf(0, true, text)));
    const json::value event = Parse(events.back());
    const json::value& piece = chat ? event.at("choices").at(0).at("delta").at("content")
                                    : event.at("choices").at(0).at("text");
    EXPECT_EQ(std::string_view(piece.as_string().data(), piece.as_string().size()), text);
    // Readers that split events at any Unicode line end must not be misled.
    EXPECT_EQ(events.back().find("\u2028"), std::string::npos);
    EXPECT_EQ(events.back().find("\u2029"), std::string::npos);
  }
}

TEST(ApiTextTest, FloatsReadBackAsTheyWere) {
  for (const float value : {0.0f, -0.0f, 1.0f, -1.5e-7f, -123456.78f, 1e30f, -3.4028235e38f,
                            1.17549435e-38f, 1e-45f, -0.1f}) {
    std::string text;
    AppendJsonFloat(text, value);
    const json::value parsed = Parse(text);
    ASSERT_TRUE(parsed.is_double()) << text;
    EXPECT_EQ(static_cast<float>(parsed.as_double()), value) << text;
  }
  for (const float value :
       {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
        std::numeric_limits<float>::quiet_NaN()}) {
    std::string text;
    AppendJsonFloat(text, value);
    EXPECT_EQ(text, "-9999.0");
  }
}

TEST(ApiTextTest, AnErrorEndsAStreamWithOneEventAndDone) {
  const auto events =
      Events(EventStream::RenderError(InvalidValue("messages[0]", "A \"bad\"\nvalue.")));
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[0], R"({"error":{"message":"A \"bad\"\nvalue.","type":"invalid_request_error",)"
                       R"("param":"messages[0]","code":"invalid_value"}})");
  EXPECT_EQ(events[1], "[DONE]");
  Parse(events[0]);
  EXPECT_JSON(
      ErrorJson(TimedOut("late")),
      R"({"error":{"message":"late","type":"timeout_error","param":null,"code":"timeout"}})");
}

TEST(ApiTextTest, Models) {
  Catalog catalog;
  EXPECT_EQ(ModelListJson(catalog), R"({"object":"list","data":[]})");
  catalog.models.push_back(TestModel());
  const std::string model =
      R"({"id":"tiny","object":"model","created":1700000000,"owned_by":"antiphon","root":"tiny",)"
      R"("parent":null,"max_model_len":512,"aliases":["alias"]})";
  EXPECT_EQ(ModelJson(*TestModel()), model);
  catalog.models.push_back(TestModel());
  EXPECT_EQ(ModelListJson(catalog), R"({"object":"list","data":[)" + model + "," + model + "]}");
}

TEST(ApiTextTest, ErrorsSayWhatIsWrongEvenOfBytesThatAreNoText) {
  // What a client wrote comes back in messages; the answer is JSON whatever it was.
  const std::string raw = "a\xff\xc3(\xe2\x80 b\xed\xa0\x80";
  Parse(ErrorJson(HttpError(404, "There is no " + raw)));
  Parse(ErrorJson(ModelNotFound(raw, "")));
  Parse(ErrorJson(InvalidValue(raw, raw)));
}

}  // namespace
}  // namespace antiphon::gateway
