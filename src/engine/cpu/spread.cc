#include "engine/cpu/spread.h"

namespace antiphon::engine::cpu {

int FreeCore(int own, const cpu_set_t& taken, const cpu_set_t& allowed) {
  for (int i = 1; i < CPU_SETSIZE; ++i) {
    const auto core = static_cast<size_t>((own + i) % CPU_SETSIZE);
    if (CPU_ISSET(core, &allowed) && !CPU_ISSET(core, &taken)) return static_cast<int>(core);
  }
  return -1;
}

void Spread::Note(int thread) {
  const int core = sched_getcpu();
  std::atomic<int16_t>& number = cores_[static_cast<size_t>(thread)].number;
  const auto known = static_cast<int16_t>(core < CPU_SETSIZE ? core : -1);
  if (number.load(std::memory_order_relaxed) != known) {
    number.store(known, std::memory_order_relaxed);
  }
}

bool Spread::LeaveSharedCore(int thread) {
  Core& own = cores_[static_cast<size_t>(thread)];
  const int core = own.number.load(std::memory_order_relaxed);
  if (core < 0) return false;
  cpu_set_t taken, allowed;
  CPU_ZERO(&taken);
  bool shared = false;
  for (const Core& other : cores_) {
    const int number = other.number.load(std::memory_order_relaxed);
    if (&other != &own && number == core) shared = true;
    if (number >= 0) CPU_SET(static_cast<size_t>(number), &taken);
  }
  if (!shared || sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return false;
  const int free = FreeCore(core, taken, allowed);
  if (free < 0) return false;
  cpu_set_t only;
  CPU_ZERO(&only);
  CPU_SET(static_cast<size_t>(free), &only);
  // Said before it is so, or the other one leaves as well.
  own.number.store(static_cast<int16_t>(free), std::memory_order_relaxed);
  const bool moved = sched_setaffinity(0, sizeof(only), &only) == 0;
  sched_setaffinity(0, sizeof(allowed), &allowed);
  return moved;
}

}  // namespace antiphon::engine::cpu
