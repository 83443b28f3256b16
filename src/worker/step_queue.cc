#include "worker/step_queue.h"

#include <algorithm>

namespace antiphon::worker {

void StepQueue::Post(Closure closure) {
  absl::MutexLock lock(&mu_);
  if (closed_) return;
  ready_.push_back(std::move(closure));
  posted_.Signal();
  if (interrupt_) interrupt_();
}

void StepQueue::SetInterrupt(std::function<void()> interrupt) {
  absl::MutexLock lock(&mu_);
  interrupt_ = std::move(interrupt);
}

Executor::TimerId StepQueue::PostAfter(absl::Duration delay, Closure closure) {
  const absl::Time at = clock_->Now() + delay;
  absl::MutexLock lock(&mu_);
  const TimerId id = next_timer_++;
  if (closed_) return id;
  timers_.emplace(std::pair(at, id), std::move(closure));
  posted_.Signal();
  if (interrupt_) interrupt_();
  return id;
}

void StepQueue::CancelTimer(TimerId id) {
  Closure dead;  // destroyed outside the lock
  absl::MutexLock lock(&mu_);
  auto it = std::find_if(timers_.begin(), timers_.end(),
                         [id](const auto& timer) { return timer.first.second == id; });
  if (it == timers_.end()) return;
  dead = std::move(it->second);
  timers_.erase(it);
}

void StepQueue::TakeDue(absl::Time now, std::deque<Closure>& due) {
  due.swap(ready_);
  while (!timers_.empty() && timers_.begin()->first.first <= now) {
    due.push_back(std::move(timers_.begin()->second));
    timers_.erase(timers_.begin());
  }
}

bool StepQueue::Run(absl::Duration wait) {
  std::deque<Closure> due;
  {
    absl::MutexLock lock(&mu_);
    absl::Time now = clock_->Now();
    TakeDue(now, due);
    if (due.empty() && wait > absl::ZeroDuration() && !closed_) {
      if (!timers_.empty()) wait = std::min(wait, timers_.begin()->first.first - now);
      posted_.WaitWithTimeout(&mu_, wait);
      TakeDue(clock_->Now(), due);
    }
  }
  for (Closure& closure : due) {
    closure();
    closure = nullptr;  // what it owns goes before the next one runs
  }
  return !due.empty();
}

absl::Time StepQueue::next_timer() const {
  absl::MutexLock lock(&mu_);
  return timers_.empty() ? absl::InfiniteFuture() : timers_.begin()->first.first;
}

void StepQueue::Close() {
  std::deque<Closure> ready;
  std::map<std::pair<absl::Time, TimerId>, Closure> timers;
  absl::MutexLock lock(&mu_);
  closed_ = true;
  ready.swap(ready_);
  timers.swap(timers_);
  posted_.Signal();
}

}  // namespace antiphon::worker
