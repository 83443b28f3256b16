#include "engine/cpu/team.h"

#include <sched.h>

#include <algorithm>
#include <cstdio>
#include <utility>

namespace antiphon::engine::cpu {
namespace {

// Some ten microseconds: longer than a balanced phase's spread, shorter than a scheduler's slice.
constexpr int kSpins = 200;

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

// The cgroup v2 CPU quota in whole cores, rounded up; 0 when there is none.
int CgroupQuotaCores() {
  std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r");
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
  if (const int quota = CgroupQuotaCores(); quota > 0) cores = std::min(cores, quota);
  return std::max(cores, 1);
}

Team::Team(int threads, const std::string& name, std::function<void(int)> round)
    : size_(std::max(threads, 1)), round_body_(std::move(round)) {
  threads_.reserve(static_cast<size_t>(size_));
  for (int i = 0; i < size_; ++i) {
    threads_.emplace_back(name + std::to_string(i), [this, i] { Work(i); });
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
  int seen = 0;
  while (true) {
    round_.wait(seen, std::memory_order_acquire);
    ++seen;
    if (stopping_.load(std::memory_order_relaxed)) return;
    round_body_(thread);
  }
}

void Team::Barrier() {
  if (size_ == 1) {
    next_.store(0, std::memory_order_relaxed);
    return;
  }
  const int phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    next_.store(0, std::memory_order_relaxed);
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    phase_.notify_all();
    return;
  }
  for (int i = 0; i < kSpins; ++i) {
    if (phase_.load(std::memory_order_acquire) != phase) return;
    Pause();
  }
  while (phase_.load(std::memory_order_acquire) == phase) {
    phase_.wait(phase, std::memory_order_acquire);
  }
}

}  // namespace antiphon::engine::cpu
