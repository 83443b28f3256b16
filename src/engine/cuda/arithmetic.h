// The arithmetic of the CUDA kernels, an element at a time: the same code runs in kernels and in
// tests on the CPU.
#ifndef ANTIPHON_ENGINE_CUDA_ARITHMETIC_H_
#define ANTIPHON_ENGINE_CUDA_ARITHMETIC_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define ANTIPHON_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ANTIPHON_HOST_DEVICE inline
#endif

namespace antiphon::engine::cuda {

ANTIPHON_HOST_DEVICE float FromBf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, sizeof(value));
  return value;
}

// To nearest, ties to even; NaN stays NaN.
ANTIPHON_HOST_DEVICE uint16_t ToBf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

ANTIPHON_HOST_DEVICE float RmsScale(float sum_of_squares, uint32_t size, float eps) {
  return 1.0f / sqrtf(sum_of_squares / static_cast<float>(size) + eps);
}

ANTIPHON_HOST_DEVICE float SiluMul(float gate, float up) {
  return gate / (1.0f + expf(-gate)) * up;
}

struct Pair {
  float a;
  float b;
};
ANTIPHON_HOST_DEVICE Pair Rotate(Pair x, float cosine, float sine) {
  return {x.a * cosine - x.b * sine, x.b * cosine + x.a * sine};
}

// A candidate of the argmax. NaN never wins; ties go to the lower id.
struct Best {
  float value;
  uint32_t id;
};
ANTIPHON_HOST_DEVICE Best Better(Best x, Best y) {
  if (y.value > x.value || (y.value == x.value && y.id < x.id)) return y;
  return x;
}

// A hash for benchmarks' and tests' random numbers, uniform in [-1, 1).
ANTIPHON_HOST_DEVICE float RandomUnit(uint64_t seed, uint64_t index) {
  uint64_t z = seed * 0x9e3779b97f4a7c15ull + index + 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  z ^= z >> 31;
  return static_cast<float>(static_cast<int32_t>(z >> 32)) * (1.0f / 2147483648.0f);
}

}  // namespace antiphon::engine::cuda

#endif  // ANTIPHON_ENGINE_CUDA_ARITHMETIC_H_
