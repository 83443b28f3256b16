#include "gateway/validate.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "antiphon/v1/inference.pb.h"

namespace antiphon::gateway {
namespace {

// !(a <= x && x <= b) instead of x < a || x > b: NaN is out of range.
MaybeError InRange(const char* name, double value, double low, double high) {
  if (low <= value && value <= high) return std::nullopt;
  return InvalidValue(name, fmt::format("Invalid value for '{}': {} is not between {} and {}.",
                                        name, value, low, high));
}

MaybeError ValidateSampling(const api::GenerationOptions& o) {
  struct Bound {
    const char* name;
    bool present;
    double value, low, high;
  };
  const Bound bounds[] = {
      {"temperature", o.has_temperature(), o.temperature(), 0, 2},
      {"top_p", o.has_top_p(), o.top_p(), 0, 1},
      {"min_p", o.has_min_p(), o.min_p(), 0, 1},
      {"top_k", o.has_top_k(), static_cast<double>(o.top_k()), -1, 2147483647},
      {"presence_penalty", o.has_presence_penalty(), o.presence_penalty(), -2, 2},
      {"frequency_penalty", o.has_frequency_penalty(), o.frequency_penalty(), -2, 2},
      {"repetition_penalty", o.has_repetition_penalty(), o.repetition_penalty(), 0, 10},
  };
  for (const Bound& b : bounds) {
    if (!b.present) continue;
    if (MaybeError e = InRange(b.name, b.value, b.low, b.high)) return e;
  }
  if (o.has_top_p() && o.top_p() == 0) {
    return InvalidValue("top_p",
                        "Invalid value for 'top_p': it must be above 0; for greedy sampling "
                        "set temperature to 0.");
  }
  if (o.has_repetition_penalty() && o.repetition_penalty() == 0) {
    return InvalidValue("repetition_penalty",
                        "Invalid value for 'repetition_penalty': it must be above 0; 1 is off.");
  }
  for (const auto& [id, bias] : o.logit_bias()) {
    if (!(bias >= -100 && bias <= 100)) {
      return InvalidValue("logit_bias",
                          fmt::format("Invalid value for 'logit_bias': the bias {} of token {} is "
                                      "not between -100 and 100.",
                                      bias, id));
    }
  }
  return std::nullopt;
}

MaybeError ValidateStops(const api::GenerationOptions& o) {
  if (o.stop_size() > kStopStringsMax) {
    return InvalidValue("stop", fmt::format("Invalid value for 'stop': {} strings; at most {} are "
                                            "served.",
                                            o.stop_size(), kStopStringsMax));
  }
  for (const std::string& stop : o.stop()) {
    if (stop.empty()) {
      return InvalidValue("stop", "Invalid value for 'stop': a stop string must not be empty.");
    }
    if (stop.size() > kStopStringBytesMax) {
      return InvalidValue("stop",
                          fmt::format("Invalid value for 'stop': a stop string has {} bytes; "
                                      "at most {} are served.",
                                      stop.size(), kStopStringBytesMax));
    }
  }
  if (o.stop_token_ids_size() > 256) {
    return InvalidValue("stop_token_ids",
                        "Invalid value for 'stop_token_ids': at most 256 are "
                        "served.");
  }
  return std::nullopt;
}

MaybeError ValidateSalt(const api::GenerationOptions& o) {
  if (!o.has_cache_salt()) return std::nullopt;
  const std::string& salt = o.cache_salt();
  if (salt.empty() || salt.size() > 128) {
    return InvalidValue("cache_salt",
                        "Invalid value for 'cache_salt': it must have 1 to 128 characters.");
  }
  if (salt.find_first_of(std::string_view("@/\\\0", 4)) != std::string::npos) {
    return InvalidValue("cache_salt",
                        "Invalid value for 'cache_salt': @ / \\ and NUL are not allowed.");
  }
  return std::nullopt;
}

MaybeError ValidateOptions(const api::GenerationOptions& o, const ValidationLimits& limits) {
  if (o.has_max_tokens() && o.max_tokens() == 0) {
    return InvalidValue("max_tokens", "Invalid value for 'max_tokens': it must be at least 1.");
  }
  if (o.has_n() && (o.n() == 0 || o.n() > limits.max_n)) {
    return InvalidValue("n", fmt::format("Invalid value for 'n': {} is not between 1 and {}.",
                                         o.n(), limits.max_n));
  }
  if (MaybeError e = ValidateSampling(o)) return e;
  if (MaybeError e = ValidateStops(o)) return e;
  if (MaybeError e = ValidateSalt(o)) return e;
  if (o.has_max_tokens() && o.min_tokens() > o.max_tokens()) {
    return InvalidValue("min_tokens",
                        fmt::format("Invalid value for 'min_tokens': {} is above max_tokens {}.",
                                    o.min_tokens(), o.max_tokens()));
  }
  if (o.has_top_logprobs() && o.top_logprobs() > kTopLogprobsMax) {
    return InvalidValue("top_logprobs",
                        fmt::format("Invalid value for 'top_logprobs': {} is not between 0 and {}.",
                                    o.top_logprobs(), kTopLogprobsMax));
  }
  if (o.top_logprobs() > 0 && !o.logprobs()) {
    return InvalidValue("top_logprobs",
                        "Invalid value for 'top_logprobs': it needs 'logprobs' to be true.");
  }
  return std::nullopt;
}

template <typename Messages>
MaybeError ValidateMessages(const Messages& messages) {
  static constexpr std::string_view kRoles[] = {"system", "developer", "user", "assistant", "tool"};
  int index = 0;
  for (const api::ChatMessage& m : messages) {
    const std::string at = fmt::format("messages[{}]", index++);
    if (std::find(std::begin(kRoles), std::end(kRoles), m.role()) == std::end(kRoles)) {
      return InvalidValue(at + ".role",
                          fmt::format("Invalid value for '{}.role': it must be one of system, "
                                      "developer, user, assistant and tool.",
                                      at));
    }
    if (!m.has_content() && !(m.role() == "assistant" && m.tool_calls_size() > 0)) {
      return InvalidValue(at + ".content",
                          fmt::format("Invalid value for '{}.content': only an assistant's message "
                                      "with tool_calls may go without.",
                                      at));
    }
    if (m.tool_calls_size() > 0 && m.role() != "assistant") {
      return InvalidValue(at + ".tool_calls",
                          fmt::format("Invalid value for '{}.tool_calls': only an assistant's "
                                      "message may have them.",
                                      at));
    }
  }
  return std::nullopt;
}

}  // namespace

MaybeError Validate(const api::ChatRequest& request, const ValidationLimits& limits) {
  if (request.messages_size() == 0) {
    return InvalidValue("messages",
                        "Invalid value for 'messages': at least one message is needed.");
  }
  if (MaybeError e = ValidateMessages(request.messages())) return e;
  if (request.add_generation_prompt() && request.continue_final_message()) {
    return InvalidValue(
        "continue_final_message",
        "Invalid value for 'continue_final_message': add_generation_prompt cannot be "
        "true as well.");
  }
  if (request.continue_final_message()) {
    const auto& last = request.messages(request.messages_size() - 1);
    if (last.role() != "assistant" || last.content().empty()) {
      return InvalidValue("continue_final_message",
                          "Invalid value for 'continue_final_message': the last message must be an "
                          "assistant's, with content.");
    }
  }
  return ValidateOptions(request.options(), limits);
}

MaybeError Validate(const api::CompletionRequest& request, const ValidationLimits& limits) {
  if (request.prompts_size() == 0) {
    return InvalidValue("prompt", "Invalid value for 'prompt': at least one prompt is needed.");
  }
  if (static_cast<uint32_t>(request.prompts_size()) > limits.max_prompts) {
    return InvalidValue("prompt", fmt::format("Invalid value for 'prompt': {} prompts; at most {} "
                                              "are served in one request.",
                                              request.prompts_size(), limits.max_prompts));
  }
  for (const api::Prompt& prompt : request.prompts()) {
    if (prompt.kind_case() == api::Prompt::KIND_NOT_SET) {
      return InvalidValue("prompt",
                          "Invalid value for 'prompt': it is neither text nor token ids.");
    }
    if (prompt.has_ids() && prompt.ids().ids().empty()) {
      return InvalidValue("prompt", "Invalid value for 'prompt': it has no tokens.");
    }
  }
  if (request.echo()) {
    return UnsupportedParameter("echo", "'echo' is not supported: prompts are not sent back.");
  }
  return ValidateOptions(request.options(), limits);
}

MaybeError Validate(const api::TokenizeRequest& request) {
  if (request.messages_size() == 0) return std::nullopt;
  if (!request.prompt().empty()) {
    return InvalidValue("prompt", "Invalid value for 'prompt': send either prompt or messages.");
  }
  return ValidateMessages(request.messages());
}

bool IsGoodLabel(std::string_view label) {
  if (label.empty() || label.size() > 128) return false;
  return std::all_of(label.begin(), label.end(), [](char c) {
    return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '.' ||
           c == '_' || c == '-';
  });
}

}  // namespace antiphon::gateway
