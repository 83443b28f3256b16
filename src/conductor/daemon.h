// antiphon-conductor as a service of RunDaemon.
#ifndef ANTIPHON_CONDUCTOR_DAEMON_H_
#define ANTIPHON_CONDUCTOR_DAEMON_H_

#include <memory>

#include "absl/status/statusor.h"
#include "common/daemon.h"

namespace antiphon::conductor {

// UNAVAILABLE when the port is taken.
absl::StatusOr<std::unique_ptr<Service>> MakeConductor(DaemonContext& context);

}  // namespace antiphon::conductor

#endif  // ANTIPHON_CONDUCTOR_DAEMON_H_
