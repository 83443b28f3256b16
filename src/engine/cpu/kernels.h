// The arithmetic of the CPU engine, behind one table of functions for each instruction set.
//
// Every table gives the same bits. Reductions run over 16 virtual lanes in one fixed order,
// products of quantised formats are summed as integers inside a block of 32 and the blocks are
// added in ascending order with fused multiply-adds (in the K formats to a super-block's sum, and
// the super-blocks in ascending order), whatever the width of a register or the shape of a tile. So
// a row's result depends on the row alone: not on its neighbours, the chunk, the thread count or
// the machine.
//
// This header is included by files compiled for instruction sets that the machine may not have: it
// must stay free of anything that emits inline functions.
#ifndef ANTIPHON_ENGINE_CPU_KERNELS_H_
#define ANTIPHON_ENGINE_CPU_KERNELS_H_

#include <cstddef>
#include <cstdint>

namespace antiphon::engine::cpu {

inline constexpr int kGroupRows = 16;      // output rows that share a packed group
inline constexpr int kQuantBlock = 32;     // elements that share an activation scale
inline constexpr int kSuperBlock = 256;    // elements that share a scale in the K formats
inline constexpr int kRowTile = 16;        // activation rows that share a quantised tile
inline constexpr int kAttentionTile = 64;  // tokens of one softmax tile, counted from position 0

// Packed weights: groups of 16 rows, padded with zero rows, interleaved so that lane r of a vector
// belongs to row r.
//   kF32, kF16, kBf16: [column][16].
//   kQ8_0: for each block of 32 columns: 16 f16 scales; 8 x [16 rows][4 columns] of u8 (value +
//   128).
//   kQ4_0: 16 f16 scales; 4 x [16 rows][4 bytes]: byte c of step i holds column 4i + c in its low
//   nibble and column 16 + 4i + c in its high nibble (value + 8).
//   kQ4_1: as kQ4_0 with 16 f16 minima after the scales and values from 0 to 15.
//   kQ5_0, kQ5_1: as kQ4_0 (value + 16) and kQ4_1 (values from 0 to 31), and before the nibbles
//   [16 rows][4 bytes]: bit i of byte c is the fifth bit of column 4i + c.
//   kQ4_K, kQ5_K: for each super-block of 256 columns: 16 f16 scales d; 16 f16 minima m; 8 blocks
//   of 32 columns: 16 u8 scales s; 16 u8 minima z (0 to 63); values from 0 to 15 or 31 as in kQ4_0
//   and kQ5_1. 4.625 and 5.625 bits a weight, to the file's 4.5 and 5.5: s and z have a byte
//   instead of six bits.
//   kQ6_K: for each super-block: 16 f16 scales d; 8 blocks: 16 int8 scales s of its first 16
//   columns; 16 of the others; 2 x [16 rows][4 bytes]: the bits 2f and 2f + 1 of byte c in half h
//   are the fifth and sixth of column 16h + 4f + c; nibbles as in kQ4_0 (value + 32). 6.5625 bits a
//   weight, the file's.
enum class PackedType : uint8_t {
  kF32,
  kF16,
  kBf16,
  kQ8_0,
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ4_K,
  kQ5_K,
  kQ6_K
};
inline constexpr int kPackedTypes = 11;

constexpr bool UsesQuantisedActivations(PackedType type) { return type >= PackedType::kQ8_0; }

// What the integer formats differ in. With S the integer sum of a block's products, a its
// activations' scale and A the scale times their sum, a row's result grows
//   in a format without super-blocks by a * S * scale, then by minimum * A;
//   in one with them by d * sum(s * S * a), then, if it has minima, by -m * sum(z * A).
// Of kQ6_K s * S is s0 * S0 + s1 * S1, of the halves of the block. It stays below 2^24: a float
// holds it, and all that leads to it, exactly, so it may be computed in either kind of number. Of
// activations at 16 bits S is below 2^29 and s * S is of floats: float(S) * s, or
// fma(float(S1), s1, float(S0) * s0).
struct QuantFormat {
  int bits;                // of a value
  bool minima;             // else values have an offset: half of their range
  size_t super_bytes = 0;  // f16 numbers ahead of a super-block; 0: there are none
  size_t head_bytes = 0;   // numbers ahead of a block
  size_t high_bytes = 0;   // of a block: bits past the nibbles
  size_t value_bytes = 256;
};
constexpr QuantFormat FormatOf(PackedType type) {
  switch (type) {
    case PackedType::kF32:
    case PackedType::kF16:
    case PackedType::kBf16:
      break;
    case PackedType::kQ8_0:
      return {.bits = 8, .minima = false, .head_bytes = 32, .value_bytes = 512};
    case PackedType::kQ4_0:
      return {.bits = 4, .minima = false, .head_bytes = 32};
    case PackedType::kQ4_1:
      return {.bits = 4, .minima = true, .head_bytes = 64};
    case PackedType::kQ5_0:
      return {.bits = 5, .minima = false, .head_bytes = 32, .high_bytes = 64};
    case PackedType::kQ5_1:
      return {.bits = 5, .minima = true, .head_bytes = 64, .high_bytes = 64};
    case PackedType::kQ4_K:
      return {.bits = 4, .minima = true, .super_bytes = 64, .head_bytes = 32};
    case PackedType::kQ5_K:
      return {.bits = 5, .minima = true, .super_bytes = 64, .head_bytes = 32, .high_bytes = 64};
    case PackedType::kQ6_K:
      return {.bits = 6, .minima = false, .super_bytes = 32, .head_bytes = 32, .high_bytes = 128};
  }
  return {.bits = 0, .minima = false, .value_bytes = 0};
}
constexpr size_t BlockBytes(QuantFormat format) {
  return format.head_bytes + format.high_bytes + format.value_bytes;
}

// Bytes of one group of 16 rows. The K formats need whole super-blocks.
constexpr size_t PackedGroupBytes(PackedType type, size_t columns) {
  if (type == PackedType::kF32) return columns * 64;
  if (!UsesQuantisedActivations(type)) return columns * 32;
  const QuantFormat format = FormatOf(type);
  return columns / kSuperBlock * format.super_bytes + columns / kQuantBlock * BlockBytes(format);
}

// Quantised activations: tiles of up to 16 rows. For each block of 32 columns, with R rows in the
// tile: int8 values[R][32]; QuantNumbers numbers[R]. Four rows' numbers fill a cache line: threads
// that quantise four rows at a time do not write to each other's.
//
// A row at 16 bits takes the place of two. A value is 256 times that of the first plus that of the
// second, both from -127 to 127; a table may keep the 64 bytes of a block in an order of its own.
// The first place has the row's numbers, the second zeros.
struct QuantNumbers {
  float scale;
  float sum;       // scale times the sum of the values
  int32_t offset;  // -128 times the sum of the values
  int32_t half;    // -32 times the sum of the first 16 values
};
inline constexpr size_t kQuantRowBlockBytes = kQuantBlock + sizeof(QuantNumbers);
constexpr size_t QuantTileBytes(size_t rows, size_t columns) {
  return rows * (columns / 32) * kQuantRowBlockBytes;
}

// out[row][16 * group + lane] = sum over columns, or is increased by it when `add`.
struct MatMul {
  const std::byte* weights = nullptr;  // first group
  size_t columns = 0;
  int groups = 0;
  const float* x = nullptr;  // float types: [rows][x_stride]
  size_t x_stride = 0;
  const std::byte* x_quant = nullptr;  // integer types: tiles, all full but the last
  int rows = 0;
  float* out = nullptr;
  size_t out_stride = 0;
  bool add = false;
  bool fine = false;  // integer types: `rows` are rows at 16 bits, in tiles of up to half as many
};

// Memory that is to be read soon.
struct MemoryRange {
  const std::byte* begin;
  const std::byte* end;
};

// Queries of one kv head against the cache of one sequence.
struct Attention {
  const float* queries = nullptr;  // [count][padded_dim], already scaled, padding zero
  int count = 0;
  const uint32_t* limits = nullptr;  // visible tokens of each query, not descending, at least 1
  float* out = nullptr;              // [count][padded_dim]
  int head_dim = 0;
  int padded_dim = 0;  // head_dim rounded up to 16

