#include <algorithm>

#include "engine/cuda/arithmetic.h"
#include "engine/cuda/dependent_launch.cuh"
#include "engine/cuda/few_rows.h"

namespace antiphon::engine::cuda {
namespace {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kWarp = 32;
constexpr uint32_t kWarps = kThreads / kWarp;
constexpr uint32_t kOutputs = 2;  // rows of w that a warp reads side by side
constexpr uint32_t kAhead = 4;    // 16-byte pieces of each that are on their way
constexpr uint32_t kPiece = 8;    // weights
constexpr uint32_t kStep = kAhead * kWarp * kPiece;
constexpr size_t kSharedBytesMax = size_t{96} << 10;

__device__ __forceinline__ float Low(uint32_t two) { return __uint_as_float(two << 16); }
__device__ __forceinline__ float High(uint32_t two) { return __uint_as_float(two & 0xffff0000u); }

__device__ __forceinline__ float SumOfWarp(float value) {
  for (uint32_t step = kWarp / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, step);
  }
  return value;
}

// Weights of the warp's two rows, one step of them.
struct Pieces {
  uint4 w[kOutputs][kAhead];
};

__device__ __forceinline__ void Fetch(const uint16_t* const (&rows)[kOutputs], uint32_t base,
                                      uint32_t lane, uint32_t k, Pieces& out) {
#pragma unroll
  for (uint32_t a = 0; a < kAhead; ++a) {
    const uint32_t at = base + (a * kWarp + lane) * kPiece;
#pragma unroll
    for (uint32_t o = 0; o < kOutputs; ++o) {
      out.w[o][a] =
          at < k ? __ldcs(reinterpret_cast<const uint4*>(rows[o] + at)) : make_uint4(0, 0, 0, 0);
    }
  }
}

__device__ __forceinline__ float Dot(uint4 w, uint4 x, float sum) {
  const uint32_t ws[4] = {w.x, w.y, w.z, w.w}, xs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum = fmaf(Low(ws[i]), Low(xs[i]), sum);
    sum = fmaf(High(ws[i]), High(xs[i]), sum);
  }
  return sum;
}

