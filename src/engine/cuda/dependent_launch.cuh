// Programmatic dependent launch: a kernel may start while the one before it still runs, and waits
// for its results where it needs them. A kernel launched so must call WaitForKernelBefore in every
// thread before it reads what others wrote or writes anything.
#ifndef ANTIPHON_ENGINE_CUDA_DEPENDENT_LAUNCH_CUH_
#define ANTIPHON_ENGINE_CUDA_DEPENDENT_LAUNCH_CUH_

#include <cuda_runtime_api.h>

namespace antiphon::engine::cuda {

__device__ __forceinline__ void WaitForKernelBefore() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may be placed as soon as every block has come here.
__device__ __forceinline__ void LetNextKernelStart() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

template <typename... Parameters, typename... Arguments>
cudaError_t Launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   bool dependent, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace antiphon::engine::cuda

#endif  // ANTIPHON_ENGINE_CUDA_DEPENDENT_LAUNCH_CUH_
