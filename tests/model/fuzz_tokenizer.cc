// The first byte chooses the pre-tokenizer and options, the rest is text: what is encoded decodes
// to the same text (but for qwen2's normal form), and what is no UTF-8 is refused.
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "antiphon/v1/model.pb.h"
#include "model/gguf.h"
#include "model/tokenizer.h"
#include "model/unicode.h"
#include "tests/model/gguf_builder.h"

namespace {

using namespace antiphon::model;

std::unique_ptr<Tokenizer> Make(const std::string& pre) {
  GgufBuilder builder;
  AddTinyTokenizer(builder, pre);
  const std::string bytes = builder.Build();
  return *Tokenizer::Create(*TokenizerSpecOf(**ParseGguf(bytes)));
}

void Require(bool condition) {
  if (!condition) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::vector<std::unique_ptr<Tokenizer>>* tokenizers = [] {
    auto* made = new std::vector<std::unique_ptr<Tokenizer>>;
    for (const char* pre : {"gpt-2", "smollm", "llama-bpe", "qwen2"}) made->push_back(Make(pre));
    return made;
  }();
  if (size == 0) return 0;
  const Tokenizer& tokenizer = *(*tokenizers)[data[0] % 4];
  const bool normalises = data[0] % 4 == 3;
  const std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);
  const auto ids = tokenizer.Encode(text, {.parse_special = (data[0] & 4) != 0});
  const bool valid = FindInvalidUtf8(text) == std::string_view::npos;
  Require(ids.ok() == valid);
  if (valid) {
    const std::string back = tokenizer.Decode(*ids, /*skip_special=*/false);
    // Added tokens cut the text before it is normalised, so the parts may still compose.
    Require(normalises ? NormalizeNfc(back) == NormalizeNfc(text) : back == text);
  }
  Detokenizer detokenizer(&tokenizer, false);
  std::string streamed;
  for (const char byte : text) {
    const std::string piece = detokenizer.Push(static_cast<uint8_t>(byte));
    Require(FindInvalidUtf8(piece) == std::string::npos);
    streamed += piece;
  }
  streamed += detokenizer.Finish();
  Require(!valid || streamed == text);
  return 0;
}
