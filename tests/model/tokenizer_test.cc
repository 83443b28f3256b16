#include "model/tokenizer.h"

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "antiphon/v1/model.pb.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/byte_alphabet.h"
#include "model/gguf.h"
#include "tests/model/gguf_builder.h"

namespace antiphon::model {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Ids = std::vector<uint32_t>;

internal::v1::TokenizerSpec TinySpec(const std::string& pre) {
  GgufBuilder builder;
  AddTinyTokenizer(builder, pre);
  const std::string bytes = builder.Build();
  const auto file = ParseGguf(bytes);
  EXPECT_TRUE(file.ok()) << file.status();
  const auto spec = TokenizerSpecOf(**file);
  EXPECT_TRUE(spec.ok()) << spec.status();
  return *spec;
}

std::unique_ptr<Tokenizer> Tiny(const std::string& pre = "gpt-2") {
  auto tokenizer = Tokenizer::Create(TinySpec(pre));
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return *std::move(tokenizer);
}

Ids Encode(const Tokenizer& tokenizer, std::string_view text,
           Tokenizer::EncodeOptions options = {}) {
  const auto ids = tokenizer.Encode(text, options);
  EXPECT_TRUE(ids.ok()) << ids.status();
  return ids.ok() ? *ids : Ids{};
}

TEST(TokenizerTest, MergesTheLowestRankFirst) {
  const auto tokenizer = Tiny();
  EXPECT_THAT(Encode(*tokenizer, "hello t"), ElementsAre(258, 'o', 259));
  EXPECT_THAT(Encode(*tokenizer, "hel"), ElementsAre(256, 'l'));
  EXPECT_THAT(Encode(*tokenizer, ""), ElementsAre());
}

TEST(TokenizerTest, MergesTheSameInShortAndLongPieces) {
  const auto tokenizer = Tiny();
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    std::string shorter;
    while (shorter.size() < 40) shorter.push_back("hel"[random() % 3]);
    // The same letters as the tail of a long piece, kept apart by a letter that never merges.
    const std::string longer = std::string(60, 'x') + shorter;
    Ids expected(60, 'x');
    const Ids tail = Encode(*tokenizer, shorter);
    expected.insert(expected.end(), tail.begin(), tail.end());
    EXPECT_EQ(Encode(*tokenizer, longer), expected) << shorter;
  }
}

TEST(TokenizerTest, FindsAddedTokensLongestFirst) {
  internal::v1::TokenizerSpec spec = TinySpec("gpt-2");
  spec.add_tokens("<tool>s");
  spec.add_token_types(4);
  const auto tokenizer = Tokenizer::Create(spec);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_THAT(Encode(**tokenizer, "a<tool>s<tool><tool"),
              ElementsAre('a', kTinyVocabulary, 263, '<', 't', 'o', 'o', 'l'));
}

TEST(TokenizerTest, ReadsControlTokensInTextOnlyWhenAsked) {
  const auto tokenizer = Tiny();
  EXPECT_THAT(Encode(*tokenizer, "<|im_end|><tool>"), ElementsAre(262, 263));
  const Ids plain = Encode(*tokenizer, "<|im_end|><tool>", {.parse_special = false});
  EXPECT_EQ(plain.size(), 11u);  // ten characters of the control token, and the tool
  EXPECT_EQ(plain.back(), 263u);
  EXPECT_EQ(tokenizer->Decode(plain, false), "<|im_end|><tool>");
}

TEST(TokenizerTest, AddsBosOnceAndOnlyWhenTheModelAsks) {
  EXPECT_THAT(Encode(*Tiny(), "a"), ElementsAre('a'));
  internal::v1::TokenizerSpec spec = TinySpec("gpt-2");
  spec.set_add_bos(true);
  const auto tokenizer = Tokenizer::Create(spec);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_THAT(Encode(**tokenizer, "a"), ElementsAre(261, 'a'));
  EXPECT_THAT(Encode(**tokenizer, "<|im_start|>a"), ElementsAre(261, 'a'));
  EXPECT_THAT(Encode(**tokenizer, ""), ElementsAre(261));
  EXPECT_THAT(Encode(**tokenizer, "a", {.add_bos = false}), ElementsAre('a'));
}

TEST(TokenizerTest, KnowsItsSpecialTokens) {
  const auto tokenizer = Tiny();
  EXPECT_EQ(tokenizer->vocab_size(), kTinyVocabulary);
  EXPECT_EQ(tokenizer->bos_text(), "<|im_start|>");
  EXPECT_EQ(tokenizer->eos_text(), "<|im_end|>");
  EXPECT_THAT(tokenizer->end_of_generation_ids(), ElementsAre(260, 262));
  EXPECT_TRUE(tokenizer->IsControl(261));
  EXPECT_FALSE(tokenizer->IsControl(263));
  EXPECT_FALSE(tokenizer->IsControl(UINT32_MAX));
  EXPECT_EQ(tokenizer->FindToken("<tool>"), 263);
  EXPECT_EQ(tokenizer->FindToken(" t"), 259);
  EXPECT_EQ(tokenizer->FindToken("nowhere"), -1);
  EXPECT_EQ(tokenizer->TokenBytes(259), " t");
  EXPECT_EQ(tokenizer->TokenBytes(UINT32_MAX), "");
}

