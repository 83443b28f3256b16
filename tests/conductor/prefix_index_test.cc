#include "conductor/prefix_index.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>

#include "tests/conductor/harness.h"

namespace antiphon::conductor {
namespace {

const FingerprintId kFingerprint = IdOf(TestFingerprint());

std::map<int, uint32_t> Matches(const PrefixIndex& index, const std::vector<BlockKey>& keys) {
  std::map<int, uint32_t> matches;
  for (const auto& [holder, blocks] : index.LongestPrefixes(keys, kFingerprint)) {
    EXPECT_TRUE(matches.emplace(holder, blocks).second) << "holder twice";
    EXPECT_GT(blocks, 0u);
  }
  return matches;
}

TEST(PrefixIndexTest, CountsLeadingBlocksOfEachHolder) {
  PrefixIndex index(1000);
  const auto a = index.AddHolder(), b = index.AddHolder();
  const auto keys = Chain(1, 10);
  for (int i = 0; i < 10; ++i) index.Insert(keys[i], kFingerprint, a);
  for (int i = 0; i < 4; ++i) index.Insert(keys[i], kFingerprint, b);
  EXPECT_EQ(Matches(index, keys), (std::map<int, uint32_t>{{a, 10}, {b, 4}}));
  EXPECT_EQ(index.blocks(), 10u);
  EXPECT_EQ(index.blocks_of(b), 4u);
}

TEST(PrefixIndexTest, AGapEndsThePrefix) {
  PrefixIndex index(1000);
  const auto a = index.AddHolder();
  const auto keys = Chain(1, 10);
  for (int i = 0; i < 10; ++i) index.Insert(keys[i], kFingerprint, a);
  index.Erase(keys[3], kFingerprint, a);
  EXPECT_EQ(Matches(index, keys), (std::map<int, uint32_t>{{a, 3}}));
  index.Erase(keys[0], kFingerprint, a);
  EXPECT_TRUE(Matches(index, keys).empty());
}

TEST(PrefixIndexTest, EqualTokensUnderAnotherFingerprintAreAnotherBlock) {
  PrefixIndex index(1000);
  const auto a = index.AddHolder();
  const auto keys = Chain(1, 2);
  index.Insert(keys[0], FingerprintId(), a);
  EXPECT_TRUE(Matches(index, keys).empty());
}

TEST(PrefixIndexTest, IsBounded) {
  PrefixIndex index(100);
  const auto a = index.AddHolder(), b = index.AddHolder();
  const auto keys = Chain(1, 200);
  int stored = 0;
  for (const auto& key : keys) stored += index.Insert(key, kFingerprint, a);
  EXPECT_EQ(stored, 100);
  EXPECT_EQ(index.refused(), 100u);
  EXPECT_TRUE(index.Insert(keys[0], kFingerprint, b)) << "a known block needs no room";
}

TEST(PrefixIndexTest, ARemovedHolderIsForgottenAndItsNumberComesBackEmpty) {
  PrefixIndex index(1000);
  const auto a = index.AddHolder();
  const auto keys = Chain(1, 5);
  for (const auto& key : keys) index.Insert(key, kFingerprint, a);
  index.RemoveHolder(a);
  EXPECT_EQ(index.blocks(), 0u);
  EXPECT_TRUE(Matches(index, keys).empty());
  EXPECT_EQ(index.AddHolder(), a);
  EXPECT_TRUE(Matches(index, keys).empty());
}

// Against sets: random inserts, erasures and lost holders, hot blocks that spill into bitsets.
TEST(PrefixIndexTest, AgreesWithANaiveIndex) {
  for (uint64_t seed = 0; seed < 8; ++seed) {
    std::mt19937_64 rng(seed);
    PrefixIndex index(5000, seed * 77);
    std::map<int, std::set<BlockKey>> naive;
    std::vector<int> holders;
    const auto chains = {Chain(1, 40), Chain(2, 40), Chain(3, 40)};
    std::vector<std::vector<BlockKey>> all(chains);
    for (int step = 0; step < 2000; ++step) {
      const uint64_t dice = rng() % 1000;
      if (holders.empty() || (dice < 5 && holders.size() < 150)) {
        for (int n = 0; n < 20; ++n) holders.push_back(index.AddHolder());
      } else if (dice < 8) {
        const size_t at = rng() % holders.size();
        index.RemoveHolder(static_cast<PrefixIndex::Holder>(holders[at]));
        naive.erase(holders[at]);
        holders.erase(holders.begin() + static_cast<long>(at));
      } else {
        const auto& chain = all[rng() % all.size()];
        const int holder = holders[rng() % holders.size()];
        // Skewed to the front, as prefixes are.
        const size_t depth = std::min(rng() % chain.size(), rng() % chain.size());
        if (dice < 200) {
          index.Erase(chain[depth], kFingerprint, static_cast<PrefixIndex::Holder>(holder));
          naive[holder].erase(chain[depth]);
        } else {
          for (size_t i = 0; i <= depth; ++i) {
            index.Insert(chain[i], kFingerprint, static_cast<PrefixIndex::Holder>(holder));
            naive[holder].insert(chain[i]);
          }
        }
      }
      if (step % 100 != 0) continue;
      std::set<BlockKey> distinct;
      for (const auto& [holder, keys] : naive) distinct.insert(keys.begin(), keys.end());
      ASSERT_EQ(index.blocks(), distinct.size()) << "seed " << seed << " step " << step;
      for (const auto& chain : all) {
        std::map<int, uint32_t> expected;
        for (const auto& [holder, keys] : naive) {
          uint32_t n = 0;
          while (n < chain.size() && keys.contains(chain[n])) ++n;
          if (n > 0) expected[holder] = n;
        }
        ASSERT_EQ(Matches(index, chain), expected) << "seed " << seed << " step " << step;
      }
    }
  }
}

}  // namespace
}  // namespace antiphon::conductor
