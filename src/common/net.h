// Addresses as operators write them.
#ifndef ANTIPHON_COMMON_NET_H_
#define ANTIPHON_COMMON_NET_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace antiphon::config::v1 {
class Listener;
}

namespace antiphon {

struct HostPort {
  std::string host;  // without brackets
  uint16_t port = 0;
  std::string Text() const;  // "127.0.0.1:80", "[::1]:80"
};

// "127.0.0.1:8000", "[::1]:8000", ":8000" (all interfaces), "host:8000". INVALID_ARGUMENT says what
// is missing.
absl::StatusOr<HostPort> ParseHostPort(std::string_view text);
bool IsLoopback(std::string_view host);

// What peers are told: listener.advertise, else the listen host with the real port (the host's name
// when it listens on all interfaces).
std::string AdvertisedAddress(const config::v1::Listener& listener, uint16_t real_port);

// Listens on TCP; port 0 is chosen by the kernel. UNAVAILABLE "port 8000 on 127.0.0.1 is taken"
// or the reason. Returns the descriptor; `port` gets the real one.
absl::StatusOr<int> ListenTcp(const HostPort& address, uint16_t& port, int backlog = 1024);

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_NET_H_
