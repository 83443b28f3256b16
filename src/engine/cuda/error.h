// Errors inside the module, which has no Abseil: a code of absl::StatusCode and a text.
#ifndef ANTIPHON_ENGINE_CUDA_ERROR_H_
#define ANTIPHON_ENGINE_CUDA_ERROR_H_

#include <cuda_runtime_api.h>

#include <string>
#include <utility>

namespace antiphon::engine::cuda {

inline constexpr int kInvalidArgument = 3;
inline constexpr int kResourceExhausted = 8;
inline constexpr int kFailedPrecondition = 9;
inline constexpr int kInternal = 13;
inline constexpr int kUnavailable = 14;

struct [[nodiscard]] Error {
  int code = 0;
  std::string message;
  explicit operator bool() const { return code != 0; }
};

// RESOURCE_EXHAUSTED: the device's memory. FAILED_PRECONDITION: driver or device are not fit.
// UNAVAILABLE: the device is lost (Xid, ECC, a fault); nothing works on it in this process any
// more.
Error FromCuda(cudaError_t status, const char* what);

#define ANTIPHON_CONCAT_(a, b) a##b
#define ANTIPHON_CONCAT(a, b) ANTIPHON_CONCAT_(a, b)
#define CUDA_RETURN_IF_ERROR(expression)                                \
  if (const cudaError_t status_ = (expression); status_ != cudaSuccess) \
  return ::antiphon::engine::cuda::FromCuda(status_, #expression)
#define MODULE_RETURN_IF_ERROR(expression) \
  if (::antiphon::engine::cuda::Error error_ = (expression); error_) return error_

}  // namespace antiphon::engine::cuda

#endif  // ANTIPHON_ENGINE_CUDA_ERROR_H_