TEST(TokenizerTest, ComposesCharactersForQwenAlone) {
  const std::string text = "e\xCC\x81";  // e and U+0301
  EXPECT_THAT(Encode(*Tiny("qwen2"), text), ElementsAre(0xC3, 0xA9));
  EXPECT_THAT(Encode(*Tiny("llama-bpe"), text), ElementsAre('e', 0xCC, 0x81));
}

TEST(TokenizerTest, GivesTheTextBackForAnyValidUtf8) {
  std::mt19937 random(7);
  for (const char* pre : {"gpt-2", "smollm", "llama-bpe"}) {
    const auto tokenizer = Tiny(pre);
    for (int round = 0; round < 500; ++round) {
      std::string text;
      const size_t bytes = random() % 200;
      while (text.size() < bytes) {
        const uint32_t kind = random() % 4;
        if (kind == 0) text += static_cast<char>(random() % 0x80);
        if (kind == 1) text += "hello t 123 \r\n<|im_end|>"[random() % 24];
        if (kind == 2)
          text += std::string(
              {static_cast<char>(0xC2 + random() % 30), static_cast<char>(0x80 + random() % 64)});
        if (kind == 3)
          text += std::string(
              {static_cast<char>(0xF1), '\x9F', '\x98', static_cast<char>(0x80 + random() % 64)});
      }
      const Ids ids = Encode(*tokenizer, text);
      EXPECT_EQ(tokenizer->Decode(ids, false), text);
      Detokenizer detokenizer(tokenizer.get(), false);
      std::string streamed;
      for (const uint32_t id : ids) {
        const std::string piece = detokenizer.Push(id);
        EXPECT_EQ(FindInvalidUtf8(piece), std::string::npos);
        streamed += piece;
      }
      EXPECT_EQ(streamed + detokenizer.Finish(), text);
    }
  }
}

TEST(TokenizerTest, RefusesTextThatIsNotUtf8WithTheByte) {
  const auto ids = Tiny()->Encode("abcdefghij\xC3(", {});
  EXPECT_EQ(ids.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(ids.status().message()), HasSubstr("byte 10"));
}

TEST(TokenizerTest, EncodesAMegabyteWithoutSpacesInTime) {
  const std::string run(1 << 20, 'h');
  EXPECT_EQ(Encode(*Tiny(), run).size(), run.size());
  std::string hell;
  for (int i = 0; i < 1 << 18; ++i) hell += "hell";
  EXPECT_EQ(Encode(*Tiny(), hell).size(), 1u << 18);
}

TEST(TokenizerSpecTest, UsesGpt2sByteAlphabet) {
  for (int b = 0; b < 256; ++b) {
    const std::string byte(1, static_cast<char>(b));
    EXPECT_EQ(ToByteAlphabet(byte), TinyByteCharacter(b));
    EXPECT_EQ(FromByteAlphabet(TinyByteCharacter(b)), byte);
  }
  EXPECT_EQ(FromByteAlphabet(" "), std::nullopt);
  EXPECT_EQ(FromByteAlphabet("\xFF"), std::nullopt);
  EXPECT_EQ(FromByteAlphabet("\xE4\xBD\xA0"), std::nullopt);
}

struct BadSpec {
  const char* says;
  void (*spoil)(internal::v1::TokenizerSpec&);
};

TEST(TokenizerSpecTest, IsRefusedInWordsThatNameTheFault) {
  using Spec = internal::v1::TokenizerSpec;
  const BadSpec cases[] = {
      {"model \"llama\"", [](Spec& s) { s.set_model("llama"); }},
      {"pre-tokenizer \"default\"", [](Spec& s) { s.set_pre("default"); }},
      {"vocabulary is empty", [](Spec& s) { s.clear_tokens(); }},
      {"token types for", [](Spec& s) { s.add_token_types(1); }},
      {"token 5 has type 9", [](Spec& s) { s.set_token_types(5, 9); }},
      {"added token 262 has 300 bytes", [](Spec& s) { s.set_tokens(262, std::string(300, 'x')); }},
      {"merge 4 is not two tokens", [](Spec& s) { s.add_merges("ab"); }},
      {"merge 4 is not two tokens", [](Spec& s) { s.add_merges(" a"); }},
      {"merge 4 is not two tokens", [](Spec& s) { s.add_merges("a "); }},
      {"merge 4 is not two tokens", [](Spec& s) { s.add_merges("a b c"); }},
      {"merge 4 needs a token that is not in the vocabulary (result)",
       [](Spec& s) { s.add_merges("a b"); }},
      {"(left side)", [](Spec& s) { s.add_merges("zz b"); }},
      {"(right side)", [](Spec& s) { s.add_merges("a zz"); }},
      {"bos_id 264 is outside", [](Spec& s) { s.set_bos_id(264); }},
      {"eos_id -1 is outside", [](Spec& s) { s.set_eos_id(-1); }},
      {"end_of_generation_ids: 999", [](Spec& s) { s.add_end_of_generation_ids(999); }},
      {"asks for a BOS token",
       [](Spec& s) {
         s.clear_bos_id();
         s.set_add_bos(true);
       }},
  };
  for (const BadSpec& c : cases) {
    Spec spec = TinySpec("gpt-2");
    c.spoil(spec);
    const auto tokenizer = Tokenizer::Create(spec);
    ASSERT_FALSE(tokenizer.ok()) << c.says;
    EXPECT_EQ(tokenizer.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(tokenizer.status().message()), HasSubstr(c.says));
  }
}

