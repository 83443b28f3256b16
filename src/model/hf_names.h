// How a Hugging Face folder calls what ModelFile has GGUF's names for: tensors and configuration of
// LlamaForCausalLM, MistralForCausalLM and Qwen2ForCausalLM.
#ifndef ANTIPHON_MODEL_HF_NAMES_H_
#define ANTIPHON_MODEL_HF_NAMES_H_

#include <string>
#include <string_view>

#include "absl/types/span.h"
#include "model/model_file.h"

namespace antiphon::model {

// "model.layers.0.self_attn.q_proj.weight" is "blk.0.attn_q.weight". A name that is none of ours
// becomes one that is nobody's, so that it cannot pass for another.
std::string GgufTensorName(std::string_view hf);

// A field of a JSON file, and the key that stands for it ("block_count" behind the architecture).
struct HfField {
  const char* field;
  const char* key;
};
// Of config.json, whose values are taken as they are.
absl::Span<const HfField> ConfigFields();
// Of generation_config.json, for general.sampling.*.
absl::Span<const HfField> SamplingFields();

const Wording& HfWording();

// `config.json field "num_hidden_layers"`
std::string ConfigField(std::string_view name);

}  // namespace antiphon::model

#endif  // ANTIPHON_MODEL_HF_NAMES_H_
