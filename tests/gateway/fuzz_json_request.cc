// Bodies of HTTP requests, up to what is sent to the cluster. The first byte picks the endpoint.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "antiphon/v1/inference.pb.h"
#include "gateway/prepare.h"
#include "gateway/validate.h"
#include "tests/gateway/model_fixture.h"

namespace {

using namespace antiphon::gateway;

void CheckError(const MaybeError& error) {
  if (!error.has_value()) return;
  if (error->status < 400 || error->status > 499 || error->message.empty()) std::abort();
  if (antiphon::model::FindInvalidUtf8(ErrorJson(*error)) != std::string_view::npos) std::abort();
}

template <typename Request>
void Generate(MaybeError error, const Request& request) {
  if (!error) error = Validate(request, {});
  PreparedRequest prepared;
  if (!error) error = Prepare(request, TestModel(), {}, prepared);
  CheckError(error);
  if (error) return;
  if (prepared.choices.empty() || prepared.choices.size() > 16 * 256) std::abort();
  for (const GenerationSpec& spec : prepared.choices) {
    if (spec.prompt->empty() || spec.stop.max_tokens() == 0) std::abort();
    if (spec.prompt->size() + spec.stop.max_tokens() > 512) std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view body(reinterpret_cast<const char*>(data) + 1, size - 1);
  HttpOptions options;
  switch (data[0] % 4) {
    case 0: {
      api::ChatRequest request;
      Generate(ParseChat(body, request, options), request);
      break;
    }
    case 1: {
      api::CompletionRequest request;
      Generate(ParseCompletion(body, request, options), request);
      break;
    }
    case 2: {
      api::TokenizeRequest request;
      api::TokenizeResponse response;
      MaybeError error = ParseTokenize(body, request, options);
      if (!error) error = Validate(request);
      if (!error) error = Tokenize(request, *TestModel(), {}, response);
      CheckError(error);
      break;
    }
    default: {
      api::DetokenizeRequest request;
      api::DetokenizeResponse response;
      MaybeError error = ParseDetokenize(body, request, options);
      if (!error) error = Detokenize(request, *TestModel(), response);
      CheckError(error);
    }
  }
  return 0;
}
