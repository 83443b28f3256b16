#include "engine/cuda/page_table.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <vector>

#include "tests/engine/random.h"

namespace antiphon::engine::cuda {
namespace {

constexpr uint32_t kBlock = 16;

std::vector<std::byte*> Blocks(uintptr_t first, size_t count) {
  std::vector<std::byte*> blocks;
  for (size_t i = 0; i < count; ++i) blocks.push_back(reinterpret_cast<std::byte*>(first + i));
  return blocks;
}

TEST(PageTableTest, APromptInChunksLoadsNothing) {
  PageTable table(1, 8, kBlock);
  const auto blocks = Blocks(100, 8);
  PageTable::Placement p;
  for (const auto& [start, end] :
       std::vector<std::pair<uint32_t, uint32_t>>{{0, 23}, {23, 64}, {64, 65}}) {
    table.BeginStep();
    ASSERT_TRUE(table.Place(1, blocks.data(), start, end, &p));
    EXPECT_EQ(p.load_begin, p.load_end);
  }
  EXPECT_EQ(table.pages_free(), 3u);
}

TEST(PageTableTest, AContextThatIsNotThereIsLoadedWithItsPartialBlock) {
  PageTable table(1, 8, kBlock);
  const auto blocks = Blocks(100, 8);
  PageTable::Placement p;
  table.BeginStep();
  ASSERT_TRUE(table.Place(1, blocks.data(), 40, 41, &p));
  EXPECT_EQ(p.load_begin, 0u);
  EXPECT_EQ(p.load_end, 3u);
}

TEST(PageTableTest, AMovedBlockAndAllBehindItAreLoadedAgain) {
  PageTable table(1, 8, kBlock);
  auto blocks = Blocks(100, 8);
  PageTable::Placement p;
  table.BeginStep();
  ASSERT_TRUE(table.Place(1, blocks.data(), 0, 70, &p));
  blocks[2] = reinterpret_cast<std::byte*>(7);
  table.BeginStep();
  ASSERT_TRUE(table.Place(1, blocks.data(), 70, 71, &p));
  EXPECT_EQ(p.load_begin, 2u);
  EXPECT_EQ(p.load_end, 5u);
}

TEST(PageTableTest, WhatAnAbandonedStepPlacedIsNotTrusted) {
  PageTable table(1, 8, kBlock);
  const auto blocks = Blocks(100, 8);
  PageTable::Placement p;
  table.BeginStep();
  ASSERT_TRUE(table.Place(1, blocks.data(), 0, 32, &p));
  table.AbandonStep();
  table.BeginStep();
  ASSERT_TRUE(table.Place(1, blocks.data(), 32, 33, &p));
  EXPECT_EQ(p.load_begin, 0u);
  EXPECT_EQ(p.load_end, 2u);
}

TEST(PageTableTest, SequencesOfOneStepDoNotTakeFromEachOther) {
  PageTable table(1, 4, kBlock);
  const auto a = Blocks(100, 4), b = Blocks(200, 4);
  PageTable::Placement p;
  table.BeginStep();
  ASSERT_TRUE(table.Place(1, a.data(), 0, 48, &p));
  EXPECT_FALSE(table.Place(2, b.data(), 0, 32, &p));
  table.AbandonStep();
  table.BeginStep();
  EXPECT_TRUE(table.Place(2, b.data(), 0, 32, &p));
}

// Against a model that remembers, for every page, which block's which positions it holds.
TEST(PageTableTest, RandomStepsNeverReadAPageThatHoldsSomethingElse) {
  for (uint64_t seed = 1; seed <= 200; ++seed) {
    SCOPED_TRACE(seed);
    TestRandom random(seed);
    constexpr uint32_t kPages = 12;
    PageTable table(5, kPages, kBlock);
    struct Content {
      uint64_t sequence = 0;
      std::byte* block = nullptr;
      uint32_t filled = 0;  // tokens of the block
    };
    std::map<int32_t, Content> pages;
    struct Sequence {
      std::vector<std::byte*> blocks;
      uint32_t tokens = 0;
    };
    std::map<uint64_t, Sequence> sequences;
    uint64_t next = 1;
    for (int step = 0; step < 60; ++step) {
      table.BeginStep();
      std::set<int32_t> used;
      std::set<uint64_t> stepped;
      bool failed = false;
      const uint32_t chunks = 1 + random.Bits() % 3;
      for (uint32_t c = 0; c < chunks && !failed; ++c) {
        uint64_t handle = 1 + random.Bits() % next;
        if (handle == next) {
          sequences[next++] = {Blocks(1000 * next, 8), 0};
        }
        if (!stepped.insert(handle).second) continue;
        Sequence& s = sequences[handle];
        if (random.Bits() % 5 == 0) s.tokens = random.Bits() % (s.tokens + 1);  // again from there
        if (random.Bits() % 7 == 0) s.blocks[random.Bits() % 8] += 400;
        const uint32_t start = s.tokens;
        const uint32_t end =
            std::min(8 * kBlock, start + 1 + static_cast<uint32_t>(random.Bits() % 40));
        if (end <= start) continue;
        PageTable::Placement p;
        if (!table.Place(handle, s.blocks.data(), start, end, &p)) {
          failed = true;
          break;
        }
        for (uint32_t b = 0; b * kBlock < end; ++b) {
          ASSERT_GE(p.pages[b], 5);
          ASSERT_LT(p.pages[b], 5 + static_cast<int32_t>(kPages));
          ASSERT_TRUE(used.insert(p.pages[b]).second) << "a page is in two places";
          Content& content = pages[p.pages[b]];
          const uint32_t needed = std::min(kBlock, start > b * kBlock ? start - b * kBlock : 0);
          if (b >= p.load_begin && b < p.load_end) {
            content = {handle, s.blocks[b], needed};
          } else if (needed > 0) {
            ASSERT_EQ(content.sequence, handle);
            ASSERT_EQ(content.block, s.blocks[b]);
            ASSERT_GE(content.filled, needed);
          }
          content = {handle, s.blocks[b], std::min(kBlock, end - b * kBlock)};
        }
        s.tokens = end;
      }
      if (failed || random.Bits() % 9 == 0) {
        table.AbandonStep();
        for (int32_t page : used) pages[page] = {};
      }
    }
  }
}

}  // namespace
}  // namespace antiphon::engine::cuda
