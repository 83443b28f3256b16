// A small model for tests: one token a byte, and a few control tokens.
#ifndef ANTIPHON_TESTS_GATEWAY_MODEL_FIXTURE_H_
#define ANTIPHON_TESTS_GATEWAY_MODEL_FIXTURE_H_

#include <memory>
#include <string>
#include <vector>

#include "common/block_key.h"
#include "gateway/served_model.h"

namespace antiphon::gateway {

// GPT-2's byte alphabet as UTF-8.
inline std::string BytePiece(int byte) {
  static const std::vector<std::string> kPieces = [] {
    std::vector<std::string> pieces(256);
    int next = 256;
    for (int b = 0; b < 256; ++b) {
      const bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
      const int code = printable ? b : next++;
      std::string& s = pieces[static_cast<size_t>(b)];
      if (code < 0x80) {
        s += static_cast<char>(code);
      } else {
        s += static_cast<char>(0xc0 | (code >> 6));
        s += static_cast<char>(0x80 | (code & 63));
      }
    }
    return pieces;
  }();
  return kPieces[static_cast<size_t>(byte)];
}

inline constexpr uint32_t kTestEos = 257;  // <|im_end|>
inline constexpr uint32_t kTestVocab = 258;
inline constexpr char kTestTemplate[] =
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ "
    "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' "
    "}}{% endif %}";

inline internal::v1::TokenizerSpec TestTokenizerSpec() {
  internal::v1::TokenizerSpec spec;
  spec.set_model("gpt2");
  spec.set_pre("smollm");
  for (int b = 0; b < 256; ++b) {
    spec.add_tokens(BytePiece(b));
    spec.add_token_types(1);
  }
  for (const char* control : {"<|im_start|>", "<|im_end|>"}) {
    spec.add_tokens(control);
    spec.add_token_types(3);
  }
  spec.set_eos_id(kTestEos);
  spec.add_end_of_generation_ids(kTestEos);
  return spec;
}

inline internal::v1::ModelCard TestCard() {
  internal::v1::ModelCard card;
  card.set_name("tiny");
  card.add_aliases("alias");
  card.set_weights_digest("00ff");
  card.set_tokenizer_digest(Sha256Hex(TestTokenizerSpec().SerializeAsString()));
  card.set_chat_template_digest(Sha256Hex(kTestTemplate));
  card.set_context_length(512);
  card.set_vocab_size(kTestVocab);
  card.set_block_tokens(16);
  card.set_created_unix_s(1700000000);
  return card;
}

inline ServedModelPtr TestModel() {
  static const ServedModelPtr kModel = [] {
    auto model = std::make_shared<ServedModel>();
    model->card = TestCard();
    auto tokenizer = model::Tokenizer::Create(TestTokenizerSpec());
    if (!tokenizer.ok()) std::abort();
    model->tokenizer = *std::move(tokenizer);
    auto chat_template = model::ChatTemplate::Parse(kTestTemplate);
    if (!chat_template.ok()) std::abort();
    model->chat_template = *std::move(chat_template);
    return model;
  }();
  return kModel;
}

}  // namespace antiphon::gateway

#endif  // ANTIPHON_TESTS_GATEWAY_MODEL_FIXTURE_H_
