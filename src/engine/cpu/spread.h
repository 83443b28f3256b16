// Keeps the threads of a team on cores of their own.
//
// Threads that meet at barriers and sleep there look to the kernel like one thread that is always
// running, so it leaves two of them on one core beside an idle one for tens of milliseconds: who
// wakes them holds a core just then, and both are put on the other. They see it themselves.
#ifndef ANTIPHON_ENGINE_CPU_SPREAD_H_
#define ANTIPHON_ENGINE_CPU_SPREAD_H_

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <vector>

namespace antiphon::engine::cpu {

// The next allowed core after `own`, in a circle, that is not taken; -1: there is none.
int FreeCore(int own, const cpu_set_t& taken, const cpu_set_t& allowed);

class Spread {
 public:
  explicit Spread(int threads) : cores_(static_cast<size_t>(threads)) {}

  // By each thread now and then, for the others to see: the core that it runs on.
  void Note(int thread);
  // By a thread that is about to wait: if another was last seen on its core, moves to one where
  // none was, of those that the thread may use. Takes some 50 us then. The kernel may move it again
  // at any time. True: it has moved.
  bool LeaveSharedCore(int thread);

 private:
  struct Core {
    std::atomic<int16_t> number{-1};  // -1: not known
  };
  std::vector<Core> cores_;  // side by side: written only when one changes
};

}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_SPREAD_H_
