#include "kvstore/slot_header.h"

#include <gtest/gtest.h>

#include <vector>

#include "common/block_key.h"
#include "common/philox.h"

namespace antiphon::kvstore {
namespace {

constexpr KvLayout kLayout{.block_tokens = 16, .layers = 3, .kv_heads = 2, .head_dim = 8};

SlotHeader Example() {
  SlotHeader header{.generation = 7, .position = 2};
  for (uint32_t t = 0; t < 16; ++t) header.token_ids.push_back(t * 1000);
  header.layer_checksums = {1, ~uint64_t{0}, 3};
  header.parent = RootKey({.weights_digest = "w", .block_tokens = 16});
  header.key = NextKey(header.parent, header.token_ids);
  header.fingerprint = FingerprintId::Truncate(header.key.bytes().data());
  return header;
}

std::vector<std::byte> Written(const SlotHeader& header) {
  std::vector<std::byte> bytes(kSlotHeaderBytes, std::byte{0xFF});
  WriteSlotHeader(header, bytes.data());
  return bytes;
}

TEST(SlotHeaderTest, ReadsWhatItWrote) {
  const SlotHeader header = Example();
  const auto read = ReadSlotHeader(Written(header));
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->key, header.key);
  EXPECT_EQ(read->parent, header.parent);
  EXPECT_EQ(read->fingerprint, header.fingerprint);
  EXPECT_EQ(read->generation, 7u);
  EXPECT_EQ(read->position, 2u);
  EXPECT_EQ(read->token_ids, header.token_ids);
  EXPECT_EQ(read->layer_checksums, header.layer_checksums);
  EXPECT_TRUE(CheckHeaderContent(*read, kLayout).ok());
}

TEST(SlotHeaderTest, EveryFlippedByteIsFound) {
  const auto good = Written(Example());
  for (size_t i = 0; i < good.size(); ++i) {
    auto bad = good;
    bad[i] ^= std::byte{1};
    EXPECT_EQ(ReadSlotHeader(bad).status().code(), absl::StatusCode::kDataLoss) << "byte " << i;
  }
}

TEST(SlotHeaderTest, TokensThatDoNotHashToTheKeyAreRefused) {
  SlotHeader header = Example();
  header.token_ids[3] ^= 1;
  EXPECT_EQ(CheckHeaderContent(header, kLayout).code(), absl::StatusCode::kDataLoss);
  header.token_ids.pop_back();
  EXPECT_EQ(CheckHeaderContent(header, kLayout).code(), absl::StatusCode::kDataLoss);
}

TEST(SlotHeaderTest, ABlock0WithoutItsRootKeyIsTakenByItsKey) {
  SlotHeader header = Example();
  header.position = 0;
  header.parent = BlockKey();
  EXPECT_TRUE(CheckHeaderContent(header, kLayout).ok());
  header.position = 1;
  EXPECT_FALSE(CheckHeaderContent(header, kLayout).ok());
}

TEST(SlotHeaderTest, ALayoutThatDoesNotFitIsNamed) {
  KvLayout layout = kLayout;
  EXPECT_TRUE(CheckHeaderFits(layout).ok());
  layout.block_tokens = 1024;
  const absl::Status status = CheckHeaderFits(layout);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(std::string(status.message()).find("block_tokens 1024"), std::string::npos);
}

TEST(SlotHeaderTest, AWrongByteInAnyFilledTokenFailsTheLayer) {
  std::vector<std::byte> payload(kLayout.payload_bytes());
  for (size_t i = 0; i < payload.size(); ++i) {
    payload[i] = static_cast<std::byte>(Philox4x32(1, i)[0]);
  }
  const auto at = [&](uint32_t layer) { return payload.data() + layer * kLayout.layer_bytes(); };
  const std::vector<uint64_t> sums = {LayerChecksum(kLayout, at(1), 5),
                                      LayerChecksum(kLayout, at(2), 5)};
  EXPECT_TRUE(VerifyLayers(kLayout, payload.data(), 1, 5, sums).ok());
  at(2)[4 * kLayout.token_bytes()] ^= std::byte{1};
  EXPECT_EQ(VerifyLayers(kLayout, payload.data(), 1, 5, sums).code(), absl::StatusCode::kDataLoss);
  at(2)[4 * kLayout.token_bytes()] ^= std::byte{1};
  at(2)[5 * kLayout.token_bytes()] ^= std::byte{1};  // not filled
  EXPECT_TRUE(VerifyLayers(kLayout, payload.data(), 1, 5, sums).ok());
}

}  // namespace
}  // namespace antiphon::kvstore
