// Paged attention by FlashInfer's header templates (the FA2 kernels, bf16, causal), for any mix of
// prompt chunks and single rows. The only place that knows FlashInfer.
#ifndef ANTIPHON_ENGINE_CUDA_ATTENTION_H_
#define ANTIPHON_ENGINE_CUDA_ATTENTION_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "engine/cuda/error.h"

namespace antiphon::engine::cuda {

struct AttentionShape {
  uint32_t heads = 0;
  uint32_t kv_heads = 0;
  uint32_t head_dim = 0;  // 64 or 128
  uint32_t page_tokens = 0;
  uint32_t page_stride = 0;   // elements from one page's keys to the next page's
  bool dependent = false;     // launch behind the kernel before (dependent_launch.cuh)
  uint32_t query_stride = 0;  // elements from one row's queries to the next row's
};

// How work is cut over the multiprocessors, with the place of its tables in the workspace.
struct AttentionPlan {
  int64_t words[16] = {};
  friend bool operator==(const AttentionPlan&, const AttentionPlan&) = default;
};

struct AttentionWorkspace {
  void* partials = nullptr;  // device
  size_t partial_bytes = 0;
  void* tables = nullptr;  // device
  void* tables_pinned = nullptr;
  size_t table_bytes = 0;
};

// The batch in device memory. Queries of chunk c are rows [query_starts[c], query_starts[c + 1]);
// they are the last ones of a context that lies in pages[page_starts[c] .. page_starts[c + 1]), of
// which the last holds last_page_tokens[c] tokens.
struct AttentionBatch {
  int32_t* query_starts = nullptr;
  int32_t* page_starts = nullptr;
  int32_t* pages = nullptr;
  int32_t* last_page_tokens = nullptr;
  uint32_t chunks = 0;
};

bool AttentionServes(uint32_t head_dim);

// Copies the tables to the device on `stream`; tables_pinned must not change until that is done.
// `graph`: every chunk is one row, and the plan for the same number of chunks is always the same
// but for the tables' contents.
Error PlanAttention(const AttentionShape& shape, const AttentionWorkspace& workspace,
                    int32_t* query_starts_host, int32_t* page_starts_host, uint32_t chunks,
                    bool graph, cudaStream_t stream, AttentionPlan* plan);

// q and out: [row][heads][head_dim], q with `query_stride`. keys and values point at the layer's
// first key and value of page 0.
Error Attend(const AttentionShape& shape, const AttentionWorkspace& workspace,
             const AttentionPlan& plan, const AttentionBatch& batch, uint16_t* q, uint16_t* keys,
             uint16_t* values, uint16_t* out, cudaStream_t stream);

}  // namespace antiphon::engine::cuda

#endif  // ANTIPHON_ENGINE_CUDA_ATTENTION_H_
