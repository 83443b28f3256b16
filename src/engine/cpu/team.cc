#include "engine/cpu/team.h"

#include <sched.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>

#include "engine/pause.h"

namespace antiphon::engine::cpu {
namespace {

// Three to ten microseconds, as long as the processor's pause is: longer than a balanced phase's
// spread, shorter than a scheduler's slice.
constexpr int kSpins = 200;

thread_local int thread_of_team = 0;

// Calls idle() until that returns false, spins for a little while, then sleeps. Whoever stores the
// value notifies.
template <typename T, typename Ready, typename Idle>
void AwaitValue(const std::atomic<T>& value, Ready ready, Idle idle) {
  for (int spins = 0; spins < kSpins;) {
    if (ready(value.load(std::memory_order_acquire))) return;
    if (idle()) continue;
    Pause();
    ++spins;
  }
  for (T seen; !ready(seen = value.load(std::memory_order_acquire));) {
    value.wait(seen, std::memory_order_acquire);
  }
}

// Of one cgroup folder; 0: none.
int QuotaOf(const std::string& folder) {
  std::FILE* file = std::fopen((folder + "/cpu.max").c_str(), "r");
  if (file == nullptr) return 0;
  long long quota = 0, period = 0;
  const int fields = std::fscanf(file, "%lld %lld", &quota, &period);
  std::fclose(file);
  if (fields != 2 || quota <= 0 || period <= 0) return 0;
  return static_cast<int>((quota + period - 1) / period);
}

}  // namespace

int GrantedCores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  int cores = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
  const int quota = QuotaCores("/proc/self/cgroup", "/sys/fs/cgroup");
  if (quota > 0) cores = std::min(cores, quota);
  return std::max(cores, 1);
}

int QuotaCores(const std::string& cgroups, const std::string& root) {
  std::string path;  // of the process, below the root; "" in a container that sees only its own
  if (std::FILE* file = std::fopen(cgroups.c_str(), "r"); file != nullptr) {
    char line[4096];
    while (std::fgets(line, sizeof(line), file) != nullptr) {
      if (std::strncmp(line, "0::/", 4) == 0) {
        path = std::string(line + 3, std::strcspn(line + 3, "\n"));
      }
    }
    std::fclose(file);
  }
  int least = 0;
  while (true) {
    const int quota = QuotaOf(root + path);
    if (quota > 0 && (least == 0 || quota < least)) least = quota;
    const size_t slash = path.rfind('/');
    if (slash == std::string::npos) return least;
    path.resize(slash);
  }
}

void AwaitAtLeast(const std::atomic<uint32_t>& value, uint32_t least) {
  AwaitValue(
      value, [least](uint32_t now) { return now >= least; }, [] { return false; });
}

Team::Team(int threads, const std::string& name, int nice, std::function<void(int)> round)
    : size_(std::max(threads, 1)), round_body_(std::move(round)), shares_(size_), spread_(size_) {
  threads_.reserve(static_cast<size_t>(size_));
  for (int i = 0; i < size_; ++i) {
    threads_.emplace_back(name + std::to_string(i), [this, i, nice] {
      if (nice > 0) SetThreadNice(nice);
      Work(i);
    });
  }
}

Team::~Team() {
  stopping_.store(true, std::memory_order_relaxed);
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  for (Thread& thread : threads_) thread.Join();
}

void Team::StartRound() {
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
}

void Team::Work(int thread) {
  thread_of_team = thread;
  int seen = 0;
  while (true) {
    round_.wait(seen, std::memory_order_acquire);
    ++seen;
    if (stopping_.load(std::memory_order_relaxed)) return;
    round_body_(thread);
  }
}

void Team::Barrier(absl::FunctionRef<bool()> idle) {
  if (size_ == 1) {
    next_.store(0, std::memory_order_relaxed);
    return;
  }
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  spread_.Note(thread_of_team);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    next_.store(0, std::memory_order_relaxed);
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    phase_.notify_all();
    return;
  }
  spread_.LeaveSharedCore(thread_of_team);
  AwaitValue(
      phase_, [phase](uint32_t now) { return now != phase; }, idle);
}

}  // namespace antiphon::engine::cpu
