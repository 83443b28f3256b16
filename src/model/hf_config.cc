#include "model/hf_config.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>
#include <optional>
#include <string>
#include <utility>

#include "common/status_macros.h"
#include "model/hf_json.h"
#include "model/hf_names.h"

namespace antiphon::model {
namespace {

struct Architecture {
  const char* name;
  const char* gguf;
};
constexpr Architecture kArchitectures[] = {
    {"LlamaForCausalLM", "llama"},
    {"MistralForCausalLM", "llama"},
    {"Qwen2ForCausalLM", "qwen2"},
};
// What the classes of transformers take for fields that a file leaves out.
constexpr double kRmsNormEps = 1e-6;
constexpr double kRopeTheta = 10'000;
constexpr uint64_t kMistralWindow = 4096;

constexpr uint64_t kHeadDimMax = 4096;

absl::Status Unservable(std::string message) {
  return absl::FailedPreconditionError(std::move(message));
}

absl::Status Refused(std::string_view field, const Json& value, std::string_view served) {
  return Unservable(fmt::format("{} is {}: {}", ConfigField(field), Shown(value), served));
}

// Scalars as they are; what is none has a type that no getter takes.
Value ValueOf(const Json& json) {
  if (const auto* u = json.if_uint64()) return Value{*u};
  if (const auto* i = json.if_int64()) {
    return *i >= 0 ? Value{static_cast<uint64_t>(*i)} : Value{*i};
  }
  if (const auto* d = json.if_double()) return Value{*d};
  if (const auto* b = json.if_bool()) return Value{*b};
  if (const auto* s = json.if_string()) return Value{std::string(s->data(), s->size())};
  return Value{Array{}};
}

std::optional<double> Number(const JsonObject& object, std::string_view name) {
  const Json* member = FindMember(object, name);
  if (member == nullptr || !member->is_number()) return std::nullopt;
  return member->to_number<double>();
}

class ConfigReader {
 public:
  ConfigReader(const JsonObject& config, ModelContents& contents)
      : config_(config), contents_(contents) {}

  absl::Status Read() {
    RETURN_IF_ERROR(ReadArchitecture());
    for (const HfField& field : ConfigFields()) {
      if (const Json* member = FindMember(config_, field.field)) Set(field.key, ValueOf(*member));
    }
    if (FindMember(config_, "rms_norm_eps") == nullptr) {
      Set("attention.layer_norm_rms_epsilon", Value{kRmsNormEps});
    }
    RETURN_IF_ERROR(RefuseVariants());
    RETURN_IF_ERROR(ReadWindow());
    RETURN_IF_ERROR(ReadRope());
    return CheckTensors();
  }

 private:
  void Set(std::string_view key, Value value) {
    contents_.metadata[fmt::format("{}.{}", architecture_, key)] = std::move(value);
  }

  absl::Status ReadArchitecture() {
    const JsonArray* names = FindArray(config_, "architectures");
    if (names == nullptr || names->empty() || !(*names)[0].is_string()) {
      return Unservable(ConfigField("architectures") + " is missing or names none");
    }
    const boost::json::string& text = (*names)[0].get_string();
    class_ = std::string(text.data(), text.size());
    const auto* known = std::find_if(std::begin(kArchitectures), std::end(kArchitectures),
                                     [&](const Architecture& a) { return class_ == a.name; });
    if (known == std::end(kArchitectures)) {
      contents_.metadata["general.architecture"] = Value{class_};
      return Refused("architectures", (*names)[0],
                     "LlamaForCausalLM, MistralForCausalLM and Qwen2ForCausalLM are served");
    }
    architecture_ = known->gguf;
    contents_.metadata["general.architecture"] = Value{architecture_};
    return absl::OkStatus();
  }