absl::Status SpecStatus(const std::string& bytes) {
  const auto file = ParseGguf(bytes);
  if (!file.ok()) return file.status();
  return TokenizerSpecOf(**file).status();
}

TEST(TokenizerSpecTest, NamesTheKeyOfTheFile) {
  const auto model = [] { return GgufBuilder().String("tokenizer.ggml.model", "gpt2"); };
  const auto pre = [&] { return model().String("tokenizer.ggml.pre", "gpt-2"); };
  const auto tokens = [&] { return pre().Strings("tokenizer.ggml.tokens", {"a", "b", "ab"}); };
  const auto merges = [&] { return tokens().Strings("tokenizer.ggml.merges", {"a b"}); };
  const std::pair<std::string, const char*> cases[] = {
      {GgufBuilder().Build(), "tokenizer.ggml.model is missing"},
      {GgufBuilder().String("tokenizer.ggml.model", "llama").Build(), "SentencePiece"},
      {model().Build(), "tokenizer.ggml.pre is missing"},
      {model().String("tokenizer.ggml.pre", "default").Build(),
       "tokenizer.ggml.pre is \"default\""},
      {model().U32("tokenizer.ggml.pre", 1).Build(), "tokenizer.ggml.pre is not a string"},
      {pre().Build(), "tokenizer.ggml.tokens is missing"},
      {pre().U32("tokenizer.ggml.tokens", 1).Build(), "tokenizer.ggml.tokens is not an array"},
      {pre().I32s("tokenizer.ggml.tokens", {1}).Build(), "not an array of strings"},
      {tokens().Build(), "tokenizer.ggml.merges is missing"},
      {merges().I32s("tokenizer.ggml.token_type", {1}).Build(), "1 entries for 3 tokens"},
      {merges().I32s("tokenizer.ggml.token_type", {1, 1, 7}).Build(), "tokenizer.ggml.token_type"},
      {merges().U32("tokenizer.ggml.eos_token_id", 3).Build(), "tokenizer.ggml.eos_token_id is 3"},
      {merges().String("tokenizer.ggml.bos_token_id", "a").Build(), "tokenizer.ggml.bos_token_id"},
      {merges().Bool("tokenizer.ggml.add_bos_token", true).Build(), "bos_token_id is missing"},
      {merges().U32("tokenizer.ggml.add_bos_token", 1).Build(), "add_bos_token is not a bool"},
  };
  for (const auto& [bytes, says] : cases) {
    const absl::Status status = SpecStatus(bytes);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << says;
    EXPECT_THAT(std::string(status.message()), HasSubstr(says));
  }
  EXPECT_TRUE(SpecStatus(merges().Build()).ok());
}

TEST(TokenizerSpecTest, AddsBosForLlama3FilesThatDoNotSay) {
  const auto spec_of = [](GgufBuilder builder) {
    const std::string bytes = builder.String("tokenizer.ggml.model", "gpt2")
                                  .Strings("tokenizer.ggml.tokens", {"a", "b", "ab"})
                                  .Strings("tokenizer.ggml.merges", {"a b"})
                                  .U32("tokenizer.ggml.bos_token_id", 0)
                                  .Build();
    return TokenizerSpecOf(**ParseGguf(bytes));
  };
  const std::string pre = "tokenizer.ggml.pre";
  EXPECT_TRUE(spec_of(GgufBuilder().String(pre, "llama-bpe"))->add_bos());
  EXPECT_FALSE(spec_of(GgufBuilder().String(pre, "qwen2"))->add_bos());
  EXPECT_FALSE(
      spec_of(GgufBuilder().String(pre, "llama-bpe").Bool("tokenizer.ggml.add_bos_token", false))
          ->add_bos());
}

}  // namespace
}  // namespace antiphon::model