  // K of position p: blocks[p / block_tokens] + key_offset + (p % block_tokens) * token_bytes.
  const std::byte* const* blocks = nullptr;
  uint32_t block_tokens = 0;
  size_t token_bytes = 0;
  size_t key_offset = 0;
  size_t value_offset = 0;
  bool f32_cache = false;  // else bf16

  // AttentionScratchFloats(count, padded_dim); where it begins at no cache line, attention takes up
  // to a tenth longer.
  float* scratch = nullptr;

  // What the caller will read next. While few queries are multiplied, as many lines are fetched of
  // these ranges, in order, as are read of the cache, or twice as many. What has been fetched
  // leaves its range. Lines that follow each other arrive much sooner than those of one head, so
  // the ranges had better be of whole tokens.
  MemoryRange* ahead = nullptr;
  int ahead_count = 0;
  bool ahead_twice = false;

  // What the caller will attend to next: the first tile of its positions [next_first, next_end) is
  // prefetched, unless it is `ahead` that is. `next_offset`: its offsets less these.
  const std::byte* const* next_blocks = nullptr;
  ptrdiff_t next_offset = 0;
  uint32_t next_first = 0;
  uint32_t next_end = 0;

  // To spread a long context over threads: `attention` then goes only over the tiles [first_tile,
  // end_tile) and leaves them, not in `out`, but in partials[tile][query], each of
  // AttentionPartialFloats. Once all tiles are there, `merge_attention` makes `out` of them, with
  // the very bits that one pass gives.
  float* partials = nullptr;
  uint32_t first_tile = 0;
  uint32_t end_tile = 0;
};
// A tile's values, maximum and sum for one query.
constexpr size_t AttentionPartialFloats(size_t padded_dim) { return padded_dim + 16; }
// Transposed keys, values, weights of up to 4 queries, the queries, running maximum and sum.
constexpr size_t AttentionScratchFloats(size_t count, size_t padded_dim) {
  return 2 * padded_dim * kAttentionTile + 4 * kAttentionTile + count * (padded_dim + 2) + 64;
}

constexpr size_t kMaximaBlock = 32;

struct Kernels {
  const char* name;
  void (*matmul[kPackedTypes])(const MatMul&);
  // Quantises one row into its place in a tile that holds `tile_rows` rows.
  void (*quantize_row)(const float* x, size_t columns, int row, int tile_rows, std::byte* tile);
  // The same at 16 bits, in the places `row` and `row` + 1; `row` is even. For the same table's
  // matmul.
  void (*quantize_row_fine)(const float* x, size_t columns, int row, int tile_rows,
                            std::byte* tile);
  // `n` is a multiple of 16, elements past `size` are zero.
  void (*rms_norm)(const float* x, const float* weight, size_t n, size_t size, float eps,
                   float* out);
  void (*silu_mul)(const float* gate, const float* up, size_t n, float* out);
  void (*add)(float* x, const float* y, size_t n);
  // Rotates pairs (i, i + half), i < half, by the angles of cos and sin; `x` and `out` may be
  // equal.
  void (*rope)(const float* x, const float* cos, const float* sin, size_t half, float* out);
  void (*to_bf16)(const float* x, size_t n, uint16_t* out);  // any n
  void (*attention)(const Attention&);
  void (*merge_attention)(const Attention&);
  // For the sampler; any n above 0. The lowest index of the maximum; NaN never wins.
  size_t (*argmax)(const float* x, size_t n);
  // out[b] = the maximum of x[b * kMaximaBlock ..], ceil(n / kMaximaBlock) of them.
  void (*block_maxima)(const float* x, size_t n, float* out);
  // out[i] = (x[i] - shift) * scale
  void (*shift_scale)(const float* x, size_t n, float shift, float scale, float* out);
  // Sum of exp(x - shift).
  double (*sum_exp)(const float* x, size_t n, float shift);
};

const Kernels& ScalarKernels();

}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_KERNELS_H_
