#include "engine/cpu/dequantize.h"

#include <cstdint>
#include <cstring>

#include "common/status_macros.h"
#include "engine/cpu/gguf_blocks.h"

namespace antiphon::engine::cpu {
namespace {

using model::TensorType;

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

void DequantizeQ5_0(const uint8_t* p, size_t n, float* out) {
  uint8_t values[kGgufBlock];
  for (size_t b = 0; b < n; b += 32, p += 22, out += 32) {
    const float d = LoadHalf(p);
    ReadQ5Block(p + 2, values);
    for (int i = 0; i < 32; ++i) out[i] = static_cast<float>(values[i] - 16) * d;
  }
}

void DequantizeQ5_1(const uint8_t* p, size_t n, float* out) {
  uint8_t values[kGgufBlock];
  for (size_t b = 0; b < n; b += 32, p += 24, out += 32) {
    const float d = LoadHalf(p), m = LoadHalf(p + 2);
    ReadQ5Block(p + 4, values);
    for (int i = 0; i < 32; ++i) out[i] = static_cast<float>(values[i]) * d + m;
  }
}

// Q4_K and Q5_K: `bytes` and `read` a super-block's.
void DequantizeK45(const uint8_t* p, size_t n, size_t bytes,
                   void (*read)(const uint8_t*, int, uint8_t*), float* out) {
  uint8_t values[kGgufBlock];
  for (size_t b = 0; b < n; b += kGgufSuperBlock, p += bytes) {
    const float d = LoadHalf(p), dmin = LoadHalf(p + 2);
    for (int j = 0; j < 8; ++j, out += kGgufBlock) {
      const auto [scale, minimum] = ReadScaleAndMinimum(p, j);
      const float step = d * static_cast<float>(scale), offset = dmin * static_cast<float>(minimum);
      read(p, j, values);
      for (int i = 0; i < kGgufBlock; ++i) out[i] = step * static_cast<float>(values[i]) - offset;
    }
  }
}

void DequantizeQ4_K(const uint8_t* p, size_t n, float* out) {
  DequantizeK45(p, n, kQ4KBytes, ReadQ4KBlock, out);
}

void DequantizeQ5_K(const uint8_t* p, size_t n, float* out) {
  DequantizeK45(p, n, kQ5KBytes, ReadQ5KBlock, out);
}

void DequantizeQ6_K(const uint8_t* p, size_t n, float* out) {
  uint8_t values[kGgufBlock];
  for (size_t b = 0; b < n; b += kGgufSuperBlock, p += kQ6KBytes) {
    const float d = LoadHalf(p + kQ6KSuperScale);
    for (int j = 0; j < 8; ++j, out += kGgufBlock) {
      ReadQ6KBlock(p, j, values);
      for (int i = 0; i < kGgufBlock; ++i) {
        const int8_t scale = static_cast<int8_t>(p[kQ6KScales + 2 * j + i / 16]);
        out[i] = d * static_cast<float>(scale) * static_cast<float>(values[i] - 32);
      }
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
