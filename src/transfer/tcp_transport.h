// The `tcp` transport (wire format: transfer/tcp_wire.h). Two io threads: one serves this process'
// regions, one pulls. Payload goes from the region to the socket and from the socket to its
// destination without a buffer between.
//
// Pulling: slices are cut into requests of at most `request_bytes_max`; several are on the way to
// a peer at once, up to `peer_bytes_max`, over `lanes` connections that are opened on demand, kept,
// and opened again with jittered backoff. A pull that met a connection which the peer had closed
// while it was idle is tried once more. A peer that sends nothing for `stall` while it owes bytes
// loses its connection. Cancelled and late bytes are read into a bin, never into local memory.
//
// Serving: a connection has a fixed size (its unanswered requests, at most kRequestsQueuedMax), so
// a slow or hostile reader holds no memory; a malformed frame ends its connection. At
// `connections_max` the connection that was idle for longest makes room for a new one.
#ifndef ANTIPHON_TRANSFER_TCP_TRANSPORT_H_
#define ANTIPHON_TRANSFER_TCP_TRANSPORT_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/clock.h"
#include "common/metrics.h"
#include "transfer/transport.h"

namespace antiphon::transfer {

struct TcpOptions {
  std::string listen = "127.0.0.1:0";
  // Turns the real port into address(); empty: the listen host with that port.
  std::function<std::string(uint16_t port)> advertise;
  uint64_t seed = 0;             // of the backoff's jitter
  const Clock* clock = nullptr;  // real time; null: Clock::Real()
  Registry* registry = nullptr;  // null: no metrics
  int lanes = 2;
  uint32_t request_bytes_max = 1 << 20;
  uint64_t peer_bytes_max = 16 << 20;  // requested and not yet here, of one peer
  size_t queued_pulls_max = 1 << 16;   // of all peers; more are refused RESOURCE_EXHAUSTED
  int connections_max = 1024;          // served
  absl::Duration connect_timeout = absl::Seconds(3);
  absl::Duration stall = absl::Seconds(5);
  absl::Duration backoff_min = absl::Milliseconds(20);
  absl::Duration backoff_max = absl::Seconds(1);
};

// UNAVAILABLE: cannot listen (why is in the text).
absl::StatusOr<std::unique_ptr<Transport>> MakeTcpTransport(TcpOptions options);

}  // namespace antiphon::transfer

#endif  // ANTIPHON_TRANSFER_TCP_TRANSPORT_H_
