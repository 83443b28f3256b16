// The arithmetic of the checksum kernel, one piece and one lane after the other on the CPU.
#ifndef ANTIPHON_TESTS_ENGINE_CUDA_SERIAL_CHECKSUM_H_
#define ANTIPHON_TESTS_ENGINE_CUDA_SERIAL_CHECKSUM_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "engine/cuda/checksum.h"

namespace antiphon::engine::cuda {

inline uint64_t SerialHash(const std::byte* piece, uint32_t size, uint64_t seed) {
  uint64_t secret[kHashSecretWords];
  for (uint32_t i = 0; i < kHashSecretWords; ++i) secret[i] = HashSecretWord(i);
  uint64_t parts = 0;
  for (uint32_t lane = 0; lane < kHashLanes; ++lane) {
    parts += HashPart(lane, size, seed, secret, [&](uint32_t stripe) {
      HashWords words;
      std::memcpy(&words, piece + stripe * kHashStripeBytes + lane * sizeof(words), sizeof(words));
      return words;
    });
  }
  return FinishHash(size, parts);
}

// Of a layer whose K and V are `half_bytes` each and filled up to `filled_bytes`.
inline uint64_t SerialChecksum(const std::byte* layer, size_t half_bytes, size_t filled_bytes) {
  uint64_t sum = 0;
  for (size_t at = 0, index = 0; at < filled_bytes; at += kHashPieceBytes, ++index) {
    const auto size = static_cast<uint32_t>(std::min<size_t>(kHashPieceBytes, filled_bytes - at));
    sum += SerialHash(layer + at, size, 2 * index);
    sum += SerialHash(layer + half_bytes + at, size, 2 * index + 1);
  }
  return sum;
}

}  // namespace antiphon::engine::cuda

#endif  // ANTIPHON_TESTS_ENGINE_CUDA_SERIAL_CHECKSUM_H_
