#include "common/block_key.h"

#include <gtest/gtest.h>

namespace antiphon {
namespace {

const KeyRoot kRoot = {
    .weights_digest = "ab12", .block_tokens = 4, .tenant_salt = "tenant", .cache_salt = "salt"};

// From Python's hashlib over the encoding that block_key.h describes.
TEST(BlockKeyTest, EqualsAnIndependentImplementation) {
  const BlockKey root = RootKey(kRoot);
  EXPECT_EQ(root.Hex(), "6a1a498b158ba3ccff4a503963332407");
  const std::vector<uint32_t> tokens = {1, 2, 3, 4, 5, 6, 7, 8, 9};
  const auto keys = BlockKeys(root, tokens, 4);
  ASSERT_EQ(keys.size(), 2u) << "an unfinished block has no key";
  EXPECT_EQ(keys[0].Hex(), "eb9d6f0dc5b83974cdaba659896eff6e");
  EXPECT_EQ(keys[1].Hex(), "0fa4437ba296993afaa754652384e1c9");
}

TEST(BlockKeyTest, EveryFieldOfTheRootChangesTheKey) {
  const BlockKey base = RootKey(kRoot);
  KeyRoot other = kRoot;
  other.weights_digest = "ab13";
  EXPECT_NE(RootKey(other), base);
  other = kRoot;
  other.block_tokens = 5;
  EXPECT_NE(RootKey(other), base);
  other = kRoot;
  other.tenant_salt = "tenants";
  EXPECT_NE(RootKey(other), base);
  other = kRoot;
  other.cache_salt = "";
  EXPECT_NE(RootKey(other), base);
  other = kRoot;
  other.adapter = "a";
  EXPECT_NE(RootKey(other), base);
}

TEST(BlockKeyTest, FieldsCannotRunIntoOneAnother) {
  KeyRoot a = kRoot, b = kRoot;
  a.tenant_salt = "xy";
  a.cache_salt = "z";
  b.tenant_salt = "x";
  b.cache_salt = "yz";
  EXPECT_NE(RootKey(a), RootKey(b));
}

TEST(BlockKeyTest, ABlockNamesAllThatPrecedesIt) {
  const auto a = BlockKeys(RootKey(kRoot), std::vector<uint32_t>{1, 2, 3, 4, 5, 6, 7, 8}, 4);
  const auto b = BlockKeys(RootKey(kRoot), std::vector<uint32_t>{1, 2, 3, 9, 5, 6, 7, 8}, 4);
  EXPECT_NE(a[0], b[0]);
  EXPECT_NE(a[1], b[1]) << "equal tokens behind another block are another block";
}

TEST(BlockKeyTest, Sha256IsTheStandardOne) {
  EXPECT_EQ(Sha256Hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

}  // namespace
}  // namespace antiphon
