#include "kvstore/client/connection.h"

#include <poll.h>
#include <spdlog/fmt/fmt.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "antiphon/v1/store.pb.h"
#include "common/clock.h"
#include "common/fd_passing.h"
#include "common/status_macros.h"

namespace antiphon::kvstore {
namespace {

absl::Status WaitFor(int fd, short events, absl::Time deadline) {
  while (true) {
    const int64_t left = absl::ToInt64Milliseconds(deadline - Clock::Real().Now());
    if (left <= 0) return absl::UnavailableError("the store did not answer in time");
    pollfd p{.fd = fd, .events = events, .revents = 0};
    const int n = poll(&p, 1, static_cast<int>(left));
    if (n > 0) return absl::OkStatus();
    if (n < 0 && errno != EINTR) return absl::UnavailableError(std::strerror(errno));
  }
}

}  // namespace

Fd::Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}

Fd& Fd::operator=(Fd&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

Fd::~Fd() {
  if (fd_ >= 0) close(fd_);
}

absl::Status SendAll(int socket, std::string_view bytes, int passed, absl::Time deadline) {
  while (!bytes.empty()) {
    const ssize_t n = SendWithFd(socket, bytes, passed);
    if (n > 0) {
      bytes.remove_prefix(static_cast<size_t>(n));
      passed = -1;
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      RETURN_IF_ERROR(WaitFor(socket, POLLOUT, deadline));
    } else {
      return absl::UnavailableError(fmt::format("send: {}", std::strerror(errno)));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<Fd> ConnectToStore(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(address.sun_path)) {
    return absl::InvalidArgumentError(
        fmt::format("socket path '{}' has {} bytes; it has 1 to {}; set a shorter "
                    "cluster.runtime_dir",
                    path, path.size(), sizeof(address.sun_path) - 1));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  Fd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (fd.get() < 0) return absl::UnavailableError(fmt::format("socket: {}", std::strerror(errno)));
  if (connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    return absl::UnavailableError(fmt::format("no store at {}: {}", path, std::strerror(errno)));
  }
  return fd;
}

absl::StatusOr<wire::StoreReply> AwaitReply(int socket, FrameCutter& cutter, absl::Time deadline,
                                            std::vector<int>& fds) {
  char buffer[64 << 10];
  while (true) {
    ASSIGN_OR_RETURN(const auto frame, cutter.Next());
    if (frame.has_value()) {
      wire::StoreReply reply;
      if (!reply.ParseFromArray(frame->data(), static_cast<int>(frame->size()))) {
        return absl::InternalError("the store's answer cannot be read");
      }
      return reply;
    }
    RETURN_IF_ERROR(WaitFor(socket, POLLIN, deadline));
    const ssize_t n = RecvWithFds(socket, buffer, sizeof(buffer), fds);
    if (n == 0) return absl::UnavailableError("the store closed the connection");
    if (n < 0 && errno != EAGAIN) return absl::UnavailableError(std::strerror(errno));
    if (n > 0) cutter.Append({buffer, static_cast<size_t>(n)});
  }
}

absl::Status StatusOf(const wire::StoreReply& reply) {
  if (reply.status().code() == 0) return absl::OkStatus();
  return absl::Status(static_cast<absl::StatusCode>(reply.status().code()),
                      reply.status().message());
}

}  // namespace antiphon::kvstore
