// Simulated time, processes and network. One thread; every choice comes from one seed, so a seed is
// one history.
//
// A process is killed by destroying it: what was scheduled for it is dropped. A paused process
// (SIGSTOP) runs nothing until it resumes; its memory can still be pulled, as a NIC would. Clocks
// of processes are skewed in offset and rate.
#ifndef ANTIPHON_TESTS_SIM_WORLD_H_
#define ANTIPHON_TESTS_SIM_WORLD_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/time/time.h"
#include "common/clock.h"
#include "common/executor.h"

namespace antiphon::sim {

// What goes wrong in one history, drawn from its seed.
struct Faults {
  absl::Duration latency = absl::Microseconds(200);  // mean, of every message
  double late = 0;                                   // a message takes up to 100 times as long
  double pull_lost = 0;  // of a pull: it ends UNAVAILABLE or at its deadline
  double pull_flip = 0;  // a byte arrives changed
  double pull_torn = 0;  // only a part arrives, and the end says OK
  double kills_per_s = 0;
  double pauses_per_s = 0;
  double breaks_per_s = 0;  // of streams
  double cancels = 0;       // of requests
  double handoffs = 0;  // of Ready messages: decode sleeps while prefill dies and its slots go on
  double skew = 0;      // clocks run up to this much faster or slower
  bool any = false;
};

class World {
 public:
  explicit World(uint64_t seed) : rng_(seed) {}

  absl::Time now() const { return now_; }
  void At(absl::Duration delay, absl::AnyInvocable<void()> event);
  // Runs the next event; false when there is none before `limit`.
  bool Step(absl::Time limit);

  uint64_t Below(uint64_t n) { return n == 0 ? 0 : rng_() % n; }
  double Uniform() { return static_cast<double>(rng_() >> 11) * 0x1.0p-53; }
  bool Chance(double p) { return p > 0 && Uniform() < p; }
  absl::Duration Latency();

  Faults faults;
  uint64_t events = 0;
  std::map<std::string, uint64_t> counts;  // what happened, by name
  std::vector<std::string> violations;     // of invariants; the history is bad when there is one

 private:
  struct Event {
    absl::Time at;
    uint64_t order;
    absl::AnyInvocable<void()> run;
  };
  struct Later {
    bool operator()(const Event& a, const Event& b) const {
      return std::pair(a.at, a.order) > std::pair(b.at, b.order);
    }
  };
  absl::Time now_ = absl::UnixEpoch() + absl::Hours(1);
  uint64_t next_order_ = 0;
  std::mt19937_64 rng_;
  std::vector<Event> heap_;
};

class Process : public Clock, public Executor {
 public:
  Process(World* world, std::string name);
  ~Process() override;

  const std::string& name() const { return name_; }
  World& world() const { return *world_; }

  // Runs `event` here unless the process is dead by then; when it is paused, after it resumes.
  void After(absl::Duration delay, absl::AnyInvocable<void()> event);
  void Pause(absl::Duration d) { paused_until_ = world_->now() + d; }
  void Resume();
  std::weak_ptr<char> life() const { return life_; }

  // Clock: this process's.
  absl::Time Now() const override;
  absl::Time WallNow() const override { return Now(); }
  // How long until the process's clock shows `t`.
  absl::Duration Until(absl::Time t) const;

  // Executor.
  void Post(Closure closure) override { After(absl::ZeroDuration(), std::move(closure)); }
  TimerId PostAfter(absl::Duration delay, Closure closure) override;
  void CancelTimer(TimerId id) override { timers_.erase(id); }

 private:
  void Run(absl::AnyInvocable<void()> event);
  void ScheduleWake();
  void Wake();

  World* world_;
  std::string name_;
  std::shared_ptr<char> life_ = std::make_shared<char>();
  absl::Time paused_until_ = absl::InfinitePast();
  std::deque<absl::AnyInvocable<void()>> held_;  // what came during the pause
  uint64_t last_wake_ = 0;
  absl::Duration offset_;
  double rate_ = 1;
  absl::Time born_;
  TimerId next_timer_ = 1;
  std::map<TimerId, Closure> timers_;
};

// A bidirectional stream between two processes. Each direction keeps its order; breaking it (or the
// death of a side) loses what is in flight, or not, and then tells both sides once.
class Pipe : public std::enable_shared_from_this<Pipe> {
 public:
  static std::shared_ptr<Pipe> Open(Process& a, Process& b);

  // `from`: 0 for a, 1 for b. Dropped when the pipe is broken.
  void Send(int from, absl::AnyInvocable<void()> deliver);
  // Runs once, at that side, when the pipe breaks.
  void OnBroken(int side, absl::AnyInvocable<void()> broken);
  // Side `from` closes: the other side hears of it as a break; `from` itself hears nothing.
  void Close(int from);
  void Break();
  bool broken() const { return broken_; }
  // Null when that side is dead.
  Process* at(int side) const { return Alive(side) ? sides_[side].process : nullptr; }
  bool Has(const Process& process) const {
    return sides_[0].process == &process || sides_[1].process == &process;
  }

 private:
  struct Side {
    Process* process = nullptr;
    std::weak_ptr<char> life;
    absl::Time last;  // delivery to this side
    absl::AnyInvocable<void()> broken;
  };
  bool Alive(int side) const { return !sides_[side].life.expired(); }
  absl::Duration NextDelay(int to);

  World* world_ = nullptr;
  Side sides_[2];
  bool broken_ = false;
  bool lossy_ = false;  // what was in flight at the break is lost
};

}  // namespace antiphon::sim

#endif  // ANTIPHON_TESTS_SIM_WORLD_H_
