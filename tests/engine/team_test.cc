#include "engine/cpu/team.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <barrier>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/blocking_counter.h"
#include "engine/cpu/look_ahead.h"
#include "engine/cpu/shares.h"
#include "engine/cpu/spread.h"

namespace antiphon::engine::cpu {
namespace {

class QuotaTest : public testing::Test {
 protected:
  void SetUp() override {
    root_ = testing::TempDir() + "cgroup-" + std::to_string(getpid());
    std::filesystem::create_directories(root_ + "/machine.slice/pod/worker");
  }
  void TearDown() override { std::filesystem::remove_all(root_); }
  void Write(const std::string& file, const std::string& text) const {
    std::ofstream(root_ + file) << text;
  }
  int Quota() const { return QuotaCores(root_ + "/cgroups", root_); }
  std::string root_;
};

TEST_F(QuotaTest, TheSmallestFromTheProcessUpCounts) {
  Write("/cgroups", "0::/machine.slice/pod/worker\n");
  EXPECT_EQ(Quota(), 0) << "no quota anywhere";
  Write("/machine.slice/pod/worker/cpu.max", "max 100000\n");
  EXPECT_EQ(Quota(), 0);
  Write("/machine.slice/pod/cpu.max", "250000 100000\n");
  EXPECT_EQ(Quota(), 3) << "rounded up";
  Write("/machine.slice/cpu.max", "100000 100000\n");
  EXPECT_EQ(Quota(), 1);
  Write("/machine.slice/pod/worker/cpu.max", "800000 100000\n");
  EXPECT_EQ(Quota(), 1);
}

TEST_F(QuotaTest, AContainerSeesItsOwnAsTheRoot) {
  Write("/cgroups", "12:pids:/x\n0::/\n");
  Write("/cpu.max", "150000 100000\n");
  EXPECT_EQ(Quota(), 2);
}

TEST_F(QuotaTest, WhatCannotBeReadIsNoQuota) {
  Write("/cpu.max", "nonsense");
  EXPECT_EQ(Quota(), 0) << "no cgroups file";
  Write("/cgroups", "");
  EXPECT_EQ(Quota(), 0);
  Write("/cpu.max", "0 0");
  EXPECT_EQ(Quota(), 0);
}

TEST(TeamTest, EveryPieceIsDoneOnceAndThreadsStandBack) {
  std::vector<std::atomic<int>> done(1000);
  std::atomic<int> nice_sum{0};
  absl::BlockingCounter ended(3);
  Team* self = nullptr;
  Team team(3, "test", 7, [&](int thread) {
    nice_sum += getpriority(PRIO_PROCESS, static_cast<id_t>(gettid()));
    self->ForEach(1000, 7, [&](int begin, int end) {
      for (int i = begin; i < end; ++i) ++done[static_cast<size_t>(i)];
    });
    ended.DecrementCount();
  });
  self = &team;
  team.StartRound();
  ended.Wait();
  for (const auto& d : done) EXPECT_EQ(d, 1);
  EXPECT_EQ(nice_sum, 3 * 7);
  EXPECT_EQ(getpriority(PRIO_PROCESS, 0), 0) << "only the team's threads";
}

// Threads as slow as they like: each use hands out every item once.
TEST(SharesTest, EveryItemIsHandedOutOnce) {
  constexpr int kThreads = 4, kUses = 400;
  Shares shares(kThreads);
  std::vector<std::vector<std::atomic<int>>> taken;
  for (int use = 0; use < kUses; ++use) taken.emplace_back(static_cast<size_t>(use * 7 % 97));
  std::barrier all(kThreads);
  const auto work = [&](int thread) {
    std::mt19937 random(static_cast<unsigned>(thread));
    for (int use = 0; use < kUses; ++use) {
      auto& items = taken[static_cast<size_t>(use)];
      if (random() % 4 == 0) std::this_thread::yield();
      shares.Begin(thread, static_cast<int>(items.size()));
      for (Shares::Range r; !(r = shares.Next(thread, 1 + use % 5)).empty();) {
        for (int i = r.begin; i < r.end; ++i) ++items[static_cast<size_t>(i)];
        if (random() % 8 == 0) std::this_thread::yield();
      }
      all.arrive_and_wait();
    }
  };
  {
    std::vector<std::jthread> threads;
    for (int i = 0; i < kThreads; ++i) threads.emplace_back(work, i);
  }
  for (const auto& items : taken) {
    for (const auto& count : items) ASSERT_EQ(count, 1);
  }
}

TEST(SharesTest, AThreadReadsOnAndThenTakesTheRearOfWhatIsLeft) {
  Shares shares(2);
  const auto next = [&](int thread, int run) {
    const Shares::Range r = shares.Next(thread, run);
    return std::pair(r.begin, r.end);
  };
  using Pair = std::pair<int, int>;
  shares.Begin(0, 20);
  shares.Begin(1, 20);
  EXPECT_EQ(next(0, 4), Pair(0, 4));
  EXPECT_EQ(next(1, 4), Pair(10, 14));
  EXPECT_EQ(next(0, 4), Pair(4, 8));
  EXPECT_EQ(next(0, 4), Pair(8, 10)) << "the rest of its own";
  EXPECT_EQ(next(0, 4), Pair(17, 20)) << "half of the six that the other has left";
  EXPECT_EQ(next(1, 4), Pair(14, 17));
  EXPECT_TRUE(shares.Next(0, 4).empty());
  EXPECT_TRUE(shares.Next(1, 4).empty());
}

TEST(SharesTest, AThreadThatHasLostItsCoreHoldsUpNoItem) {
  Shares shares(3);
  for (int use = 0; use < 3; ++use) {
    shares.Begin(1, 30);  // alone: the others come when all is done
    std::vector<int> taken(30);
    for (Shares::Range r; !(r = shares.Next(1, 1)).empty();) {
      for (int i = r.begin; i < r.end; ++i) ++taken[static_cast<size_t>(i)];
    }
    EXPECT_EQ(taken, std::vector<int>(30, 1));
    for (int late : {0, 2}) {
      shares.Begin(late, 30);
      EXPECT_TRUE(shares.Next(late, 1).empty());
    }
  }
}

TEST(SharesTest, LessThanARunIsLeftToItsOwner) {
  Shares shares(2);
  shares.Begin(0, 6);
  shares.Begin(1, 6);
  EXPECT_EQ(shares.Next(1, 2).end, 5);
  EXPECT_EQ(shares.Next(0, 3).end, 3);
  EXPECT_TRUE(shares.Next(0, 2).empty()) << "one item is left, and it is the other's";
  EXPECT_EQ(shares.Next(1, 2).end, 6);
}

TEST(TeamTest, AWaitingThreadHasSomethingToDo) {
  std::atomic<int> idle_calls{0};
  std::atomic<bool> begun{false};
  std::vector<std::atomic<int>> done(64);
  absl::BlockingCounter ended(2);
  Team* self = nullptr;
  Team team(2, "test", 0, [&](int thread) {
    int left = 5;
    // Thread 0's first item takes until the other, which waits for its beginning, has run out of
    // idle work.
    self->ForRuns(
        thread, 64, 1,
        [&](int begin, int end) {
          for (int i = begin; i < end; ++i) ++done[static_cast<size_t>(i)];
          if (begin == 0) begun = true;
          while (begin == 0 && idle_calls < 5) std::this_thread::yield();
          while (!begun) std::this_thread::yield();
        },
        [&] {
          if (thread == 0 || left == 0) return false;
          --left;
          ++idle_calls;
          return true;
        });
    ended.DecrementCount();
  });
  self = &team;
  team.StartRound();
  ended.Wait();
  for (const auto& d : done) EXPECT_EQ(d, 1);
  EXPECT_EQ(idle_calls, 5);
}

cpu_set_t SetOf(std::initializer_list<size_t> cores) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const size_t core : cores) CPU_SET(core, &set);
  return set;
}

