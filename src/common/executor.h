// Serial executors: the home of every stateful object. Whoever wants something of the object posts
// a closure; closures of one executor never overlap, so the object needs no locks.
#ifndef ANTIPHON_COMMON_EXECUTOR_H_
#define ANTIPHON_COMMON_EXECUTOR_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/functional/any_invocable.h"
#include "absl/time/time.h"

namespace antiphon {

using Closure = absl::AnyInvocable<void()>;

// Thread-safe.
class Executor {
 public:
  using TimerId = uint64_t;  // never 0

  virtual ~Executor() = default;
  // Runs `closure` after all that was posted before it. Dropped unrun after Shutdown.
  virtual void Post(Closure closure) = 0;
  // Runs `closure` once, not before `delay` has passed.
  virtual TimerId PostAfter(absl::Duration delay, Closure closure) = 0;
  // The closure will not run; no effect when it ran already.
  virtual void CancelTimer(TimerId id) = 0;
};

// One thread of its own. Queue depth is the caller's to bound (services bound what they admit).
class SerialExecutor final : public Executor {
 public:
  explicit SerialExecutor(std::string name);
  ~SerialExecutor() override;  // Shutdown()

  void Post(Closure closure) override;
  TimerId PostAfter(absl::Duration delay, Closure closure) override;
  void CancelTimer(TimerId id) override;
  // Runs what is posted already, drops timers, joins. Not from its own thread.
  void Shutdown();
  bool OnThisThread() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_EXECUTOR_H_
