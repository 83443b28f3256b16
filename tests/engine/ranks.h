// Ranks for tests: as threads of this process, or as processes of their own.
#ifndef ANTIPHON_TESTS_ENGINE_RANKS_H_
#define ANTIPHON_TESTS_ENGINE_RANKS_H_

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <functional>
#include <vector>

#include "common/thread.h"

namespace antiphon::engine {

// body(rank) on a thread for each rank; returns when all have ended.
inline void RunThreads(int size, const std::function<void(int)>& body) {
  std::vector<Thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back("rank", [&body, rank] { body(rank); });
  }
}

// A child process that runs `body` and ends with code 0 if none of its expectations failed.
inline pid_t ForkRank(const std::function<void()>& body) {
  std::fflush(nullptr);
  const pid_t pid = fork();
  if (pid != 0) return pid;
  alarm(100);  // a hang is a failure here, not a process left behind
  body();
  std::fflush(nullptr);
  _exit(testing::Test::HasFailure() ? 1 : 0);
}

// The exit code, or 128 + the signal that ended it.
inline int WaitForRank(pid_t pid) {
  int status = 0;
  EXPECT_EQ(waitpid(pid, &status, 0), pid);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// body(rank) in a process for each rank.
inline void RunProcesses(int size, const std::function<void(int)>& body) {
  std::vector<pid_t> ranks;
  for (int rank = 0; rank < size; ++rank) {
    ranks.push_back(ForkRank([&body, rank] { body(rank); }));
  }
  for (int rank = 0; rank < size; ++rank) {
    EXPECT_EQ(WaitForRank(ranks[static_cast<size_t>(rank)]), 0) << "rank " << rank;
  }
}

}  // namespace antiphon::engine

#endif  // ANTIPHON_TESTS_ENGINE_RANKS_H_