TEST(SpreadTest, TheNextFreeCoreIsTakenOfThoseAllowed) {
  EXPECT_EQ(FreeCore(0, SetOf({0}), SetOf({0, 1})), 1);
  EXPECT_EQ(FreeCore(1, SetOf({1}), SetOf({0, 1})), 0);
  EXPECT_EQ(FreeCore(0, SetOf({0, 1, 3}), SetOf({0, 1, 3, 5})), 5);
  EXPECT_EQ(FreeCore(5, SetOf({5, 7}), SetOf({2, 5, 7})), 2);
  EXPECT_EQ(FreeCore(0, SetOf({0, 1}), SetOf({0, 1})), -1);
  EXPECT_EQ(FreeCore(0, SetOf({0}), SetOf({0})), -1);
  EXPECT_EQ(FreeCore(1023, SetOf({1023}), SetOf({1022, 1023})), 1022);
}

// Puts the calling thread on a core; all that were allowed stay allowed.
class OnCore {
 public:
  OnCore() {
    EXPECT_EQ(sched_getaffinity(0, sizeof(allowed_), &allowed_), 0);
    while (core_ < CPU_SETSIZE && !CPU_ISSET(core_, &allowed_)) ++core_;
    const cpu_set_t only = SetOf({core_});
    EXPECT_EQ(sched_setaffinity(0, sizeof(only), &only), 0);
  }
  ~OnCore() { Free(); }
  void Free() const { EXPECT_EQ(sched_setaffinity(0, sizeof(allowed_), &allowed_), 0); }
  size_t core() const { return core_; }
  const cpu_set_t& allowed() const { return allowed_; }

