#include "engine/cuda/checksum.h"
#include "engine/cuda/kernels.h"

namespace antiphon::engine::cuda {
namespace {

constexpr uint32_t kWarp = 32;
constexpr uint32_t kThreadsMax = 256;

__device__ __forceinline__ uint64_t SumOfLanes(uint64_t value, uint32_t first, uint32_t end) {
  for (uint32_t step = first; step < end; step *= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, step);
  }
  return value;
}

__host__ __device__ __forceinline__ uint32_t PiecesOf(size_t bytes) {
  return static_cast<uint32_t>((bytes + kHashPieceBytes - 1) / kHashPieceBytes);
}

// One block of threads for a layer of a block of tokens.
__global__ void __launch_bounds__(kThreadsMax)
    ChecksumKernel(Pages pages, const FilledPage* __restrict__ filled, uint32_t layers,
                   uint32_t first, uint64_t* __restrict__ sums) {
  __shared__ uint64_t secret[kHashSecretWords];
  __shared__ uint64_t of_warp[kThreadsMax / kWarp];
  if (threadIdx.x < kHashSecretWords) secret[threadIdx.x] = HashSecretWord(threadIdx.x);
  __syncthreads();
  const FilledPage page = filled[blockIdx.x];
  const uint32_t layer = first + blockIdx.y;
  const size_t token_bytes = size_t{pages.kv_heads} * pages.head_dim * 2;
  const size_t half_bytes = token_bytes * pages.block_tokens;
  const size_t filled_bytes = token_bytes * page.tokens;
  const std::byte* begin =
      pages.base + static_cast<size_t>(page.page) * pages.page_bytes + layer * pages.layer_bytes;
  // Pieces of K and V in turn: the number of a piece is its seed.
  const uint32_t pieces = 2 * PiecesOf(filled_bytes);
  const uint32_t lane = threadIdx.x % kHashLanes;
  uint64_t sum = 0;
  // All threads take all turns, as they shuffle.
  for (uint32_t turn = 0; turn < pieces; turn += blockDim.x / kHashLanes) {
    const uint32_t piece = turn + threadIdx.x / kHashLanes;
    const size_t at = size_t{piece / 2} * kHashPieceBytes;
    uint32_t size = 0;
    uint64_t part = 0;
    if (piece < pieces) {
      size = filled_bytes - at < kHashPieceBytes ? static_cast<uint32_t>(filled_bytes - at)
                                                 : kHashPieceBytes;
      const std::byte* from = begin + piece % 2 * half_bytes + at + lane * sizeof(HashWords);
      part = HashPart(lane, size, piece, secret, [from](uint32_t stripe) -> HashWords {
        const ulonglong2 words =
            *reinterpret_cast<const ulonglong2*>(from + stripe * kHashStripeBytes);
        return {words.x, words.y};
      });
    }
    part = SumOfLanes(part, 1, kHashLanes);
    if (lane == 0 && piece < pieces) sum += FinishHash(size, part);
  }
  sum = SumOfLanes(sum, kHashLanes, kWarp);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (uint32_t warp = 1; warp < blockDim.x / kWarp; ++warp) sum += of_warp[warp];
  sums[size_t{blockIdx.x} * layers + layer] = sum;
}

}  // namespace

bool ChecksumServes(size_t token_bytes) {
  return token_bytes > 0 && token_bytes % kHashUnitBytes == 0;
}

cudaError_t Checksum(const Pages& pages, const FilledPage* filled, uint32_t count, uint32_t layers,
                     uint32_t first, uint32_t end, uint64_t* sums, cudaStream_t stream) {
  const size_t token_bytes = size_t{pages.kv_heads} * pages.head_dim * 2;
  if (!ChecksumServes(token_bytes)) return cudaErrorInvalidValue;
  const uint32_t wanted = 2 * PiecesOf(token_bytes * pages.block_tokens) * kHashLanes;
  const uint32_t threads =
      wanted < kThreadsMax ? (wanted + kWarp - 1) / kWarp * kWarp : kThreadsMax;
  ChecksumKernel<<<dim3(count, end - first), threads, 0, stream>>>(pages, filled, layers, first,
                                                                   sums);
  return cudaGetLastError();
}

}  // namespace antiphon::engine::cuda
