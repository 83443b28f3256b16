#include "gateway/validate.h"

#include <gtest/gtest.h>

#include <boost/json/parse.hpp>
#include <boost/json/serialize.hpp>
#include <fstream>

#include "antiphon/v1/inference.pb.h"
#include "gateway/prepare.h"
#include "tests/gateway/model_fixture.h"

namespace antiphon::gateway {
namespace {

const ValidationLimits kLimits;

// What the HTTP front does with a body before it asks the cluster.
MaybeError Answer(const std::string& path, const std::string& body,
                  HttpOptions* options = nullptr) {
  HttpOptions own;
  HttpOptions& o = options != nullptr ? *options : own;
  const Catalog catalog{.models = {TestModel()}};
  const auto with_model = [&](const std::string& name, auto&& then) -> MaybeError {
    const ServedModelPtr model = catalog.Find(name);
    if (model == nullptr) return ModelNotFound(name, catalog.served_names());
    return then(model);
  };
  PreparedRequest prepared;
  if (path == "/v1/chat/completions") {
    api::ChatRequest r;
    if (MaybeError e = ParseChat(body, r, o)) return e;
    if (MaybeError e = Validate(r, kLimits)) return e;
    return with_model(r.model(), [&](const auto& m) { return Prepare(r, m, {}, prepared); });
  }
  if (path == "/v1/completions") {
    api::CompletionRequest r;
    if (MaybeError e = ParseCompletion(body, r, o)) return e;
    if (MaybeError e = Validate(r, kLimits)) return e;
    return with_model(r.model(), [&](const auto& m) { return Prepare(r, m, {}, prepared); });
  }
  if (path == "/tokenize") {
    api::TokenizeRequest r;
    api::TokenizeResponse out;
    if (MaybeError e = ParseTokenize(body, r, o)) return e;
    if (MaybeError e = Validate(r)) return e;
    return with_model(r.model(), [&](const auto& m) { return Tokenize(r, *m, {}, out); });
  }
  api::DetokenizeRequest r;
  api::DetokenizeResponse out;
  if (MaybeError e = ParseDetokenize(body, r, o)) return e;
  return with_model(r.model(), [&](const auto& m) { return Detokenize(r, *m, out); });
}

std::string Text(const boost::json::value& v) {
  return std::string(v.get_string().data(), v.get_string().size());
}

TEST(ValidateTest, AnswersEveryMalformedRequestWithItsStatusFieldAndCode) {
  std::ifstream in(MALFORMED_REQUESTS);
  std::string line;
  int count = 0;
  while (std::getline(in, line)) {
    const auto entry = boost::json::parse(line).get_object();
    SCOPED_TRACE(Text(entry.at("name")));
    std::string body;
    if (const auto* hex = entry.if_contains("body_hex")) {
      const std::string digits = Text(*hex);
      for (size_t i = 0; i < digits.size(); i += 2) {
        body += static_cast<char>(std::stoi(digits.substr(i, 2), nullptr, 16));
      }
    } else if (entry.at("body").is_string()) {
      body = Text(entry.at("body"));
    } else {
      body = boost::json::serialize(entry.at("body"));
    }
    const MaybeError error = Answer(Text(entry.at("path")), body);
    ++count;
    ASSERT_TRUE(error.has_value()) << "it was accepted";
    EXPECT_EQ(error->status, entry.at("status").to_number<int>()) << error->message;
    EXPECT_EQ(error->code, Text(entry.at("code"))) << error->message;
    const auto& param = entry.at("param");
    EXPECT_EQ(error->param, param.is_null() ? "" : Text(param)) << error->message;
    EXPECT_FALSE(error->message.empty());
    // The error itself is valid JSON on one line.
    EXPECT_NO_THROW(boost::json::parse(ErrorJson(*error)));
    EXPECT_EQ(ErrorJson(*error).find('\n'), std::string::npos);
  }
  EXPECT_GE(count, 100);
}

TEST(ValidateTest, TakesNullForEveryOptionalField) {
  std::string chat =
      R"({"messages":[{"role":"user","content":"hi","name":null,"tool_calls":null}])";
  std::string completion = R"({"prompt":"hi")";
  for (const char* name : {"model",
                           "max_tokens",
                           "max_completion_tokens",
                           "temperature",
                           "top_p",
                           "top_k",
                           "min_p",
                           "presence_penalty",
                           "frequency_penalty",
                           "repetition_penalty",
                           "seed",
                           "n",
                           "stop",
                           "stop_token_ids",
                           "include_stop_str_in_output",
                           "ignore_eos",
                           "min_tokens",
                           "logit_bias",
                           "logprobs",
                           "top_logprobs",
                           "cache_salt",
                           "skip_special_tokens",
                           "user",
                           "stream",
                           "stream_options",
                           "return_token_ids",
                           "request_id",
                           "rid",
                           "tools",
                           "tool_choice",
                           "response_format",
                           "functions",
                           "function_call",
                           "best_of",
                           "suffix",
                           "echo",
                           "guided_json",
                           "chat_template_kwargs",
                           "add_generation_prompt",
                           "continue_final_message",
                           "priority",
                           "metadata",
                           "store",
                           "service_tier",
                           "prediction",
                           "modalities",
                           "reasoning_effort"}) {
    chat += std::string(",\"") + name + "\":null";
    completion += std::string(",\"") + name + "\":null";
  }
  HttpOptions options;
  MaybeError e = Answer("/v1/chat/completions", chat + "}", &options);
  EXPECT_FALSE(e.has_value()) << e->message;
  EXPECT_TRUE(options.ignored.empty()) << options.ignored[0];
  e = Answer("/v1/completions", completion + "}");
  EXPECT_FALSE(e.has_value()) << e->message;
}

TEST(ValidateTest, TakesNeutralValuesOfFieldsThatAreNotServed) {
  HttpOptions options;
  const MaybeError e =
      Answer("/v1/completions", R"({"prompt":"hi","best_of":1,"echo":false,"suffix":"",
      "use_beam_search":false,"length_penalty":1.0,"response_format":{"type":"text"},
      "tool_choice":"none","parallel_tool_calls":true,"priority":0,"modalities":["text"],
      "repeat_penalty":1,"metadata":{"a":"b"},"store":true,"user":"me"})",
             &options);
  EXPECT_FALSE(e.has_value()) << e->message;
  EXPECT_TRUE(options.ignored.empty());
}

