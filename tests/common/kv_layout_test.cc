#include "common/kv_layout.h"

#include <gtest/gtest.h>
#include <xxhash.h>

#include <vector>

namespace antiphon {
namespace {

constexpr KvLayout kLayout = {.block_tokens = 16, .layers = 3, .kv_heads = 3, .head_dim = 64};

std::vector<std::byte> Noise(size_t bytes, uint32_t seed) {
  std::vector<std::byte> out(bytes);
  for (auto& b : out) {
    seed = seed * 1664525 + 1013904223;
    b = static_cast<std::byte>(seed >> 24);
  }
  return out;
}

// The definition in the header, word by word.
uint64_t Naive(const KvLayout& layout, const std::byte* layer, uint32_t tokens) {
  uint64_t sum = 0;
  for (uint64_t half = 0; half < 2; ++half) {
    const size_t bytes = layout.token_bytes() * tokens;
    const std::byte* data = layer + half * layout.half_bytes();
    for (size_t piece = 0; piece * 4096 < bytes; ++piece) {
      std::vector<std::byte> copy(data + piece * 4096,
                                  data + std::min(bytes, (piece + 1) * size_t{4096}));
      sum += XXH3_64bits_withSeed(copy.data(), copy.size(), 2 * piece + half);
    }
  }
  return sum;
}

TEST(KvLayoutTest, ChecksumFollowsItsDefinitionForEveryFill) {
  for (KvDtype dtype : {KvDtype::kBf16, KvDtype::kF32}) {
    KvLayout layout = kLayout;
    layout.dtype = dtype;
    const auto layer = Noise(layout.layer_bytes(), 7);
    for (uint32_t tokens = 0; tokens <= layout.block_tokens; ++tokens) {
      EXPECT_EQ(LayerChecksum(layout, layer.data(), tokens), Naive(layout, layer.data(), tokens));
    }
  }
}

TEST(KvLayoutTest, ChecksumSeesFilledBytesAndNoOthers) {
  auto layer = Noise(kLayout.layer_bytes(), 9);
  const uint64_t before = LayerChecksum(kLayout, layer.data(), 5);
  const size_t filled = kLayout.token_bytes() * 5;
  layer[filled] ^= std::byte{1};                         // K of token 5
  layer[kLayout.half_bytes() + filled] ^= std::byte{1};  // V of token 5
  EXPECT_EQ(LayerChecksum(kLayout, layer.data(), 5), before);
  layer[filled - 1] ^= std::byte{1};
  EXPECT_NE(LayerChecksum(kLayout, layer.data(), 5), before);
}

TEST(KvLayoutTest, SwappedPiecesAndSwappedHalvesAreNoticed) {
  KvLayout layout = kLayout;
  layout.block_tokens = 64;  // 24 KiB a half: six pieces
  auto layer = Noise(layout.layer_bytes(), 11);
  const uint64_t before = LayerChecksum(layout, layer.data(), 64);
  std::swap_ranges(layer.begin(), layer.begin() + 4096, layer.begin() + 4096);
  EXPECT_NE(LayerChecksum(layout, layer.data(), 64), before);
  std::swap_ranges(layer.begin(), layer.begin() + 4096, layer.begin() + 4096);
  const auto half = static_cast<std::ptrdiff_t>(layout.half_bytes());
  std::swap_ranges(layer.begin(), layer.begin() + half, layer.begin() + half);
  EXPECT_NE(LayerChecksum(layout, layer.data(), 64), before);
}

TEST(KvLayoutTest, SizesAreAlignedByLayer) {
  EXPECT_EQ(kLayout.token_bytes(), 384u);
  EXPECT_EQ(kLayout.half_bytes(), 6144u);
  EXPECT_EQ(kLayout.layer_bytes(), 12288u);
  EXPECT_EQ(kLayout.slot_bytes(), 4096u + 3 * 12288u);
  EXPECT_EQ(kLayout.BlocksFor(0), 0u);
  EXPECT_EQ(kLayout.BlocksFor(16), 1u);
  EXPECT_EQ(kLayout.BlocksFor(17), 2u);
}

TEST(KvLayoutTest, RefusesWhatCannotBeABlockAndNamesTheField) {
  const auto message = [](KvLayout layout) { return std::string(layout.Validate().message()); };
  KvLayout layout = kLayout;
  EXPECT_TRUE(layout.Validate().ok());
  layout.block_tokens = 0;
  EXPECT_NE(message(layout).find("block_tokens"), std::string::npos);
  layout = kLayout;
  layout.layer_align = 0;
  EXPECT_NE(message(layout).find("layer_align"), std::string::npos);
  layout = kLayout;
  layout.kv_heads = layout.head_dim = layout.layers = 1 << 20;
  EXPECT_NE(message(layout).find("1 GiB"), std::string::npos);
}

TEST(KvLayoutTest, TextTellsLayoutsApart) {
  KvLayout other = kLayout;
  other.dtype = KvDtype::kF32;
  EXPECT_NE(kLayout.Text(), other.Text());
  EXPECT_EQ(kLayout.Text(), "L3,H3,D64,B16,bf16,A4096,xxh3-4k");
}

}  // namespace
}  // namespace antiphon
