// The worker's attachment to its host's store, shared by the prefill and the decode core: renumbers
// their calls, books their slots, and attaches again when the store comes back.
#ifndef ANTIPHON_WORKER_STORE_LINK_H_
#define ANTIPHON_WORKER_STORE_LINK_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "antiphon/v1/model.pb.h"
#include "antiphon/v1/store.pb.h"
#include "common/executor.h"
#include "common/kv_layout.h"
#include "common/wire.h"
#include "kvstore/client/store_client.h"
#include "worker/slot_ledger.h"

namespace antiphon::worker {

enum class Side { kPrefill, kDecode };

using AttachFunction = std::function<absl::StatusOr<std::unique_ptr<kvstore::StoreClient>>(
    kvstore::AttachOptions options)>;

struct StoreLinkOptions {
  std::string socket_path;
  Identity self;
  KvLayout layout;
  internal::v1::Fingerprint fingerprint;
  Executor* executor = nullptr;  // the step loop; everything below runs there
  AttachFunction attach;         // StoreClient::Attach; blocks, runs on a thread of its own
  absl::AnyInvocable<void(kvstore::StoreClient&)> on_attached;
  absl::AnyInvocable<void(const absl::Status&)> on_lost;
  absl::AnyInvocable<void(Side, const internal::v1::StoreReply&)> on_reply;
};

// Used on the executor's thread only, but for construction.
class StoreLink {
 public:
  explicit StoreLink(StoreLinkOptions options);
  // Starts to attach, again and again until it succeeds.
  void Attach();
  // With the core's ids; dropped while no store is attached.
  void Call(Side side, internal::v1::StoreRequest request);
  // Between the two, calls gather and go out in one piece.
  void Cork();
  void Uncork();
  // After on_lost, when no step touches the pool any more: unmaps it and attaches again.
  void Reattach();

  bool attached() const { return client_ != nullptr && !lost_; }
  uint32_t slots_held() const { return ledger_.slots(); }
  uint32_t slot_count() const { return client_ == nullptr ? 0 : client_->slot_count(); }
  uint64_t incarnation() const { return client_ == nullptr ? 0 : client_->store_incarnation(); }
  // Why the last attempt failed; empty when attached.
  const std::string& error() const { return error_; }

 private:
  using Name = std::pair<Side, uint64_t>;  // a core's id

  void OnAttachResult(absl::StatusOr<std::unique_ptr<kvstore::StoreClient>> client);
  void OnEvent(const internal::v1::StoreReply& event);
  void OnReply(Side side, uint64_t id, const internal::v1::StoreRequest& request,
               internal::v1::StoreReply reply);

  StoreLinkOptions options_;
  std::unique_ptr<kvstore::StoreClient> client_;
  bool lost_ = false;
  std::string error_ = "not attached yet";
  SlotLedger ledger_;
  std::map<Name, uint64_t> fetches_;      // open fetches, core's id -> connection's
  std::map<uint64_t, Name> fetch_names_;  // and back
  SerialExecutor attacher_;               // last: its closures use the rest
};

}  // namespace antiphon::worker

#endif  // ANTIPHON_WORKER_STORE_LINK_H_