// The rows of x, as bf16 in shared memory.
template <uint32_t kRows>
__device__ __forceinline__ void StageInput(const FewRowsProduct& p, uint16_t* staged) {
  if (p.x != nullptr) {
    for (uint32_t i = threadIdx.x * kPiece; i < kRows * p.k; i += kThreads * kPiece) {
      *reinterpret_cast<uint4*>(staged + i) = *reinterpret_cast<const uint4*>(p.x + i);
    }
    return;
  }
  __shared__ float partial[kRows][kWarps];
#pragma unroll
  for (uint32_t r = 0; r < kRows; ++r) {
    const float4* x = reinterpret_cast<const float4*>(p.residual + size_t{r} * p.k);
    float sum = 0;
    for (uint32_t i = threadIdx.x; i < p.k / 4; i += kThreads) {
      const float4 v = x[i];
      sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    sum = SumOfWarp(sum);
    if (threadIdx.x % kWarp == 0) partial[r][threadIdx.x / kWarp] = sum;
  }
  __syncthreads();
#pragma unroll
  for (uint32_t r = 0; r < kRows; ++r) {
    float sum = 0;
    for (uint32_t i = 0; i < kWarps; ++i) sum += partial[r][i];
    const float scale = RmsScale(sum, p.k, p.eps);
    const float4* x = reinterpret_cast<const float4*>(p.residual + size_t{r} * p.k);
    const float4* norm = reinterpret_cast<const float4*>(p.norm);
    for (uint32_t i = threadIdx.x; i < p.k / 4; i += kThreads) {
      const float4 v = x[i];
      const float4 w = norm[i];
      ushort4 out;
      out.x = ToBf16(v.x * scale * w.x);
      out.y = ToBf16(v.y * scale * w.y);
      out.z = ToBf16(v.z * scale * w.z);
      out.w = ToBf16(v.w * scale * w.w);
      reinterpret_cast<ushort4*>(staged + size_t{r} * p.k)[i] = out;
    }
  }
}

template <uint32_t kRows>
__global__ void __launch_bounds__(kThreads, 2) FewRowsKernel(FewRowsProduct p) {
  extern __shared__ uint4 shared[];
  uint16_t* staged = reinterpret_cast<uint16_t*>(shared);
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t warp = blockIdx.x * kWarps + threadIdx.x / kWarp;
  const bool silu = p.output == FewRowsOutput::kSilu;
  const uint32_t outputs[kOutputs] = {silu ? warp : warp * kOutputs,
                                      silu ? warp + p.n / 2 : warp * kOutputs + 1};
  const bool alive = silu ? warp < p.n / 2 : outputs[0] < p.n;
  // A warp without work, or with one row where there could be two, reads rows that exist.
  const uint16_t* rows[kOutputs];
#pragma unroll
  for (uint32_t o = 0; o < kOutputs; ++o) {
    rows[o] = p.w + size_t{alive ? min(outputs[o], p.n - 1) : 0} * p.k;
  }
  Pieces next;
  Fetch(rows, 0, lane, p.k, next);  // nobody writes weights: no need to wait
  LetNextKernelStart();
  WaitForKernelBefore();
  StageInput<kRows>(p, staged);
  __syncthreads();
  if (!alive) return;

  float sums[kOutputs][kRows] = {};
  for (uint32_t base = 0; base < p.k; base += kStep) {
    const Pieces now = next;
    if (base + kStep < p.k) Fetch(rows, base + kStep, lane, p.k, next);
#pragma unroll
    for (uint32_t a = 0; a < kAhead; ++a) {
      const uint32_t at = base + (a * kWarp + lane) * kPiece;
      if (at >= p.k) break;
#pragma unroll
      for (uint32_t r = 0; r < kRows; ++r) {
        const uint4 x = *reinterpret_cast<const uint4*>(staged + size_t{r} * p.k + at);
#pragma unroll
        for (uint32_t o = 0; o < kOutputs; ++o) sums[o][r] = Dot(now.w[o][a], x, sums[o][r]);
      }
    }
  }
#pragma unroll
  for (uint32_t o = 0; o < kOutputs; ++o) {
#pragma unroll
    for (uint32_t r = 0; r < kRows; ++r) sums[o][r] = SumOfWarp(sums[o][r]);
  }
  if (lane != 0) return;
#pragma unroll
  for (uint32_t r = 0; r < kRows; ++r) {
    if (silu) {
      static_cast<uint16_t*>(p.y)[r * p.y_stride + warp] = ToBf16(SiluMul(sums[0][r], sums[1][r]));
      continue;
    }
#pragma unroll
    for (uint32_t o = 0; o < kOutputs; ++o) {
      if (outputs[o] >= p.n) continue;
      const size_t at = r * p.y_stride + outputs[o];
      if (p.output == FewRowsOutput::kBf16) {
        static_cast<uint16_t*>(p.y)[at] = ToBf16(sums[o][r]);
      } else if (p.output == FewRowsOutput::kFloat) {
        static_cast<float*>(p.y)[at] = sums[o][r];
      } else {
        static_cast<float*>(p.y)[at] += sums[o][r];
      }
    }
  }
}

template <uint32_t kRows>
cudaError_t Run(const FewRowsProduct& p, bool dependent, cudaStream_t stream) {
  const size_t shared_bytes = size_t{kRows} * p.k * sizeof(uint16_t);
  const cudaError_t status =
      cudaFuncSetAttribute(FewRowsKernel<kRows>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(kSharedBytesMax));
  if (status != cudaSuccess) return status;
  const uint32_t warps =
      p.output == FewRowsOutput::kSilu ? p.n / 2 : (p.n + kOutputs - 1) / kOutputs;
  return Launch(FewRowsKernel<kRows>, dim3((warps + kWarps - 1) / kWarps), dim3(kThreads),
                shared_bytes, dependent, stream, p);
}

}  // namespace

bool FewRowsServes(uint32_t rows, uint32_t k) {
  return rows >= 1 && rows <= kFewRowsMax && size_t{rows} * k * sizeof(uint16_t) <= kSharedBytesMax;
}

cudaError_t MultiplyFewRows(const FewRowsProduct& product, uint32_t rows, bool dependent,
                            cudaStream_t stream) {
  switch (rows) {
    case 1:
      return Run<1>(product, dependent, stream);
    case 2:
      return Run<2>(product, dependent, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace antiphon::engine::cuda
