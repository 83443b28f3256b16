#include <algorithm>

#include "engine/cuda/attention.h"
#include "engine/cuda/attention_kernel.cuh"

namespace antiphon::engine::cuda {
namespace {

// FlashInfer reports by exceptions; they end here.
template <typename Call>
Error Guarded(const char* what, const Call& call) {
  try {
    const cudaError_t status = call();
    if (status != cudaSuccess) return FromCuda(status, what);
    return {};
  } catch (const std::exception& error) {
    return {kInternal, std::string(what) + ": " + error.what()};
  }
}

}  // namespace

bool AttentionServes(uint32_t head_dim) { return head_dim == 64 || head_dim == 128; }

Error PlanAttention(const AttentionShape& shape, const AttentionWorkspace& workspace,
                    int32_t* query_starts_host, int32_t* page_starts_host, uint32_t chunks,
                    bool graph, cudaStream_t stream, AttentionPlan* plan) {
  flashinfer::PrefillPlanInfo info;
  const auto rows = static_cast<uint32_t>(query_starts_host[chunks]);
  MODULE_RETURN_IF_ERROR(Guarded("PrefillPlan", [&] {
    return flashinfer::PrefillPlan<int32_t>(
        workspace.partials, workspace.partial_bytes, workspace.tables, workspace.tables_pinned,
        workspace.table_bytes, info, query_starts_host, page_starts_host, rows, chunks, shape.heads,
        shape.kv_heads, shape.head_dim, shape.head_dim, shape.page_tokens, graph,
        /*sizeof_dtype_o=*/2, /*window_left=*/-1, /*fixed_split_size=*/-1,
        /*disable_split_kv=*/false, /*num_colocated_ctas=*/0, /*uniform_q_len=*/graph ? 1 : 0,
        stream);
  }));
  const std::vector<int64_t> words = info.ToVector();
  *plan = {};
  std::copy(words.begin(), words.end(), plan->words);
  return {};
}

Error Attend(const AttentionShape& shape, const AttentionWorkspace& workspace,
             const AttentionPlan& plan, const AttentionBatch& batch, uint16_t* q, uint16_t* keys,
             uint16_t* values, uint16_t* out, cudaStream_t stream) {
  return Guarded("BatchPrefillWithPagedKVCache", [&] {
    return shape.head_dim == 64
               ? AttendWithDim<64>(shape, workspace, plan, batch, q, keys, values, out, stream)
               : AttendWithDim<128>(shape, workspace, plan, batch, q, keys, values, out, stream);
  });
}

}  // namespace antiphon::engine::cuda