  // Fields that change the arithmetic in ways we do not compute.
  absl::Status RefuseVariants() const {
    if (const Json* member = FindMember(config_, "quantization_config")) {
      return Refused("quantization_config", *member, "quantised weights are served from GGUF only");
    }
    const Json* activation = FindMember(config_, "hidden_act");
    if (activation != nullptr && FindText(config_, "hidden_act") != "silu") {
      return Refused("hidden_act", *activation, "\"silu\" is served");
    }
    if (IsTrue(config_, "mlp_bias")) {
      return Refused("mlp_bias", true, "biases of the feed-forward are not served");
    }
    const auto rotary = Number(config_, "partial_rotary_factor");
    if (rotary.has_value() && *rotary != 1) {
      return Refused("partial_rotary_factor", *rotary, "1 is served");
    }
    return absl::OkStatus();
  }

  // The window that the class would use; LlamaShapeOf refuses one that the context exceeds.
  absl::Status ReadWindow() {
    if (const JsonArray* types = FindArray(config_, "layer_types")) {
      for (const Json& type : *types) {
        if (!type.is_string() || type.get_string() != "full_attention") {
          return Unservable(fmt::format("{} has {}: \"full_attention\" is served",
                                        ConfigField("layer_types"), Shown(type)));
        }
      }
    }
    const Json* window = FindMember(config_, "sliding_window");
    if (class_ == "MistralForCausalLM" && !config_.contains("sliding_window")) {
      Set("attention.sliding_window", Value{kMistralWindow});
    } else if (window != nullptr &&
               (class_ == "MistralForCausalLM" ||
                (architecture_ == "qwen2" && IsTrue(config_, "use_sliding_window")))) {
      Set("attention.sliding_window", ValueOf(*window));
    }
    return absl::OkStatus();
  }

  // transformers has the section under two names: from version 5 on, with the base inside.
  absl::Status ReadRope() {
    const char* section = "rope_parameters";
    const Json* member = FindMember(config_, section);
    if (member == nullptr) member = FindMember(config_, section = "rope_scaling");
    const JsonObject none;
    if (member != nullptr && !member->is_object()) {
      return Refused(section, *member, "an object is expected");
    }
    const JsonObject& rope = member == nullptr ? none : member->get_object();
    for (const auto& [name, value] : rope) {
      if (value.is_object()) {
        return Unservable(
            fmt::format("{} differs by kind of layer, which is not served", ConfigField(section)));
      }
    }
    const Json* base = FindMember(rope, "rope_theta");
    if (base == nullptr) base = FindMember(config_, "rope_theta");
    Set("rope.freq_base", base == nullptr ? Value{kRopeTheta} : ValueOf(*base));
    return ReadScaling(rope, section);
  }

  absl::Status ReadScaling(const JsonObject& rope, const std::string& section) {
    const auto rotary = Number(rope, "partial_rotary_factor");
    if (rotary.has_value() && *rotary != 1) {
      return Refused(section + ".partial_rotary_factor", *rotary, "1 is served");
    }
    const char* name = "rope_type";
    const Json* type = FindMember(rope, name);
    if (type == nullptr) type = FindMember(rope, name = "type");
    if (type == nullptr) return absl::OkStatus();
    const std::string_view text = FindText(rope, name);
    if (text == "default") return absl::OkStatus();
    if (text == "llama3") return AddLlama3Divisors(rope, section);
    if (text != "linear") {
      return Refused(fmt::format("{}.{}", section, name), *type,
                     "\"default\", \"linear\" and \"llama3\" are served");
    }
    const Json* factor = FindMember(rope, "factor");
    if (factor == nullptr) return Unservable(ConfigField(section + ".factor") + " is missing");
    Set("rope.scaling.type", Value{std::string(text)});
    Set("rope.scaling.factor", ValueOf(*factor));
    return absl::OkStatus();
  }

  absl::StatusOr<double> RopeNumber(const JsonObject& rope, const std::string& section,
                                    const char* name) const {
    const auto number = Number(rope, name);
    if (!number.has_value() || !(*number > 0 && *number <= 1e9)) {
      return Unservable(fmt::format("{} is missing or no number from 0 to 1e9",
                                    ConfigField(fmt::format("{}.{}", section, name))));
    }
    return *number;
  }

  uint64_t HeadDim() const {
    if (const auto dim = Number(config_, "head_dim")) return ToSize(*dim);
    const uint64_t heads = ToSize(Number(config_, "num_attention_heads").value_or(0));
    return heads == 0 ? 0 : ToSize(Number(config_, "hidden_size").value_or(0)) / heads;
  }
  static uint64_t ToSize(double number) {
    return number > 0 && number < 1e9 ? static_cast<uint64_t>(number) : 0;
  }

