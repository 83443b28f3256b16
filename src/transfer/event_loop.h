// An epoll loop on a thread of its own: the home of sockets. What is not marked thread-safe is
// called on the loop's thread only.
#ifndef ANTIPHON_TRANSFER_EVENT_LOOP_H_
#define ANTIPHON_TRANSFER_EVENT_LOOP_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/functional/any_invocable.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "common/clock.h"
#include "common/executor.h"
#include "common/thread.h"

namespace antiphon::transfer {

class EventLoop {
 public:
  using WatchId = uint64_t;  // never 0
  using TimerId = uint64_t;  // never 0
  using Handler = absl::AnyInvocable<void(uint32_t epoll_events)>;

  EventLoop(std::string thread_name, const Clock& clock);
  ~EventLoop();  // Stop()

  // Thread-safe. Dropped unrun once Stop has run what was posted before it.
  void Post(Closure closure);
  // Thread-safe. Runs what was posted already, then ends the thread. Not from the loop's thread.
  void Stop();

  // Level-triggered. 0 when the kernel refuses the descriptor (errno says why). The loop does not
  // own `fd`; unwatch before closing it. A handler may unwatch itself.
  WatchId Watch(int fd, uint32_t events, Handler handler);
  void Modify(WatchId id, uint32_t events);
  // The handler runs no more, not even for events found already.
  void Unwatch(WatchId id);

  TimerId AddTimer(absl::Time at, Closure closure);
  void CancelTimer(TimerId id);
  absl::Time Now() const { return clock_.Now(); }

 private:
  struct Watched {
    int fd = -1;
    uint32_t events = 0;
    std::shared_ptr<Handler> handler;
  };
  void Run();
  bool RunPosted();  // false: stopping and nothing left
  int RunTimers();   // milliseconds to the next, -1: none

  const Clock& clock_;
  int epoll_fd_ = -1;
  int wake_fd_ = -1;
  absl::flat_hash_map<WatchId, Watched> watched_;
  std::map<std::pair<absl::Time, TimerId>, Closure> timers_;
  absl::flat_hash_map<TimerId, absl::Time> due_;
  uint64_t next_id_ = 1;

  absl::Mutex mu_;
  std::vector<Closure> posted_ ABSL_GUARDED_BY(mu_);
  bool woken_ ABSL_GUARDED_BY(mu_) = false;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
  Thread thread_;
};

}  // namespace antiphon::transfer

#endif  // ANTIPHON_TRANSFER_EVENT_LOOP_H_
