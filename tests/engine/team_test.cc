#include "engine/cpu/team.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "absl/synchronization/blocking_counter.h"

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

}  // namespace
}  // namespace antiphon::engine::cpu
