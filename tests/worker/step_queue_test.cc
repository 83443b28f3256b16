#include "worker/step_queue.h"

#include <gtest/gtest.h>

#include <vector>

namespace antiphon::worker {
namespace {

TEST(StepQueueTest, RunSaysWhetherAnythingWasDue) {
  StepQueue queue(&Clock::Real());
  std::vector<int> ran;
  EXPECT_FALSE(queue.Run(absl::ZeroDuration()));
  queue.Post([&] { ran.push_back(1); });
  queue.Post([&] { ran.push_back(2); });
  EXPECT_TRUE(queue.Run(absl::ZeroDuration()));
  EXPECT_EQ(ran, (std::vector<int>{1, 2}));
  EXPECT_FALSE(queue.Run(absl::Milliseconds(1)));
  queue.PostAfter(absl::Milliseconds(1), [&] { ran.push_back(3); });
  EXPECT_TRUE(queue.Run(absl::Seconds(60)));
  EXPECT_EQ(ran.back(), 3);
}

TEST(StepQueueTest, WhateverIsPostedInterrupts) {
  StepQueue queue(&Clock::Real());
  int interrupts = 0;
  queue.Post([] {});
  queue.SetInterrupt([&] { ++interrupts; });
  queue.Post([] {});
  queue.Post([] {});
  EXPECT_EQ(interrupts, 2);
  // Who waits elsewhere has to wait for less.
  EXPECT_EQ(queue.next_timer(), absl::InfiniteFuture());
  queue.PostAfter(absl::Seconds(60), [] {});
  EXPECT_EQ(interrupts, 3);
  EXPECT_LT(queue.next_timer(), Clock::Real().Now() + absl::Seconds(61));
  queue.Close();
  queue.Post([] {});
  EXPECT_EQ(interrupts, 3);
}

}  // namespace
}  // namespace antiphon::worker
