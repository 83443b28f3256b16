// What the GPU's tests need, without GoogleTest: they are built where there is CUDA and CMake and
// nothing else.
#ifndef ANTIPHON_TESTS_ENGINE_CUDA_CHECK_H_
#define ANTIPHON_TESTS_ENGINE_CUDA_CHECK_H_

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "engine/cuda/arithmetic.h"
#include "engine/cuda/error.h"
#include "engine/cuda/module.h"

namespace antiphon::engine::cuda {

inline int failures = 0;

inline void Expect(bool good, const std::string& what) {
  if (good) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

inline void MustBeOk(const Error& error, const char* what) {
  if (!error) return;
  std::printf("FAILED: %s: %s\n", what, error.message.c_str());
  std::exit(1);
}
inline void MustBeOk(cudaError_t status, const char* what) {
  if (status != cudaSuccess) MustBeOk(FromCuda(status, what), what);
}
#define OK(expression) ::antiphon::engine::cuda::MustBeOk((expression), #expression)

// ||out - want|| / ||want||; NaN when anything is NaN.
template <typename A, typename B>
double Distance(const std::vector<A>& out, const std::vector<B>& want) {
  double error = 0, size = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double d = double(out[i]) - double(want[i]);
    error += d * d;
    size += double(want[i]) * double(want[i]);
  }
  return std::sqrt(error / size);
}

inline void ExpectClose(double distance, double bound, const std::string& what) {
  std::printf("%-68s %.2e (bound %.1e)\n", what.c_str(), distance, bound);
  Expect(distance <= bound, what);  // NaN fails
}

inline std::vector<float> Randoms(size_t size, uint64_t seed, float scale) {
  std::vector<float> out(size);
  for (size_t i = 0; i < size; ++i) out[i] = scale * RandomUnit(seed, i);
  return out;
}
inline std::vector<uint16_t> ToBf16(const std::vector<float>& x) {
  std::vector<uint16_t> out(x.size());
  for (size_t i = 0; i < x.size(); ++i) out[i] = ToBf16(x[i]);
  return out;
}
inline std::vector<float> FromBf16(const std::vector<uint16_t>& x) {
  std::vector<float> out(x.size());
  for (size_t i = 0; i < x.size(); ++i) out[i] = FromBf16(x[i]);
  return out;
}

// Exits with 77, which ctest counts as skipped, where there is no device.
inline void NeedDevice() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return;
  std::printf("skipped: no CUDA device (%s)\n", cudaGetErrorString(status));
  std::exit(77);
}

inline int Verdict() {
  std::printf("%s\n", failures == 0 ? "all passed" : "FAILED");
  return failures == 0 ? 0 : 1;
}

}  // namespace antiphon::engine::cuda

#endif  // ANTIPHON_TESTS_ENGINE_CUDA_CHECK_H_
