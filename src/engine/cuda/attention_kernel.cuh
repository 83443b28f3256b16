// One head dimension of FlashInfer's kernels; each is instantiated in a file of its own.
#ifndef ANTIPHON_ENGINE_CUDA_ATTENTION_KERNEL_CUH_
#define ANTIPHON_ENGINE_CUDA_ATTENTION_KERNEL_CUH_

#include <cuda_bf16.h>

#include <cmath>
#include <exception>
#include <flashinfer/attention/default_prefill_params.cuh>
#include <flashinfer/attention/prefill.cuh>
#include <flashinfer/attention/scheduler.cuh>
#include <flashinfer/attention/variants.cuh>
#include <flashinfer/page.cuh>
#include <vector>

#include "engine/cuda/attention.h"

namespace antiphon::engine::cuda {

inline flashinfer::PrefillPlanInfo PlanOf(const AttentionPlan& plan) {
  flashinfer::PrefillPlanInfo info;
  info.FromVector(std::vector<int64_t>(plan.words, plan.words + 15));
  return info;
}

template <uint32_t kHeadDim>
cudaError_t AttendWithDim(const AttentionShape& shape, const AttentionWorkspace& workspace,
                          const AttentionPlan& plan, const AttentionBatch& batch, uint16_t* q,
                          uint16_t* keys, uint16_t* values, uint16_t* out, cudaStream_t stream) {
  using Bf16 = __nv_bfloat16;
  using Params = flashinfer::BatchPrefillPagedParams<Bf16, Bf16, Bf16, int32_t>;
  using Variant = flashinfer::DefaultAttention<false, false, false, false>;
  const flashinfer::PrefillPlanInfo info = PlanOf(plan);
  const int64_t strides[3] = {shape.page_stride, int64_t{shape.kv_heads} * kHeadDim, kHeadDim};
  flashinfer::paged_kv_t<Bf16, int32_t> paged(
      shape.kv_heads, shape.page_tokens, kHeadDim, batch.chunks, flashinfer::QKVLayout::kNHD,
      reinterpret_cast<Bf16*>(keys), reinterpret_cast<Bf16*>(values), strides, batch.pages,
      batch.page_starts, batch.last_page_tokens);
  Params params(reinterpret_cast<Bf16*>(q), paged, nullptr, batch.query_starts, nullptr, nullptr,
                reinterpret_cast<Bf16*>(out), nullptr, nullptr, shape.heads,
                static_cast<int32_t>(shape.query_stride), static_cast<int32_t>(kHeadDim),
                /*window_left=*/-1, /*logits_soft_cap=*/0.0f,
                1.0f / std::sqrt(static_cast<float>(kHeadDim)), 1.0f, 1e4f);
  const auto table = [&]<typename T>(T* /*type*/, int64_t offset) {
    return flashinfer::GetPtrFromBaseOffset<T>(workspace.tables, offset);
  };
  int32_t* const ids = nullptr;
  params.request_indices = table(ids, info.request_indices_offset);
  params.qo_tile_indices = table(ids, info.qo_tile_indices_offset);
  params.kv_tile_indices = table(ids, info.kv_tile_indices_offset);
  params.o_indptr = table(ids, info.o_indptr_offset);
  params.kv_chunk_size_ptr = table(ids, info.kv_chunk_size_ptr_offset);
  Bf16* partial_values = nullptr;
  float* partial_sums = nullptr;
  if (info.split_kv) {
    params.merge_indptr = table(ids, info.merge_indptr_offset);
    partial_values = flashinfer::GetPtrFromBaseOffset<Bf16>(workspace.partials, info.v_offset);
    partial_sums = flashinfer::GetPtrFromBaseOffset<float>(workspace.partials, info.s_offset);
    if (info.enable_cuda_graph) {
      params.block_valid_mask = table(static_cast<bool*>(nullptr), info.block_valid_mask_offset);
    }
  }
  params.padded_batch_size = static_cast<uint32_t>(info.padded_batch_size);
  params.max_total_num_rows = static_cast<uint32_t>(info.total_num_rows);
  if (info.enable_cuda_graph) {
    params.total_num_rows = table(static_cast<uint32_t*>(nullptr), info.total_num_rows_offset);
  }
  const auto run = [&]<uint32_t kTile>() {
    return flashinfer::BatchPrefillWithPagedKVCacheDispatched<
        kTile, kHeadDim, kHeadDim, flashinfer::PosEncodingMode::kNone,
        /*USE_FP16_QK_REDUCTION=*/false, flashinfer::MaskMode::kCausal, Variant, Params>(
        params, partial_values, partial_sums, /*enable_pdl=*/shape.dependent, stream);
  };
  switch (info.cta_tile_q) {
    case 16:
      return run.template operator()<16>();
    case 64:
      return run.template operator()<64>();
    case 128:
      return run.template operator()<128>();
    default:
      return cudaErrorInvalidConfiguration;
  }
}

extern template cudaError_t AttendWithDim<64>(const AttentionShape&, const AttentionWorkspace&,
                                              const AttentionPlan&, const AttentionBatch&,
                                              uint16_t*, uint16_t*, uint16_t*, uint16_t*,
                                              cudaStream_t);
extern template cudaError_t AttendWithDim<128>(const AttentionShape&, const AttentionWorkspace&,
                                               const AttentionPlan&, const AttentionBatch&,
                                               uint16_t*, uint16_t*, uint16_t*, uint16_t*,
                                               cudaStream_t);

}  // namespace antiphon::engine::cuda

#endif  // ANTIPHON_ENGINE_CUDA_ATTENTION_KERNEL_CUH_
