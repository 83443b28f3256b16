// From a validated request to the generations that answer it: template, tokens, context, sampling
// defaults, stop rules, keys. Pure; thread-safe; the costly part of a request (rendering and
// tokenising), so it does not run where tokens flow.
#ifndef ANTIPHON_GATEWAY_PREPARE_H_
#define ANTIPHON_GATEWAY_PREPARE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "gateway/api_error.h"
#include "gateway/generation.h"
#include "gateway/served_model.h"

namespace antiphon::inference::v1 {
class ChatRequest;
class CompletionRequest;
class DetokenizeRequest;
class DetokenizeResponse;
class TokenizeRequest;
class TokenizeResponse;
}  // namespace antiphon::inference::v1

namespace antiphon::gateway {

namespace api = ::antiphon::inference::v1;

// What goes with a request besides its message.
struct Caller {
  std::string tenant = "default";
  std::string tenant_salt;
  std::string label;  // x-request-id or the request's id
  std::string request_class;
  absl::Time deadline = absl::InfiniteFuture();
  absl::Time wall_now;  // for templates
  uint64_t seed = 0;    // when the client gives none
};

// The choices of a request, prompt-major: choice = prompt * n + j. Ids are not set.
struct PreparedRequest {
  ServedModelPtr model;
  bool chat = false;
  uint32_t n = 1;
  uint32_t prompt_tokens = 0;  // each prompt once
  std::vector<GenerationSpec> choices;
};

MaybeError Prepare(const api::ChatRequest& request, const ServedModelPtr& model,
                   const Caller& caller, PreparedRequest& out);
MaybeError Prepare(const api::CompletionRequest& request, const ServedModelPtr& model,
                   const Caller& caller, PreparedRequest& out);
MaybeError Tokenize(const api::TokenizeRequest& request, const ServedModel& model,
                    absl::Time wall_now, api::TokenizeResponse& out);
MaybeError Detokenize(const api::DetokenizeRequest& request, const ServedModel& model,
                      api::DetokenizeResponse& out);

// The seed of choice j: seed itself for the first.
uint64_t ChoiceSeed(uint64_t seed, uint32_t choice);
// What block keys of a tenant are rooted in.
std::string TenantSalt(const std::string& cluster, const std::string& tenant);

}  // namespace antiphon::gateway

#endif  // ANTIPHON_GATEWAY_PREPARE_H_
