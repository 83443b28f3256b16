// Reproducible numbers for tests, from the same generator as the sampler's.
#ifndef ANTIPHON_TESTS_ENGINE_RANDOM_H_
#define ANTIPHON_TESTS_ENGINE_RANDOM_H_

#include <cmath>
#include <cstdint>
#include <vector>

#include "common/philox.h"

namespace antiphon::engine {

class TestRandom {
 public:
  explicit TestRandom(uint64_t seed) : seed_(seed) {}
  uint32_t Bits() { return Philox4x32(seed_, count_++)[0]; }
  // In [0, n).
  uint32_t Below(uint32_t n) { return static_cast<uint32_t>(uint64_t{Bits()} * n >> 32); }
  double Uniform() { return PhiloxUniform(seed_, count_++); }
  float Normal() {
    const double r = std::sqrt(-2 * std::log(1 - Uniform()));
    return static_cast<float>(r * std::cos(6.283185307179586 * Uniform()));
  }
  std::vector<float> Normals(size_t n, float scale = 1) {
    std::vector<float> v(n);
    for (float& x : v) x = scale * Normal();
    return v;
  }

 private:
  uint64_t seed_;
  uint64_t count_ = 0;
};

}  // namespace antiphon::engine

#endif  // ANTIPHON_TESTS_ENGINE_RANDOM_H_
