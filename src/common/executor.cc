#include "common/executor.h"

#include <algorithm>
#include <deque>
#include <map>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "common/clock.h"
#include "common/thread.h"

namespace antiphon {

struct SerialExecutor::State {
  absl::Mutex mu;
  std::deque<Closure> ready ABSL_GUARDED_BY(mu);
  std::map<std::pair<absl::Time, TimerId>, Closure> timers ABSL_GUARDED_BY(mu);
  std::map<TimerId, absl::Time> due ABSL_GUARDED_BY(mu);
  TimerId next_timer ABSL_GUARDED_BY(mu) = 1;
  bool stopping ABSL_GUARDED_BY(mu) = false;
  std::thread::id thread_id;
  absl::CondVar wake;
  Thread thread;

  void Run();
};

void SerialExecutor::State::Run() {
  thread_id = std::this_thread::get_id();
  std::deque<Closure> batch;
  while (true) {
    {
      absl::MutexLock lock(&mu);
      while (true) {
        const absl::Time now = Clock::Real().Now();
        while (!timers.empty() && timers.begin()->first.first <= now) {
          due.erase(timers.begin()->first.second);
          ready.push_back(std::move(timers.begin()->second));
          timers.erase(timers.begin());
        }
        if (!ready.empty() || stopping) break;
        if (timers.empty()) {
          wake.Wait(&mu);
        } else {
          wake.WaitWithTimeout(&mu, timers.begin()->first.first - now);
        }
      }
      if (ready.empty()) return;  // stopping, and all that was posted has run
      batch.swap(ready);
    }
    for (Closure& closure : batch) {
      closure();
      closure = nullptr;  // what it owns goes before the next one runs
    }
    batch.clear();
  }
}

SerialExecutor::SerialExecutor(std::string name) : state_(std::make_unique<State>()) {
  state_->thread = Thread(std::move(name), [state = state_.get()] { state->Run(); });
}

SerialExecutor::~SerialExecutor() { Shutdown(); }

void SerialExecutor::Post(Closure closure) {
  absl::MutexLock lock(&state_->mu);
  if (state_->stopping) return;
  state_->ready.push_back(std::move(closure));
  state_->wake.Signal();
}

Executor::TimerId SerialExecutor::PostAfter(absl::Duration delay, Closure closure) {
  const absl::Time at = Clock::Real().Now() + delay;
  absl::MutexLock lock(&state_->mu);
  const TimerId id = state_->next_timer++;
  if (state_->stopping) return id;
  state_->timers.emplace(std::pair(at, id), std::move(closure));
  state_->due.emplace(id, at);
  state_->wake.Signal();
  return id;
}

void SerialExecutor::CancelTimer(TimerId id) {
  Closure dead;  // destroyed outside the lock
  absl::MutexLock lock(&state_->mu);
  auto it = state_->due.find(id);
  if (it == state_->due.end()) return;
  auto timer = state_->timers.find({it->second, id});
  dead = std::move(timer->second);
  state_->timers.erase(timer);
  state_->due.erase(it);
}

void SerialExecutor::Shutdown() {
  {
    absl::MutexLock lock(&state_->mu);
    state_->stopping = true;
    state_->timers.clear();
    state_->due.clear();
    state_->wake.Signal();
  }
  state_->thread.Join();
}

bool SerialExecutor::OnThisThread() const {
  return std::this_thread::get_id() == state_->thread_id;
}

}  // namespace antiphon
