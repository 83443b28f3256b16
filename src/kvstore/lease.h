// Leases on blocks of other stores: found and pinned there while this store pulls them.
#ifndef ANTIPHON_KVSTORE_LEASE_H_
#define ANTIPHON_KVSTORE_LEASE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/ids.h"
#include "common/wire.h"

namespace antiphon::internal::v1 {
class LeaseReply;
}

namespace antiphon::kvstore {

struct LeaseQuery {
  std::string rpc_address;
  FingerprintId fingerprint;
  std::vector<BlockKey> keys;  // consecutive
  absl::Duration timeout;      // the lease ends with it
};

// Lives on the executor of whoever uses it: calls and callbacks are made there.
class LeaseClient {
 public:
  using LeaseId = uint64_t;  // never 0
  using Granted = absl::AnyInvocable<void(absl::StatusOr<wire::LeaseReply>)>;

  virtual ~LeaseClient() = default;
  // `granted` runs once, later: the answer (possibly no slots), or why none came. Not after Close.
  virtual LeaseId Open(LeaseQuery query, Granted granted) = 0;
  // Ends the lease; the other store unpins. Always called, after errors too.
  virtual void Close(LeaseId id) = 0;
};

}  // namespace antiphon::kvstore

#endif  // ANTIPHON_KVSTORE_LEASE_H_
