// Writes safetensors and Hugging Face folders for tests: whole ones from a small GGUF, broken ones
// by field.
#ifndef ANTIPHON_TESTS_MODEL_HF_BUILDER_H_
#define ANTIPHON_TESTS_MODEL_HF_BUILDER_H_

#include <boost/json/parse.hpp>
#include <boost/json/serialize.hpp>
#include <cstring>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "model/json_value.h"
#include "model/model_file.h"

namespace antiphon::model {

// A header with its length in front of it, and data behind.
inline std::string SafetensorsOf(std::string_view header, std::string_view data) {
  const uint64_t size = header.size();
  std::string bytes(sizeof(size), '\0');
  std::memcpy(bytes.data(), &size, sizeof(size));
  return bytes.append(header).append(data);
}

class SafetensorsBuilder {
 public:
  SafetensorsBuilder& Tensor(const std::string& name, std::string_view dtype,
                             const std::vector<uint64_t>& shape, std::string_view data) {
    JsonObject entry;
    entry["dtype"] = dtype;
    JsonArray dims;
    for (const uint64_t d : shape) dims.push_back(d);
    entry["shape"] = std::move(dims);
    entry["data_offsets"] = JsonArray{data_.size(), data_.size() + data.size()};
    header_[name] = std::move(entry);
    data_ += data;
    return *this;
  }
  std::string Build() const {
    std::string header = boost::json::serialize(header_);
    header.resize((header.size() + 7) / 8 * 8, ' ');  // as the reference writer does
    return SafetensorsOf(header, data_);
  }

 private:
  JsonObject header_ = {{"__metadata__", {{"format", "pt"}}}};
  std::string data_;
};

using HfFiles = std::map<std::string, std::string>;

// The name in a Hugging Face folder, written out once more.
inline std::string HfTensorNameOf(const std::string& gguf) {
  static const auto* const names =
      new std::map<std::string, std::string>{{"token_embd.weight", "model.embed_tokens.weight"},
                                             {"output_norm.weight", "model.norm.weight"},
                                             {"output.weight", "lm_head.weight"},
                                             {"attn_norm.weight", "input_layernorm.weight"},
                                             {"ffn_norm.weight", "post_attention_layernorm.weight"},
                                             {"attn_output.weight", "self_attn.o_proj.weight"},
                                             {"attn_q.weight", "self_attn.q_proj.weight"},
                                             {"attn_k.weight", "self_attn.k_proj.weight"},
                                             {"attn_v.weight", "self_attn.v_proj.weight"},
                                             {"attn_q.bias", "self_attn.q_proj.bias"},
                                             {"attn_k.bias", "self_attn.k_proj.bias"},
                                             {"attn_v.bias", "self_attn.v_proj.bias"},
                                             {"ffn_gate.weight", "mlp.gate_proj.weight"},
                                             {"ffn_up.weight", "mlp.up_proj.weight"},
                                             {"ffn_down.weight", "mlp.down_proj.weight"}};
  if (gguf.rfind("blk.", 0) != 0) return names->at(gguf);
  const size_t dot = gguf.find('.', 4);
  return "model.layers." + gguf.substr(4, dot - 4) + "." + names->at(gguf.substr(dot + 1));
}

// Rows of q and k as Hugging Face has them: of every head the first elements of all pairs, then the
// second ones.
inline std::string RowsInHalves(std::string_view data, uint64_t rows, uint64_t head_dim) {
  const size_t row_bytes = data.size() / rows;
  std::string out;
  for (uint64_t row = 0; row < rows; ++row) {
    const uint64_t within = row % head_dim, pairs = head_dim / 2;
    const uint64_t from = row - within + (within < pairs ? 2 * within : 2 * (within - pairs) + 1);
    out += data.substr(from * row_bytes, row_bytes);
  }
  return out;
}

inline JsonObject HfConfigOf(const ModelFile& file) {
  const std::string arch = *file.GetString("general.architecture");
  const auto number = [&](const char* key) { return *file.GetUint(arch + "." + key); };
  JsonObject config;
  config["architectures"] = JsonArray{arch == "qwen2" ? "Qwen2ForCausalLM" : "LlamaForCausalLM"};
  config["hidden_act"] = "silu";
  config["hidden_size"] = number("embedding_length");
  config["intermediate_size"] = number("feed_forward_length");
  config["num_hidden_layers"] = number("block_count");
  config["num_attention_heads"] = number("attention.head_count");
  config["num_key_value_heads"] = number("attention.head_count_kv");
  config["max_position_embeddings"] = number("context_length");
  config["rms_norm_eps"] = *file.GetDouble(arch + ".attention.layer_norm_rms_epsilon");
  config["rope_theta"] = *file.GetDouble(arch + ".rope.freq_base");
  config["tie_word_embeddings"] = file.FindTensor("output.weight") == nullptr;
  config["vocab_size"] = file.FindTensor("token_embd.weight")->dims[1];
  config["torch_dtype"] = "bfloat16";
  if (*file.GetStringOr(arch + ".rope.scaling.type", "none") == "linear") {
    config["rope_scaling"] =
        JsonObject{{"type", "linear"}, {"factor", *file.GetDouble(arch + ".rope.scaling.factor")}};
  }
  return config;
}

// A pre-tokenizer's section of tokenizer.json.
inline Json HfPreTokenizer(const std::string& pre) {
  const auto byte_level = [](const char* regex) {
    return std::string(R"({"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,)") +
           R"("use_regex":)" + regex + "}";
  };
  const std::string split = R"({"type":"Split","pattern":{"Regex":"(?i:'s|'t|'re|'ve|'m|'ll|'d)|)"
                            R"([^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N})" +
                            std::string(pre == "llama-bpe" ? "{1,3}" : "") +
                            R"(| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"},)"
                            R"("behavior":"Isolated","invert":false})";
  const auto sequence = [](const std::string& a, const std::string& b) {
    return boost::json::parse(R"({"type":"Sequence","pretokenizers":[)" + a + "," + b + "]}");
  };
  if (pre == "gpt-2") return boost::json::parse(byte_level("true"));
  if (pre == "smollm") {
    return sequence(R"({"type":"Digits","individual_digits":true})", byte_level("true"));
  }
  return sequence(split, byte_level("false"));
}

