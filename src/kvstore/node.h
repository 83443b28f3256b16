// The store without its sockets: requests of workers and of other stores in, replies out. Owns the
// slot table and the fetches; reads and writes the pool. The daemon and the simulator run this
// class; what differs is the executor, the transport and the leases that they give it.
#ifndef ANTIPHON_KVSTORE_NODE_H_
#define ANTIPHON_KVSTORE_NODE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/types/span.h"
#include "common/clock.h"
#include "common/executor.h"
#include "common/kv_layout.h"
#include "common/metrics.h"
#include "common/wire.h"
#include "kvstore/core.h"
#include "kvstore/fetch.h"
#include "kvstore/lease.h"
#include "kvstore/slot_header.h"
#include "transfer/transport.h"

namespace antiphon::internal::v1 {
class BlockMeta;
class LeaseReply;
class LeaseRequest;
class StoreEvents;
class StoreLoad;
class StoreReply;
class StoreRequest;
}  // namespace antiphon::internal::v1

namespace antiphon::kvstore {

struct NodeOptions {
  Identity self;
  absl::Span<std::byte> pool;                // mapped for the node's life; exported by the shell as
                                             // region self.incarnation
  Executor* executor = nullptr;              // where everything here runs
  Executor* verifier = nullptr;              // where pulled bytes are verified; may be `executor`
  transfer::Transport* transport = nullptr;  // null: blocks of other stores are unavailable
  LeaseClient* leases = nullptr;             // null: likewise
  const Clock* clock = nullptr;
  Registry* registry = nullptr;
  std::string rpc_address;
  // Called when events() has something new.
  absl::AnyInvocable<void()> on_changes;
};

// Lives on its executor: every call is made there, every callback runs there. When the transport
// and the verifier run on other threads, they end before the node does.
class StoreNode {
 public:
  using SessionId = ClientId;
  using ReplySink = absl::AnyInvocable<void(const wire::StoreReply&)>;

  explicit StoreNode(NodeOptions options);
  ~StoreNode();

  // Before the first attachment, when it was not known at construction.
  void set_rpc_address(std::string address) { options_.rpc_address = std::move(address); }

  // Attach is refused UNAVAILABLE with this text from now on; empty: allowed, as at first.
  void set_not_ready(std::string why) { not_ready_ = std::move(why); }

  // A worker connected. Replies and events of the session go to `sink`.
  SessionId OpenSession(ReplySink sink);
  void Handle(SessionId session, const wire::StoreRequest& request);
  // The connection is gone but the worker may live and write: its holdings stay.
  void Disconnect(SessionId session);
  // The worker can touch the pool no more: releases all it held.
  void CloseSession(SessionId session);

  // A lease of another store.
  ClientId OpenLease();
  // Pins more for it. Codes: FAILED_PRECONDITION handshake; INVALID_ARGUMENT field.
  absl::Status HandleLease(ClientId lease, const wire::LeaseRequest& request,
                           wire::LeaseReply& reply);
  void CloseLease(ClientId lease);

  // From now on Reserve is refused UNAVAILABLE; leases get nothing.
  void Drain() { draining_ = true; }

  // Everything in the index.
  void FillSnapshot(wire::StoreEvents& events) const;
  // What changed since the last call. False: nothing.
  bool TakeEvents(wire::StoreEvents& events);
  void FillLoad(wire::StoreLoad& load) const;

  // Null until the first attachment sets the layout.
  const StoreCore* core() const { return core_.get(); }
  StoreCore* mutable_core() { return core_.get(); }
  const std::optional<KvLayout>& layout() const { return layout_; }
  std::byte* SlotAt(uint32_t slot) const { return options_.pool.data() + slot * slot_bytes_; }
  size_t session_count() const { return sessions_.size(); }
  size_t fetch_count() const { return streams_.size() + prefixes_.size(); }

