#include "kvstore/core.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <vector>

#include "common/philox.h"

namespace antiphon::kvstore {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;

FingerprintId Print(uint8_t n) {
  std::array<uint8_t, 16> bytes{};
  bytes[15] = n;
  return FingerprintId(bytes);
}
BlockKey Key(uint16_t n) {
  std::array<uint8_t, 16> bytes{};
  bytes[14] = static_cast<uint8_t>(n >> 8);
  bytes[15] = static_cast<uint8_t>(n);
  return BlockKey(bytes);
}
const FingerprintId kPrint = Print(1);

// Block `n` of a chain: its parent is block n - 1.
BlockPlace Chain(uint16_t n, uint16_t base = 100) {
  return {.name = {kPrint, Key(static_cast<uint16_t>(base + n))},
          .parent = n == 0 ? BlockKey() : Key(static_cast<uint16_t>(base + n - 1)),
          .position = n};
}

class CoreTest : public ::testing::Test {
 protected:
  explicit CoreTest(uint32_t slots = 4) : core_(slots) {
    core_.AddClient(1, kPrint);
    core_.AddClient(2, kPrint);
  }
  void TearDown() override { EXPECT_TRUE(core_.CheckInvariants().ok()) << core_.CheckInvariants(); }

  // Commits a chain of `n` blocks for client 1 and lets go of it.
  std::vector<SlotId> Put(uint16_t n, uint16_t base = 100) {
    auto slots = core_.Reserve(1, n);
    EXPECT_TRUE(slots.ok()) << slots.status();
    for (uint16_t i = 0; i < n; ++i) {
      EXPECT_TRUE(core_.Commit(1, (*slots)[i], Chain(i, base)).ok());
    }
    EXPECT_TRUE(core_.Release(1, *slots).ok());
    return *slots;
  }
  std::vector<BlockKey> Keys(uint16_t n, uint16_t base = 100) {
    std::vector<BlockKey> keys;
    for (uint16_t i = 0; i < n; ++i) keys.push_back(Key(static_cast<uint16_t>(base + i)));
    return keys;
  }

