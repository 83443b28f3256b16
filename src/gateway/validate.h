// The one validator of both fronts. HTTP bodies are parsed into the messages of inference.proto
// here; then Validate checks ranges and combinations on the messages, whichever front they came
// from.
//
// Pure and thread-safe; input is hostile. Errors name the field as the client wrote it.
#ifndef ANTIPHON_GATEWAY_VALIDATE_H_
#define ANTIPHON_GATEWAY_VALIDATE_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "gateway/api_error.h"

namespace antiphon::inference::v1 {
class ChatRequest;
class CompletionRequest;
class DetokenizeRequest;
class GenerationOptions;
class TokenizeRequest;
}  // namespace antiphon::inference::v1

namespace antiphon::gateway {

namespace api = ::antiphon::inference::v1;

// What an HTTP body says beyond the messages.
struct HttpOptions {
  bool stream = false;
  bool include_usage = false;  // stream_options
  bool continuous_usage = false;
  bool return_token_ids = false;
  std::string label;                 // request_id or rid; empty: none
  std::vector<std::string> ignored;  // unknown fields, at most 32
};

MaybeError ParseChat(std::string_view body, api::ChatRequest& request, HttpOptions& options);
MaybeError ParseCompletion(std::string_view body, api::CompletionRequest& request,
                           HttpOptions& options);
MaybeError ParseTokenize(std::string_view body, api::TokenizeRequest& request,
                         HttpOptions& options);
MaybeError ParseDetokenize(std::string_view body, api::DetokenizeRequest& request,
                           HttpOptions& options);

struct ValidationLimits {
  uint32_t max_n = 16;
  uint32_t max_prompts = 256;  // of one completion request
};
inline constexpr int kStopStringsMax = 16;
inline constexpr size_t kStopStringBytesMax = 256;
inline constexpr uint32_t kTopLogprobsMax = 20;

MaybeError Validate(const api::ChatRequest& request, const ValidationLimits& limits);
MaybeError Validate(const api::CompletionRequest& request, const ValidationLimits& limits);
MaybeError Validate(const api::TokenizeRequest& request);

// Whether a client's request id may be echoed and logged: [A-Za-z0-9._-]{1,128}.
bool IsGoodLabel(std::string_view label);

}  // namespace antiphon::gateway

#endif  // ANTIPHON_GATEWAY_VALIDATE_H_