 private:
  struct Metrics;
  struct Session {
    ReplySink sink;  // empty after Disconnect
    bool attached = false;
    FingerprintId fingerprint;
  };
  // A running FetchOpen.
  struct Stream {
    std::string source;
    uint64_t incarnation = 0;
    absl::Time deadline;
    Executor::TimerId timer = 0;
    StreamFetch plan;
    std::map<uint64_t, transfer::PullId> pulls;  // by tag
    uint64_t close_id = 0;                       // of the FetchClose to answer
  };
  // A running FetchPrefix.
  struct Prefix {
    SessionId session = 0;
    uint64_t request_id = 0;
    FingerprintId fingerprint;
    std::vector<BlockKey> keys;      // those not found here
    uint32_t first_position = 0;     // of keys[0]
    std::optional<BlockKey> parent;  // of keys[0]; absent: unknown
    std::vector<SlotId> pinned;      // for the worker, in order
    uint64_t incarnation = 0;
    absl::Time deadline;
    Executor::TimerId timer = 0;
    LeaseClient::LeaseId lease = 0;
    std::string data_address;
    std::vector<SlotId> source, dest;  // dest: reserved by the store, until let go
    std::vector<SlotHeader> expected;
    std::vector<bool> held;                      // dest not let go yet
    std::map<uint32_t, transfer::PullId> pulls;  // by block
    std::optional<PrefixFetch> plan;             // once granted
    bool ended = false;
  };
  using StreamKey = std::pair<SessionId, uint64_t>;  // the request that opened it

  // node.cc
  absl::Status Attach(SessionId id, const wire::StoreRequest& request, wire::StoreReply& reply);
  // Until there are `slots` behind those that are pinned, which are given back when they cannot be
  // had.
  absl::Status ReserveBehind(SessionId id, const std::vector<SlotId>& pinned, uint32_t slots,
                             wire::StoreReply& reply);
  absl::Status SetLayout(const KvLayout& layout);
  absl::Status Apply(SessionId id, const wire::StoreRequest& request, wire::StoreReply& reply,
                     bool& answer_later);
  absl::Status Commit(SessionId id, const wire::StoreRequest& request, wire::StoreReply& reply);
  void Reply(SessionId session, uint64_t id, const absl::Status& status);
  void Reply(SessionId session, wire::StoreReply& reply, const absl::Status& status);
  void Settle();  // after anything that may have changed the table

  // node_fetch.cc
  absl::Status OpenStream(SessionId session, const wire::StoreRequest& request);
  absl::Status ExtendStream(SessionId session, const wire::StoreRequest& request);
  absl::Status CloseStream(SessionId session, const wire::StoreRequest& request);
  void StartCopy(const StreamKey& key, Stream& stream, const LayerCopy& copy);
  void EndStream(const StreamKey& key, absl::Status status);
  void PumpStream(const StreamKey& key);  // may erase it
  void OpenPrefix(SessionId session, uint64_t request_id, const wire::StoreRequest& request,
                  std::vector<BlockKey> keys);
  void PrefixGranted(uint64_t id, absl::StatusOr<wire::LeaseReply> grant);
  void StartBlock(uint64_t id, Prefix& prefix, uint32_t block);
  void BlockDone(uint64_t id, uint32_t block, const absl::Status& status);
  absl::Status CheckBlock(const SlotHeader& expected, SlotId dest) const;
  void EnterBlock(Prefix& prefix, uint32_t block);
  void EndPrefix(uint64_t id);
  void PumpPrefix(uint64_t id);  // may erase it
  void EndFetchesOf(SessionId session);
  std::vector<transfer::Slice> SlicesOf(const LayerCopy& copy) const;
  transfer::PullId Pull(transfer::PullRequest request, absl::AnyInvocable<absl::Status()> verify,
                        absl::AnyInvocable<void(absl::Status)> done);
  void HoldDestination(SlotId dest);
  void LetGoDestination(SlotId dest);
  void CountChecksumFailure(const absl::Status& status);
  // `body` as a closure that does nothing once this node is gone.
  template <typename Body>
  auto Guard(Body body) {
    return [alive = std::weak_ptr<char>(alive_), body = std::move(body)](auto&&... args) mutable {
      if (!alive.expired()) body(std::forward<decltype(args)>(args)...);
    };
  }

  NodeOptions options_;
  std::unique_ptr<Metrics> metrics_;
  std::optional<KvLayout> layout_;
  size_t slot_bytes_ = 0;
  std::unique_ptr<StoreCore> core_;
  std::map<SessionId, Session> sessions_;
  std::map<ClientId, bool> leases_;  // of other stores; true: fingerprint known
  ClientId next_client_ = 1;
  std::map<StreamKey, Stream> streams_;
  std::map<uint64_t, Prefix> prefixes_;
  uint64_t next_prefix_ = 1;
  std::map<uint32_t, int> writing_;  // slots that copies in flight write into
  bool draining_ = false;
  std::string not_ready_;
  std::shared_ptr<char> alive_ = std::make_shared<char>();
};

}  // namespace antiphon::kvstore

#endif  // ANTIPHON_KVSTORE_NODE_H_
