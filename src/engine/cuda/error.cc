#include "engine/cuda/error.h"

namespace antiphon::engine::cuda {
namespace {

int CodeOf(cudaError_t status) {
  switch (status) {
    case cudaErrorMemoryAllocation:
      return kResourceExhausted;
    case cudaErrorInsufficientDriver:
    case cudaErrorNoDevice:
    case cudaErrorInvalidDevice:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorCompatNotSupportedOnDevice:
    case cudaErrorSystemNotReady:
    case cudaErrorInitializationError:
      return kFailedPrecondition;
    case cudaErrorInvalidValue:
    case cudaErrorInvalidConfiguration:
    case cudaErrorHostMemoryAlreadyRegistered:
    case cudaErrorHostMemoryNotRegistered:
    case cudaErrorNotSupported:
    case cudaErrorStreamCaptureUnsupported:
    case cudaErrorStreamCaptureInvalidated:
      return kInternal;
    default:
      return kUnavailable;
  }
}

}  // namespace

Error FromCuda(cudaError_t status, const char* what) {
  const int code = CodeOf(status);
  std::string call(what);
  call = call.substr(0, call.find('('));
  std::string text = code == kUnavailable ? "the GPU is lost: " : "";
  text += cudaGetErrorString(status);
  text += std::string(" (") + cudaGetErrorName(status) + " from " + call + ")";
  return {code, std::move(text)};
}

}  // namespace antiphon::engine::cuda
