// Time as a dependency. Decision code takes `now` as an argument; shells take a Clock.
#ifndef ANTIPHON_COMMON_CLOCK_H_
#define ANTIPHON_COMMON_CLOCK_H_

#include "absl/time/time.h"

namespace antiphon {

// Thread-safe.
class Clock {
 public:
  virtual ~Clock() = default;
  // Never goes back, does not follow changes of the wall clock. Only differences mean anything.
  virtual absl::Time Now() const = 0;
  // For what people read (`created`, logs).
  virtual absl::Time WallNow() const = 0;

  static Clock& Real();
};

// Moves only when told.
class FakeClock final : public Clock {
 public:
  absl::Time Now() const override { return now_; }
  absl::Time WallNow() const override { return now_; }
  void Advance(absl::Duration d) { now_ += d; }
  void Set(absl::Time t) { now_ = t; }

 private:
  absl::Time now_ = absl::UnixEpoch();
};

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_CLOCK_H_
