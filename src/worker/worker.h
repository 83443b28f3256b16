// The process around both cores. `antiphon-prefill` and `antiphon-decode` are this program under
// two names: the name sets the role, which decides which of its two services the conductors use.
#ifndef ANTIPHON_WORKER_WORKER_H_
#define ANTIPHON_WORKER_WORKER_H_

#include "absl/status/statusor.h"
#include "common/daemon.h"

namespace antiphon::worker {

enum class StartRole { kPrefill, kDecode };

// What main does: a daemon of that role, or with kRankFlag one of its ranks (rank_processes.h).
int RunWorker(int argc, char** argv, StartRole role);

// Listens and checks the model file at once; loads it, attaches to the store and registers in the
// background. Errors are those of OpenModel (model_host.h) and of the listener.
absl::StatusOr<std::unique_ptr<Service>> StartWorker(DaemonContext& context, StartRole role);

}  // namespace antiphon::worker

#endif  // ANTIPHON_WORKER_WORKER_H_
