#include <algorithm>

#include "engine/cuda/arithmetic.h"
#include "engine/cuda/block_best.cuh"
#include "engine/cuda/dependent_launch.cuh"
#include "engine/cuda/kernels.h"

namespace antiphon::engine::cuda {
namespace {

constexpr uint32_t kWarp = 32;
constexpr uint32_t kNormThreads = 512;
constexpr uint32_t kRowThreads = 256;
// Stores to the host wait for the bus, and what waits takes room from products that want a whole
// multiprocessor: few threads copy rows out, each with many loads under way.
constexpr uint32_t kCopyThreads = 32;
constexpr uint32_t kCopyBlocks = 32;
constexpr uint32_t kCopyLoads = 8;
constexpr uint32_t kArgmaxThreads = 1024;

struct alignas(16) Eight {
  uint16_t v[8];
};
struct alignas(4) Two {
  uint16_t v[2];
};

__device__ __forceinline__ float SumOfBlock(float value) {
  __shared__ float partial[kNormThreads / kWarp];
  for (uint32_t step = kWarp / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, step);
  }
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = threadIdx.x % kWarp < kNormThreads / kWarp ? partial[threadIdx.x % kWarp] : 0.0f;
  for (uint32_t step = kNormThreads / kWarp / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, step);
  }
  return __shfl_sync(0xffffffffu, value, 0);
}

__global__ void EmbedKernel(const uint16_t* __restrict__ table, const uint32_t* __restrict__ ids,
                            uint32_t size, float* __restrict__ out) {
  const uint16_t* from = table + size_t{ids[blockIdx.x]} * size;
  float* to = out + size_t{blockIdx.x} * size;
  for (uint32_t i = threadIdx.x * 8; i < size; i += blockDim.x * 8) {
    const Eight eight = *reinterpret_cast<const Eight*>(from + i);
    for (int k = 0; k < 8; ++k) to[i + k] = FromBf16(eight.v[k]);
  }
}

__global__ void __launch_bounds__(kNormThreads)
    RmsNormKernel(const float* __restrict__ x, const float* __restrict__ weight,
                  const uint32_t* __restrict__ index, uint32_t size, float eps,
                  uint16_t* __restrict__ out) {
  const size_t row = index == nullptr ? blockIdx.x : index[blockIdx.x];
  const float4* from = reinterpret_cast<const float4*>(x + row * size);
  const float4* scale_of = reinterpret_cast<const float4*>(weight);
  uint16_t* to = out + size_t{blockIdx.x} * size;
  float sum = 0;
  for (uint32_t i = threadIdx.x; i < size / 4; i += kNormThreads) {
    const float4 v = from[i];
    sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
  }
  const float scale = RmsScale(SumOfBlock(sum), size, eps);
  for (uint32_t i = threadIdx.x; i < size / 4; i += kNormThreads) {
    const float4 v = from[i];
    const float4 w = scale_of[i];
    ushort4 result;
    result.x = ToBf16(v.x * scale * w.x);
    result.y = ToBf16(v.y * scale * w.y);
    result.z = ToBf16(v.z * scale * w.z);
    result.w = ToBf16(v.w * scale * w.w);
    reinterpret_cast<ushort4*>(to)[i] = result;
  }
}

__device__ __forceinline__ uint16_t* KeyOf(const Pages& pages, int32_t page, uint32_t layer,
                                           uint32_t position) {
  const size_t token_bytes = size_t{pages.kv_heads} * pages.head_dim * 2;
  return reinterpret_cast<uint16_t*>(pages.base + static_cast<size_t>(page) * pages.page_bytes +
                                     layer * pages.layer_bytes +
                                     position % pages.block_tokens * token_bytes);
}

// Two neighbouring pairs (i, i + half) of one head.
__device__ __forceinline__ void RotateTwo(const uint16_t* from, const float* bias, uint32_t half,
                                          const float* cosine, const float* sine, uint16_t* to) {
  const Two low = *reinterpret_cast<const Two*>(from);
  const Two high = *reinterpret_cast<const Two*>(from + half);
  Two out_low, out_high;
  for (int k = 0; k < 2; ++k) {
    Pair pair = {FromBf16(low.v[k]), FromBf16(high.v[k])};
    if (bias != nullptr) pair = {pair.a + bias[k], pair.b + bias[half + k]};
    const Pair rotated = Rotate(pair, cosine[k], sine[k]);
    out_low.v[k] = ToBf16(rotated.a);
    out_high.v[k] = ToBf16(rotated.b);
  }
  *reinterpret_cast<Two*>(to) = out_low;
  *reinterpret_cast<Two*>(to + half) = out_high;
}