 private:
  cpu_set_t allowed_;
  size_t core_ = 0;
};

TEST(SpreadTest, AThreadLeavesACoreThatItShares) {
  Spread spread(3);
  const OnCore on_core;
  if (CPU_COUNT(&on_core.allowed()) < 2) GTEST_SKIP() << "one core";
  EXPECT_FALSE(spread.LeaveSharedCore(1)) << "nobody has said where he is";
  spread.Note(0);
  EXPECT_FALSE(spread.LeaveSharedCore(0)) << "alone";
  spread.Note(1);
  EXPECT_FALSE(spread.LeaveSharedCore(1)) << "it may not go";
  on_core.Free();
  EXPECT_TRUE(spread.LeaveSharedCore(1));
  EXPECT_FALSE(spread.LeaveSharedCore(0)) << "the other is as good as gone";
  cpu_set_t now;
  ASSERT_EQ(sched_getaffinity(0, sizeof(now), &now), 0);
  EXPECT_TRUE(CPU_EQUAL(&now, &on_core.allowed())) << "and may go on to any";
}

TEST(TeamTest, AThreadThatWaitsLeavesACoreThatItShares) {
  std::vector<size_t> before(2), waiting(2);
  std::atomic<bool> seen{false}, one_core{false};
  absl::BlockingCounter ended(2);
  Team* self = nullptr;
  Team team(2, "test", 0, [&](int thread) {
    const OnCore on_core;
    one_core = CPU_COUNT(&on_core.allowed()) < 2;
    self->Barrier();  // both are there, and may not leave
    on_core.Free();
    before[static_cast<size_t>(thread)] = on_core.core();
    // Thread 0 sleeps: nothing but the team moves the other.
    while (thread == 0 && !seen) usleep(1000);
    self->Barrier([&] {
      if (!seen) waiting[1] = static_cast<size_t>(sched_getcpu());
      seen = true;
      return false;
    });
    ended.DecrementCount();
  });
  self = &team;
  team.StartRound();
  ended.Wait();
  if (one_core) GTEST_SKIP() << "one core";
  EXPECT_NE(waiting[1], before[1]);
}

TEST(LookAheadTest, FetchesInOrderAFewLinesAtATime) {
  alignas(64) std::byte memory[1024] = {};
  LookAhead ahead;
  EXPECT_FALSE(ahead.Fetch(4)) << "nothing was added";
  ahead.Add(memory, 256);
  ahead.Add(memory + 512, 128);
  EXPECT_EQ(ahead.bytes(), 384u);
  EXPECT_TRUE(ahead.Fetch(4));
  EXPECT_TRUE(ahead.Fetch(1)) << "the second range";
  EXPECT_TRUE(ahead.Fetch(4)) << "its last line";
  EXPECT_FALSE(ahead.Fetch(4));
  ahead.Add(memory, 64);
  EXPECT_TRUE(ahead.Fetch(4)) << "more may come";
  ahead.Clear();
  EXPECT_FALSE(ahead.Fetch(4));
  EXPECT_EQ(ahead.bytes(), 0u);
}

}  // namespace
}  // namespace antiphon::engine::cpu
