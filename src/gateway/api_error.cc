#include "gateway/api_error.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <cmath>

#include "antiphon/v1/control.pb.h"
#include "gateway/json_text.h"
#include "model/tokenizer.h"

namespace antiphon::gateway {
namespace {

// Paths and headers come back in messages, and may hold any bytes.
std::string Utf8Only(std::string text) {
  for (size_t bad; (bad = model::FindInvalidUtf8(text)) != std::string::npos;) text[bad] = '?';
  return text;
}

}  // namespace

ApiError InvalidValue(std::string_view param, std::string message) {
  return {.status = 400,
          .type = "invalid_request_error",
          .code = "invalid_value",
          .param = std::string(param),
          .message = std::move(message)};
}

ApiError UnsupportedParameter(std::string_view param, std::string message) {
  return {.status = 400,
          .type = "invalid_request_error",
          .code = "unsupported_parameter",
          .param = std::string(param),
          .message = std::move(message)};
}

ApiError InvalidJson(std::string message) {
  return {.status = 400,
          .type = "invalid_request_error",
          .code = "invalid_json",
          .message = std::move(message)};
}

ApiError ContextLengthExceeded(std::string_view param, uint64_t context, uint64_t prompt,
                               uint64_t completion) {
  const bool chat = param == "messages";
  return {.status = 400,
          .type = "invalid_request_error",
          .code = "context_length_exceeded",
          .param = std::string(param),
          .message = fmt::format(
              "This model's maximum context length is {} tokens. However, you requested {} tokens "
              "({} in the {}, {} in the completion). Please reduce the length of the {} or "
              "completion.",
              context, prompt + completion, prompt, chat ? "messages" : "prompt", completion,
              chat ? "messages" : "prompt")};
}

ApiError ModelNotFound(std::string_view model, std::string_view served) {
  return {.status = 404,
          .type = "not_found_error",
          .code = "model_not_found",
          .param = "model",
          .message = served.empty() ? fmt::format("The model `{}` does not exist.", model)
                                    : fmt::format("The model `{}` does not exist. Served here: {}.",
                                                  model, served)};
}

ApiError Unauthenticated(std::string message) {
  return {.status = 401,
          .type = "authentication_error",
          .code = "invalid_api_key",
          .message = std::move(message)};
}

ApiError Unavailable(std::string_view code, std::string message) {
  return {.status = 503,
          .type = "unavailable_error",
          .code = std::string(code),
          .message = std::move(message),
          .retry_after_s = 1};
}

ApiError Draining() {
  return Unavailable("draining", "This gateway is shutting down; send the request again.");
}

ApiError TimedOut(std::string message) {
  return {.status = 504, .type = "timeout_error", .code = "timeout", .message = std::move(message)};
}

ApiError Internal(std::string_view request_id) {
  return {.status = 500,
          .type = "internal_error",
          .code = "internal_error",
          .message = fmt::format("Internal error; the request's id is {}.", request_id)};
}

ApiError HttpError(int status, std::string message) {
  ApiError error{.status = status, .type = "invalid_request_error", .message = std::move(message)};
  switch (status) {
    case 404:
      error.type = "not_found_error";
      error.code = "route_not_found";
      break;
    case 405:
      error.code = "method_not_allowed";
      break;
    case 408:
      error.code = "request_timeout";
      break;
    case 413:
      error.code = "request_too_large";
      break;
    case 415:
      error.code = "unsupported_media_type";
      break;
    case 417:
      error.code = "expectation_failed";
      break;
    case 431:
      error.code = "headers_too_large";
      break;
    case 501:
      error.type = "not_supported_error";
      error.code = "not_supported";
      break;
    case 503:
      error.type = "unavailable_error";
      error.code = "overloaded";
      break;
    case 505:
      error.code = "http_version_not_supported";
      break;
    default:
      error.code = "bad_request";
  }
  return error;
}

ApiError FromRejected(const internal::v1::Rejected& rejected, int overload_status, double jitter) {
  using R = internal::v1::Rejected;
  const auto say = [&](const char* otherwise) {
    return rejected.message().empty() ? std::string(otherwise) : rejected.message();
  };
  ApiError error;
  switch (rejected.reason()) {
    case R::NO_WORKERS:
      error = Unavailable("no_workers", say("No worker can serve this model now."));
      break;
    case R::DRAINING:
      error = Unavailable("draining", say("The cluster is shutting down."));
      break;
    case R::UNKNOWN_MODEL:
      error = ModelNotFound("", "");
      error.message = say("The cluster does not serve this model.");
      return error;
    default: {
      error.status = overload_status;
      error.type = "rate_limit_error";
      error.code = "overloaded";
      error.message = say("The cluster is overloaded.");
      switch (rejected.reason()) {
        case R::PREDICTED_TTFT:
          error.rejected_reason = "predicted-ttft";
          break;
        case R::PREDICTED_TBT:
          error.rejected_reason = "predicted-tbt";
          break;
        case R::QUEUE_FULL:
          error.rejected_reason = "queue-full";
          error.code = "queue_full";
          break;
        case R::NO_KV_SPACE:
          error.rejected_reason = "no-kv-space";
          break;
        default:
          break;
      }
    }
  }
  const double seconds = std::clamp(rejected.retry_after_s(), 1.0, 60.0);
  error.retry_after_s = std::clamp(seconds * (0.8 + 0.4 * jitter), 1.0, 60.0);
  error.retry_is_useless = rejected.retry_is_useless();
  return error;
}

std::string_view ErrorTypeLabel(const ApiError& error) {
  switch (error.status) {
    case 401:
    case 403:
      return "authentication";
    case 404:
      return "not_found";
    case 429:
    case 529:
      return "overload";
    case 499:
      return "cancelled";
    case 501:
      return "unsupported";
    case 502:
      return "unavailable";
    case 503:
      return error.type == "rate_limit_error" ? "overload" : "unavailable";
    case 504:
      return "timeout";
    default:
      return error.status >= 400 && error.status < 500 ? "validation" : "internal";
  }
}

std::string ErrorJson(const ApiError& error) {
  std::string out = "{\"error\":{\"message\":";
  AppendJsonString(out, Utf8Only(error.message));
  out += ",\"type\":";
  AppendJsonString(out, error.type);
  out += ",\"param\":";
  if (error.param.empty()) {
    out += "null";
  } else {
    AppendJsonString(out, Utf8Only(error.param));
  }
  out += ",\"code\":";
  AppendJsonString(out, error.code);
  out += "}}";
  return out;
}

absl::Status ToStatus(const ApiError& error) {
  const std::string message =
      error.param.empty() ? error.message : fmt::format("{}: {}", error.param, error.message);
  switch (error.status) {
    case 401:
      return absl::UnauthenticatedError(message);
    case 403:
      return absl::PermissionDeniedError(message);
    case 404:
      return absl::NotFoundError(message);
    case 429:
    case 529:
      return absl::ResourceExhaustedError(message);
    case 499:
      return absl::CancelledError(message);
    case 501:
      return absl::UnimplementedError(message);
    case 503:
      return error.type == "rate_limit_error" ? absl::ResourceExhaustedError(message)
                                              : absl::UnavailableError(message);
    case 504:
      return absl::DeadlineExceededError(message);
    default:
      return error.status >= 400 && error.status < 500 ? absl::InvalidArgumentError(message)
                                                       : absl::InternalError(message);
  }
}

}  // namespace antiphon::gateway
