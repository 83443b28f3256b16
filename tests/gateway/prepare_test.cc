#include "gateway/prepare.h"

#include <gtest/gtest.h>

#include "antiphon/v1/inference.pb.h"
#include "tests/gateway/model_fixture.h"

namespace antiphon::gateway {
namespace {

api::ChatRequest Chat(const std::string& text) {
  api::ChatRequest r;
  auto& m = *r.add_messages();
  m.set_role("user");
  m.set_content(text);
  return r;
}

std::string TextOf(const GenerationSpec& spec) {
  return TestModel()->tokenizer->Decode(*spec.prompt, false);
}

TEST(PrepareTest, RendersAndTokenisesAChat) {
  PreparedRequest out;
  ASSERT_FALSE(Prepare(Chat("hi"), TestModel(), {}, out));
  ASSERT_EQ(out.choices.size(), 1u);
  EXPECT_EQ(TextOf(out.choices[0]), "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
  EXPECT_EQ(out.prompt_tokens, out.choices[0].prompt->size());
  // The default is what the context leaves.
  EXPECT_EQ(out.choices[0].stop.max_tokens() + out.prompt_tokens, 512u);
}

TEST(PrepareTest, TreatsDeveloperAsSystemAndContinuesTheLastMessage) {
  api::ChatRequest r = Chat("hi");
  r.mutable_messages(0)->set_role("developer");
  auto& m = *r.add_messages();
  m.set_role("assistant");
  m.set_content("Well, ");
  r.set_continue_final_message(true);
  PreparedRequest out;
  ASSERT_FALSE(Prepare(r, TestModel(), {}, out));
  EXPECT_EQ(TextOf(out.choices[0]),
            "<|im_start|>system\nhi<|im_end|>\n<|im_start|>assistant\nWell,");
}

TEST(PrepareTest, OrdersChoicesByPromptAndDerivesSeeds) {
  api::CompletionRequest r;
  r.add_prompts()->set_text("a");
  r.add_prompts()->mutable_ids()->add_ids(98);
  r.mutable_options()->set_n(2);
  r.mutable_options()->set_seed(-5);
  PreparedRequest out;
  ASSERT_FALSE(Prepare(r, TestModel(), {}, out));
  ASSERT_EQ(out.choices.size(), 4u);
  EXPECT_EQ(out.prompt_tokens, 2u);
  EXPECT_EQ(*out.choices[1].prompt, *out.choices[0].prompt);
  EXPECT_EQ(*out.choices[2].prompt, (std::vector<uint32_t>{98}));
  EXPECT_EQ(out.choices[0].sampling.seed(), static_cast<uint64_t>(-5));
  EXPECT_NE(out.choices[1].sampling.seed(), out.choices[0].sampling.seed());
  EXPECT_EQ(out.choices[3].sampling.seed(), out.choices[1].sampling.seed());
  EXPECT_EQ(out.choices[0].stop.max_tokens(), 16u);
}

TEST(PrepareTest, TakesSamplingDefaultsFromTheCardUnlessTheClientSpeaks) {
  auto model = std::make_shared<ServedModel>(*TestModel());
  model->card.mutable_sampling()->set_temperature(0.3);
  model->card.mutable_sampling()->set_top_k(40);
  api::CompletionRequest r;
  r.add_prompts()->set_text("a");
  r.mutable_options()->set_top_k(-1);
  PreparedRequest out;
  ASSERT_FALSE(Prepare(r, model, {}, out));
  EXPECT_EQ(out.choices[0].sampling.temperature(), 0.3);
  EXPECT_EQ(out.choices[0].sampling.top_k(), 0u);
  EXPECT_EQ(out.choices[0].sampling.top_p(), 1);
  EXPECT_EQ(out.choices[0].sampling.repetition_penalty(), 1);
}

TEST(PrepareTest, StopsAtEndsOfGenerationUnlessTheyAreIgnored) {
  api::CompletionRequest r;
  r.add_prompts()->set_text("a");
  r.mutable_options()->add_stop_token_ids(99);
  PreparedRequest out;
  ASSERT_FALSE(Prepare(r, TestModel(), {}, out));
  EXPECT_EQ(out.choices[0].stop.stop_ids_size(), 2);
  EXPECT_EQ(out.choices[0].stop.stop_ids(1), kTestEos);
  r.mutable_options()->set_ignore_eos(true);
  PreparedRequest ignoring;
  ASSERT_FALSE(Prepare(r, TestModel(), {}, ignoring));
  EXPECT_EQ(ignoring.choices[0].stop.stop_ids_size(), 1);
}

TEST(PrepareTest, SeparatesTenantsAndSaltsByTheRootOfTheirKeys) {
  api::CompletionRequest r;
  r.add_prompts()->set_text("a");
  const auto root = [&](const std::string& tenant) {
    PreparedRequest out;
    Caller caller;
    caller.tenant_salt = TenantSalt("cluster", tenant);
    EXPECT_FALSE(Prepare(r, TestModel(), caller, out));
    return out.choices[0].root;
  };
  const BlockKey a = root("a");
  EXPECT_EQ(root("a"), a);
  EXPECT_NE(root("b"), a);
  r.mutable_options()->set_cache_salt("s");
  EXPECT_NE(root("a"), a);
}

TEST(PrepareTest, ReportsARefusalOfTheTemplate) {
  auto model = std::make_shared<ServedModel>(*TestModel());
  auto refusing = model::ChatTemplate::Parse("{{ raise_exception('roles must alternate') }}");
  ASSERT_TRUE(refusing.ok());
  model->chat_template = *std::move(refusing);
  PreparedRequest out;
  const MaybeError e = Prepare(Chat("x"), model, {}, out);
  ASSERT_TRUE(e.has_value());
  EXPECT_EQ(e->status, 400);
  EXPECT_NE(e->message.find("roles must alternate"), std::string::npos) << e->message;
  model->chat_template = nullptr;
  EXPECT_EQ(Prepare(Chat("x"), model, {}, out)->code, "unsupported_parameter");
}

TEST(PrepareTest, TokenisesAndDetokenises) {
  api::TokenizeRequest r;
  r.set_prompt("hé");
  r.set_return_token_strs(true);
  api::TokenizeResponse out;
  ASSERT_FALSE(Tokenize(r, *TestModel(), {}, out));
  EXPECT_EQ(out.count(), 3u);
  EXPECT_EQ(out.max_model_len(), 512u);
  EXPECT_EQ(out.token_strs(0), "h");
  api::DetokenizeRequest back;
  *back.mutable_tokens() = out.tokens();
  api::DetokenizeResponse text;
  ASSERT_FALSE(Detokenize(back, *TestModel(), text));
  EXPECT_EQ(text.prompt(), "hé");
}

}  // namespace
}  // namespace antiphon::gateway
