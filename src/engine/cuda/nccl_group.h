// The ranks of a tensor-parallel model on their devices, joined by NCCL. NCCL is loaded when a
// group is made, so that the module works where it is not installed.
#ifndef ANTIPHON_ENGINE_CUDA_NCCL_GROUP_H_
#define ANTIPHON_ENGINE_CUDA_NCCL_GROUP_H_

#include <cuda_runtime_api.h>
#include <nccl.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "engine/cuda/error.h"
#include "engine/cuda/module.h"

namespace antiphon::engine::cuda {

// One rank. One thread. CUDA graphs that hold its operations must be gone before it is destroyed.
class NcclGroup {
 public:
  // What rank 0 makes and every rank needs. FAILED_PRECONDITION: there is no NCCL.
  static Error MakeId(GroupId* out);
  // Blocks until all ranks have come; every rank has a device of its own.
  static Error Join(const GroupId& id, uint32_t rank, uint32_t ranks,
                    std::unique_ptr<NcclGroup>* out);
  ~NcclGroup();

  // values[i] = the sum of all ranks' values[i], in place, on the stream; may be captured.
  Error AllReduceSum(float* values, size_t count, cudaStream_t stream);
  // UNAVAILABLE when a rank or its link has failed. To be asked while a step is waited for.
  Error Health();

 private:
  explicit NcclGroup(ncclComm_t comm) : comm_(comm) {}
  ncclComm_t comm_;
  bool failed_ = false;
};

}  // namespace antiphon::engine::cuda

#endif  // ANTIPHON_ENGINE_CUDA_NCCL_GROUP_H_
