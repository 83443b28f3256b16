// Writes GGUF files for tests: whole ones by name, broken ones by field. Keys and tensors come out
// in the order they were added.
//
//   const std::string file = GgufBuilder()
//       .String("general.architecture", "llama").U32("llama.block_count", 2)
//       .Tensor("output_norm.weight", TensorType::kF32, {8})
//       .Build();
#ifndef ANTIPHON_TESTS_MODEL_GGUF_BUILDER_H_
#define ANTIPHON_TESTS_MODEL_GGUF_BUILDER_H_

#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "model/gguf.h"

namespace antiphon::model {

// GGUF's value types.
enum class GgufType : uint32_t {
  kU8,
  kI8,
  kU16,
  kI16,
  kU32,
  kI32,
  kF32,
  kBool,
  kString,
  kArray,
  kU64,
  kI64,
  kF64
};

class GgufBuilder {
 public:
  explicit GgufBuilder(uint32_t version = 3) : version_(version) {}

  // The little-endian bytes of a number.
  template <typename T>
  static std::string Raw(T value) {
    static_assert(std::is_arithmetic_v<T>);
    std::string bytes(sizeof(T), '\0');
    std::memcpy(bytes.data(), &value, sizeof(T));
    return bytes;
  }
  // A GGUF string: 64-bit length and bytes.
  static std::string Text(std::string_view s) { return Raw<uint64_t>(s.size()) + std::string(s); }

  GgufBuilder& U32(std::string_view key, uint32_t v) { return Key(key, GgufType::kU32, Raw(v)); }
  GgufBuilder& U64(std::string_view key, uint64_t v) { return Key(key, GgufType::kU64, Raw(v)); }
  GgufBuilder& I32(std::string_view key, int32_t v) { return Key(key, GgufType::kI32, Raw(v)); }
  GgufBuilder& F32(std::string_view key, float v) { return Key(key, GgufType::kF32, Raw(v)); }
  GgufBuilder& F64(std::string_view key, double v) { return Key(key, GgufType::kF64, Raw(v)); }
  GgufBuilder& Bool(std::string_view key, bool v) {
    return Key(key, GgufType::kBool, std::string(1, v ? '\1' : '\0'));
  }
  GgufBuilder& String(std::string_view key, std::string_view v) {
    return Key(key, GgufType::kString, Text(v));
  }
  GgufBuilder& Strings(std::string_view key, const std::vector<std::string>& values) {
    std::string bytes;
    for (const std::string& v : values) bytes += Text(v);
    return ArrayOf(key, GgufType::kString, values.size(), bytes);
  }
  GgufBuilder& I32s(std::string_view key, const std::vector<int32_t>& values) {
    std::string bytes;
    for (const int32_t v : values) bytes += Raw(v);
    return ArrayOf(key, GgufType::kI32, values.size(), bytes);
  }
  GgufBuilder& ArrayOf(std::string_view key, GgufType of, uint64_t count, std::string_view bytes) {
    return Key(key, GgufType::kArray,
               Raw(static_cast<uint32_t>(of)) + Raw(count) + std::string(bytes));
  }
  // Any key: `type` and `value` are written as they are.
  GgufBuilder& Key(std::string_view key, GgufType type, std::string_view value) {
    return RawKey(Text(key) + Raw(static_cast<uint32_t>(type)) + std::string(value));
  }
  GgufBuilder& RawKey(std::string_view bytes) {
    keys_ += bytes;
    ++key_count_;
    return *this;
  }

  // A tensor of `data`, or of as many zero bytes as its type and dimensions need.
  GgufBuilder& Tensor(std::string_view name, TensorType type, std::vector<uint64_t> dims,
                      std::optional<std::string> data = std::nullopt) {
    if (!data.has_value()) {
      const TypeTraits traits = TraitsOf(type);
      uint64_t elements = 1;
      for (const uint64_t d : dims) elements *= d;
      const uint64_t blocks = traits.block_elements == 0 ? 0 : elements / traits.block_elements;
      data = std::string(blocks * traits.block_bytes, '\0');
    }
    Pad(data_);
    RawTensor(name, static_cast<uint32_t>(type), dims, data_.size());
    data_ += *data;
    return *this;
  }
  // A tensor's entry alone, with the offset as given.
  GgufBuilder& RawTensor(std::string_view name, uint32_t type, const std::vector<uint64_t>& dims,
                         uint64_t offset) {
    tensors_ += Text(name) + Raw(static_cast<uint32_t>(dims.size()));
    for (const uint64_t d : dims) tensors_ += Raw(d);
    tensors_ += Raw(type) + Raw(offset);
    ++tensor_count_;
    return *this;
  }
  GgufBuilder& Data(std::string_view bytes) {
    data_ += bytes;
    return *this;
  }

  // What the file pads its data to; writes general.alignment too.
  GgufBuilder& Alignment(uint32_t bytes) {
    alignment_ = bytes;
    return U32("general.alignment", bytes);
  }
  // What the header claims, whatever was added.
  GgufBuilder& ClaimKeys(uint64_t count) {
    claimed_keys_ = count;
    return *this;
  }
  GgufBuilder& ClaimTensors(uint64_t count) {
    claimed_tensors_ = count;
    return *this;
  }

  std::string Build() const {
    std::string file = "GGUF" + Raw(version_) + Raw(claimed_tensors_.value_or(tensor_count_)) +
                       Raw(claimed_keys_.value_or(key_count_)) + keys_ + tensors_;
    if (!data_.empty()) Pad(file);
    return file + data_;
  }