  StoreCore core_;
};

TEST_F(CoreTest, AFreedSlotComesBackWithTheNextGeneration) {
  const auto first = core_.Reserve(1, 4);
  ASSERT_TRUE(first.ok());
  ASSERT_TRUE(core_.Release(1, *first).ok());
  const auto second = core_.Reserve(1, 4);
  ASSERT_TRUE(second.ok());
  for (const SlotId& slot : *second) EXPECT_EQ(slot.generation, 2u);
  EXPECT_FALSE(core_.PinSlots(2, *first).ok());
  EXPECT_FALSE(core_.MayWrite(1, first->front()));
}

TEST_F(CoreTest, ReservesAllOrNothing) {
  Put(2);
  const auto pinned = core_.PinPrefix(2, Keys(2));
  EXPECT_THAT(pinned, SizeIs(2));
  EXPECT_EQ(core_.Reserve(1, 3).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(core_.stats().committed, 2u);
  EXPECT_EQ(core_.stats().free, 2u);
  EXPECT_TRUE(core_.Reserve(1, 2).ok());
}

TEST_F(CoreTest, EvictsLeavesBeforeTheirParents) {
  Put(3);
  ASSERT_TRUE(core_.Reserve(1, 2).ok());  // one free, one evicted
  EXPECT_THAT(core_.PinPrefix(2, Keys(3)), SizeIs(2));
}

TEST_F(CoreTest, EvictsTheLeastRecentlyUsedChain) {
  Put(2, 100);
  Put(2, 200);
  ASSERT_TRUE(core_.Release(2, core_.PinPrefix(2, Keys(2, 100))).ok());
  ASSERT_TRUE(core_.Reserve(1, 2).ok());
  EXPECT_THAT(core_.PinPrefix(2, Keys(2, 200)), IsEmpty());
  EXPECT_THAT(core_.PinPrefix(2, Keys(2, 100)), SizeIs(2));
}

TEST_F(CoreTest, DoesNotEvictAParentOfAPinnedChild) {
  const auto slots = Put(2);
  ASSERT_TRUE(core_.PinSlots(2, {slots[1]}).ok());
  EXPECT_FALSE(core_.Reserve(1, 3).ok());
  ASSERT_TRUE(core_.Release(2, {slots[1]}).ok());
  EXPECT_TRUE(core_.Reserve(1, 4).ok());
}

TEST_F(CoreTest, ADuplicateStaysPrivateAndIsFreedWhenReleased) {
  Put(1);
  const auto slot = core_.Reserve(2, 1);
  ASSERT_TRUE(slot.ok());
  const auto committed = core_.Commit(2, slot->front(), Chain(0));
  ASSERT_TRUE(committed.ok());
  EXPECT_TRUE(committed->duplicate);
  EXPECT_EQ(core_.stats().committed, 1u);
  ASSERT_TRUE(core_.Release(2, *slot).ok());
  EXPECT_EQ(core_.stats().free, 3u);
}

TEST_F(CoreTest, AReaderKeepsTheSlotOfAWriterThatDied) {
  const auto slot = core_.Reserve(1, 1);
  ASSERT_TRUE(slot.ok());
  ASSERT_TRUE(core_.PinSlots(2, *slot).ok());
  core_.RemoveClient(1);
  EXPECT_EQ(core_.stats().retired, 1u);
  EXPECT_EQ(core_.stats().free, 3u);
  ASSERT_TRUE(core_.Release(2, *slot).ok());
  EXPECT_EQ(core_.stats().free, 4u);
}

TEST_F(CoreTest, AClientThatEndsReleasesEverything) {
  Put(2);
  core_.PinPrefix(2, Keys(2));
  core_.PinPrefix(2, Keys(1));
  ASSERT_TRUE(core_.Reserve(2, 1).ok());
  core_.RemoveClient(2);
  const CoreStats stats = core_.stats();
  EXPECT_EQ(stats.pins, 0u);
  EXPECT_EQ(stats.reserved, 0u);
  EXPECT_EQ(stats.committed, 2u);
}

TEST_F(CoreTest, AnotherFingerprintSeesNothing) {
  const auto slots = Put(1);
  core_.AddClient(3, Print(9));
  EXPECT_THAT(core_.PinPrefix(3, Keys(1)), IsEmpty());
  EXPECT_EQ(core_.PinSlots(3, slots).code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(core_.Commit(3, core_.Reserve(3, 1)->front(), Chain(0)).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(CoreTest, ReleasingWhatIsNotHeldIsAnErrorAndTheRestIsReleased) {
  const auto slots = core_.Reserve(1, 1);
  ASSERT_TRUE(slots.ok());
  EXPECT_EQ(core_.Release(1, {SlotId{3, 1}, slots->front()}).code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(core_.stats().free, 4u);
  EXPECT_EQ(core_.Release(1, *slots).code(), absl::StatusCode::kNotFound);
}

TEST_F(CoreTest, OnlyTheOwnerCommitsAndOnlyOnce) {
  const auto slots = core_.Reserve(1, 1);
  ASSERT_TRUE(slots.ok());
  EXPECT_FALSE(core_.Commit(2, slots->front(), Chain(0)).ok());
  ASSERT_TRUE(core_.Commit(1, slots->front(), Chain(0)).ok());
  EXPECT_FALSE(core_.Commit(1, slots->front(), Chain(1)).ok());
}

TEST_F(CoreTest, TellsEveryChangeOfTheIndexInOrder) {
  Put(2);
  BlockChanges changes = core_.TakeChanges();
  EXPECT_EQ(changes.first_seq, 1u);
  ASSERT_THAT(changes.changes, SizeIs(2));
  EXPECT_FALSE(changes.changes[0].removed);
  ASSERT_TRUE(core_.Reserve(1, 3).ok());
  changes = core_.TakeChanges();
  EXPECT_EQ(changes.first_seq, 3u);
  ASSERT_THAT(changes.changes, SizeIs(1));
  EXPECT_TRUE(changes.changes[0].removed);
  EXPECT_EQ(changes.changes[0].block.name.key, Key(101));
  EXPECT_THAT(core_.Snapshot(), SizeIs(1));
}

// Random operations against what the header promises, kept in plain maps.
class Model {
 public:
  std::map<std::pair<ClientId, uint32_t>, int> pins, reserved;  // (client, slot)

  void Check(const StoreCore& core) {
    uint64_t total = 0;
    std::set<uint32_t> pinned;
    for (const auto& [at, n] : pins) {
      total += static_cast<uint64_t>(n);
      if (n > 0) pinned.insert(at.second);
    }
    size_t writers = 0;
    for (const auto& [at, n] : reserved) writers += static_cast<size_t>(n);
    const CoreStats stats = core.stats();
    EXPECT_EQ(stats.pins, total);
    EXPECT_EQ(stats.pinned, pinned.size());
    EXPECT_EQ(stats.reserved, writers);
  }
};

TEST(CorePropertyTest, RandomOperationsKeepTheInvariants) {
  constexpr uint32_t kSlots = 24;
  constexpr int kClients = 4;
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    SCOPED_TRACE(seed);
    uint64_t at = 0;
    const auto random = [&](uint32_t below) {
      return static_cast<uint32_t>(PhiloxUniform(seed, at++) * below);
    };
    StoreCore core(kSlots);
    Model model;
    std::vector<uint64_t> last_generation(kSlots, 0);
    std::map<BlockName, bool> indexed;  // rebuilt from the changes
    std::map<ClientId, std::vector<SlotId>> held;
    for (ClientId c = 1; c <= kClients; ++c) core.AddClient(c, kPrint);
    for (int step = 0; step < 2000; ++step) {
      const ClientId c = 1 + random(kClients);
      auto& mine = held[c];
      switch (random(7)) {
        case 0: {
          const auto slots = core.Reserve(c, random(6));
          if (!slots.ok()) break;
          for (const SlotId& s : *slots) {
            EXPECT_GT(s.generation, last_generation[s.slot]) << "a generation came twice";
            last_generation[s.slot] = s.generation;
            for (const auto& [who, n] : model.pins) EXPECT_FALSE(who.second == s.slot && n > 0);
            ++model.reserved[{c, s.slot}];
            mine.push_back(s);
          }
          break;
        }
        case 1: {
          const auto base = static_cast<uint16_t>(1000 * random(3));
          std::vector<BlockKey> keys;
          for (uint16_t i = 0; i < 6; ++i) keys.push_back(Chain(i, base).name.key);
          for (const SlotId& s : core.PinPrefix(c, keys)) {
            ++model.pins[{c, s.slot}];
            mine.push_back(s);
          }
          break;
        }
        case 2: {
          if (mine.empty()) break;
          const ClientId other = 1 + random(kClients);
          const SlotId s = mine[random(static_cast<uint32_t>(mine.size()))];
          ASSERT_TRUE(core.PinSlots(other, {s}).ok());
          ++model.pins[{other, s.slot}];
          held[other].push_back(s);
          break;
        }
        case 3: {
          if (mine.empty()) break;
          const SlotId s = mine[random(static_cast<uint32_t>(mine.size()))];
          const bool may = core.MayWrite(c, s);
          EXPECT_EQ(may, (model.reserved[{c, s.slot}] == 1));
          const auto done = core.Commit(
              c, s,
              Chain(static_cast<uint16_t>(random(6)), static_cast<uint16_t>(1000 * random(3))));
          EXPECT_EQ(done.ok(), may);
          if (!may) break;
          --model.reserved[{c, s.slot}];
          ++model.pins[{c, s.slot}];
          break;
        }
        case 4:
        case 5: {
          if (mine.empty()) break;
          const uint32_t i = random(static_cast<uint32_t>(mine.size()));
          const SlotId s = mine[i];
          ASSERT_TRUE(core.Release(c, {s}).ok());
          auto& pins = model.pins[{c, s.slot}];
          if (pins > 0) {
            --pins;
          } else {
            --model.reserved[{c, s.slot}];
          }
          mine.erase(mine.begin() + i);
          break;
        }
        case 6: {
          if (random(20) != 0) break;
          core.RemoveClient(c);
          core.AddClient(c, kPrint);
          mine.clear();
          for (auto& [who, n] : model.pins) {
            if (who.first == c) n = 0;
          }
          for (auto& [who, n] : model.reserved) {
            if (who.first == c) n = 0;
          }
          break;
        }
      }
      const absl::Status status = core.CheckInvariants();
      ASSERT_TRUE(status.ok()) << status << " after step " << step;
      model.Check(core);
      for (const BlockChange& change : core.TakeChanges().changes) {
        EXPECT_EQ(indexed[change.block.name], change.removed);
        indexed[change.block.name] = !change.removed;
      }
      ASSERT_FALSE(::testing::Test::HasFailure()) << "after step " << step;
    }
    for (ClientId c = 1; c <= kClients; ++c) core.RemoveClient(c);
    EXPECT_EQ(core.stats().pins + core.stats().reserved + core.stats().retired, 0u);
    EXPECT_EQ(core.stats().free + core.stats().committed, kSlots);
    // Whatever was cached can all be evicted again.
    core.AddClient(9, kPrint);
    EXPECT_TRUE(core.Reserve(9, kSlots).ok());
  }
}

}  // namespace
}  // namespace antiphon::kvstore
