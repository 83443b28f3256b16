#include "gateway/prepare.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <cmath>
#include <iterator>

#include "antiphon/v1/inference.pb.h"
#include "common/block_key.h"
#include "common/philox.h"
#include "gateway/validate.h"

namespace antiphon::gateway {
namespace {

using model::Json;
using model::JsonArray;
using model::JsonObject;

constexpr uint32_t kCompletionTokensDefault = 16;

Json FromProtoValue(const google::protobuf::Value& value) {
  switch (value.kind_case()) {
    case google::protobuf::Value::kBoolValue:
      return value.bool_value();
    case google::protobuf::Value::kNumberValue: {
      // Struct knows doubles only; templates print integers as such.
      const double d = value.number_value();
      if (d == std::floor(d) && std::abs(d) < 9e15) return static_cast<int64_t>(d);
      return d;
    }
    case google::protobuf::Value::kStringValue:
      return Json(value.string_value());
    case google::protobuf::Value::kListValue: {
      JsonArray list;
      for (const auto& item : value.list_value().values()) list.push_back(FromProtoValue(item));
      return list;
    }
    case google::protobuf::Value::kStructValue: {
      JsonObject object;
      for (const auto& [k, v] : value.struct_value().fields()) object[k] = FromProtoValue(v);
      return object;
    }
    default:
      return nullptr;
  }
}

template <typename Messages>
JsonArray TemplateMessages(const Messages& messages) {
  JsonArray out;
  for (const api::ChatMessage& m : messages) {
    JsonObject message;
    message["role"] = m.role() == "developer" ? "system" : m.role();
    message["content"] = m.has_content() ? Json(m.content()) : Json(nullptr);
    if (!m.name().empty()) message["name"] = m.name();
    if (!m.tool_call_id().empty()) message["tool_call_id"] = m.tool_call_id();
    if (m.tool_calls_size() > 0) {
      JsonArray calls;
      for (const auto& c : m.tool_calls()) {
        calls.push_back(
            JsonObject{{"id", c.id()},
                       {"type", c.type()},
                       {"function", JsonObject{{"name", c.name()}, {"arguments", c.arguments()}}}});
      }
      message["tool_calls"] = std::move(calls);
    }
    out.push_back(std::move(message));
  }
  return out;
}

struct RenderArguments {
  bool add_generation_prompt = true;
  bool continue_final_message = false;
  const google::protobuf::Struct* kwargs = nullptr;
};

template <typename Messages>
MaybeError Render(const ServedModel& model, const Messages& messages, RenderArguments arguments,
                  absl::Time wall_now, std::string& out) {
  if (model.chat_template == nullptr) {
    return UnsupportedParameter(
        "messages", fmt::format("The model `{}` has no chat template; use /v1/completions.",
                                model.card.name()));
  }
  JsonObject context;
  for (const auto& [key, value] : arguments.kwargs->fields()) {
    context[key] = FromProtoValue(value);
  }
  context["messages"] = TemplateMessages(messages);
  context["add_generation_prompt"] =
      arguments.add_generation_prompt && !arguments.continue_final_message;
  context["bos_token"] = std::string(model.tokenizer->bos_text());
  context["eos_token"] = std::string(model.tokenizer->eos_text());
  absl::StatusOr<std::string> text = model.chat_template->Render(context, wall_now);
  if (!text.ok()) {
    const std::string why(text.status().message());
    return InvalidValue("messages", fmt::format("The chat template refuses the messages: {}", why));
  }
  out = *std::move(text);
  if (arguments.continue_final_message) {
    // The answer goes on where the last message ends, so what the template writes behind it goes.
    std::string last = messages[messages.size() - 1].content();
    const size_t end = last.find_last_not_of(" \t\r\n");
    last.resize(end == std::string::npos ? 0 : end + 1);
    const size_t at = out.rfind(last);
    if (last.empty() || at == std::string::npos) {
      return InvalidValue("continue_final_message",
                          "Invalid value for 'continue_final_message': the chat template does not "
                          "write the last message as it is.");
    }
    out.resize(at + last.size());
  }
  return std::nullopt;
}

MaybeError Encode(const ServedModel& model, std::string_view field, std::string_view text,
                  bool add_special, std::vector<uint32_t>& ids) {
  absl::StatusOr<std::vector<uint32_t>> encoded =
      model.tokenizer->Encode(text, {.add_bos = add_special});
  if (!encoded.ok()) {
    const std::string why(encoded.status().message());
    return InvalidValue(field, fmt::format("Invalid value for '{}': {}", field, why));
  }
  ids = *std::move(encoded);
  return std::nullopt;
}

MaybeError CheckIds(const ServedModel& model, const char* field, absl::Span<const uint32_t> ids) {
  for (uint32_t id : ids) {
    if (id >= model.tokenizer->vocab_size()) {
      return InvalidValue(field,
                          fmt::format("Invalid value for '{}': token id {} is not one of the "
                                      "model's {}.",
                                      field, id, model.tokenizer->vocab_size()));
    }
  }
  return std::nullopt;
}

void FillSampling(const api::GenerationOptions& o, const wire::SamplingDefaults& d,
                  wire::Sampling& s) {
  const auto pick = [](bool given, double value, bool has_default, double by_model,
                       double otherwise) {
    return given ? value : has_default ? by_model : otherwise;
  };
  s.set_temperature(
      pick(o.has_temperature(), o.temperature(), d.has_temperature(), d.temperature(), 1));
  s.set_top_p(pick(o.has_top_p(), o.top_p(), d.has_top_p(), d.top_p(), 1));
  s.set_min_p(pick(o.has_min_p(), o.min_p(), d.has_min_p(), d.min_p(), 0));
  s.set_repetition_penalty(pick(o.has_repetition_penalty(), o.repetition_penalty(),
                                d.has_repetition_penalty(), d.repetition_penalty(), 1));
  const double top_k = pick(o.has_top_k(), o.top_k(), d.has_top_k(), d.top_k(), 0);
  s.set_top_k(top_k > 0 ? static_cast<uint32_t>(top_k) : 0);
  s.set_presence_penalty(o.presence_penalty());
  s.set_frequency_penalty(o.frequency_penalty());
  for (const auto& [id, bias] : o.logit_bias()) (*s.mutable_logit_bias())[id] = bias;
  s.set_logprobs(o.logprobs());
  s.set_top_logprobs(o.top_logprobs());
}

// Everything but prompt, token limit and seed.
MaybeError FillSpec(const api::GenerationOptions& o, const ServedModel& model, const Caller& caller,
                    GenerationSpec& spec) {
  for (const auto& [id, bias] : o.logit_bias()) {
    if (MaybeError e = CheckIds(model, "logit_bias", absl::MakeConstSpan(&id, 1))) return e;
  }
  if (MaybeError e = CheckIds(model, "stop_token_ids", o.stop_token_ids())) return e;
  spec.label = caller.label;
  spec.tenant = caller.tenant;
  spec.model = model.card.name();
  spec.request_class = caller.request_class;
  spec.block_tokens = model.card.block_tokens();
  spec.root = RootKey({.weights_digest = model.card.weights_digest(),
                       .block_tokens = model.card.block_tokens(),
                       .tenant_salt = caller.tenant_salt,
                       .cache_salt = o.cache_salt()});
  FillSampling(o, model.card.sampling(), spec.sampling);
  std::vector<uint32_t> stops(o.stop_token_ids().begin(), o.stop_token_ids().end());
  if (!o.ignore_eos()) {
    const auto& ends = model.tokenizer->end_of_generation_ids();
    stops.insert(stops.end(), ends.begin(), ends.end());
  }
  std::sort(stops.begin(), stops.end());
  stops.erase(std::unique(stops.begin(), stops.end()), stops.end());
  spec.stop.mutable_stop_ids()->Add(stops.begin(), stops.end());
  spec.stop.set_min_tokens(o.min_tokens());
  spec.stop_strings.assign(o.stop().begin(), o.stop().end());
  spec.include_stop_string = o.include_stop_str_in_output();
  spec.skip_special_tokens = o.has_skip_special_tokens() ? o.skip_special_tokens() : true;
  spec.deadline = caller.deadline;
  spec.tokenizer = model.tokenizer;
  return std::nullopt;
}

// `field` is the prompt's: "messages" or "prompt".
MaybeError LimitTokens(const api::GenerationOptions& o, const ServedModel& model,
                       std::string_view field, bool chat, uint32_t prompt, uint32_t& max_tokens) {
  const uint64_t context = model.card.context_length();
  if (o.has_max_tokens()) {
    if (uint64_t{prompt} + o.max_tokens() > context) {
      return ContextLengthExceeded(field, context, prompt, o.max_tokens());
    }
    max_tokens = o.max_tokens();
  } else {
    if (prompt + uint64_t{1} > context) return ContextLengthExceeded(field, context, prompt, 1);
    const uint64_t left = context - prompt;
    max_tokens =
        static_cast<uint32_t>(chat ? left : std::min<uint64_t>(left, kCompletionTokensDefault));
  }
  if (o.min_tokens() > max_tokens) {
    return InvalidValue(
        "min_tokens", fmt::format("Invalid value for 'min_tokens': {} is above the {} tokens that "
                                  "can be generated.",
                                  o.min_tokens(), max_tokens));
  }
  return std::nullopt;
}

MaybeError AddChoices(const api::GenerationOptions& o, const Caller& caller, std::string_view field,
                      const GenerationSpec& common, std::vector<uint32_t> prompt,
                      PreparedRequest& out) {
  if (prompt.empty()) {
    return InvalidValue(field, fmt::format("Invalid value for '{}': it has no tokens.", field));
  }
  GenerationSpec spec = common;
  uint32_t max_tokens = 0;
  if (MaybeError e = LimitTokens(o, *out.model, field, out.chat,
                                 static_cast<uint32_t>(prompt.size()), max_tokens)) {
    return e;
  }
  spec.stop.set_max_tokens(max_tokens);
  out.prompt_tokens += static_cast<uint32_t>(prompt.size());
  spec.prompt = std::make_shared<const std::vector<uint32_t>>(std::move(prompt));
  const uint64_t seed = o.has_seed() ? static_cast<uint64_t>(o.seed()) : caller.seed;
  for (uint32_t j = 0; j < out.n; ++j) {
    spec.sampling.set_seed(ChoiceSeed(seed, j));
    out.choices.push_back(spec);
  }
  return std::nullopt;
}

}  // namespace

uint64_t ChoiceSeed(uint64_t seed, uint32_t choice) {
  if (choice == 0) return seed;
  const auto v = Philox4x32(seed, choice, 0x63686f696365);  // "choice"
  return (uint64_t{v[0]} << 32) | v[1];
}

std::string TenantSalt(const std::string& cluster, const std::string& tenant) {
  return Sha256Hex(
      fmt::format("antiphon tenant {} {} {} {}", cluster.size(), cluster, tenant.size(), tenant));
}

MaybeError Prepare(const api::ChatRequest& request, const ServedModelPtr& model,
                   const Caller& caller, PreparedRequest& out) {
  out.model = model;
  out.chat = true;
  out.n = request.options().has_n() ? request.options().n() : 1;
  GenerationSpec common;
  if (MaybeError e = FillSpec(request.options(), *model, caller, common)) return e;
  std::string text;
  RenderArguments arguments{.add_generation_prompt = !request.has_add_generation_prompt() ||
                                                     request.add_generation_prompt(),
                            .continue_final_message = request.continue_final_message(),
                            .kwargs = &request.chat_template_kwargs()};
  if (MaybeError e = Render(*model, request.messages(), arguments, caller.wall_now, text)) return e;
  std::vector<uint32_t> ids;
  // Templates write the beginning-of-sequence token themselves.
  if (MaybeError e = Encode(*model, "messages", text, request.add_special_tokens(), ids)) return e;
  return AddChoices(request.options(), caller, "messages", common, std::move(ids), out);
}

MaybeError Prepare(const api::CompletionRequest& request, const ServedModelPtr& model,
                   const Caller& caller, PreparedRequest& out) {
  out.model = model;
  out.n = request.options().has_n() ? request.options().n() : 1;
  GenerationSpec common;
  if (MaybeError e = FillSpec(request.options(), *model, caller, common)) return e;
  for (const api::Prompt& prompt : request.prompts()) {
    std::vector<uint32_t> ids;
    if (prompt.has_ids()) {
      ids.assign(prompt.ids().ids().begin(), prompt.ids().ids().end());
      if (MaybeError e = CheckIds(*model, "prompt", ids)) return e;
    } else {
      const bool special = !request.has_add_special_tokens() || request.add_special_tokens();
      if (MaybeError e = Encode(*model, "prompt", prompt.text(), special, ids)) return e;
    }
    if (MaybeError e =
            AddChoices(request.options(), caller, "prompt", common, std::move(ids), out)) {
      return e;
    }
  }
  return std::nullopt;
}

MaybeError Tokenize(const api::TokenizeRequest& request, const ServedModel& model,
                    absl::Time wall_now, api::TokenizeResponse& out) {
  std::vector<uint32_t> ids;
  if (request.messages_size() > 0) {
    std::string text;
    RenderArguments arguments{.add_generation_prompt = !request.has_add_generation_prompt() ||
                                                       request.add_generation_prompt(),
                              .kwargs = &request.chat_template_kwargs()};
    if (MaybeError e = Render(model, request.messages(), arguments, wall_now, text)) return e;
    if (MaybeError e = Encode(model, "messages", text, request.add_special_tokens(), ids)) return e;
  } else {
    const bool special = !request.has_add_special_tokens() || request.add_special_tokens();
    if (MaybeError e = Encode(model, "prompt", request.prompt(), special, ids)) return e;
  }
  out.set_count(static_cast<uint32_t>(ids.size()));
  out.set_max_model_len(model.card.context_length());
  out.mutable_tokens()->Add(ids.begin(), ids.end());
  if (request.return_token_strs()) {
    for (const uint32_t id : ids) {
      out.add_token_strs(model.tokenizer->Decode(absl::MakeConstSpan(&id, 1), false));
    }
  }
  return std::nullopt;
}

MaybeError Detokenize(const api::DetokenizeRequest& request, const ServedModel& model,
                      api::DetokenizeResponse& out) {
  if (MaybeError e = CheckIds(model, "tokens", request.tokens())) return e;
  out.set_prompt(model.tokenizer->Decode(request.tokens(), false));
  return std::nullopt;
}

}  // namespace antiphon::gateway
