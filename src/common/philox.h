// Philox4x32-10, a counter-based generator (Salmon et al., SC'11): the value at a position depends
// on key and position alone, so a resumed stream samples what it would have sampled.
#ifndef ANTIPHON_COMMON_PHILOX_H_
#define ANTIPHON_COMMON_PHILOX_H_

#include <array>
#include <cstdint>

namespace antiphon {

// Four 32-bit values for (key, counter).
constexpr std::array<uint32_t, 4> Philox4x32(uint64_t key, uint64_t counter_low,
                                             uint64_t counter_high = 0) {
  uint32_t c[4] = {static_cast<uint32_t>(counter_low), static_cast<uint32_t>(counter_low >> 32),
                   static_cast<uint32_t>(counter_high), static_cast<uint32_t>(counter_high >> 32)};
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c[0];
    const uint64_t p1 = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
    c[1] = static_cast<uint32_t>(p1);
    c[3] = static_cast<uint32_t>(p0);
    c[0] = n0;
    c[2] = n2;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {c[0], c[1], c[2], c[3]};
}

// Uniform in [0, 1), 53 bits.
constexpr double PhiloxUniform(uint64_t key, uint64_t position) {
  const auto v = Philox4x32(key, position);
  return static_cast<double>((uint64_t{v[0]} << 21) | (v[1] >> 11)) * 0x1.0p-53;
}

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_PHILOX_H_
