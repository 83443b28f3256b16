// The step loop's inbox: an executor whose closures run on the loop's own thread, between two looks
// at the engine.
#ifndef ANTIPHON_WORKER_STEP_QUEUE_H_
#define ANTIPHON_WORKER_STEP_QUEUE_H_

#include <deque>
#include <functional>
#include <map>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "common/clock.h"
#include "common/executor.h"

namespace antiphon::worker {

// Thread-safe but for Run. Its depth is bounded by its posters: a stream's next message is read
// when the last one was handled.
class StepQueue final : public Executor {
 public:
  explicit StepQueue(const Clock* clock) : clock_(clock) {}

  void Post(Closure closure) override;
  TimerId PostAfter(absl::Duration delay, Closure closure) override;
  void CancelTimer(TimerId id) override;

  // Runs what is due; when nothing is, waits for it, at most `wait`. False: nothing was. The loop's
  // thread only.
  bool Run(absl::Duration wait);
  // Infinite future: none is set.
  absl::Time next_timer() const;
  // Called, on any thread and with the queue locked, whenever something is posted: for a loop that
  // may be waiting elsewhere.
  void SetInterrupt(std::function<void()> interrupt);
  // Drops what was not run and whatever comes later.
  void Close();

 private:
  void TakeDue(absl::Time now, std::deque<Closure>& due) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Clock* clock_;
  mutable absl::Mutex mu_;
  absl::CondVar posted_;
  std::function<void()> interrupt_ ABSL_GUARDED_BY(mu_);
  std::deque<Closure> ready_ ABSL_GUARDED_BY(mu_);
  std::map<std::pair<absl::Time, TimerId>, Closure> timers_ ABSL_GUARDED_BY(mu_);
  TimerId next_timer_ ABSL_GUARDED_BY(mu_) = 1;
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace antiphon::worker

#endif  // ANTIPHON_WORKER_STEP_QUEUE_H_
