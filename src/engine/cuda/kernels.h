// The module's own kernels: what lies between the matrix products and the attention. All are
// launched on the given stream; sizes are elements. bf16 is uint16_t here.
#ifndef ANTIPHON_ENGINE_CUDA_KERNELS_H_
#define ANTIPHON_ENGINE_CUDA_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace antiphon::engine::cuda {

// out[row] = table[ids[row]]; size is a multiple of 8.
cudaError_t Embed(const uint16_t* table, const uint32_t* ids, uint32_t rows, uint32_t size,
                  float* out, cudaStream_t stream);

// out[row] = rms_norm(x[row]) * weight, or of x[index[row]] with an index. size % 4 == 0. The order
// of the sum depends on `size` alone.
cudaError_t RmsNorm(const float* x, const float* weight, const uint32_t* index, uint32_t rows,
                    uint32_t size, float eps, uint16_t* out, cudaStream_t stream);

// Where K and V of rows live.
struct Pages {
  std::byte* base = nullptr;
  size_t page_bytes = 0;
  size_t layer_bytes = 0;
  uint32_t block_tokens = 0;
  uint32_t kv_heads = 0;
  uint32_t head_dim = 0;
  // The host's blocks, of which a page may hold some heads only.
  size_t host_layer_bytes = 0;
  size_t host_token_bytes = 0;  // K or V
  size_t host_offset = 0;       // of the page's first head within a token
};

struct RopeAppend {
  uint16_t* qkv = nullptr;  // [rows][q | k | v]; q is rotated in place
  const float* bias = nullptr;
  const float* cosines = nullptr;  // [position][rope_dims / 2]
  const float* sines = nullptr;
  const uint32_t* positions = nullptr;
  const int32_t* pages = nullptr;  // the page of each row
  uint32_t rows = 0;
  uint32_t heads = 0;
  uint32_t rope_dims = 0;  // a multiple of 4
  uint32_t layer = 0;
};
// Adds the bias, rotates q and k, and writes k and v to their pages. `dependent`: see
// dependent_launch.cuh.
cudaError_t RopeAndAppend(const RopeAppend& arguments, const Pages& pages, bool dependent,
                          cudaStream_t stream);

// out[row][i] = silu(gate_up[row][i]) * gate_up[row][size + i]; size is a multiple of 8.
cudaError_t SiluMultiply(const uint16_t* gate_up, uint32_t rows, uint32_t size, uint16_t* out,
                         cudaStream_t stream);

// ids[row] = the lowest index of the maximum of x[row].
cudaError_t Argmax(const float* x, uint32_t rows, uint32_t size, size_t stride, uint32_t* ids,
                   cudaStream_t stream);

// Writes K and V of one token a row, for layers [first, end), to host memory: targets[row] is the
// device's address of the block's payload; 0: nothing is written.
cudaError_t CopyRowsOut(const Pages& pages, const uint32_t* positions, const int32_t* row_pages,
                        const uint64_t* targets, uint32_t rows, uint32_t first, uint32_t end,
                        cudaStream_t stream);

// A page and how many of its tokens have K and V.
struct FilledPage {
  int32_t page = 0;
  uint32_t tokens = 0;
};
// sums[i][layer] of [count][layers] = the checksum (common/kv_layout.h) of a layer of page i, for
// layers [first, end). `sums` may be pinned host memory.
cudaError_t Checksum(const Pages& pages, const FilledPage* filled, uint32_t count, uint32_t layers,
                     uint32_t first, uint32_t end, uint64_t* sums, cudaStream_t stream);
bool ChecksumServes(size_t token_bytes);  // of K or V of a token

// Uniform numbers in [-scale, scale).
cudaError_t RandomBf16(uint16_t* out, size_t size, uint64_t seed, float scale, cudaStream_t stream);
cudaError_t FillFloat(float* out, size_t size, float value, cudaStream_t stream);

}  // namespace antiphon::engine::cuda

#endif  // ANTIPHON_ENGINE_CUDA_KERNELS_H_
