// HTTP bodies into the messages of inference.proto. Types are checked here, because only JSON can
// get them wrong; so are the fields that are known and not served.
#include <spdlog/fmt/fmt.h>

#include <charconv>
#include <cmath>
#include <functional>
#include <limits>

#include "antiphon/v1/inference.pb.h"
#include "gateway/json_fields.h"
#include "gateway/validate.h"

namespace antiphon::gateway {
namespace {

using model::Json;
using model::JsonArray;
using model::JsonObject;

constexpr int64_t kUint32Max = std::numeric_limits<uint32_t>::max();

std::string_view View(const boost::json::string& s) { return {s.data(), s.size()}; }

bool IsNumber(const Json& v, double wanted) {
  return (v.is_int64() && static_cast<double>(v.get_int64()) == wanted) ||
         (v.is_uint64() && static_cast<double>(v.get_uint64()) == wanted) ||
         (v.is_double() && v.get_double() == wanted);
}
bool IsBool(const Json& v, bool wanted) { return v.is_bool() && v.get_bool() == wanted; }
bool IsText(const Json& v, std::string_view wanted) {
  return v.is_string() && View(v.get_string()) == wanted;
}
bool IsEmptyArray(const Json& v) { return v.is_array() && v.get_array().empty(); }
bool IsEmptyObject(const Json& v) { return v.is_object() && v.get_object().empty(); }
bool Never(const Json&) { return false; }
bool One(const Json& v) { return IsNumber(v, 1); }
bool Zero(const Json& v) { return IsNumber(v, 0); }
bool False(const Json& v) { return IsBool(v, false); }
bool True(const Json& v) { return IsBool(v, true); }
bool Empty(const Json& v) { return IsEmptyArray(v) || IsEmptyObject(v) || IsText(v, ""); }
bool AnyBool(const Json& v) { return v.is_bool(); }
bool NoneText(const Json& v) { return IsText(v, "none"); }
bool TextFormat(const Json& v) {
  if (!v.is_object()) return false;
  const Json* type = v.get_object().if_contains("type");
  return type != nullptr && IsText(*type, "text");
}
bool TextOnly(const Json& v) {
  return v.is_array() && v.get_array().size() == 1 && IsText(v.get_array()[0], "text");
}

// Fields that would change the answer if we served them. A neutral value asks for nothing.
struct Unserved {
  const char* name;
  bool (*neutral)(const Json&);
  const char* advice;  // ends the message
};
constexpr Unserved kUnserved[] = {
    {"tools", Never, "Tool calls are not served yet; leave it out."},
    {"tool_choice", NoneText, "Tool calls are not served yet; leave it out or send \"none\"."},
    {"parallel_tool_calls", AnyBool, "Tool calls are not served yet; leave it out."},
    {"functions", Never, "Tool calls are not served yet; leave it out."},
    {"function_call", NoneText, "Tool calls are not served yet; leave it out."},
    {"response_format", TextFormat,
     "Only {\"type\":\"text\"} is served; constrained output is not served yet."},
    {"structured_outputs", Never, "Constrained output is not served yet."},
    {"guided_json", Never, "Constrained output is not served yet."},
    {"guided_regex", Never, "Constrained output is not served yet."},
    {"guided_choice", Never, "Constrained output is not served yet."},
    {"guided_grammar", Never, "Constrained output is not served yet."},
    {"guided_decoding_backend", Never, "Constrained output is not served yet."},
    {"guided_whitespace_pattern", Never, "Constrained output is not served yet."},
    {"json_schema", Never, "Constrained output is not served yet."},
    {"regex", Never, "Constrained output is not served yet."},
    {"ebnf", Never, "Constrained output is not served yet."},
    {"grammar", Empty, "Constrained output is not served yet."},
    {"best_of", One, "Only 1 is served."},
    {"use_beam_search", False, "Beam search is not served."},
    {"length_penalty", One, "Beam search is not served; 1 is accepted."},
    {"early_stopping", False, "Beam search is not served."},
    {"suffix", Empty, "Text after the completion cannot be given."},
    {"echo", False, "Prompts are not sent back."},
    {"prompt_logprobs", Never, "Log probabilities of prompt tokens are not served."},
    {"logprob_token_ids", Empty, "Use 'top_logprobs'."},
    {"bad_words", Empty, "Use 'logit_bias' with -100."},
    {"allowed_token_ids", Never, "Use 'logit_bias'."},
    {"return_tokens_as_token_ids", False, "Use 'return_token_ids'."},
    {"lora", Empty, "Adapters are not served."},
    {"lora_request", Never, "Adapters are not served."},
    {"chat_template", Never, "Templates come with the model only."},
    {"documents", Empty, "Put documents into the messages."},
    {"modalities", TextOnly, "Only [\"text\"] is served."},
    {"audio", Never, "Only text is served."},
    {"web_search_options", Never, "Web search is not served."},
    {"reasoning_effort", NoneText,
     "Use 'chat_template_kwargs' where a template has such a switch."},
    {"truncate_prompt_tokens", Never, "Prompts are never cut; send a shorter one."},
    {"priority", Zero, "Use the header X-Antiphon-Class."},
    {"kv_transfer_params", Never, "KV transfer is internal to the cluster."},
    {"spaces_between_special_tokens", True, "Only true is served."},
    {"repeat_penalty", One, "Use 'repetition_penalty'."},
    {"n_predict", Never, "Use 'max_tokens'."},
    {"mirostat", Zero, "It is not served."},
    {"typical_p", One, "It is not served; 1 is accepted."},
    {"tfs_z", One, "It is not served; 1 is accepted."},
    {"top_a", Zero, "It is not served; 0 is accepted."},
};

// Known, and the answer is the same with or without them.
constexpr const char* kWithoutEffect[] = {
    "metadata",           "store",        "service_tier",           "safety_identifier",
    "prompt_cache_key",   "prediction",   "prompt_cache_retention", "prompt_cache_options",
    "verbosity",          "cache_prompt", "include_reasoning",      "stream_interval",
    "include_obfuscation"};

void RefuseUnserved(JsonFields& fields) {
  for (const Unserved& u : kUnserved) {
    const Json* value = fields.Find(u.name);
    if (value == nullptr || u.neutral(*value)) continue;
    fields.Fail(UnsupportedParameter(
        u.name, fmt::format("Unsupported parameter: '{}'. {}", u.name, u.advice)));
  }
  for (const char* name : kWithoutEffect) fields.Accept(name);
}

void ReadStrings(JsonFields& fields, const char* name,
                 const std::function<void(std::string_view)>& add) {
  const Json* value = fields.Find(name);
  if (value == nullptr) return;
  if (value->is_string()) {
    add(View(value->get_string()));
    return;
  }
  const auto wrong = [&](const Json& got) {
    fields.Fail(InvalidValue(
        name,
        fmt::format("Invalid type for '{}': expected a string or an array of strings, but got "
                    "{} instead.",
                    name, JsonKindName(got))));
  };
  if (!value->is_array()) return wrong(*value);
  if (value->get_array().size() > 4096) {
    fields.Fail(InvalidValue(name, fmt::format("Invalid value for '{}': too many strings.", name)));
    return;
  }
  for (const Json& item : value->get_array()) {
    if (!item.is_string()) return wrong(item);
    add(View(item.get_string()));
  }
}

// An id of the vocabulary; whether it is in range is the model's to say.
bool ReadTokenId(JsonFields& fields, const std::string& path, const Json& item, uint32_t& id) {
  if (item.is_int64() && item.get_int64() >= 0 && item.get_int64() <= kUint32Max) {
    id = static_cast<uint32_t>(item.get_int64());
    return true;
  }
  fields.Fail(InvalidValue(
      path, fmt::format("Invalid value for '{}': expected token ids, but got {}.", path,
                        item.is_int64() ? std::to_string(item.get_int64()) : JsonKindName(item))));
  return false;
}

void ReadLogitBias(JsonFields& fields, api::GenerationOptions& o) {
  const JsonObject* bias = fields.Object("logit_bias");
  if (bias == nullptr) return;
  if (bias->size() > 1024) {
    fields.Fail(InvalidValue("logit_bias",
                             "Invalid value for 'logit_bias': at most 1024 tokens are "
                             "served."));
    return;
  }
  for (const auto& member : *bias) {
    const std::string_view key(member.key().data(), member.key().size());
    uint32_t id = 0;
    const auto [end, ec] = std::from_chars(key.data(), key.data() + key.size(), id);
    if (ec != std::errc() || end != key.data() + key.size()) {
      fields.Fail(InvalidValue("logit_bias",
                               "Invalid value for 'logit_bias': keys must be token ids "
                               "in decimal."));
      return;
    }
    const Json& v = member.value();
    double value = 0;
    if (v.is_double()) {
      value = v.get_double();
    } else if (v.is_int64()) {
      value = static_cast<double>(v.get_int64());
    } else {
      fields.Fail(
          InvalidValue("logit_bias", fmt::format("Invalid type for 'logit_bias': expected a "
                                                 "number, but got {} instead.",
                                                 JsonKindName(v))));
      return;
    }
    if (!(value >= -100 && value <= 100)) {
      fields.Fail(InvalidValue(
          "logit_bias", fmt::format("Invalid value for 'logit_bias': the bias {} of token {} "
                                    "is not between -100 and 100.",
                                    value, id)));
      return;
    }
    (*o.mutable_logit_bias())[id] = static_cast<float>(value);
  }
}

void ReadStream(JsonFields& fields, HttpOptions& options) {
  if (const auto v = fields.Bool("stream")) options.stream = *v;
  const JsonObject* stream_options = fields.Object("stream_options");
  if (stream_options != nullptr) {
    if (!options.stream) {
      fields.Fail(InvalidValue("stream_options",
                               "Invalid value for 'stream_options': it is allowed "
                               "only with stream true."));
      return;
    }
    MaybeError inner;
    JsonFields sub(*stream_options, "stream_options.", inner);
    if (const auto v = sub.Bool("include_usage")) options.include_usage = *v;
    if (const auto v = sub.Bool("continuous_usage_stats")) options.continuous_usage = *v;
    sub.Bool("include_obfuscation");
    if (inner) fields.Fail(*inner);
    for (std::string& name : sub.Unknown()) options.ignored.push_back("stream_options." + name);
  }
  if (const auto v = fields.Bool("return_token_ids")) options.return_token_ids = *v;
  for (const char* name : {"request_id", "rid"}) {
    const auto v = fields.String(name);
    if (!v) continue;
    if (!IsGoodLabel(*v)) {
      fields.Fail(InvalidValue(name, fmt::format("Invalid value for '{}': it must match "
                                                 "[A-Za-z0-9._-]{{1,128}}.",
                                                 name)));
      return;
    }
    options.label = std::string(*v);
  }
}

void ReadOptions(JsonFields& fields, api::GenerationOptions& o) {
  constexpr double kHuge = std::numeric_limits<double>::max();
  const auto max_tokens = fields.Integer("max_tokens", 1, kUint32Max);
  const auto max_completion = fields.Integer("max_completion_tokens", 1, kUint32Max);
  if (max_tokens) o.set_max_tokens(static_cast<uint32_t>(*max_tokens));
  if (max_completion) o.set_max_tokens(static_cast<uint32_t>(*max_completion));
  if (const auto v = fields.Number("temperature", 0, 2)) o.set_temperature(*v);
  if (const auto v = fields.Number("top_p", 0, 1)) o.set_top_p(*v);
  if (const auto v = fields.Integer("top_k", -1, std::numeric_limits<int32_t>::max())) {
    o.set_top_k(static_cast<int32_t>(*v));
  }
  if (const auto v = fields.Number("min_p", 0, 1)) o.set_min_p(*v);
  if (const auto v = fields.Number("presence_penalty", -2, 2)) o.set_presence_penalty(*v);
  if (const auto v = fields.Number("frequency_penalty", -2, 2)) o.set_frequency_penalty(*v);
  if (const auto v = fields.Number("repetition_penalty", -kHuge, kHuge)) {
    o.set_repetition_penalty(*v);
  }
  if (const auto v = fields.Integer("seed", std::numeric_limits<int64_t>::min(),
                                    std::numeric_limits<int64_t>::max())) {
    o.set_seed(*v);
  }
  if (const auto v = fields.Integer("n", 1, kUint32Max)) o.set_n(static_cast<uint32_t>(*v));
  ReadStrings(fields, "stop", [&](std::string_view s) { o.add_stop(std::string(s)); });
  if (const JsonArray* ids = fields.Array("stop_token_ids")) {
    for (const Json& item : *ids) {
      uint32_t id = 0;
      if (!ReadTokenId(fields, "stop_token_ids", item, id)) break;
      o.add_stop_token_ids(id);
    }
  }
  if (const auto v = fields.Bool("include_stop_str_in_output")) {
    o.set_include_stop_str_in_output(*v);
  }
  if (const auto v = fields.Bool("ignore_eos")) o.set_ignore_eos(*v);
  if (const auto v = fields.Integer("min_tokens", 0, kUint32Max)) {
    o.set_min_tokens(static_cast<uint32_t>(*v));
  }
  ReadLogitBias(fields, o);
  if (const auto v = fields.String("cache_salt")) o.set_cache_salt(std::string(*v));
  if (const auto v = fields.Bool("skip_special_tokens")) o.set_skip_special_tokens(*v);
  if (const auto v = fields.String("user")) o.set_user(std::string(*v));
}

google::protobuf::Value ToProtoValue(const Json& json) {
  google::protobuf::Value out;
  switch (json.kind()) {
    case boost::json::kind::null:
      out.set_null_value(google::protobuf::NULL_VALUE);
      break;
    case boost::json::kind::bool_:
      out.set_bool_value(json.get_bool());
      break;
    case boost::json::kind::int64:
      out.set_number_value(static_cast<double>(json.get_int64()));
      break;
    case boost::json::kind::uint64:
      out.set_number_value(static_cast<double>(json.get_uint64()));
      break;
    case boost::json::kind::double_:
      out.set_number_value(json.get_double());
      break;
    case boost::json::kind::string:
      out.set_string_value(std::string(View(json.get_string())));
      break;
    case boost::json::kind::array: {
      auto* list = out.mutable_list_value();
      for (const Json& item : json.get_array()) *list->add_values() = ToProtoValue(item);
      break;
    }
    case boost::json::kind::object: {
      auto* members = out.mutable_struct_value()->mutable_fields();
      for (const auto& m : json.get_object()) {
        (*members)[std::string(m.key().data(), m.key().size())] = ToProtoValue(m.value());
      }
      break;
    }
  }
  return out;
}

void ReadTemplateArguments(JsonFields& fields, google::protobuf::Struct* out) {
  const JsonObject* kwargs = fields.Object("chat_template_kwargs");
  if (kwargs == nullptr) return;
  for (const auto& m : *kwargs) {
    const std::string key(m.key().data(), m.key().size());
    (*out->mutable_fields())[key] = ToProtoValue(m.value());
  }
}

// A string, or a list of parts {"type":"text","text":...}: joined by line breaks as templates do.
void ReadContent(JsonFields& fields, api::ChatMessage& message) {
  const Json* content = fields.Find("content");
  if (content == nullptr) return;
  const std::string path = fields.Path("content");
  if (content->is_string()) {
    message.set_content(std::string(View(content->get_string())));
    return;
  }
  if (!content->is_array()) {
    fields.Fail(
        InvalidValue(path, fmt::format("Invalid type for '{}': expected a string or an array "
                                       "of text parts, but got {} instead.",
                                       path, JsonKindName(*content))));
    return;
  }
  std::string text;
  size_t index = 0;
  for (const Json& part : content->get_array()) {
    const std::string at = fmt::format("{}[{}]", path, index);
    if (!part.is_object()) {
      fields.Fail(
          InvalidValue(at, fmt::format("Invalid type for '{}': expected an object, but got {} "
                                       "instead.",
                                       at, JsonKindName(part))));
      return;
    }
    MaybeError inner;
    JsonFields sub(part.get_object(), at + ".", inner);
    const auto type = sub.String("type");
    const auto value = type == "text" ? sub.String("text") : std::nullopt;
    if (!inner && type != "text") {
      inner =
          type ? UnsupportedParameter(
                     at + ".type",
                     fmt::format("Unsupported content type in '{}': only \"text\" is served.", at))
               : InvalidValue(at + ".type", fmt::format("Missing field: '{}.type'.", at));
    }
    if (!inner && !value) {
      inner = InvalidValue(at + ".text", fmt::format("Missing field: '{}.text'.", at));
    }
    if (inner) {
      fields.Fail(*inner);
      return;
    }
    if (index++ > 0) text += '\n';
    text += *value;
  }
  message.set_content(text);
}

void ReadToolCalls(JsonFields& fields, api::ChatMessage& message) {
  const JsonArray* calls = fields.Array("tool_calls");
  if (calls == nullptr) return;
  size_t index = 0;
  for (const Json& item : *calls) {
    const std::string at = fields.Path(fmt::format("tool_calls[{}]", index++));
    const auto wrong = [&](std::string_view what) {
      fields.Fail(InvalidValue(at, fmt::format("Invalid value for '{}': {}.", at, what)));
    };
    if (!item.is_object()) return wrong("expected an object");
    MaybeError inner;
    JsonFields sub(item.get_object(), at + ".", inner);
    api::ToolCall& call = *message.add_tool_calls();
    if (const auto v = sub.String("id")) call.set_id(std::string(*v));
    const auto type = sub.String("type");
    call.set_type(std::string(type.value_or("function")));
    if (const JsonObject* function = sub.Object("function")) {
      JsonFields f(*function, at + ".function.", inner);
      if (const auto v = f.String("name")) call.set_name(std::string(*v));
      if (const auto v = f.String("arguments")) call.set_arguments(std::string(*v));
    }
    if (inner) {
      fields.Fail(*inner);
      return;
    }
    if (call.type() != "function") return wrong("only calls of functions are known");
    if (call.name().empty()) return wrong("function.name is missing");
  }
}

template <typename Messages>
void ReadMessages(JsonFields& fields, Messages* out) {
  const JsonArray* messages = fields.Array("messages");
  if (messages == nullptr) return;
  if (messages->size() > 100'000) {
    fields.Fail(InvalidValue("messages", "Invalid value for 'messages': too many messages."));
    return;
  }
  size_t index = 0;
  for (const Json& item : *messages) {
    const std::string at = fmt::format("messages[{}]", index++);
    if (!item.is_object()) {
      fields.Fail(
          InvalidValue(at, fmt::format("Invalid type for '{}': expected an object, but got {} "
                                       "instead.",
                                       at, JsonKindName(item))));
      return;
    }
    MaybeError inner;
    JsonFields sub(item.get_object(), at + ".", inner);
    api::ChatMessage& message = *out->Add();
    const auto role = sub.String("role");
    if (role) {
      message.set_role(std::string(*role));
    } else {
      sub.Fail(InvalidValue(at + ".role", fmt::format("Missing field: '{}.role'.", at)));
    }
    ReadContent(sub, message);
    if (const auto v = sub.String("name")) message.set_name(std::string(*v));
    if (const auto v = sub.String("tool_call_id")) message.set_tool_call_id(std::string(*v));
    ReadToolCalls(sub, message);
    if (sub.Find("function_call") != nullptr) {
      sub.Fail(UnsupportedParameter(at + ".function_call",
                                    fmt::format("Unsupported parameter: '{}.function_call'. Use "
                                                "tool_calls.",
                                                at)));
    }
    if (inner) {
      fields.Fail(*inner);
      return;
    }
  }
}

// str, [str], [int], [[int]], and lists that mix strings with lists of ids.
void ReadPrompt(JsonFields& fields, api::CompletionRequest& request) {
  const Json* prompt = fields.Find("prompt");
  if (prompt == nullptr) return;
  if (prompt->is_string()) {
    request.add_prompts()->set_text(std::string(View(prompt->get_string())));
    return;
  }
  if (!prompt->is_array()) {
    fields.Fail(
        InvalidValue("prompt", fmt::format("Invalid type for 'prompt': expected a string, an "
                                           "array of strings, of token ids or of arrays of "
                                           "token ids, but got {} instead.",
                                           JsonKindName(*prompt))));
    return;
  }
  const JsonArray& items = prompt->get_array();
  const auto read_ids = [&](const JsonArray& ids, api::TokenIds& out) {
    out.mutable_ids()->Reserve(static_cast<int>(ids.size()));
    for (const Json& item : ids) {
      uint32_t id = 0;
      if (!ReadTokenId(fields, "prompt", item, id)) return;
      out.add_ids(id);
    }
  };
  if (!items.empty() && (items[0].is_int64() || items[0].is_uint64())) {
    read_ids(items, *request.add_prompts()->mutable_ids());
    return;
  }
  for (const Json& item : items) {
    if (fields.failed()) return;
    if (item.is_string()) {
      request.add_prompts()->set_text(std::string(View(item.get_string())));
    } else if (item.is_array()) {
      read_ids(item.get_array(), *request.add_prompts()->mutable_ids());
    } else {
      fields.Fail(
          InvalidValue("prompt", fmt::format("Invalid type for 'prompt': expected strings or "
                                             "token ids, but got {} among them.",
                                             JsonKindName(item))));
    }
  }
}

void Finish(const JsonFields& fields, HttpOptions& options) {
  // What comes after an error has not been read, which makes it no unknown field.
  if (fields.failed()) return options.ignored.clear();
  for (std::string& name : fields.Unknown()) options.ignored.push_back(std::move(name));
  if (options.ignored.size() > kUnknownNamesMax) options.ignored.resize(kUnknownNamesMax);
}

}  // namespace

MaybeError ParseChat(std::string_view body, api::ChatRequest& request, HttpOptions& options) {
  Json root;
  if (MaybeError e = ParseJsonObject(body, root)) return e;
  MaybeError error;
  JsonFields fields(root.get_object(), "", error);
  RefuseUnserved(fields);
  if (const auto v = fields.String("model")) request.set_model(std::string(*v));
  if (fields.Find("messages") == nullptr) {
    fields.Fail(InvalidValue("messages", "Missing required parameter: 'messages'."));
  }
  ReadMessages(fields, request.mutable_messages());
  ReadOptions(fields, *request.mutable_options());
  if (const auto v = fields.Bool("logprobs")) request.mutable_options()->set_logprobs(*v);
  if (const auto v = fields.Integer("top_logprobs", 0, kTopLogprobsMax)) {
    request.mutable_options()->set_top_logprobs(static_cast<uint32_t>(*v));
  }
  ReadTemplateArguments(fields, request.mutable_chat_template_kwargs());
  if (const auto v = fields.Bool("add_generation_prompt")) request.set_add_generation_prompt(*v);
  if (const auto v = fields.Bool("continue_final_message")) request.set_continue_final_message(*v);
  if (const auto v = fields.Bool("add_special_tokens")) request.set_add_special_tokens(*v);
  ReadStream(fields, options);
  Finish(fields, options);
  return error;
}

MaybeError ParseCompletion(std::string_view body, api::CompletionRequest& request,
                           HttpOptions& options) {
  Json root;
  if (MaybeError e = ParseJsonObject(body, root)) return e;
  MaybeError error;
  JsonFields fields(root.get_object(), "", error);
  RefuseUnserved(fields);
  if (const auto v = fields.String("model")) request.set_model(std::string(*v));
  if (fields.Find("prompt") == nullptr) {
    fields.Fail(InvalidValue("prompt", "Missing required parameter: 'prompt'."));
  }
  ReadPrompt(fields, request);
  ReadOptions(fields, *request.mutable_options());
  if (const auto v = fields.Integer("logprobs", 0, kTopLogprobsMax)) {
    request.mutable_options()->set_logprobs(true);
    request.mutable_options()->set_top_logprobs(static_cast<uint32_t>(*v));
  }
  if (const auto v = fields.Bool("add_special_tokens")) request.set_add_special_tokens(*v);
  ReadStream(fields, options);
  Finish(fields, options);
  return error;
}

MaybeError ParseTokenize(std::string_view body, api::TokenizeRequest& request,
                         HttpOptions& options) {
  Json root;
  if (MaybeError e = ParseJsonObject(body, root)) return e;
  MaybeError error;
  JsonFields fields(root.get_object(), "", error);
  if (const auto v = fields.String("model")) request.set_model(std::string(*v));
  const bool has_prompt = fields.Find("prompt") != nullptr;
  const bool has_messages = fields.Find("messages") != nullptr;
  if (has_prompt == has_messages) {
    fields.Fail(
        InvalidValue("prompt", has_prompt ? "Invalid value for 'prompt': send either prompt or "
                                            "messages."
                                          : "Missing required parameter: 'prompt' or 'messages'."));
  }
  if (const auto v = has_prompt ? fields.String("prompt") : std::nullopt) {
    request.set_prompt(std::string(*v));
  }
  ReadMessages(fields, request.mutable_messages());
  if (has_messages && request.messages_size() == 0) {
    fields.Fail(
        InvalidValue("messages", "Invalid value for 'messages': at least one message is needed."));
  }
  if (const auto v = fields.Bool("add_special_tokens")) request.set_add_special_tokens(*v);
  if (const auto v = fields.Bool("add_generation_prompt")) request.set_add_generation_prompt(*v);
  if (const auto v = fields.Bool("return_token_strs")) request.set_return_token_strs(*v);
  ReadTemplateArguments(fields, request.mutable_chat_template_kwargs());
  Finish(fields, options);
  return error;
}

MaybeError ParseDetokenize(std::string_view body, api::DetokenizeRequest& request,
                           HttpOptions& options) {
  Json root;
  if (MaybeError e = ParseJsonObject(body, root)) return e;
  MaybeError error;
  JsonFields fields(root.get_object(), "", error);
  if (const auto v = fields.String("model")) request.set_model(std::string(*v));
  const JsonArray* tokens = fields.Array("tokens");
  if (tokens == nullptr) {
    fields.Fail(InvalidValue("tokens", "Missing required parameter: 'tokens'."));
  } else {
    for (const Json& item : *tokens) {
      uint32_t id = 0;
      if (!ReadTokenId(fields, "tokens", item, id)) break;
      request.add_tokens(id);
    }
  }
  Finish(fields, options);
  return error;
}

}  // namespace antiphon::gateway
