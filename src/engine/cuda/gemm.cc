#include "engine/cuda/gemm.h"

#include <algorithm>
#include <string>

namespace antiphon::engine::cuda {
namespace {

constexpr size_t kWorkspaceBytes = size_t{64} << 20;
constexpr int kCandidates = 24;
constexpr int kTimedRuns = 3;
constexpr uint32_t kManyRows = 256;  // from here on a run is long enough to be timed once

Error FromBlas(cublasStatus_t status, const char* what) {
  const int code = status == CUBLAS_STATUS_ALLOC_FAILED       ? kResourceExhausted
                   : status == CUBLAS_STATUS_EXECUTION_FAILED ? kUnavailable
                   : status == CUBLAS_STATUS_NOT_INITIALIZED  ? kFailedPrecondition
                                                              : kInternal;
  std::string call(what);
  return {code, std::string("cuBLASLt: ") + cublasLtGetStatusName(status) + " from " +
                    call.substr(0, call.find('('))};
}

#define BLAS_RETURN_IF_ERROR(expression)                                             \
  if (const cublasStatus_t status_ = (expression); status_ != CUBLAS_STATUS_SUCCESS) \
  return FromBlas(status_, #expression)

}  // namespace

uint32_t RowBucket(uint32_t rows) {
  uint32_t bucket = 1;
  while (bucket < rows && bucket < 16) bucket *= 2;
  if (rows <= bucket) return bucket;
  if (rows <= 128) return (rows + 15) / 16 * 16;
  for (bucket = 256; bucket < rows;) bucket *= 2;
  return bucket;
}

struct Gemm::Layouts {
  cublasLtMatrixLayout_t w = nullptr, x = nullptr, y = nullptr;
  ~Layouts() {
    for (cublasLtMatrixLayout_t layout : {w, x, y}) {
      if (layout != nullptr) cublasLtMatrixLayoutDestroy(layout);
    }
  }
};

Gemm::~Gemm() {
  if (operation_ != nullptr) cublasLtMatmulDescDestroy(operation_);
  if (handle_ != nullptr) cublasLtDestroy(handle_);
  if (workspace_ != nullptr) cudaFree(workspace_);
}

Error Gemm::Init(cudaStream_t stream) {
  stream_ = stream;
  BLAS_RETURN_IF_ERROR(cublasLtCreate(&handle_));
  BLAS_RETURN_IF_ERROR(cublasLtMatmulDescCreate(&operation_, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  // Column-major to the library: y^T [n][rows] = w^T^T [n][k] x^T [k][rows].
  const cublasOperation_t transpose = CUBLAS_OP_T, keep = CUBLAS_OP_N;
  BLAS_RETURN_IF_ERROR(cublasLtMatmulDescSetAttribute(operation_, CUBLASLT_MATMUL_DESC_TRANSA,
                                                      &transpose, sizeof(transpose)));
  BLAS_RETURN_IF_ERROR(
      cublasLtMatmulDescSetAttribute(operation_, CUBLASLT_MATMUL_DESC_TRANSB, &keep, sizeof(keep)));
  CUDA_RETURN_IF_ERROR(cudaMalloc(&workspace_, kWorkspaceBytes));
  return {};
}

Error Gemm::MakeLayouts(const Product& p, uint32_t rows, Layouts& out) {
  const cudaDataType_t y_type = p.float_output ? CUDA_R_32F : CUDA_R_16BF;
  BLAS_RETURN_IF_ERROR(cublasLtMatrixLayoutCreate(&out.w, CUDA_R_16BF, p.k, p.n, p.k));
  BLAS_RETURN_IF_ERROR(cublasLtMatrixLayoutCreate(&out.x, CUDA_R_16BF, p.k, rows, p.k));
  BLAS_RETURN_IF_ERROR(
      cublasLtMatrixLayoutCreate(&out.y, y_type, p.n, rows, static_cast<int64_t>(p.y_stride)));
  return {};
}

Error Gemm::Propose(const Product& product, const Layouts& layouts, int count,
                    std::vector<cublasLtMatmulHeuristicResult_t>& out) {
  cublasLtMatmulPreference_t preference = nullptr;
  BLAS_RETURN_IF_ERROR(cublasLtMatmulPreferenceCreate(&preference));
  const size_t bytes = kWorkspaceBytes;
  cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes,
                                       sizeof(bytes));
  out.resize(static_cast<size_t>(count));
  int found = 0;
  const cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(handle_, operation_, layouts.w, layouts.x, layouts.y,
                                     layouts.y, preference, count, out.data(), &found);
  cublasLtMatmulPreferenceDestroy(preference);
  BLAS_RETURN_IF_ERROR(status);
  out.resize(static_cast<size_t>(found));
  if (out.empty()) {
    return {kInternal, "cuBLASLt has no algorithm for n=" + std::to_string(product.n) +
                           " k=" + std::to_string(product.k)};
  }
  return {};
}

Error Gemm::Launch(const Product& product, const Layouts& layouts,
                   const cublasLtMatmulAlgo_t& algorithm, const void* w, const void* x, void* y) {
  const float one = 1.0f, beta = product.accumulate ? 1.0f : 0.0f;
  BLAS_RETURN_IF_ERROR(cublasLtMatmul(handle_, operation_, &one, w, layouts.w, x, layouts.x, &beta,
                                      y, layouts.y, y, layouts.y, &algorithm, workspace_,
                                      kWorkspaceBytes, stream_));
  return {};
}

Error Gemm::Tune(const Product& product, uint32_t rows, const std::vector<const void*>& weights,
                 const void* x, void* y) {
  const uint32_t bucket = RowBucket(rows);
  const Key key(product, bucket);
  if (chosen_.count(key) != 0) return {};
  Layouts layouts;
  MODULE_RETURN_IF_ERROR(MakeLayouts(product, bucket, layouts));
  std::vector<cublasLtMatmulHeuristicResult_t> candidates;
  MODULE_RETURN_IF_ERROR(Propose(product, layouts, kCandidates, candidates));
  cudaEvent_t begin = nullptr, end = nullptr;
  CUDA_RETURN_IF_ERROR(cudaEventCreate(&begin));
  CUDA_RETURN_IF_ERROR(cudaEventCreate(&end));
  float best = 0;
  const cublasLtMatmulAlgo_t* chosen = nullptr;
  for (const cublasLtMatmulHeuristicResult_t& candidate : candidates) {
    if (candidate.state != CUBLAS_STATUS_SUCCESS) continue;
    if (Launch(product, layouts, candidate.algo, weights[0], x, y)) continue;
    cudaEventRecord(begin, stream_);
    bool failed = false;
    const int runs = bucket >= kManyRows ? 1 : kTimedRuns;
    for (int run = 0; run < runs && !failed; ++run) {
      for (const void* w : weights) {
        failed = failed || static_cast<bool>(Launch(product, layouts, candidate.algo, w, x, y));
      }
    }
    cudaEventRecord(end, stream_);
    CUDA_RETURN_IF_ERROR(cudaEventSynchronize(end));
    float milliseconds = 0;
    CUDA_RETURN_IF_ERROR(cudaEventElapsedTime(&milliseconds, begin, end));
    if (failed || (chosen != nullptr && milliseconds >= best)) continue;
    best = milliseconds;
    chosen = &candidate.algo;
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  if (chosen == nullptr) {
    return {kInternal, "no algorithm of cuBLASLt runs for n=" + std::to_string(product.n) +
                           " k=" + std::to_string(product.k)};
  }
  chosen_.emplace(key, *chosen);
  return {};
}

Error Gemm::Run(const Product& product, uint32_t rows, const void* w, const void* x, void* y) {
  Layouts layouts;
  MODULE_RETURN_IF_ERROR(MakeLayouts(product, rows, layouts));
  const uint32_t bucket = RowBucket(rows);
  auto algorithm = chosen_.find(Key(product, bucket));
  if (algorithm == chosen_.end()) {
    std::vector<cublasLtMatmulHeuristicResult_t> candidates;
    MODULE_RETURN_IF_ERROR(Propose(product, layouts, 1, candidates));
    algorithm = chosen_.emplace(Key(product, bucket), candidates[0].algo).first;
  }
  if (rows == bucket) return Launch(product, layouts, algorithm->second, w, x, y);
  // The bucket's algorithm, unless it does not fit this very number of rows.
  auto exact = exact_.find({product, rows});
  if (exact == exact_.end()) {
    cublasLtMatmulHeuristicResult_t check;
    if (cublasLtMatmulAlgoCheck(handle_, operation_, layouts.w, layouts.x, layouts.y, layouts.y,
                                &algorithm->second, &check) == CUBLAS_STATUS_SUCCESS &&
        check.workspaceSize <= kWorkspaceBytes) {
      exact = exact_.emplace(std::tuple(product, rows), algorithm->second).first;
    } else {
      std::vector<cublasLtMatmulHeuristicResult_t> candidates;
      MODULE_RETURN_IF_ERROR(Propose(product, layouts, 1, candidates));
      exact = exact_.emplace(std::tuple(product, rows), candidates[0].algo).first;
    }
  }
  return Launch(product, layouts, exact->second, w, x, y);
}

}  // namespace antiphon::engine::cuda