__device__ __forceinline__ void CopyTwo(const uint16_t* from, const float* bias, uint16_t* to) {
  Two two = *reinterpret_cast<const Two*>(from);
  if (bias != nullptr) {
    for (int k = 0; k < 2; ++k) two.v[k] = ToBf16(FromBf16(two.v[k]) + bias[k]);
  }
  *reinterpret_cast<Two*>(to) = two;
}

__global__ void RopeAndAppendKernel(RopeAppend a, Pages pages) {
  LetNextKernelStart();
  WaitForKernelBefore();
  const uint32_t row = blockIdx.x;
  const uint32_t dim = pages.head_dim;
  const uint32_t width = (a.heads + 2 * pages.kv_heads) * dim;
  uint16_t* q = a.qkv + size_t{row} * width;
  const uint32_t position = a.positions[row];
  const uint32_t half = a.rope_dims / 2;
  const float* cosines = a.cosines + size_t{position} * half;
  const float* sines = a.sines + size_t{position} * half;
  uint16_t* keys = KeyOf(pages, a.pages[row], a.layer, position);
  uint16_t* values = keys + size_t{pages.block_tokens} * pages.kv_heads * dim;
  // Each head has half / 2 twos that rotate and (dim - rope_dims) / 2 that stay.
  const uint32_t rotating = half / 2;
  const uint32_t of_head = rotating + (dim - a.rope_dims) / 2;
  const uint32_t of_rotated = (a.heads + pages.kv_heads) * of_head;
  const uint32_t of_values = pages.kv_heads * dim / 2;
  for (uint32_t i = threadIdx.x; i < of_rotated + of_values; i += blockDim.x) {
    if (i >= of_rotated) {
      const uint32_t at = (a.heads + pages.kv_heads) * dim + (i - of_rotated) * 2;
      CopyTwo(q + at, a.bias == nullptr ? nullptr : a.bias + at, values + (i - of_rotated) * 2);
      continue;
    }
    const uint32_t head = i / of_head, two = i % of_head;
    const uint32_t within = two < rotating ? two * 2 : a.rope_dims + (two - rotating) * 2;
    const uint16_t* from = q + head * dim + within;
    const float* bias = a.bias == nullptr ? nullptr : a.bias + head * dim + within;
    uint16_t* to =
        head < a.heads ? q + head * dim + within : keys + (head - a.heads) * dim + within;
    if (two < rotating) {
      RotateTwo(from, bias, half, cosines + two * 2, sines + two * 2, to);
    } else {
      CopyTwo(from, bias, to);
    }
  }
}

__global__ void SiluMultiplyKernel(const uint16_t* __restrict__ gate_up, uint32_t size,
                                   uint16_t* __restrict__ out) {
  const uint16_t* gate = gate_up + size_t{blockIdx.y} * 2 * size;
  const uint16_t* up = gate + size;
  const uint32_t i = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (i >= size) return;
  const Eight g = *reinterpret_cast<const Eight*>(gate + i);
  const Eight u = *reinterpret_cast<const Eight*>(up + i);
  Eight result;
  for (int k = 0; k < 8; ++k) result.v[k] = ToBf16(SiluMul(FromBf16(g.v[k]), FromBf16(u.v[k])));
  *reinterpret_cast<Eight*>(out + size_t{blockIdx.y} * size + i) = result;
}

__global__ void __launch_bounds__(kArgmaxThreads)
    ArgmaxKernel(const float* __restrict__ x, uint32_t size, size_t stride,
                 uint32_t* __restrict__ ids) {
  const Best best = BestOfBlock<kArgmaxThreads>(x + blockIdx.x * stride, size);
  // A row of NaN alone has no best: token 0 stands for it, as on the CPU.
  if (threadIdx.x == 0) ids[blockIdx.x] = best.id == 0xffffffffu ? 0 : best.id;
}

