// Owners of CUDA memory, streams and events.
#ifndef ANTIPHON_ENGINE_CUDA_MEMORY_H_
#define ANTIPHON_ENGINE_CUDA_MEMORY_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <utility>

#include "engine/cuda/error.h"

namespace antiphon::engine::cuda {

template <typename Handle, cudaError_t (*kFree)(Handle)>
class Owned {
 public:
  Owned() = default;
  Owned(Owned&& other) noexcept : handle_(std::exchange(other.handle_, Handle{})) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Owned() {
    if (handle_ != Handle{}) (void)kFree(handle_);  // at the end of a lost device all calls fail
  }
  Handle get() const { return handle_; }
  Handle* address() { return &handle_; }

 private:
  Handle handle_{};
};

using Stream = Owned<cudaStream_t, cudaStreamDestroy>;
using Event = Owned<cudaEvent_t, cudaEventDestroy>;
using Graph = Owned<cudaGraph_t, cudaGraphDestroy>;
using GraphExec = Owned<cudaGraphExec_t, cudaGraphExecDestroy>;

template <typename T, bool kPinned>
class Array {
 public:
  Error Allocate(size_t size) {
    if constexpr (kPinned) {
      CUDA_RETURN_IF_ERROR(
          cudaHostAlloc(pointer_.address(), size * sizeof(T), cudaHostAllocDefault));
    } else {
      CUDA_RETURN_IF_ERROR(cudaMalloc(pointer_.address(), size * sizeof(T)));
    }
    size_ = size;
    return {};
  }
  T* data() const { return static_cast<T*>(pointer_.get()); }
  size_t size() const { return size_; }
  T& operator[](size_t i) const { return data()[i]; }

 private:
  static cudaError_t Free(void* pointer) {
    return kPinned ? cudaFreeHost(pointer) : cudaFree(pointer);
  }
  Owned<void*, Free> pointer_;
  size_t size_ = 0;
};
template <typename T>
using DeviceArray = Array<T, false>;
template <typename T>
using PinnedArray = Array<T, true>;

}  // namespace antiphon::engine::cuda

#endif  // ANTIPHON_ENGINE_CUDA_MEMORY_H_
