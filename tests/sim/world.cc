#include "tests/sim/world.h"

#include <algorithm>

#include "common/status_macros.h"

namespace antiphon::sim {

void World::At(absl::Duration delay, absl::AnyInvocable<void()> event) {
  heap_.push_back({now_ + std::max(delay, absl::ZeroDuration()), next_order_++, std::move(event)});
  std::push_heap(heap_.begin(), heap_.end(), Later());
}

bool World::Step(absl::Time limit) {
  if (heap_.empty() || heap_.front().at > limit) {
    now_ = std::max(now_, limit);
    return false;
  }
  std::pop_heap(heap_.begin(), heap_.end(), Later());
  Event event = std::move(heap_.back());
  heap_.pop_back();
  now_ = event.at;
  ++events;
  event.run();
  return true;
}

absl::Duration World::Latency() {
  absl::Duration d = faults.latency * (0.2 + 1.6 * Uniform());
  if (Chance(faults.late)) {
    d *= 1 + 99 * Uniform();
    ++counts["late messages"];
  }
  return d;
}

Process::Process(World* world, std::string name)
    : world_(world), name_(std::move(name)), born_(world->now()) {
  offset_ = absl::Seconds(3600) * world_->Uniform() * (world_->faults.skew > 0 ? 1 : 0);
  rate_ = 1 + world_->faults.skew * (2 * world_->Uniform() - 1);
}

Process::~Process() = default;

absl::Time Process::Now() const { return born_ + offset_ + (world_->now() - born_) * rate_; }

absl::Duration Process::Until(absl::Time t) const {
  const absl::Duration d = t - Now();
  return d <= absl::ZeroDuration() ? absl::ZeroDuration() : d / rate_ + absl::Microseconds(1);
}

void Process::After(absl::Duration delay, absl::AnyInvocable<void()> event) {
  world_->At(delay, [this, life = life(), event = std::move(event)]() mutable {
    if (!life.expired()) Run(std::move(event));
  });
}

void Process::Run(absl::AnyInvocable<void()> event) {
  if (held_.empty() && paused_until_ <= world_->now()) return event();
  held_.push_back(std::move(event));
  if (held_.size() == 1) ScheduleWake();
}

void Process::ScheduleWake() {
  const absl::Duration left = std::max(paused_until_ - world_->now(), absl::ZeroDuration());
  world_->At(left, [this, life = life(), wake = ++last_wake_] {
    // An earlier Resume has scheduled another.
    if (!life.expired() && wake == last_wake_) Wake();
  });
}

// What came during the pause runs in the order in which it came, across overlapping pauses too.
void Process::Wake() {
  const std::weak_ptr<char> alive = life();
  while (!held_.empty()) {
    if (paused_until_ > world_->now()) return ScheduleWake();
    absl::AnyInvocable<void()> event = std::move(held_.front());
    // Out of the queue only afterwards: what the event causes stands behind what is held.
    event();
    if (alive.expired()) return;
    held_.pop_front();
  }
}

void Process::Resume() {
  paused_until_ = absl::InfinitePast();
  if (!held_.empty()) ScheduleWake();
}

Executor::TimerId Process::PostAfter(absl::Duration delay, Closure closure) {
  const TimerId id = next_timer_++;
  timers_.emplace(id, std::move(closure));
  After(delay / rate_, [this, id] {
    auto it = timers_.find(id);
    if (it == timers_.end()) return;
    Closure closure = std::move(it->second);
    timers_.erase(it);
    closure();
  });
  return id;
}

std::shared_ptr<Pipe> Pipe::Open(Process& a, Process& b) {
  auto pipe = std::make_shared<Pipe>();
  pipe->world_ = &a.world();
  pipe->sides_[0] = {.process = &a, .life = a.life(), .last = a.world().now()};
  pipe->sides_[1] = {.process = &b, .life = b.life(), .last = a.world().now()};
  return pipe;
}

absl::Duration Pipe::NextDelay(int to) {
  Side& side = sides_[to];
  side.last = std::max(side.last + absl::Nanoseconds(1), world_->now() + world_->Latency());
  return side.last - world_->now();
}

void Pipe::Send(int from, absl::AnyInvocable<void()> deliver) {
  const int to = 1 - from;
  if (broken_ || !Alive(to)) return;
  const absl::Duration delay = NextDelay(to);
  sides_[to].process->After(
      delay, [self = shared_from_this(), to, deliver = std::move(deliver)]() mutable {
        // What was sent before an orderly close still arrives.
        if (self->broken_ && (self->lossy_ || !self->sides_[to].broken)) return;
        deliver();
      });
}

void Pipe::OnBroken(int side, absl::AnyInvocable<void()> broken) {
  sides_[side].broken = std::move(broken);
}

void Pipe::Close(int from) {
  if (broken_) return;
  sides_[from].broken = nullptr;
  Break();
  lossy_ = false;
}

void Pipe::Break() {
  if (broken_) return;
  broken_ = true;
  lossy_ = world_->Chance(0.5);
  for (int side : {0, 1}) {
    if (!Alive(side) || !sides_[side].broken) continue;
    const absl::Duration delay = NextDelay(side);
    sides_[side].process->After(delay, [self = shared_from_this(), side] {
      auto broken = std::move(self->sides_[side].broken);
      self->sides_[side].broken = nullptr;
      if (broken) broken();
    });
  }
}

}  // namespace antiphon::sim
