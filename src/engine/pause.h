#ifndef ANTIPHON_ENGINE_PAUSE_H_
#define ANTIPHON_ENGINE_PAUSE_H_

#include <atomic>

namespace antiphon::engine {

// Some tens of nanoseconds in which the core does little.
inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

}  // namespace antiphon::engine

#endif  // ANTIPHON_ENGINE_PAUSE_H_
