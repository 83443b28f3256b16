// When a dead child is started again, and when the cluster gives up.
#ifndef ANTIPHON_CLI_UP_RESTART_POLICY_H_
#define ANTIPHON_CLI_UP_RESTART_POLICY_H_

#include <algorithm>
#include <deque>
#include <optional>

#include "absl/time/time.h"

namespace antiphon::cli {

// Of one child. Not thread-safe.
class RestartPolicy {
 public:
  static constexpr int kDeathsMax = 5;
  static constexpr absl::Duration kWindow = absl::Seconds(60);

  // The child died: how long to wait before its successor starts, nothing when it died too often.
  std::optional<absl::Duration> OnDeath(absl::Time now) {
    deaths_.push_back(now);
    while (now - deaths_.front() > kWindow) deaths_.pop_front();
    if (static_cast<int>(deaths_.size()) >= kDeathsMax) return std::nullopt;
    // A single death costs a tenth of a second; a child that cannot live is not started in a loop.
    return absl::Milliseconds(100) * (1 << (2 * (deaths_.size() - 1)));
  }

 private:
  std::deque<absl::Time> deaths_;
};

}  // namespace antiphon::cli

#endif  // ANTIPHON_CLI_UP_RESTART_POLICY_H_
