// The integers in GGUF's blocks: where the bits of a value, a scale or a minimum lie. What they
// mean is in dequantize.cc; pack.cc keeps them as integers. The layouts are those of ggml-quants.h.
#ifndef ANTIPHON_ENGINE_CPU_GGUF_BLOCKS_H_
#define ANTIPHON_ENGINE_CPU_GGUF_BLOCKS_H_

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace antiphon::engine::cpu {

inline constexpr int kGgufBlock = 32;          // values of a block
inline constexpr int kGgufSuperBlock = 256;    // values of a super-block of the K formats
inline constexpr size_t kQ4KBytes = 144;       // d, dmin, 12 of scales, 128 of nibbles
inline constexpr size_t kQ5KBytes = 176;       // d, dmin, 12 of scales, 32 of fifth bits, nibbles
inline constexpr size_t kQ6KBytes = 210;       // 128 of nibbles, 64 of high bits, 16 scales, d
inline constexpr size_t kQ6KScales = 192;      // offset of the scales
inline constexpr size_t kQ6KSuperScale = 208;  // offset of d

// Q5_0 and Q5_1: 4 bytes of fifth bits, then 16 bytes with the values i and i + 16 in byte i. From
// 0 to 31.
inline void ReadQ5Block(const uint8_t* p, uint8_t* values) {
  uint32_t high;
  std::memcpy(&high, p, 4);
  for (int i = 0; i < 16; ++i) {
    values[i] = static_cast<uint8_t>((p[4 + i] & 15) | ((high >> i) & 1) << 4);
    values[16 + i] = static_cast<uint8_t>((p[4 + i] >> 4) | ((high >> (i + 16)) & 1) << 4);
  }
}

// Scale and minimum, from 0 to 63, of block `j` of a super-block of Q4_K or Q5_K at `p`.
struct ScaleAndMinimum {
  int scale;
  int minimum;
};
inline ScaleAndMinimum ReadScaleAndMinimum(const uint8_t* p, int j) {
  const uint8_t* q = p + 4;
  if (j < 4) return {q[j] & 63, q[j + 4] & 63};
  return {(q[j + 4] & 15) | (q[j - 4] >> 6) << 4, (q[j + 4] >> 4) | (q[j] >> 6) << 4};
}

// Block `j` of a super-block of Q4_K, from 0 to 15.
inline void ReadQ4KBlock(const uint8_t* p, int j, uint8_t* values) {
  const uint8_t* nibbles = p + 16 + 32 * (j / 2);
  for (int i = 0; i < kGgufBlock; ++i) {
    values[i] = static_cast<uint8_t>(j % 2 == 0 ? nibbles[i] & 15 : nibbles[i] >> 4);
  }
}

// Block `j` of a super-block of Q5_K, from 0 to 31: bit j of high[i] is the fifth bit.
inline void ReadQ5KBlock(const uint8_t* p, int j, uint8_t* values) {
  const uint8_t* high = p + 16;
  const uint8_t* nibbles = p + 48 + 32 * (j / 2);
  for (int i = 0; i < kGgufBlock; ++i) {
    const int low = j % 2 == 0 ? nibbles[i] & 15 : nibbles[i] >> 4;
    values[i] = static_cast<uint8_t>(low | ((high[i] >> j) & 1) << 4);
  }
}

// Block `j` of a super-block of Q6_K, from 0 to 63. Its first 16 values have the scale 2j, the
// others 2j + 1.
inline void ReadQ6KBlock(const uint8_t* p, int j, uint8_t* values) {
  const int half = j / 4, quarter = j % 4;
  const uint8_t* nibbles = p + 64 * half + 32 * (quarter % 2);
  const uint8_t* high = p + 128 + 32 * half;
  for (int i = 0; i < kGgufBlock; ++i) {
    const int low = quarter < 2 ? nibbles[i] & 15 : nibbles[i] >> 4;
    values[i] = static_cast<uint8_t>(low | ((high[i] >> (2 * quarter)) & 3) << 4);
  }
}

}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_GGUF_BLOCKS_H_
