// The daemon `antiphon-kvstore`.
#ifndef ANTIPHON_KVSTORE_SERVICE_H_
#define ANTIPHON_KVSTORE_SERVICE_H_

#include <memory>

#include "absl/status/statusor.h"
#include "common/daemon.h"

namespace antiphon::kvstore {

// Listens at once; ready when the pool is touched. The socket is RuntimeDir(config)/kvstore.sock.
absl::StatusOr<std::unique_ptr<Service>> MakeKvStore(DaemonContext& context);

}  // namespace antiphon::kvstore

#endif  // ANTIPHON_KVSTORE_SERVICE_H_
