// Threads that go through one round of work together, phase by phase.
//
// Between rounds the threads sleep. Inside a round they meet at barriers: a thread that arrives
// early spins for a few microseconds and then sleeps, so that a shared core is not burnt; one that
// shares its core with another of the team moves to a free one first.
#ifndef ANTIPHON_ENGINE_CPU_TEAM_H_
#define ANTIPHON_ENGINE_CPU_TEAM_H_

#include <atomic>
#include <functional>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "common/thread.h"
#include "engine/cpu/shares.h"
#include "engine/cpu/spread.h"

namespace antiphon::engine::cpu {

// Cores that the process may use: affinity and the quotas of its cgroup and those above. At
// least 1.
int GrantedCores();
// Whole cores, rounded up, of the smallest quota (cgroup v2) from the process's cgroup, as
// `cgroups` (/proc/self/cgroup) names it, up to `root`; 0: none.
int QuotaCores(const std::string& cgroups, const std::string& root);

// Until the value is at least `least`, as Team::Barrier waits; whoever stores it notifies.
void AwaitAtLeast(const std::atomic<uint32_t>& value, uint32_t least);

class Team {
 public:
  // Every round runs `round(thread)` once on each thread, 0 <= thread < threads. `nice`: of the
  // threads, as SetThreadNice.
  Team(int threads, const std::string& name, int nice, std::function<void(int)> round);
  // Joins the threads; a round in progress ends first.
  ~Team();

  int size() const { return size_; }

  // From outside the team, and only when the last round has ended (its body said so).
  void StartRound();

  // Inside a round, by every thread of the team alike: calls body(begin, end) for pieces of
  // [0, count) of at most `grain`, each on whichever thread is free, and returns when all are done.
  template <typename Body>
  void ForEach(int count, int grain, Body body) {
    while (true) {
      const int begin = next_.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= count) break;
      body(begin, begin + grain < count ? begin + grain : count);
    }
    Barrier();
  }
  // The same for work that reads through memory: each thread goes through its part (Shares::PartOf)
  // in pieces of at most `run`. A thread that waits for the others calls idle(), something short
  // and useful, until that returns false.
  template <typename Body, typename Idle>
  void ForRuns(int thread, int count, int run, Body body, Idle idle) {
    shares_.Begin(thread, count);
    for (Shares::Range piece; !(piece = shares_.Next(thread, run)).empty();) {
      body(piece.begin, piece.end);
    }
    Barrier(idle);
  }
  void Barrier() {
    Barrier([] { return false; });
  }
  void Barrier(absl::FunctionRef<bool()> idle);

 private:
  void Work(int thread);

  const int size_;
  const std::function<void(int)> round_body_;
  alignas(64) std::atomic<int> next_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};  // wraps after days
  alignas(64) std::atomic<int> round_{0};
  std::atomic<bool> stopping_{false};
  Shares shares_;
  Spread spread_;
  std::vector<Thread> threads_;
};

}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_TEAM_H_
