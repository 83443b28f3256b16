// The arithmetic of the CUDA kernels, an element at a time: the same code runs in kernels and in
// tests on the CPU.
#ifndef ANTIPHON_ENGINE_CUDA_ARITHMETIC_H_
#define ANTIPHON_ENGINE_CUDA_ARITHMETIC_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#include "engine/cuda/module.h"

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

// A logit as the request wants it, in the sampler's order: bias, mask, repetition, the other
// penalties.
ANTIPHON_HOST_DEVICE float EditedLogit(float logit, const LogitEdit& edit, float repetition) {
  logit += edit.bias;
  if (edit.masked) logit = -INFINITY;
  if (edit.repeated) logit = logit > 0 ? logit / repetition : logit * repetition;
  return logit - edit.penalty;
}

// exp for x <= 0 with the bits of the CPU kernels' (engine/cpu/exp-inl.h); 0 below -87.
ANTIPHON_HOST_DEVICE float SamplerExp(float x) {
  if (!(x >= -87.0f)) return 0.0f;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float n = fmaf(x, 1.44269504088896341f, magic) - magic;
  float r = fmaf(n, -0.693359375f, x);
  r = fmaf(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fmaf(p, r, 1.3981999507e-3f);
  p = fmaf(p, r, 8.3334519073e-3f);
  p = fmaf(p, r, 4.1665795894e-2f);
  p = fmaf(p, r, 1.6666665459e-1f);
  p = fmaf(p, r, 5.0000001201e-1f);
  p = fmaf(p, r * r, r) + 1.0f;
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  float power;
  memcpy(&power, &bits, sizeof(power));
  return p * power;
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
