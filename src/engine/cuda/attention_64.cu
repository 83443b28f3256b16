#include "engine/cuda/attention_kernel.cuh"

namespace antiphon::engine::cuda {

template cudaError_t AttendWithDim<64>(const AttentionShape&, const AttentionWorkspace&,
                                       const AttentionPlan&, const AttentionBatch&, uint16_t*,
                                       uint16_t*, uint16_t*, uint16_t*, cudaStream_t);

}  // namespace antiphon::engine::cuda
