// A worker's end of its host's KV store: the pool mapped into this process, and requests over the
// store's Unix socket. No transfer engine behind it.
#ifndef ANTIPHON_KVSTORE_CLIENT_STORE_CLIENT_H_
#define ANTIPHON_KVSTORE_CLIENT_STORE_CLIENT_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/executor.h"
#include "common/ids.h"
#include "common/kv_layout.h"
#include "common/wire.h"

namespace antiphon::internal::v1 {
class StoreRequest;
class StoreReply;
class Fingerprint;
}  // namespace antiphon::internal::v1

namespace antiphon::kvstore {

struct AttachOptions {
  std::string socket_path;
  Identity self;
  KvLayout layout;
  const wire::Fingerprint* fingerprint = nullptr;  // copied
  Executor* executor = nullptr;                    // where every callback runs; outlives the client
  absl::AnyInvocable<void(const wire::StoreReply&)> on_event;    // FetchProgress
  absl::AnyInvocable<void(const wire::StoreReply&)> on_refused;  // of what was told
  // Once, after all pending calls ended UNAVAILABLE: the store is gone. The pool stays mapped until
  // the client is destroyed.
  absl::AnyInvocable<void(absl::Status)> on_lost;
  absl::Duration timeout = absl::Seconds(5);  // of the attachment
};

// The pool as this process maps it, and as others can.
struct PoolMapping {
  std::byte* base = nullptr;
  size_t bytes = 0;
  int fd = -1;  // the client's
};

// Thread-safe. Destroying it closes the connection and unmaps the pool, which releases all that
// this worker held; pending callbacks are dropped.
class StoreClient {
 public:
  // Connects, shakes hands and maps the pool; blocks up to the timeout. UNAVAILABLE: no store
  // listens there (yet); FAILED_PRECONDITION: the store refuses (cluster, wire version, layout or
  // fingerprint differ, both values in the text).
  static absl::StatusOr<std::unique_ptr<StoreClient>> Attach(AttachOptions options);
  virtual ~StoreClient() = default;

  // `request.id` is filled in and returned at once (FetchOpen: it names the fetch). `done` runs on
  // the executor, in the order of the replies.
  virtual uint64_t Call(wire::StoreRequest request,
                        absl::AnyInvocable<void(const wire::StoreReply&)> done) = 0;

  // The same for what is answered only when it is refused: nobody wakes for an answer that says
  // nothing.
  virtual void Tell(wire::StoreRequest request) = 0;

  // Between the two, calls gather and go out in one piece: each that goes alone wakes the store.
  virtual void Cork() = 0;
  virtual void Uncork() = 0;

  // The slot's first payload byte in this process; nullptr for a slot out of range.
  virtual std::byte* Payload(uint32_t slot) const = 0;
  // For processes that work on the slots that this one holds. They must have ended, or let go of
  // the pool, when this client is destroyed: the store then takes the slots back.
  virtual PoolMapping pool() const = 0;

  virtual uint64_t store_incarnation() const = 0;
  virtual const std::string& data_address() const = 0;
  virtual const std::string& rpc_address() const = 0;
  virtual uint32_t slot_count() const = 0;
};

}  // namespace antiphon::kvstore

#endif  // ANTIPHON_KVSTORE_CLIENT_STORE_CLIENT_H_
