#include "common/net.h"

#include <netdb.h>
#include <netinet/in.h>
#include <spdlog/fmt/fmt.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>

#include "antiphon/v1/config.pb.h"
#include "common/status_macros.h"

namespace antiphon {
namespace {

absl::Status Bad(std::string_view text, std::string_view why) {
  return absl::InvalidArgumentError(
      fmt::format("'{}' {}; write host:port, e.g. 127.0.0.1:8000", text, why));
}

std::string HostName() {
  char name[256] = {};
  if (gethostname(name, sizeof(name) - 1) != 0 || name[0] == 0) return "localhost";
  return name;
}

absl::Status ListenError(const HostPort& address, int error) {
  const std::string host = address.host.empty() ? "all interfaces" : address.host;
  switch (error) {
    case EADDRINUSE:
      return absl::UnavailableError(fmt::format(
          "port {} on {} is taken: another program listens there; stop it, or listen on "
          "another port",
          address.port, host));
    case EACCES:
      return absl::UnavailableError(fmt::format(
          "port {} on {} is not allowed: ports below 1024 need privileges; listen on a higher port",
          address.port, host));
    case EADDRNOTAVAIL:
      return absl::UnavailableError(
          fmt::format("{} is no address of this machine; listen on one of its own, on 127.0.0.1 "
                      "or on all interfaces (\":{}\")",
                      host, address.port));
    default:
      return absl::UnavailableError(
          fmt::format("cannot listen on {}: {}", address.Text(), std::strerror(error)));
  }
}

}  // namespace

std::string HostPort::Text() const {
  return host.find(':') == std::string::npos ? fmt::format("{}:{}", host, port)
                                             : fmt::format("[{}]:{}", host, port);
}

absl::StatusOr<HostPort> ParseHostPort(std::string_view text) {
  HostPort out;
  size_t colon = 0;
  if (!text.empty() && text[0] == '[') {
    const size_t close = text.find(']');
    if (close == std::string_view::npos) return Bad(text, "has no closing bracket");
    out.host = std::string(text.substr(1, close - 1));
    if (out.host.empty()) return Bad(text, "has an empty host in brackets");
    if (close + 1 >= text.size() || text[close + 1] != ':') return Bad(text, "has no port");
    colon = close + 1;
  } else {
    colon = text.rfind(':');
    if (colon == std::string_view::npos) return Bad(text, "has no port");
    out.host = std::string(text.substr(0, colon));
    if (out.host.find(':') != std::string::npos) {
      return Bad(text, "looks like IPv6; put the host in brackets, [::1]:8000");
    }
  }
  for (char c : out.host) {
    const bool ok = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                    c == '.' || c == '-' || c == '_' || c == ':' || c == '%';
    if (!ok) return Bad(text, "has a character that no host name has");
  }
  if (out.host.size() > 253) return Bad(text.substr(0, 40), "has a host that is too long");
  const std::string_view digits = text.substr(colon + 1);
  if (digits.empty()) return Bad(text, "has no port");
  uint32_t port = 0;
  for (char c : digits) {
    if (c < '0' || c > '9' || digits.size() > 5) return Bad(text, "has a port that is no number");
    port = port * 10 + static_cast<uint32_t>(c - '0');
  }
  if (port > 65535) return Bad(text, "has a port above 65535");
  out.port = static_cast<uint16_t>(port);
  return out;
}

bool IsLoopback(std::string_view host) {
  return host == "localhost" || host == "::1" || host.substr(0, 4) == "127.";
}

std::string AdvertisedAddress(const config::v1::Listener& listener, uint16_t real_port) {
  if (!listener.advertise().empty()) {
    auto address = ParseHostPort(listener.advertise());
    if (!address.ok()) return HostPort{listener.advertise(), real_port}.Text();  // a bare host
    if (address->port == 0) address->port = real_port;
    return address->Text();
  }
  HostPort address{.host = "", .port = real_port};
  if (auto listen = ParseHostPort(listener.listen()); listen.ok()) address.host = listen->host;
  if (address.host.empty() || address.host == "0.0.0.0" || address.host == "::") {
    address.host = HostName();
  }
  return address.Text();
}

absl::StatusOr<int> ListenTcp(const HostPort& address, uint16_t& port, int backlog) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const std::string service = fmt::format("{}", address.port);
  const int rc = getaddrinfo(address.host.empty() ? nullptr : address.host.c_str(), service.c_str(),
                             &hints, &found);
  if (rc != 0) {
    return absl::UnavailableError(
        fmt::format("no such host: {} ({})", address.host, gai_strerror(rc)));
  }
  std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> list(found, &freeaddrinfo);
  int error = EADDRNOTAVAIL;
  // For all interfaces a dual-stack IPv6 socket comes first; kernels without IPv6 get the IPv4 one.
  for (int family : {address.host.empty() ? AF_INET6 : AF_UNSPEC, AF_INET}) {
    for (addrinfo* a = list.get(); a != nullptr; a = a->ai_next) {
      if (family != AF_UNSPEC && a->ai_family != family) continue;
      const int fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
      if (fd < 0) {
        error = errno;
        continue;
      }
      const int on = 1, off = 0;
      setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
      if (a->ai_family == AF_INET6 && address.host.empty()) {
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
      }
      if (bind(fd, a->ai_addr, a->ai_addrlen) == 0 && listen(fd, backlog) == 0) {
        sockaddr_storage bound{};
        socklen_t size = sizeof(bound);
        getsockname(fd, reinterpret_cast<sockaddr*>(&bound), &size);
        port =
            ntohs(bound.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6*>(&bound)->sin6_port
                                              : reinterpret_cast<sockaddr_in*>(&bound)->sin_port);
        return fd;
      }
      error = errno;
      close(fd);
      if (error == EADDRINUSE || error == EACCES) return ListenError(address, error);
    }
  }
  return ListenError(address, error);
}

}  // namespace antiphon
