// Sixteen float lanes in plain C++: what the other simd_*.h files must equal bit for bit.
#ifndef ANTIPHON_ENGINE_CPU_SIMD_SCALAR_H_
#define ANTIPHON_ENGINE_CPU_SIMD_SCALAR_H_

#include <cmath>
#include <cstdint>
#include <cstring>

namespace antiphon::engine::cpu {
namespace {

struct F {
  float v[16];
};

// Shape of the register tiles. In attention at most kTileQueries queries share a pass, of more than
// those kManyQueries at a time; each has TileVectors(queries) vectors. In float products rows x
// groups.
constexpr int kTileQueries = 2;
constexpr int kManyQueries = 2;
constexpr int TileVectors(int) { return 2; }
constexpr bool kTransposesInRegisters = false;  // 16 vectors and what goes with them
constexpr int kFloatRows = 2;
constexpr int kFloatGroups = 2;

#define ANTIPHON_LANES(expr)                    \
  F r;                                          \
  for (int i = 0; i < 16; ++i) r.v[i] = (expr); \
  return r

template <typename T>
inline void Forget(const T*&) {}  // there are registers enough
inline F Zero() { ANTIPHON_LANES(0.0f); }
inline F Splat(float x) { ANTIPHON_LANES(x); }
// Pairs of bf16 numbers are loaded as floats from wherever they lie.
inline F Load(const float* p) {
  F a;
  std::memcpy(a.v, p, sizeof(a.v));
  return a;
}
inline void Store(float* p, F a) { std::memcpy(p, a.v, sizeof(a.v)); }
inline F Add(F a, F b) { ANTIPHON_LANES(a.v[i] + b.v[i]); }
inline F Sub(F a, F b) { ANTIPHON_LANES(a.v[i] - b.v[i]); }
inline F Mul(F a, F b) { ANTIPHON_LANES(a.v[i] * b.v[i]); }
inline F Div(F a, F b) { ANTIPHON_LANES(a.v[i] / b.v[i]); }
inline F Fma(F a, F b, F c) { ANTIPHON_LANES(__builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
inline F Max(F a, F b) { ANTIPHON_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline F Min(F a, F b) { ANTIPHON_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline F Abs(F a) { ANTIPHON_LANES(__builtin_fabsf(a.v[i])); }
// value where x >= threshold, else 0.
inline F ZeroBelow(F x, F threshold, F value) {
  ANTIPHON_LANES(x.v[i] >= threshold.v[i] ? value.v[i] : 0.0f);
}
// Lanes from n on become `fill`.
inline F FillFrom(F x, int n, float fill) { ANTIPHON_LANES(i < n ? x.v[i] : fill); }
// 2^n of integral lanes from -126 to 127.
inline F Exp2(F n) {
  F r;
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23;
    std::memcpy(&r.v[i], &bits, 4);
  }
  return r;
}

// Adds the number in the lowest bits of n's representation to the exponent of x.
inline F AddToExponent(F x, F n) {
  for (int i = 0; i < 16; ++i) {
    uint32_t bits, add;
    std::memcpy(&bits, &x.v[i], 4);
    std::memcpy(&add, &n.v[i], 4);
    bits += add << 23;
    std::memcpy(&x.v[i], &bits, 4);
  }
  return x;
}

inline float HalfToFloat(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 31;
  const uint32_t mantissa = h & 0x3ff;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {
    const float small = static_cast<float>(mantissa) * 0x1p-24f;
    std::memcpy(&bits, &small, 4);
    bits |= sign;
  }
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float Bf16ToFloat(uint16_t b) {
  const uint32_t bits = static_cast<uint32_t>(b) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline F LoadF16(const uint16_t* p) { ANTIPHON_LANES(HalfToFloat(p[i])); }
inline F LoadBf16(const uint16_t* p) { ANTIPHON_LANES(Bf16ToFloat(p[i])); }
// Halves of lanes that hold two bf16 numbers.
inline F LowBf16(F pairs) {
  for (float& lane : pairs.v) {
    uint32_t bits;
    std::memcpy(&bits, &lane, 4);
    bits <<= 16;
    std::memcpy(&lane, &bits, 4);
  }
  return pairs;
}
inline F HighBf16(F pairs) {
  for (float& lane : pairs.v) {
    uint32_t bits;
    std::memcpy(&bits, &lane, 4);
    bits &= 0xffff0000;
    std::memcpy(&lane, &bits, 4);
  }
  return pairs;
}
inline void StoreBf16(uint16_t* p, F a) {
  for (int i = 0; i < 16; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &a.v[i], 4);
    p[i] = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}
// To the nearest bf16 number, even of two.
inline F RoundBf16(F a) {
  uint16_t rounded[16];
  StoreBf16(rounded, a);
  return LoadBf16(rounded);
}
// Rounds to nearest even, stores, and returns the sum. Lanes lie within +-127.
inline int32_t StoreInt8(int8_t* p, F a) {
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) {
    p[i] = static_cast<int8_t>(__builtin_nearbyintf(a.v[i]));
    sum += p[i];
  }
  return sum;
}
inline float Sum(F a) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  }
  return a.v[0];
}
inline float MaxOf(F a) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a.v[i] = a.v[i] > a.v[i + width] ? a.v[i] : a.v[i + width];
  }
  return a.v[0];
}
inline void Transpose(F (&rows)[16]) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < i; ++j) {
      const float t = rows[i].v[j];
      rows[i].v[j] = rows[j].v[i];
      rows[j].v[i] = t;
    }
  }
}
// The lanes of `even` and `odd` in turns: the first sixteen, then the others.
inline void Interleave(F& even, F& odd) {
  const F e = even, o = odd;
  for (int i = 0; i < 16; ++i) {
    even.v[i] = i % 2 == 0 ? e.v[i / 2] : o.v[i / 2];
    odd.v[i] = i % 2 == 0 ? e.v[8 + i / 2] : o.v[8 + i / 2];
  }
}
#undef ANTIPHON_LANES

}  // namespace
}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_SIMD_SCALAR_H_
