#include "engine/cpu/dequantize.h"

#include <cstdint>
#include <cstring>

#include "common/status_macros.h"

namespace antiphon::engine::cpu {
namespace {

using model::TensorType;

constexpr size_t kSuperBlock = 256;

uint16_t Load16(const uint8_t* p) {
  uint16_t v;
  std::memcpy(&v, p, 2);
  return v;
}
float LoadHalf(const uint8_t* p) { return HalfToFloat(Load16(p)); }

void DequantizeF32(const uint8_t* p, size_t n, float* out) { std::memcpy(out, p, n * 4); }

void DequantizeF16(const uint8_t* p, size_t n, float* out) {
  for (size_t i = 0; i < n; ++i) out[i] = LoadHalf(p + 2 * i);
}

void DequantizeBf16(const uint8_t* p, size_t n, float* out) {
  for (size_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(Load16(p + 2 * i)) << 16;
    std::memcpy(out + i, &bits, 4);
  }
}

void DequantizeQ8_0(const uint8_t* p, size_t n, float* out) {
  for (size_t b = 0; b < n; b += 32, p += 34, out += 32) {
    const float d = LoadHalf(p);
    for (int i = 0; i < 32; ++i) out[i] = static_cast<float>(static_cast<int8_t>(p[2 + i])) * d;
  }
}

void DequantizeQ4_0(const uint8_t* p, size_t n, float* out) {
  for (size_t b = 0; b < n; b += 32, p += 18, out += 32) {
    const float d = LoadHalf(p);
    for (int i = 0; i < 16; ++i) {
      out[i] = static_cast<float>((p[2 + i] & 15) - 8) * d;
      out[16 + i] = static_cast<float>((p[2 + i] >> 4) - 8) * d;
    }
  }
}

void DequantizeQ4_1(const uint8_t* p, size_t n, float* out) {
  for (size_t b = 0; b < n; b += 32, p += 20, out += 32) {
    const float d = LoadHalf(p), m = LoadHalf(p + 2);
    for (int i = 0; i < 16; ++i) {
      out[i] = static_cast<float>(p[4 + i] & 15) * d + m;
      out[16 + i] = static_cast<float>(p[4 + i] >> 4) * d + m;
    }
  }
}

// The fifth bits of a Q5_0 or Q5_1 block.
uint32_t HighBits(const uint8_t* p) {
  uint32_t bits;
  std::memcpy(&bits, p, 4);
  return bits;
}

void DequantizeQ5_0(const uint8_t* p, size_t n, float* out) {
  for (size_t b = 0; b < n; b += 32, p += 22, out += 32) {
    const float d = LoadHalf(p);
    const uint32_t high = HighBits(p + 2);
    for (int i = 0; i < 16; ++i) {
      const int low_value = (p[6 + i] & 15) | static_cast<int>((high >> i) & 1) << 4;
      const int high_value = (p[6 + i] >> 4) | static_cast<int>((high >> (i + 16)) & 1) << 4;
      out[i] = static_cast<float>(low_value - 16) * d;
      out[16 + i] = static_cast<float>(high_value - 16) * d;
    }
  }
}

void DequantizeQ5_1(const uint8_t* p, size_t n, float* out) {
  for (size_t b = 0; b < n; b += 32, p += 24, out += 32) {
    const float d = LoadHalf(p), m = LoadHalf(p + 2);
    const uint32_t high = HighBits(p + 4);
    for (int i = 0; i < 16; ++i) {
      const int low_value = (p[8 + i] & 15) | static_cast<int>((high >> i) & 1) << 4;
      const int high_value = (p[8 + i] >> 4) | static_cast<int>((high >> (i + 16)) & 1) << 4;
      out[i] = static_cast<float>(low_value) * d + m;
      out[16 + i] = static_cast<float>(high_value) * d + m;
    }
  }
}

// Scale and minimum of sub-block `j` from the 12 bytes that Q4_K and Q5_K share.
void ScaleAndMin(const uint8_t* q, int j, int& scale, int& minimum) {
  if (j < 4) {
    scale = q[j] & 63;
    minimum = q[j + 4] & 63;
  } else {
    scale = (q[j + 4] & 15) | (q[j - 4] >> 6) << 4;
    minimum = (q[j + 4] >> 4) | (q[j] >> 6) << 4;
  }
}

// Q4_K when `high` is null; else Q5_K, whose bit j of high[i] is the fifth bit.
void DequantizeK45(const uint8_t* p, const uint8_t* high, const uint8_t* quants, float* out) {
  const float d = LoadHalf(p), dmin = LoadHalf(p + 2);
  for (int j = 0; j < 8; ++j, out += 32) {
    int scale, minimum;
    ScaleAndMin(p + 4, j, scale, minimum);
    const float step = d * static_cast<float>(scale), offset = dmin * static_cast<float>(minimum);
    const uint8_t* q = quants + 32 * (j / 2);
    for (int i = 0; i < 32; ++i) {
      int value = j % 2 == 0 ? q[i] & 15 : q[i] >> 4;
      if (high != nullptr) value |= ((high[i] >> j) & 1) << 4;
      out[i] = step * static_cast<float>(value) - offset;
    }
  }
}

void DequantizeQ4_K(const uint8_t* p, size_t n, float* out) {
  for (size_t b = 0; b < n; b += kSuperBlock, p += 144, out += kSuperBlock) {
    DequantizeK45(p, nullptr, p + 16, out);
  }
}

void DequantizeQ5_K(const uint8_t* p, size_t n, float* out) {
  for (size_t b = 0; b < n; b += kSuperBlock, p += 176, out += kSuperBlock) {
    DequantizeK45(p, p + 16, p + 48, out);
  }
}

void DequantizeQ6_K(const uint8_t* p, size_t n, float* out) {
  for (size_t b = 0; b < n; b += kSuperBlock, p += 210, out += kSuperBlock) {
    const float d = LoadHalf(p + 208);
    for (int i = 0; i < 256; ++i) {
      const int half = i / 128, within = i % 128, quarter = within / 32, lane = within % 32;
      const uint8_t low = p[64 * half + lane + 32 * (quarter % 2)];
      const uint8_t high = p[128 + 32 * half + lane];
      const int value = (quarter < 2 ? low & 15 : low >> 4) | ((high >> (2 * quarter)) & 3) << 4;
      const int8_t scale = static_cast<int8_t>(p[192 + i / 16]);
      out[i] = d * static_cast<float>(scale) * static_cast<float>(value - 32);
    }
  }
}

using Routine = void (*)(const uint8_t*, size_t, float*);

Routine RoutineOf(TensorType type) {
  switch (type) {
    case TensorType::kF32:
      return DequantizeF32;
    case TensorType::kF16:
      return DequantizeF16;
    case TensorType::kBF16:
      return DequantizeBf16;
    case TensorType::kQ8_0:
      return DequantizeQ8_0;
    case TensorType::kQ4_0:
      return DequantizeQ4_0;
    case TensorType::kQ4_1:
      return DequantizeQ4_1;
    case TensorType::kQ5_0:
      return DequantizeQ5_0;
    case TensorType::kQ5_1:
      return DequantizeQ5_1;
    case TensorType::kQ4_K:
      return DequantizeQ4_K;
    case TensorType::kQ5_K:
      return DequantizeQ5_K;
    case TensorType::kQ6_K:
      return DequantizeQ6_K;
    default:
      return nullptr;
  }
}

}  // namespace

float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 31;
  const uint32_t mantissa = half & 0x3ff;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | mantissa << 13;
  } else if (exponent != 0) {
    bits = sign | (exponent + 112) << 23 | mantissa << 13;
  } else {
    const float small = static_cast<float>(mantissa) * 0x1p-24f;
    std::memcpy(&bits, &small, 4);
    bits |= sign;
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

bool CanDequantize(TensorType type) { return RoutineOf(type) != nullptr; }

void Dequantize(TensorType type, const std::byte* row, size_t n, float* out) {
  const Routine routine = RoutineOf(type);
  CHECK(routine != nullptr);
  routine(reinterpret_cast<const uint8_t*>(row), n, out);
}

}  // namespace antiphon::engine::cpu
