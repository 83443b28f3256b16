// The blob requests of the store's socket, in front of the shelf: handshake, memory, replies with
// descriptors, metrics.
#ifndef ANTIPHON_KVSTORE_BLOB_DESK_H_
#define ANTIPHON_KVSTORE_BLOB_DESK_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "common/metrics.h"
#include "common/wire.h"
#include "kvstore/blob_shelf.h"
#include "kvstore/client/connection.h"

namespace antiphon::internal::v1 {
class StoreReply;
class StoreRequest;
}  // namespace antiphon::internal::v1

namespace antiphon::kvstore {

struct BlobDeskOptions {
  Identity self;
  BlobLimits limits;
  std::function<uint64_t()> memory_available;  // bytes for a new blob
  Registry* registry = nullptr;
};

// Lives on the store's executor.
class BlobDesk {
 public:
  // `memory`: whose descriptor goes with the reply, or null.
  using ReplySink = absl::AnyInvocable<void(const wire::StoreReply&, BlobMemoryRef memory)>;

  explicit BlobDesk(BlobDeskOptions options);
  ~BlobDesk();

  static bool Handles(const wire::StoreRequest& request);
  // `passed`: the descriptor that came with the request. `sink` answers this request and is kept
  // while the session lasts.
  void Handle(ClientId session, const wire::StoreRequest& request, Fd passed, ReplySink sink);
  void End(ClientId session);

 private:
  struct Metrics;
  std::vector<BlobAnswer> Apply(ClientId session, const wire::StoreRequest& request, Fd passed);
  void Send(std::vector<BlobAnswer> answers);

  BlobDeskOptions options_;
  std::unique_ptr<Metrics> metrics_;
  BlobShelf shelf_;
  std::map<ClientId, ReplySink> sinks_;
};

}  // namespace antiphon::kvstore

#endif  // ANTIPHON_KVSTORE_BLOB_DESK_H_