 private:
  void Pad(std::string& bytes) const {
    bytes.resize((bytes.size() + alignment_ - 1) / alignment_ * alignment_);
  }

  uint32_t version_;
  uint32_t alignment_ = 32;
  uint64_t key_count_ = 0;
  uint64_t tensor_count_ = 0;
  std::optional<uint64_t> claimed_keys_;
  std::optional<uint64_t> claimed_tensors_;
  std::string keys_;
  std::string tensors_;
  std::string data_;
};

// What AddTinyTokenizer and TinyLlama build; every field has a sensible value.
struct TinyModel {
  std::string architecture = "llama";
  std::string pre = "gpt-2";
  uint32_t layers = 2;
  uint32_t hidden = 64;
  uint32_t feed_forward = 96;
  uint32_t heads = 4;
  uint32_t kv_heads = 2;
  uint32_t context = 128;
  TensorType type = TensorType::kF32;  // of the matrices
};

// The tokens of AddTinyTokenizer: the 256 bytes, four merged ones, <|endoftext|>, <|im_start|>,
// <|im_end|> (control) and <tool> (user-defined).
inline constexpr uint32_t kTinyVocabulary = 264;

// The byte alphabet's character for a byte (tests/model/tokenizer_test.cc compares it with ours).
inline std::string TinyByteCharacter(int byte) {
  int c = byte;
  const auto printable = [](int b) {
    return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  };
  if (!printable(byte)) {
    c = 256;
    for (int b = 0; b < byte; ++b) c += printable(b) ? 0 : 1;
  }
  if (c < 0x80) return std::string(1, static_cast<char>(c));
  return {static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 0x3F))};
}

inline GgufBuilder& AddTinyTokenizer(GgufBuilder& builder, const std::string& pre) {
  std::vector<std::string> tokens;
  std::vector<int32_t> types(kTinyVocabulary, 1);
  for (int b = 0; b < 256; ++b) tokens.push_back(TinyByteCharacter(b));
  const std::string space = TinyByteCharacter(' ');
  for (const std::string& merged :
       {std::string("he"), std::string("ll"), std::string("hell"), space + "t"}) {
    tokens.push_back(merged);
  }
  for (const char* control : {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}) {
    types[tokens.size()] = 3;
    tokens.push_back(control);
  }
  types[tokens.size()] = 4;
  tokens.push_back("<tool>");
  return builder.String("tokenizer.ggml.model", "gpt2")
      .String("tokenizer.ggml.pre", pre)
      .Strings("tokenizer.ggml.tokens", tokens)
      .I32s("tokenizer.ggml.token_type", types)
      .Strings("tokenizer.ggml.merges", {"h e", "l l", "he ll", space + " t"})
      .U32("tokenizer.ggml.bos_token_id", 261)
      .U32("tokenizer.ggml.eos_token_id", 262)
      .Bool("tokenizer.ggml.add_bos_token", false);
}

// A complete small model with zero weights and a tied output; keys and tensors can be added to it.
inline GgufBuilder TinyLlama(const TinyModel& m = {}) {
  GgufBuilder b;
  const std::string a = m.architecture + ".";
  b.String("general.architecture", m.architecture)
      .String("general.name", "tiny")
      .U32(a + "block_count", m.layers)
      .U32(a + "embedding_length", m.hidden)
      .U32(a + "feed_forward_length", m.feed_forward)
      .U32(a + "attention.head_count", m.heads)
      .U32(a + "attention.head_count_kv", m.kv_heads)
      .U32(a + "context_length", m.context)
      .F32(a + "attention.layer_norm_rms_epsilon", 1e-5f)
      .F32(a + "rope.freq_base", 10000.0f);
  AddTinyTokenizer(b, m.pre);
  const uint64_t kv_rows = uint64_t{m.hidden} / m.heads * m.kv_heads;
  b.Tensor("token_embd.weight", m.type, {m.hidden, kTinyVocabulary});
  for (uint32_t layer = 0; layer < m.layers; ++layer) {
    const std::string p = "blk." + std::to_string(layer) + ".";
    b.Tensor(p + "attn_norm.weight", TensorType::kF32, {m.hidden})
        .Tensor(p + "attn_q.weight", m.type, {m.hidden, m.hidden})
        .Tensor(p + "attn_k.weight", m.type, {m.hidden, kv_rows})
        .Tensor(p + "attn_v.weight", m.type, {m.hidden, kv_rows})
        .Tensor(p + "attn_output.weight", m.type, {m.hidden, m.hidden})
        .Tensor(p + "ffn_norm.weight", TensorType::kF32, {m.hidden})
        .Tensor(p + "ffn_gate.weight", m.type, {m.hidden, m.feed_forward})
        .Tensor(p + "ffn_up.weight", m.type, {m.hidden, m.feed_forward})
        .Tensor(p + "ffn_down.weight", m.type, {m.feed_forward, m.hidden});
    if (m.architecture == "qwen2") {
      b.Tensor(p + "attn_q.bias", TensorType::kF32, {m.hidden})
          .Tensor(p + "attn_k.bias", TensorType::kF32, {kv_rows})
          .Tensor(p + "attn_v.bias", TensorType::kF32, {kv_rows});
    }
  }
  b.Tensor("output_norm.weight", TensorType::kF32, {m.hidden});
  return b;
}

}  // namespace antiphon::model

#endif  // ANTIPHON_TESTS_MODEL_GGUF_BUILDER_H_
