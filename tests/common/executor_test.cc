#include "common/executor.h"

#include <gtest/gtest.h>

#include <atomic>
#include <vector>

#include "absl/synchronization/notification.h"
#include "common/thread.h"

namespace antiphon {
namespace {

TEST(SerialExecutorTest, RunsClosuresInOrderAndNeverTwoAtOnce) {
  std::vector<int> order;
  std::atomic<int> inside{0};
  {
    SerialExecutor executor("test");
    for (int i = 0; i < 1000; ++i) {
      executor.Post([&, i] {
        EXPECT_EQ(inside.fetch_add(1), 0);
        order.push_back(i);
        inside.fetch_sub(1);
      });
    }
  }
  ASSERT_EQ(order.size(), 1000u);
  EXPECT_TRUE(std::is_sorted(order.begin(), order.end()));
}

TEST(SerialExecutorTest, ManyThreadsMayPost) {
  int count = 0;  // no atomic: closures never overlap
  {
    SerialExecutor executor("test");
    {
      std::vector<Thread> threads;
      for (int t = 0; t < 4; ++t) {
        threads.emplace_back("poster", [&] {
          for (int i = 0; i < 500; ++i) executor.Post([&count] { ++count; });
        });
      }
    }
  }
  EXPECT_EQ(count, 2000);
}

TEST(SerialExecutorTest, TimersRunByTheirTimeNotByTheirOrder) {
  SerialExecutor executor("test");
  std::vector<int> order;
  absl::Notification done;
  executor.PostAfter(absl::Milliseconds(30), [&] {
    order.push_back(2);
    done.Notify();
  });
  executor.PostAfter(absl::Milliseconds(1), [&] { order.push_back(1); });
  done.WaitForNotification();
  EXPECT_EQ(order, (std::vector<int>{1, 2}));
}

TEST(SerialExecutorTest, ACancelledTimerDoesNotRun) {
  SerialExecutor executor("test");
  bool ran = false;
  absl::Notification done;
  const auto id = executor.PostAfter(absl::Milliseconds(1), [&] { ran = true; });
  executor.CancelTimer(id);
  executor.CancelTimer(id);  // no effect
  executor.PostAfter(absl::Milliseconds(10), [&] { done.Notify(); });
  done.WaitForNotification();
  EXPECT_FALSE(ran);
}

TEST(SerialExecutorTest, ShutdownRunsWhatIsPostedAndDropsTheRest) {
  int ran = 0;
  SerialExecutor executor("test");
  executor.PostAfter(absl::Hours(1), [&] { ran += 100; });
  executor.Post([&] { ++ran; });
  executor.Shutdown();
  executor.Post([&] { ran += 100; });
  EXPECT_EQ(ran, 1);
}

TEST(SerialExecutorTest, AClosureMayPostAndKnowsItsThread) {
  SerialExecutor executor("test");
  absl::Notification done;
  EXPECT_FALSE(executor.OnThisThread());
  executor.Post([&] {
    EXPECT_TRUE(executor.OnThisThread());
    executor.Post([&] { done.Notify(); });
  });
  done.WaitForNotification();
}

}  // namespace
}  // namespace antiphon
