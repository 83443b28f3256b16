// Leases over gRPC: the service that other stores call, and the client that calls theirs.
#ifndef ANTIPHON_KVSTORE_LEASE_RPC_H_
#define ANTIPHON_KVSTORE_LEASE_RPC_H_

#include <memory>

#include "absl/time/time.h"
#include "common/clock.h"
#include "common/executor.h"
#include "common/wire.h"
#include "kvstore/lease.h"
#include "kvstore/node.h"

namespace grpc {
class Service;
}

namespace antiphon::kvstore {

// No lease lives longer, whatever its deadline.
inline constexpr absl::Duration kLeaseLife = absl::Minutes(2);
inline constexpr int kLeasesMax = 1024;

// `node` is used on `executor` only. The server that serves it shuts down before the executor.
std::unique_ptr<grpc::Service> MakeLeaseService(StoreNode* node, Executor* executor);

// Destroyed after the executor was shut down; waits for its calls to end.
std::unique_ptr<LeaseClient> MakeGrpcLeaseClient(Identity self, Executor* executor,
                                                 const Clock* clock);

}  // namespace antiphon::kvstore

#endif  // ANTIPHON_KVSTORE_LEASE_RPC_H_
