// Matrix products through cuBLASLt, with an algorithm that is chosen once for each shape and bucket
// of rows, by timing, and then stays.
#ifndef ANTIPHON_ENGINE_CUDA_GEMM_H_
#define ANTIPHON_ENGINE_CUDA_GEMM_H_

#include <cublasLt.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <tuple>
#include <vector>

#include "engine/cuda/error.h"

namespace antiphon::engine::cuda {

// y[rows][n] = x[rows][k] w[n][k]^T, or is increased by it. x and w are bf16, y is float or bf16,
// sums are float.
struct Product {
  uint32_t n = 0;
  uint32_t k = 0;
  bool float_output = false;
  bool accumulate = false;  // needs float_output
  size_t y_stride = 0;      // elements, at least n
  friend auto operator<=>(const Product&, const Product&) = default;
};

// Rows whose algorithm serves up to this many: 1, 2, 4, 8, 16, then multiples of 16 up to 128, then
// powers of two.
uint32_t RowBucket(uint32_t rows);

// One stream. Not thread-safe.
class Gemm {
 public:
  Gemm() = default;
  ~Gemm();
  Gemm(const Gemm&) = delete;
  Gemm& operator=(const Gemm&) = delete;
  Error Init(cudaStream_t stream);

  // Chooses the algorithm of a bucket: every candidate runs over `weights` in turn (enough of them
  // that none stays in the cache), the fastest wins. `x` and `y` are scratch of RowBucket(rows)
  // rows.
  Error Tune(const Product& product, uint32_t rows, const std::vector<const void*>& weights,
             const void* x, void* y);
  // Without Tune the library's first proposal is taken, and kept.
  Error Run(const Product& product, uint32_t rows, const void* w, const void* x, void* y);

 private:
  struct Layouts;
  using Key = std::tuple<Product, uint32_t>;  // bucket

  Error MakeLayouts(const Product& product, uint32_t rows, Layouts& out);
  Error Propose(const Product& product, const Layouts& layouts, int count,
                std::vector<cublasLtMatmulHeuristicResult_t>& out);
  Error Launch(const Product& product, const Layouts& layouts,
               const cublasLtMatmulAlgo_t& algorithm, const void* w, const void* x, void* y);

  cublasLtHandle_t handle_ = nullptr;
  cublasLtMatmulDesc_t operation_ = nullptr;
  cudaStream_t stream_ = nullptr;
  void* workspace_ = nullptr;
  std::map<Key, cublasLtMatmulAlgo_t> chosen_;
  std::map<std::tuple<Product, uint32_t>, cublasLtMatmulAlgo_t> exact_;  // rows
};

}  // namespace antiphon::engine::cuda

#endif  // ANTIPHON_ENGINE_CUDA_GEMM_H_
