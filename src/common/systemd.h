// The service manager's notification protocol, sd_notify(3): one datagram to $NOTIFY_SOCKET. All of
// it does nothing when systemd did not start us.
#ifndef ANTIPHON_COMMON_SYSTEMD_H_
#define ANTIPHON_COMMON_SYSTEMD_H_

#include <string_view>

#include "absl/time/time.h"

namespace antiphon {

// `state` is lines of VARIABLE=value, e.g. "READY=1\nSTATUS=serving".
void NotifySystemd(std::string_view state);
// How often the watchdog wants to hear from this process; infinite when it does not.
absl::Duration SystemdWatchdogInterval();

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_SYSTEMD_H_
