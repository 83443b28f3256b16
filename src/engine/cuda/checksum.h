// XXH3-64 with a seed, after its public specification (github.com/Cyan4973/xxHash), of the pieces
// that the checksum of a layer sums up (common/kv_layout.h). The same code runs in the kernel and
// in tests on the CPU.
//
// A piece is read in stripes of 64 bytes. Four lanes share it: each takes 16 bytes of every stripe
// and keeps the two of XXH3's eight accumulators that these bytes go into, so that lanes have
// nothing to tell each other before the end:
//
//   hash = FinishHash(size, sum over the lanes of HashPart(lane, size, ...))
//
// Sizes are multiples of 128 bytes up to 4 KiB: a token has whole heads of 64 or 128 elements of
// bf16. XXH3's ways for other short inputs are left out.
#ifndef ANTIPHON_ENGINE_CUDA_CHECKSUM_H_
#define ANTIPHON_ENGINE_CUDA_CHECKSUM_H_

#include <cstdint>

#include "engine/cuda/arithmetic.h"

namespace antiphon::engine::cuda {

inline constexpr uint32_t kHashPieceBytes = 4096;
inline constexpr uint32_t kHashUnitBytes = 128;  // sizes are multiples of it
inline constexpr uint32_t kHashStripeBytes = 64;
inline constexpr uint32_t kHashLanes = 4;
inline constexpr uint32_t kHashSecretWords = 24;

// Bytes [8 i, 8 i + 8) of XXH3's default secret, little-endian.
ANTIPHON_HOST_DEVICE uint64_t HashSecretWord(uint32_t i) {
  static constexpr uint64_t kSecret[kHashSecretWords] = {
      0xbe4ba423396cfeb8, 0x1cad21f72c81017c, 0xdb979083e96dd4de, 0x1f67b3b7a4a44072,
      0x78e5c0cc4ee679cb, 0x2172ffcc7dd05a82, 0x8e2443f7744608b8, 0x4c263a81e69035e0,
      0xcb00c391bb52283c, 0xa32e531b8b65d088, 0x4ef90da297486471, 0xd8acdea946ef1938,
      0x3f349ce33f76faa8, 0x1d4f0bc7c7bbdcf9, 0x3159b4cd4be0518a, 0x647378d9c97e9fc8,
      0xc3ebd33483acc5ea, 0xeb6313faffa081c5, 0x49daf0b751dd0d17, 0x9e68d429265516d3,
      0xfca1477d58be162b, 0xce31d07ad1b8f88f, 0x280416958f3acb45, 0x7e404bbbcafbd7af,
  };
  return kSecret[i];
}

namespace hash {

inline constexpr uint64_t kPrime32_1 = 0x9e3779b1, kPrime32_2 = 0x85ebca77, kPrime32_3 = 0xc2b2ae3d;
inline constexpr uint64_t kPrime64_1 = 0x9e3779b185ebca87, kPrime64_2 = 0xc2b2ae3d27d4eb4f,
                          kPrime64_3 = 0x165667b19e3779f9, kPrime64_4 = 0x85ebca77c2b2ae63,
                          kPrime64_5 = 0x27d4eb2f165667c5, kPrimeMix = 0x165667919e3779f9;
// Where parts of the secret begin, in bytes: those of the last stripe and of the merge are no
// words.
inline constexpr uint32_t kScrambleSecret = 128, kLastStripeSecret = 121, kMergeSecret = 11;
inline constexpr uint32_t kStripesOfBlock = 16;  // between two scrambles

// The low half of the product, xor the high one.
ANTIPHON_HOST_DEVICE uint64_t Fold(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
  return (a * b) ^ __umul64hi(a, b);
#else
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
#endif
}

// A long input's secret: the seed is added to even words and subtracted from odd ones.
struct Secret {
  const uint64_t* words;  // HashSecretWord of [0, kHashSecretWords)
  uint64_t seed;
  ANTIPHON_HOST_DEVICE uint64_t Word(uint32_t i) const {
    return i % 2 == 0 ? words[i] + seed : words[i] - seed;
  }
  // Eight bytes from any byte that does not begin a word.
  ANTIPHON_HOST_DEVICE uint64_t At(uint32_t byte) const {
    const uint32_t shift = byte % 8 * 8;
    return (Word(byte / 8) >> shift) | (Word(byte / 8 + 1) << (64 - shift));
  }
};

}  // namespace hash

// 16 bytes of a stripe, or two accumulators.
struct HashWords {
  uint64_t even;
  uint64_t odd;
};

namespace hash {

ANTIPHON_HOST_DEVICE void Accumulate(HashWords& sums, HashWords data, uint64_t even_key,
                                     uint64_t odd_key) {
  const uint64_t even = data.even ^ even_key, odd = data.odd ^ odd_key;
  sums.even += data.odd + (even & 0xffffffff) * (even >> 32);
  sums.odd += data.even + (odd & 0xffffffff) * (odd >> 32);
}

ANTIPHON_HOST_DEVICE uint64_t Scramble(uint64_t sum, uint64_t key) {
  return (sum ^ (sum >> 47) ^ key) * kPrime32_1;
}

ANTIPHON_HOST_DEVICE HashWords FirstSums(uint32_t lane) {
  switch (lane) {
    case 0:
      return {kPrime32_3, kPrime64_1};
    case 1:
      return {kPrime64_2, kPrime64_3};
    case 2:
      return {kPrime64_4, kPrime32_2};
    default:
      return {kPrime64_5, kPrime32_1};
  }
}

}  // namespace hash

// `load(stripe)` returns the lane's 16 bytes of a stripe; `secret` holds HashSecretWord of
// [0, kHashSecretWords).
template <typename Load>
ANTIPHON_HOST_DEVICE uint64_t HashPart(uint32_t lane, uint32_t size, uint64_t seed,
                                       const uint64_t* secret, const Load& load) {
  const uint32_t pair = 2 * lane;
  if (size == kHashUnitBytes) {
    // 16 bytes each from the front and from the back, towards the middle.
    const HashWords front = load(0), back = load(1);
    const uint64_t* of_front = secret + 4 * lane;
    const uint64_t* of_back = secret + 4 * (kHashLanes - 1 - lane) + 2;
    return hash::Fold(front.even ^ (of_front[0] + seed), front.odd ^ (of_front[1] - seed)) +
           hash::Fold(back.even ^ (of_back[0] + seed), back.odd ^ (of_back[1] - seed));
  }
  const hash::Secret key = {secret, seed};
  HashWords sums = hash::FirstSums(lane);
  const uint32_t last = size / kHashStripeBytes - 1;
  uint32_t stripe = 0;
  for (; stripe + hash::kStripesOfBlock <= last; stripe += hash::kStripesOfBlock) {
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (uint32_t i = 0; i < hash::kStripesOfBlock; ++i) {
      hash::Accumulate(sums, load(stripe + i), key.Word(i + pair), key.Word(i + pair + 1));
    }
    const uint32_t at = hash::kScrambleSecret / 8 + pair;
    sums = {hash::Scramble(sums.even, key.Word(at)), hash::Scramble(sums.odd, key.Word(at + 1))};
  }
#ifdef __CUDA_ARCH__
#pragma unroll 5
#endif
  for (uint32_t i = 0; i < last - stripe; ++i) {
    hash::Accumulate(sums, load(stripe + i), key.Word(i + pair), key.Word(i + pair + 1));
  }
  const uint32_t at = hash::kLastStripeSecret + 8 * pair;
  hash::Accumulate(sums, load(last), key.At(at), key.At(at + 8));
  const uint32_t merge = hash::kMergeSecret + 8 * pair;
  return hash::Fold(sums.even ^ key.At(merge), sums.odd ^ key.At(merge + 8));
}

ANTIPHON_HOST_DEVICE uint64_t FinishHash(uint32_t size, uint64_t parts) {
  uint64_t h = parts + size * hash::kPrime64_1;
  h = (h ^ (h >> 37)) * hash::kPrimeMix;
  return h ^ (h >> 32);
}

}  // namespace antiphon::engine::cuda

#endif  // ANTIPHON_ENGINE_CUDA_CHECKSUM_H_
