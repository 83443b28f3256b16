#include "model/card.h"

#include <spdlog/fmt/fmt.h>

#include <map>
#include <utility>

#include "antiphon/v1/model.pb.h"
#include "common/status_macros.h"
#include "model/model_file.h"
#include "model/sha256.h"
#include "model/tokenizer.h"

namespace antiphon::model {
namespace {

constexpr const char* kChatTemplate = "tokenizer.chat_template";

// The type that holds most of the parameters.
std::string QuantisationOf(const ModelFile& file) {
  std::map<TensorType, uint64_t> elements;
  for (const Tensor& tensor : file.tensors()) elements[tensor.type] += tensor.elements();
  uint64_t most = 0;
  std::string name;
  for (const auto& [type, count] : elements) {
    if (count <= most) continue;
    most = count;
    name = TensorTypeName(type);
  }
  return name;
}

uint64_t ParametersOf(const ModelFile& file) {
  uint64_t count = 0;
  for (const Tensor& tensor : file.tensors()) count += tensor.elements();
  return count;
}

// general.sampling.*: what converters copy from the author's generation_config.json.
absl::Status FillSampling(const ModelFile& file, internal::v1::SamplingDefaults& sampling) {
  const auto number = [&](const char* name, double low, double high, auto set) -> absl::Status {
    const std::string key = std::string("general.sampling.") + name;
    const auto value = file.GetDouble(key);
    if (absl::IsNotFound(value.status())) return absl::OkStatus();
    RETURN_IF_ERROR(value.status());
    if (*value < low || *value > high) {
      return absl::InvalidArgumentError(
          fmt::format("{} is {}, expected {} to {}", file.wording().Key(key), *value, low, high));
    }
    set(*value);
    return absl::OkStatus();
  };
  RETURN_IF_ERROR(number("temp", 0, 100, [&](double v) { sampling.set_temperature(v); }));
  RETURN_IF_ERROR(number("top_p", 0, 1, [&](double v) { sampling.set_top_p(v); }));
  RETURN_IF_ERROR(
      number("top_k", 0, 1 << 24, [&](double v) { sampling.set_top_k(static_cast<int32_t>(v)); }));
  RETURN_IF_ERROR(number("min_p", 0, 1, [&](double v) { sampling.set_min_p(v); }));
  return number("penalty_repeat", 0, 100, [&](double v) { sampling.set_repetition_penalty(v); });
}

// What keeps the file from being served: its tensors first, then its tokenizer.
absl::Status Servable(const ModelFile& file) {
  RETURN_IF_ERROR(LlamaShapeOf(file).status());
  ASSIGN_OR_RETURN(const internal::v1::TokenizerSpec spec, TokenizerSpecOf(file));
  return Tokenizer::Create(spec).status();
}

std::string ValueText(const Value& value) {
  struct Printer {
    std::string operator()(std::monostate) const { return ""; }
    std::string operator()(uint64_t v) const { return std::to_string(v); }
    std::string operator()(int64_t v) const { return std::to_string(v); }
    std::string operator()(double v) const { return fmt::format("{}", static_cast<float>(v)); }
    std::string operator()(bool v) const { return v ? "true" : "false"; }
    std::string operator()(const Array& v) const { return fmt::format("{} values", SizeOf(v)); }
    std::string operator()(const std::string& v) const {
      std::string line;
      for (const char c : v.substr(0, 60)) {
        const unsigned char b = static_cast<unsigned char>(c);
        line.push_back(b < 0x20 || b == 0x7F ? ' ' : c);  // nothing that moves a terminal's cursor
      }
      while (FindInvalidUtf8(line) != std::string_view::npos) line.resize(FindInvalidUtf8(line));
      return v.size() > line.size() ? fmt::format("{}... ({} bytes)", line, v.size()) : line;
    }
  };
  return std::visit(Printer{}, value.v);
}

}  // namespace

absl::StatusOr<internal::v1::ModelCard> CardOf(const ModelFile& file, const std::string& name,
                                               CardParts& parts, const KnownDigests* known) {
  ASSIGN_OR_RETURN(const LlamaShape shape, LlamaShapeOf(file));
  ASSIGN_OR_RETURN(const internal::v1::TokenizerSpec spec, TokenizerSpecOf(file));
  ASSIGN_OR_RETURN(parts.chat_template_blob, file.GetStringOr(kChatTemplate, ""));
  parts.tokenizer_blob.clear();
  if (!spec.SerializeToString(&parts.tokenizer_blob)) {
    return absl::InvalidArgumentError("the tokenizer's vocabulary is too large to be sent");
  }
  internal::v1::ModelCard card;
  card.set_tokenizer_digest(Sha256Hex(parts.tokenizer_blob));
  if (known == nullptr || known->tokenizer != card.tokenizer_digest()) {
    RETURN_IF_ERROR(Tokenizer::Create(spec).status());
  }
  card.set_name(name);
  card.set_architecture(shape.architecture);
  card.set_weights_digest(known != nullptr ? known->weights : file.Digest());
  if (!parts.chat_template_blob.empty()) {
    card.set_chat_template_digest(Sha256Hex(parts.chat_template_blob));
  }
  card.set_context_length(shape.context);
  card.set_vocab_size(shape.vocab);
  RETURN_IF_ERROR(FillSampling(file, *card.mutable_sampling()));
  card.set_quantisation(QuantisationOf(file));
  card.set_parameter_count(ParametersOf(file));
  ASSIGN_OR_RETURN(const std::string display_name, file.GetStringOr("general.name", ""));
  card.set_display_name(display_name.substr(0, FindInvalidUtf8(display_name)));
  return card;
}

std::string Inspect(const ModelFile& file) {
  std::string out = fmt::format("{}, {} bytes, {} keys, {} tensors\n", file.format(),
                                file.size_bytes(), file.metadata().size(), file.tensors().size());
  for (const auto& [key, value] : file.metadata()) {
    out += fmt::format("  {} = {}\n", ValueText(Value{key}), ValueText(value));
  }
  std::map<std::string, std::pair<uint64_t, uint64_t>> by_type;
  for (const Tensor& tensor : file.tensors()) {
    auto& [tensors, elements] = by_type[TensorTypeName(tensor.type)];
    ++tensors;
    elements += tensor.elements();
  }
  for (const auto& [type, count] : by_type) {
    out += fmt::format("  {} tensors of type {}, {} parameters\n", count.first, type, count.second);
  }
  const absl::Status status = Servable(file);
  if (status.ok()) return out + "servable: yes\n";
  return out + fmt::format("servable: no, {}\n", std::string(status.message()));
}

}  // namespace antiphon::model