inline JsonObject HfTokenizerOf(const ModelFile& file) {
  const std::string pre = *file.GetString("tokenizer.ggml.pre");
  const auto texts = [&](const char* key) -> const Texts& {
    return std::get<Texts>(std::get<Array>(file.metadata().at(key).v));
  };
  JsonObject vocab;
  JsonArray added, merges;
  const Texts& tokens = texts("tokenizer.ggml.tokens");
  const Texts& rules = texts("tokenizer.ggml.merges");
  const auto& types = std::get<std::vector<int64_t>>(
      std::get<Array>(file.metadata().at("tokenizer.ggml.token_type").v));
  for (size_t id = 0; id < tokens.size(); ++id) {
    const std::string text(tokens[id]);
    const int64_t type = types[id];
    if (type != 3 && type != 4) {
      vocab[text] = id;
      continue;
    }
    added.push_back(JsonObject{{"id", id},
                               {"content", text},
                               {"single_word", false},
                               {"lstrip", false},
                               {"rstrip", false},
                               {"normalized", false},
                               {"special", type == 3}});
  }
  bool pair = false;  // both ways of writing a rule
  for (size_t i = 0; i < rules.size(); ++i) {
    const std::string rule(rules[i]);
    const size_t space = rule.find(' ');
    pair = !pair;
    if (pair) {
      merges.push_back(boost::json::string(rule));
    } else {
      merges.push_back(JsonArray{rule.substr(0, space), rule.substr(space + 1)});
    }
  }
  JsonObject tokenizer;
  tokenizer["version"] = "1.0";
  tokenizer["added_tokens"] = std::move(added);
  tokenizer["normalizer"] = pre == "qwen2" ? Json(JsonObject{{"type", "NFC"}}) : Json(nullptr);
  tokenizer["pre_tokenizer"] = HfPreTokenizer(pre);
  tokenizer["post_processor"] = nullptr;
  tokenizer["decoder"] = JsonObject{{"type", "ByteLevel"}};
  tokenizer["model"] = JsonObject{{"type", "BPE"},
                                  {"dropout", nullptr},
                                  {"unk_token", nullptr},
                                  {"byte_fallback", false},
                                  {"ignore_merges", pre == "llama-bpe"},
                                  {"vocab", std::move(vocab)},
                                  {"merges", std::move(merges)}};
  return tokenizer;
}

// The same model: weights in the types that safetensors has, the tokenizer and its end tokens.
inline HfFiles HfFolderOf(const ModelFile& file) {
  const JsonObject config = HfConfigOf(file);
  const uint64_t head_dim = config.at("hidden_size").to_number<uint64_t>() /
                            config.at("num_attention_heads").to_number<uint64_t>();
  SafetensorsBuilder weights;
  for (const Tensor& tensor : file.tensors()) {
    if (tensor.name == "rope_freqs.weight") continue;
    std::string data(reinterpret_cast<const char*>(tensor.data), tensor.bytes);
    const bool rotated = tensor.name.find("attn_q.weight") != std::string::npos ||
                         tensor.name.find("attn_k.weight") != std::string::npos;
    if (rotated && *file.GetString("general.architecture") == "llama") {
      data = RowsInHalves(data, tensor.dims[1], head_dim);
    }
    weights.Tensor(HfTensorNameOf(tensor.name), TensorTypeName(tensor.type),
                   {tensor.dims.rbegin(), tensor.dims.rend()}, data);
  }
  return {{"config.json", boost::json::serialize(config)},
          {"tokenizer.json", boost::json::serialize(HfTokenizerOf(file))},
          {"tokenizer_config.json",
           R"({"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}})"},
          {"generation_config.json",
           R"({"eos_token_id": [262, 260], "temperature": 0.6, "top_k": 20, "top_p": null})"},
          {"model.safetensors", weights.Build()}};
}

}  // namespace antiphon::model

#endif  // ANTIPHON_TESTS_MODEL_HF_BUILDER_H_
