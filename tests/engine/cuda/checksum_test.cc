// The arithmetic of the checksum kernel against libxxhash, and put together against what the host
// computes.
#include "engine/cuda/checksum.h"

#include <gtest/gtest.h>
#include <xxhash.h>

#include <random>
#include <vector>

#include "common/kv_layout.h"
#include "tests/engine/cuda/serial_checksum.h"

namespace antiphon::engine::cuda {
namespace {

std::vector<std::byte> Noise(size_t bytes, std::mt19937_64& rng) {
  std::vector<std::byte> out(bytes);
  for (auto& b : out) b = static_cast<std::byte>(rng());
  return out;
}

TEST(ChecksumTest, EverySizeOfAPieceHashesAsXxh3) {
  std::mt19937_64 rng(1);
  for (uint32_t size = kHashUnitBytes; size <= kHashPieceBytes; size += kHashUnitBytes) {
    for (uint64_t seed : {uint64_t{0}, uint64_t{1}, uint64_t{15}, rng(), ~uint64_t{0}}) {
      const auto piece = Noise(size, rng);
      ASSERT_EQ(SerialHash(piece.data(), size, seed),
                XXH3_64bits_withSeed(piece.data(), size, seed))
          << size << " bytes, seed " << seed;
    }
  }
}

TEST(ChecksumTest, LayersOfRandomLayoutsSumUpAsOnTheHost) {
  std::mt19937_64 rng(2);
  for (int turn = 0; turn < 60; ++turn) {
    KvLayout layout;
    layout.block_tokens = 1 + static_cast<uint32_t>(rng() % 64);
    layout.layers = 2;
    layout.kv_heads = 1 + static_cast<uint32_t>(rng() % 8);
    layout.head_dim = rng() % 2 == 0 ? 64 : 128;
    ASSERT_EQ(layout.token_bytes() % kHashUnitBytes, 0u);
    const auto block = Noise(layout.payload_bytes(), rng);
    for (uint32_t layer = 0; layer < layout.layers; ++layer) {
      const std::byte* begin = block.data() + layer * layout.layer_bytes();
      for (uint32_t tokens = 0; tokens <= layout.block_tokens; ++tokens) {
        ASSERT_EQ(SerialChecksum(begin, layout.half_bytes(), tokens * layout.token_bytes()),
                  LayerChecksum(layout, begin, tokens))
            << layout.Text() << ", " << tokens << " tokens";
      }
    }
  }
}

}  // namespace
}  // namespace antiphon::engine::cuda