TEST(ValidateTest, NamesUnknownFields) {
  HttpOptions options;
  const MaybeError e = Answer("/v1/completions",
                              R"({"prompt":"hi","frobnicate":1,"stream":true,
                               "stream_options":{"x":1},"zebra":null})",
                              &options);
  EXPECT_FALSE(e.has_value()) << e->message;
  EXPECT_EQ(options.ignored, (std::vector<std::string>{"stream_options.x", "frobnicate", "zebra"}));
}

// Reading ends at an error: what was not read is not unknown.
TEST(ValidateTest, NamesNoFieldOfARefusedRequest) {
  HttpOptions options;
  const MaybeError e = Answer("/v1/chat/completions",
                              R"({"messages":[{"role":"user","content":"hi"}],"seed":1,"zebra":1,
                               "tools":[{}]})",
                              &options);
  ASSERT_TRUE(e.has_value());
  EXPECT_EQ(e->param, "tools");
  EXPECT_EQ(options.ignored, std::vector<std::string>());
}

TEST(ValidateTest, ReadsEveryShapeOfPrompt) {
  const auto prompts = [](const std::string& prompt) {
    api::CompletionRequest r;
    HttpOptions options;
    const MaybeError e = ParseCompletion("{\"prompt\":" + prompt + "}", r, options);
    EXPECT_FALSE(e.has_value()) << e->message;
    return r;
  };
  EXPECT_EQ(prompts("\"a\"").prompts(0).text(), "a");
  EXPECT_EQ(prompts("[\"a\",\"b\"]").prompts_size(), 2);
  EXPECT_EQ(prompts("[1,2,3]").prompts(0).ids().ids_size(), 3);
  EXPECT_EQ(prompts("[[1],[2,3]]").prompts(1).ids().ids_size(), 2);
  EXPECT_EQ(prompts("[\"a\",[2,3]]").prompts(1).ids().ids_size(), 2);
}

TEST(ValidateTest, JoinsTextParts) {
  api::ChatRequest r;
  HttpOptions options;
  ASSERT_FALSE(ParseChat(R"({"messages":[{"role":"user","content":[{"type":"text","text":"a"},
      {"type":"text","text":"b"}]},{"role":"assistant","content":null,"tool_calls":[{"id":"1",
      "type":"function","function":{"name":"f","arguments":"{}"}}]},
      {"role":"tool","tool_call_id":"1","content":"x"}]})",
                         r, options));
  EXPECT_EQ(r.messages(0).content(), "a\nb");
  EXPECT_FALSE(r.messages(1).has_content());
  EXPECT_EQ(r.messages(1).tool_calls(0).name(), "f");
  EXPECT_EQ(r.messages(2).tool_call_id(), "1");
  EXPECT_FALSE(Validate(r, kLimits));
}

TEST(ValidateTest, LetsMaxCompletionTokensWinAndTakesWholeDecimals) {
  api::ChatRequest r;
  HttpOptions options;
  ASSERT_FALSE(ParseChat(R"({"messages":[{"role":"user","content":"a"}],"max_tokens":5,
      "max_completion_tokens":7.0,"n":2.0})",
                         r, options));
  EXPECT_EQ(r.options().max_tokens(), 7u);
  EXPECT_EQ(r.options().n(), 2u);
}

TEST(ValidateTest, ChecksMessagesOfTheGrpcFrontToo) {
  api::ChatRequest r;
  EXPECT_EQ(Validate(r, kLimits)->param, "messages");
  auto& m = *r.add_messages();
  m.set_role("user");
  m.set_content("x");
  EXPECT_FALSE(Validate(r, kLimits));
  r.mutable_options()->set_temperature(std::numeric_limits<double>::quiet_NaN());
  EXPECT_EQ(Validate(r, kLimits)->param, "temperature");
  r.mutable_options()->set_temperature(1);
  (*r.mutable_options()->mutable_logit_bias())[1] = std::numeric_limits<float>::infinity();
  EXPECT_EQ(Validate(r, kLimits)->param, "logit_bias");
}

TEST(ValidateTest, SaysTheContextLengthAsClientsExpectIt) {
  const MaybeError e = Answer("/v1/completions", R"({"prompt":"hello","max_tokens":5000})");
  ASSERT_TRUE(e.has_value());
  EXPECT_NE(e->message.find("maximum context length is 512 tokens. However, you requested 5005 "
                            "tokens (5 in the prompt, 5000 in the completion)"),
            std::string::npos)
      << e->message;
}

TEST(ValidateTest, KnowsGoodLabels) {
  EXPECT_TRUE(IsGoodLabel("req-1_a.B"));
  EXPECT_FALSE(IsGoodLabel(""));
  EXPECT_FALSE(IsGoodLabel("a b"));
  EXPECT_FALSE(IsGoodLabel("a\nb"));
  EXPECT_FALSE(IsGoodLabel(std::string(129, 'a')));
}

}  // namespace
}  // namespace antiphon::gateway
