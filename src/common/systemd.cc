#include "common/systemd.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <string>

#include "common/daemon.h"

namespace antiphon {

void NotifySystemd(std::string_view state) {
  static const std::string path = Environment("NOTIFY_SOCKET", "");
  sockaddr_un address{};
  if (path.empty() || path.size() >= sizeof(address.sun_path)) return;
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.data(), path.size());
  if (path[0] == '@') address.sun_path[0] = 0;  // the abstract namespace
  const int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return;
  const auto size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + path.size());
  // Nothing can be done about a manager that does not listen.
  (void)sendto(fd, state.data(), state.size(), MSG_NOSIGNAL,
               reinterpret_cast<const sockaddr*>(&address), size);
  close(fd);
}

absl::Duration SystemdWatchdogInterval() {
  const std::string pid = Environment("WATCHDOG_PID", "");
  if (!pid.empty() && std::atoll(pid.c_str()) != getpid()) return absl::InfiniteDuration();
  const long long us = std::atoll(Environment("WATCHDOG_USEC", "0").c_str());
  return us > 0 ? absl::Microseconds(us) : absl::InfiniteDuration();
}

}  // namespace antiphon