  // transformers, modeling_rope_utils.py, _compute_llama3_parameters: waves that turn within the
  // context of training stay, those beyond it are slowed by `factor`, and those between by a part.
  absl::Status AddLlama3Divisors(const JsonObject& rope, const std::string& section) {
    ASSIGN_OR_RETURN(const double factor, RopeNumber(rope, section, "factor"));
    ASSIGN_OR_RETURN(const double low, RopeNumber(rope, section, "low_freq_factor"));
    ASSIGN_OR_RETURN(const double high, RopeNumber(rope, section, "high_freq_factor"));
    ASSIGN_OR_RETURN(const double context,
                     RopeNumber(rope, section, "original_max_position_embeddings"));
    if (high <= low) {
      return Unservable(ConfigField(section + ".high_freq_factor") +
                        " is not above low_freq_factor");
    }
    const uint64_t head_dim = HeadDim();
    if (head_dim == 0 || head_dim > kHeadDimMax || head_dim % 2 != 0) {
      return Unservable(fmt::format("a head has {} dimensions, an even number up to {} is served",
                                    head_dim, kHeadDimMax));
    }
    const double base =
        Number(rope, "rope_theta").value_or(Number(config_, "rope_theta").value_or(kRopeTheta));
    std::vector<float> divisors(head_dim / 2);
    for (size_t i = 0; i < divisors.size(); ++i) {
      const double turns =
          std::pow(base, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim)) * context /
          (2 * std::numbers::pi);  // within that context
      const double part = std::clamp((turns - low) / (high - low), 0.0, 1.0);
      divisors[i] = static_cast<float>(1 / ((1 - part) / factor + part));
    }
    Tensor tensor{.name = "rope_freqs.weight", .type = TensorType::kF32, .dims = {head_dim / 2}};
    tensor.bytes = divisors.size() * sizeof(float);
    contents_.made.push_back(std::make_unique<std::byte[]>(tensor.bytes));
    std::memcpy(contents_.made.back().get(), divisors.data(), tensor.bytes);
    tensor.data = contents_.made.back().get();
    contents_.tensors.push_back(std::move(tensor));
    return absl::OkStatus();
  }

  bool HasTensor(std::string_view name) const {
    return std::any_of(contents_.tensors.begin(), contents_.tensors.end(),
                       [&](const Tensor& tensor) { return tensor.name == name; });
  }

  // Where fields and tensors must agree and LlamaShapeOf sees the tensors alone.
  absl::Status CheckTensors() {
    if (IsTrue(config_, "tie_word_embeddings")) {
      std::erase_if(contents_.tensors, [](const Tensor& t) { return t.name == "output.weight"; });
    } else if (!HasTensor("output.weight")) {
      return Unservable(fmt::format("tensor lm_head.weight is missing and {} is not true",
                                    ConfigField("tie_word_embeddings")));
    }
    if (architecture_ != "llama") return absl::OkStatus();
    const bool wanted = class_ == "LlamaForCausalLM" && IsTrue(config_, "attention_bias");
    if (wanted != HasTensor("blk.0.attn_q.bias")) {
      return Unservable(
          fmt::format("tensor model.layers.0.self_attn.q_proj.bias is {} and {} is {}",
                      wanted ? "missing" : "there", ConfigField("attention_bias"),
                      wanted ? "true" : "not true"));
    }
    return absl::OkStatus();
  }

  const JsonObject& config_;
  ModelContents& contents_;
  std::string class_;
  std::string architecture_;
};

}  // namespace

absl::Status ReadHfConfig(const JsonObject& config, ModelContents& contents) {
  return ConfigReader(config, contents).Read();
}

void ReadHfSampling(const JsonObject& generation, ModelContents& contents) {
  for (const HfField& field : SamplingFields()) {
    if (const Json* member = FindMember(generation, field.field)) {
      contents.metadata[fmt::format("general.sampling.{}", field.key)] = ValueOf(*member);
    }
  }
}

}  // namespace antiphon::model
