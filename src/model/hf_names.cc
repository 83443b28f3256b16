#include "model/hf_names.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <string>

namespace antiphon::model {
namespace {

struct NamePair {
  std::string_view hf;
  std::string_view gguf;
};

constexpr NamePair kTensors[] = {
    {"model.embed_tokens.weight", "token_embd.weight"},
    {"model.norm.weight", "output_norm.weight"},
    {"lm_head.weight", "output.weight"},
};

// Behind "model.layers.N." and "blk.N.".
constexpr NamePair kLayerTensors[] = {
    {"input_layernorm.weight", "attn_norm.weight"},
    {"self_attn.q_proj.weight", "attn_q.weight"},
    {"self_attn.k_proj.weight", "attn_k.weight"},
    {"self_attn.v_proj.weight", "attn_v.weight"},
    {"self_attn.q_proj.bias", "attn_q.bias"},
    {"self_attn.k_proj.bias", "attn_k.bias"},
    {"self_attn.v_proj.bias", "attn_v.bias"},
    {"self_attn.o_proj.weight", "attn_output.weight"},
    {"self_attn.o_proj.bias", "attn_output.bias"},
    {"post_attention_layernorm.weight", "ffn_norm.weight"},
    {"mlp.gate_proj.weight", "ffn_gate.weight"},
    {"mlp.up_proj.weight", "ffn_up.weight"},
    {"mlp.down_proj.weight", "ffn_down.weight"},
    {"self_attn.rotary_emb.inv_freq", "attn_rot_embd.weight"},  // of old files, used by nobody
};

constexpr std::string_view kHfLayer = "model.layers.";
constexpr std::string_view kGgufLayer = "blk.";
constexpr std::string_view kNobodys = "hf:";

constexpr HfField kConfigFields[] = {
    {"num_hidden_layers", "block_count"},
    {"hidden_size", "embedding_length"},
    {"intermediate_size", "feed_forward_length"},
    {"num_attention_heads", "attention.head_count"},
    {"num_key_value_heads", "attention.head_count_kv"},
    {"head_dim", "attention.key_length"},
    {"max_position_embeddings", "context_length"},
    {"rms_norm_eps", "attention.layer_norm_rms_epsilon"},
    {"vocab_size", "vocab_size"},
};

// Set by readers that look twice.
constexpr HfField kDerivedFields[] = {
    {"rope_theta", "rope.freq_base"},
    {"rope_scaling.rope_type", "rope.scaling.type"},
    {"rope_scaling.factor", "rope.scaling.factor"},
    {"sliding_window", "attention.sliding_window"},
};

constexpr HfField kSamplingFields[] = {
    {"temperature", "temp"},
    {"top_p", "top_p"},
    {"top_k", "top_k"},
    {"min_p", "min_p"},
    {"repetition_penalty", "penalty_repeat"},
};

struct NamedKey {
  std::string_view key;
  std::string_view text;
};
constexpr NamedKey kKeys[] = {
    {"general.architecture", "config.json field \"architectures\""},
    {"general.name", "the folder's name"},
    {"tokenizer.ggml.model", "tokenizer.json field \"model.type\""},
    {"tokenizer.ggml.pre", "tokenizer.json field \"pre_tokenizer\""},
    {"tokenizer.ggml.tokens", "tokenizer.json field \"model.vocab\""},
    {"tokenizer.ggml.token_type", "tokenizer.json field \"added_tokens\""},
    {"tokenizer.ggml.merges", "tokenizer.json field \"model.merges\""},
    {"tokenizer.ggml.add_bos_token", "tokenizer.json field \"post_processor\""},
    {"tokenizer.ggml.bos_token_id", "bos_token of tokenizer_config.json (or bos_token_id)"},
    {"tokenizer.ggml.eos_token_id", "eos_token of tokenizer_config.json (or eos_token_id)"},
    {"tokenizer.chat_template", "the chat template"},
    {"antiphon.end_token_ids", "eos_token_id of generation_config.json or config.json"},
};

bool StartsWith(std::string_view s, std::string_view prefix) {
  return s.substr(0, prefix.size()) == prefix;
}

// "12" and "self_attn..." of "12.self_attn..."; an empty number when there is none. No leading
// zeros, so that a layer has one name.
struct LayerName {
  std::string_view number;
  std::string_view rest;
};
LayerName SplitLayer(std::string_view text) {
  const size_t dot = text.find('.');
  if (dot == std::string_view::npos || dot == 0 || dot > 6) return {};
  const std::string_view number = text.substr(0, dot);
  if (number.find_first_not_of("0123456789") != std::string_view::npos) return {};
  if (number.size() > 1 && number[0] == '0') return {};
  return {number, text.substr(dot + 1)};
}

class Words : public Wording {
 public:
  std::string Key(std::string_view key) const override {
    for (const NamedKey& named : kKeys) {
      if (named.key == key) return std::string(named.text);
    }
    constexpr std::string_view kSampling = "general.sampling.";
    if (StartsWith(key, kSampling)) {
      for (const HfField& field : kSamplingFields) {
        if (key.substr(kSampling.size()) == field.key) {
          return fmt::format("generation_config.json field \"{}\"", field.field);
        }
      }
    }
    const std::string_view rest = key.substr(key.find('.') + 1);
    for (const auto fields :
         {absl::MakeConstSpan(kConfigFields), absl::MakeConstSpan(kDerivedFields)}) {
      for (const HfField& field : fields) {
        if (rest == field.key) return ConfigField(field.field);
      }
    }
    return fmt::format("what GGUF calls {}", key);
  }

  std::string Tensor(std::string_view name) const override {
    if (StartsWith(name, kNobodys)) return fmt::format("tensor {}", name.substr(kNobodys.size()));
    for (const NamePair& pair : kTensors) {
      if (pair.gguf == name) return fmt::format("tensor {}", pair.hf);
    }
    if (StartsWith(name, kGgufLayer)) {
      const LayerName layer = SplitLayer(name.substr(kGgufLayer.size()));
      for (const NamePair& pair : kLayerTensors) {
        if (pair.gguf == layer.rest) {
          return fmt::format("tensor {}{}.{}", kHfLayer, layer.number, pair.hf);
        }
      }
    }
    return fmt::format("tensor {}", name);
  }

  std::string Dims(const std::vector<uint64_t>& dims) const override {
    return fmt::format("[{}]", fmt::join(dims.rbegin(), dims.rend(), ", "));
  }
};

}  // namespace

std::string GgufTensorName(std::string_view hf) {
  for (const NamePair& pair : kTensors) {
    if (pair.hf == hf) return std::string(pair.gguf);
  }
  if (StartsWith(hf, kHfLayer)) {
    const LayerName layer = SplitLayer(hf.substr(kHfLayer.size()));
    for (const NamePair& pair : kLayerTensors) {
      if (pair.hf == layer.rest) return fmt::format("{}{}.{}", kGgufLayer, layer.number, pair.gguf);
    }
  }
  return fmt::format("{}{}", kNobodys, hf);
}

absl::Span<const HfField> ConfigFields() { return kConfigFields; }
absl::Span<const HfField> SamplingFields() { return kSamplingFields; }

const Wording& HfWording() {
  static const Words* const words = new Words;
  return *words;
}

std::string ConfigField(std::string_view name) {
  return fmt::format("config.json field \"{}\"", name);
}

}  // namespace antiphon::model