__global__ void __launch_bounds__(kCopyThreads)
    CopyRowsOutKernel(Pages pages, const uint32_t* __restrict__ positions,
                      const int32_t* __restrict__ row_pages, const uint64_t* __restrict__ targets,
                      uint32_t rows, uint32_t first, uint32_t end) {
  const uint32_t token_bytes = pages.kv_heads * pages.head_dim * 2;
  const size_t half_bytes = size_t{token_bytes} * pages.block_tokens;
  const size_t host_half_bytes = pages.host_token_bytes * pages.block_tokens;
  for (uint32_t unit = blockIdx.x; unit < rows * (end - first); unit += gridDim.x) {
    const uint32_t row = unit % rows;
    const uint32_t layer = first + unit / rows;
    if (targets[row] == 0) continue;
    const uint32_t token = positions[row] % pages.block_tokens;
    const std::byte* from = pages.base + static_cast<size_t>(row_pages[row]) * pages.page_bytes +
                            layer * pages.layer_bytes + size_t{token} * token_bytes;
    std::byte* to = reinterpret_cast<std::byte*>(targets[row]) + layer * pages.host_layer_bytes +
                    token * pages.host_token_bytes + pages.host_offset;
    for (uint32_t begin = threadIdx.x * 16; begin < 2 * token_bytes;
         begin += kCopyLoads * kCopyThreads * 16) {
      uint4 values[kCopyLoads];
#pragma unroll
      for (uint32_t i = 0; i < kCopyLoads; ++i) {
        const uint32_t at = begin + i * kCopyThreads * 16;
        if (at < 2 * token_bytes) {
          values[i] = *reinterpret_cast<const uint4*>(
              from + (at < token_bytes ? at : at - token_bytes + half_bytes));
        }
      }
#pragma unroll
      for (uint32_t i = 0; i < kCopyLoads; ++i) {
        const uint32_t at = begin + i * kCopyThreads * 16;
        if (at < 2 * token_bytes) {
          *reinterpret_cast<uint4*>(
              to + (at < token_bytes ? at : at - token_bytes + host_half_bytes)) = values[i];
        }
      }
    }
  }
}

__global__ void RandomBf16Kernel(uint16_t* out, size_t size, uint64_t seed, float scale) {
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size;
       i += size_t{gridDim.x} * blockDim.x) {
    out[i] = ToBf16(scale * RandomUnit(seed, i));
  }
}

__global__ void FillFloatKernel(float* out, size_t size, float value) {
  const size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < size) out[i] = value;
}

}  // namespace

cudaError_t Embed(const uint16_t* table, const uint32_t* ids, uint32_t rows, uint32_t size,
                  float* out, cudaStream_t stream) {
  EmbedKernel<<<rows, kRowThreads, 0, stream>>>(table, ids, size, out);
  return cudaGetLastError();
}

cudaError_t RmsNorm(const float* x, const float* weight, const uint32_t* index, uint32_t rows,
                    uint32_t size, float eps, uint16_t* out, cudaStream_t stream) {
  RmsNormKernel<<<rows, kNormThreads, 0, stream>>>(x, weight, index, size, eps, out);
  return cudaGetLastError();
}

cudaError_t RopeAndAppend(const RopeAppend& arguments, const Pages& pages, bool dependent,
                          cudaStream_t stream) {
  return Launch(RopeAndAppendKernel, dim3(arguments.rows), dim3(kRowThreads), 0, dependent, stream,
                arguments, pages);
}

cudaError_t SiluMultiply(const uint16_t* gate_up, uint32_t rows, uint32_t size, uint16_t* out,
                         cudaStream_t stream) {
  const dim3 grid((size / 8 + kRowThreads - 1) / kRowThreads, rows);
  SiluMultiplyKernel<<<grid, kRowThreads, 0, stream>>>(gate_up, size, out);
  return cudaGetLastError();
}

cudaError_t Argmax(const float* x, uint32_t rows, uint32_t size, size_t stride, uint32_t* ids,
                   cudaStream_t stream) {
  ArgmaxKernel<<<rows, kArgmaxThreads, 0, stream>>>(x, size, stride, ids);
  return cudaGetLastError();
}

cudaError_t CopyRowsOut(const Pages& pages, const uint32_t* positions, const int32_t* row_pages,
                        const uint64_t* targets, uint32_t rows, uint32_t first, uint32_t end,
                        cudaStream_t stream) {
  const uint32_t blocks = std::min(kCopyBlocks, rows * (end - first));
  CopyRowsOutKernel<<<blocks, kCopyThreads, 0, stream>>>(pages, positions, row_pages, targets, rows,
                                                         first, end);
  return cudaGetLastError();
}

cudaError_t RandomBf16(uint16_t* out, size_t size, uint64_t seed, float scale,
                       cudaStream_t stream) {
  RandomBf16Kernel<<<1024, 256, 0, stream>>>(out, size, seed, scale);
  return cudaGetLastError();
}

cudaError_t FillFloat(float* out, size_t size, float value, cudaStream_t stream) {
  FillFloatKernel<<<static_cast<unsigned>((size + 255) / 256), 256, 0, stream>>>(out, size, value);
  return cudaGetLastError();
}

}  // namespace antiphon::engine::cuda
