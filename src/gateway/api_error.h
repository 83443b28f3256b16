// What a client is told when a request cannot be served: OpenAI's nested error, with the HTTP
// status and headers that go with it. Both fronts use it; the gRPC front maps it to a status.
#ifndef ANTIPHON_GATEWAY_API_ERROR_H_
#define ANTIPHON_GATEWAY_API_ERROR_H_

#include <optional>
#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace antiphon::internal::v1 {
class Rejected;
}

namespace antiphon::gateway {

struct ApiError {
  int status = 500;   // HTTP
  std::string type;   // invalid_request_error, rate_limit_error, ...
  std::string code;   // invalid_value, model_not_found, overloaded, ...
  std::string param;  // the field; empty: null
  std::string message;
  double retry_after_s = 0;       // 0: no Retry-After
  bool retry_is_useless = false;  // x-should-retry: false
  std::string rejected_reason;    // X-Antiphon-Rejected-Reason; empty: none
  std::string allow;              // Allow, of a 405
};

// nullopt: all is well.
using MaybeError = std::optional<ApiError>;

// 400s. `param` is the field's path as the client wrote it: "messages[0].content".
ApiError InvalidValue(std::string_view param, std::string message);
ApiError UnsupportedParameter(std::string_view param, std::string message);
ApiError InvalidJson(std::string message);
ApiError ContextLengthExceeded(std::string_view param, uint64_t context, uint64_t prompt,
                               uint64_t completion);

ApiError ModelNotFound(std::string_view model, std::string_view served);  // 404
ApiError Unauthenticated(std::string message);                            // 401
ApiError Unavailable(std::string_view code, std::string message);         // 503
ApiError Draining();                                                      // 503
ApiError TimedOut(std::string message);                                   // 504
ApiError Internal(std::string_view request_id);                           // 500
// Of the HTTP layer: 404, 405, 408, 413, 415, 431, 501, ...
ApiError HttpError(int status, std::string message);

// A conductor's refusal. `overload_status` is 429, 503 or 529; `jitter` in [0, 1) spreads the
// retries over +-20 %.
ApiError FromRejected(const internal::v1::Rejected& rejected, int overload_status, double jitter);

// The class of error in antiphon_requests_total{error_type}.
std::string_view ErrorTypeLabel(const ApiError& error);
// The values that ErrorTypeLabel can give, "none" included.
inline constexpr std::string_view kErrorTypeLabels[] = {
    "none",        "validation", "authentication", "not_found",   "overload",
    "unavailable", "timeout",    "cancelled",      "unsupported", "internal"};

// {"error":{"message":...,"type":...,"param":...,"code":...}}
std::string ErrorJson(const ApiError& error);

// The gRPC front's status: 400 INVALID_ARGUMENT, 401 UNAUTHENTICATED, 403 PERMISSION_DENIED,
// 404 NOT_FOUND, 429 and 529 RESOURCE_EXHAUSTED, 499 CANCELLED, 501 UNIMPLEMENTED, 503 UNAVAILABLE,
// 504 DEADLINE_EXCEEDED, else INTERNAL. The message begins with the field when there is one.
absl::Status ToStatus(const ApiError& error);

}  // namespace antiphon::gateway

#endif  // ANTIPHON_GATEWAY_API_ERROR_H_
