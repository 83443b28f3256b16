// antiphon-gateway as a service of RunDaemon.
#ifndef ANTIPHON_GATEWAY_DAEMON_H_
#define ANTIPHON_GATEWAY_DAEMON_H_

#include <memory>

#include "absl/status/statusor.h"
#include "common/daemon.h"

namespace antiphon::gateway {

// UNAVAILABLE when a port is taken; INVALID_ARGUMENT when it would listen beyond loopback without
// keys and nobody wrote that this is meant.
absl::StatusOr<std::unique_ptr<Service>> MakeGateway(DaemonContext& context);

}  // namespace antiphon::gateway

#endif  // ANTIPHON_GATEWAY_DAEMON_H_
