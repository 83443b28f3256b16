#include "kvstore/node.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "antiphon/v1/control.pb.h"
#include "antiphon/v1/model.pb.h"
#include "antiphon/v1/store.pb.h"
#include "common/logging.h"
#include "common/status_macros.h"
#include "kvstore/node_metrics.h"

namespace antiphon::kvstore {
namespace {

absl::StatusOr<BlockKey> KeyFrom(const std::string& bytes, const char* field) {
  if (auto key = BlockKey::FromBytes(bytes)) return *key;
  return absl::InvalidArgumentError(
      fmt::format("{} has {} bytes; 16 expected", field, bytes.size()));
}

template <typename Refs>
std::vector<SlotId> SlotsFrom(const Refs& refs) {
  std::vector<SlotId> out;
  out.reserve(static_cast<size_t>(refs.size()));
  for (const wire::SlotRef& ref : refs) out.push_back(SlotFromProto(ref));
  return out;
}

template <typename Keys>
absl::StatusOr<std::vector<BlockKey>> KeysFrom(const Keys& keys) {
  std::vector<BlockKey> out;
  out.reserve(static_cast<size_t>(keys.size()));
  for (const std::string& bytes : keys) {
    ASSIGN_OR_RETURN(const BlockKey key, KeyFrom(bytes, "keys"));
    out.push_back(key);
  }
  return out;
}

void AddSlots(const std::vector<SlotId>& slots, wire::StoreReply& reply) {
  auto* out = reply.mutable_slots();
  for (const SlotId& slot : slots) *out->add_slots() = SlotToProto(slot);
}

void FillEvent(const BlockPlace& block, bool removed, wire::BlockEvent& event) {
  event.set_key(block.name.key.ToBytes());
  if (block.position > 0) event.set_parent(block.parent.ToBytes());
  event.set_removed(removed);
  event.set_fingerprint_id(block.name.fingerprint.ToBytes());
}

}  // namespace

StoreNode::StoreNode(NodeOptions options)
    : options_(std::move(options)), metrics_(std::make_unique<Metrics>(*options_.registry)) {
  CHECK(options_.executor != nullptr && options_.verifier != nullptr);
  metrics_->capacity.Set(static_cast<double>(options_.pool.size()));
}

StoreNode::~StoreNode() = default;

StoreNode::SessionId StoreNode::OpenSession(ReplySink sink) {
  const SessionId id = next_client_++;
  sessions_[id].sink = std::move(sink);
  return id;
}

void StoreNode::Disconnect(SessionId session) {
  auto it = sessions_.find(session);
  if (it == sessions_.end()) return;
  it->second.sink = nullptr;
  EndFetchesOf(session);
}

void StoreNode::CloseSession(SessionId session) {
  Disconnect(session);
  if (core_ != nullptr) core_->RemoveClient(session);
  sessions_.erase(session);
  Settle();
}

void StoreNode::Handle(SessionId session, const wire::StoreRequest& request) {
  auto it = sessions_.find(session);
  if (it == sessions_.end() || !it->second.sink) return;
  if (request.has_detach()) {
    CloseSession(session);
    return;
  }
  wire::StoreReply reply;
  reply.set_id(request.id());
  bool answer_later = false;
  const absl::Status status = Apply(session, request, reply, answer_later);
  metrics_->CountRequest(request, status);
  // Whoever asks for slots has to learn of them.
  const bool quiet = request.quiet() && (request.has_commit() || request.has_release());
  if (!status.ok() || (!answer_later && !quiet)) Reply(session, reply, status);
  Settle();
}

absl::Status StoreNode::Apply(SessionId id, const wire::StoreRequest& request,
                              wire::StoreReply& reply, bool& answer_later) {
  if (request.id() == 0) return absl::InvalidArgumentError("id is 0; it is > 0");
  if (request.has_attach()) return Attach(id, request, reply);
  if (!sessions_.at(id).attached) {
    return absl::FailedPreconditionError("attach comes first");
  }
  switch (request.op_case()) {
    case wire::StoreRequest::kReserve: {
      if (draining_) return absl::UnavailableError("the store is draining");
      ASSIGN_OR_RETURN(const auto slots, core_->Reserve(id, request.reserve().count()));
      AddSlots(slots, reply);
      return absl::OkStatus();
    }
    case wire::StoreRequest::kPinPrefix: {
      ASSIGN_OR_RETURN(const auto keys, KeysFrom(request.pin_prefix().keys()));
      const auto slots = core_->PinPrefix(id, keys);
      metrics_->hits.Add(static_cast<double>(slots.size()));
      metrics_->misses.Add(static_cast<double>(keys.size() - slots.size()));
      AddSlots(slots, reply);
      if (request.pin_prefix().reserve_to() <= slots.size()) return absl::OkStatus();
      return ReserveBehind(id, slots, request.pin_prefix().reserve_to(), reply);
    }
    case wire::StoreRequest::kPinSlots:
      return core_->PinSlots(id, SlotsFrom(request.pin_slots().slots()));
    case wire::StoreRequest::kCommit:
      return Commit(id, request, reply);
    case wire::StoreRequest::kRelease:
      return core_->Release(id, SlotsFrom(request.release().slots()));
    case wire::StoreRequest::kFetchOpen:
      return OpenStream(id, request);
    case wire::StoreRequest::kFetchExtend:
      return ExtendStream(id, request);
    case wire::StoreRequest::kFetchClose:
      answer_later = true;
      return CloseStream(id, request);
    case wire::StoreRequest::kFetchPrefix: {
      ASSIGN_OR_RETURN(auto keys, KeysFrom(request.fetch_prefix().keys()));
      answer_later = true;
      OpenPrefix(id, request.id(), request, std::move(keys));
      return absl::OkStatus();
    }
    default:
      return absl::InvalidArgumentError("op is missing or unknown to this store");
  }
}

absl::Status StoreNode::ReserveBehind(SessionId id, const std::vector<SlotId>& pinned,
                                      uint32_t slots, wire::StoreReply& reply) {
  absl::StatusOr<std::vector<SlotId>> reserved = absl::UnavailableError("the store is draining");
  if (!draining_) reserved = core_->Reserve(id, slots - static_cast<uint32_t>(pinned.size()));
  if (!reserved.ok()) {
    RETURN_IF_ERROR(core_->Release(id, pinned));
    return reserved.status();
  }
  AddSlots(*reserved, reply);
  reply.mutable_slots()->set_reserved(static_cast<uint32_t>(reserved->size()));
  return absl::OkStatus();
}

absl::Status StoreNode::Attach(SessionId id, const wire::StoreRequest& request,
                               wire::StoreReply& reply) {
  const auto& attach = request.attach();
  Session& session = sessions_.at(id);
  if (session.attached) return absl::FailedPreconditionError("attached already");
  if (!not_ready_.empty()) return absl::UnavailableError(not_ready_);
  RETURN_IF_ERROR(Negotiate(options_.self, attach.hello()).status());
  ASSIGN_OR_RETURN(const KvLayout layout, LayoutFromProto(attach.layout()));
  if (attach.fingerprint().layout() != layout.Text()) {
    return absl::InvalidArgumentError(
        fmt::format("fingerprint.layout is '{}' but the layout is '{}'",
                    attach.fingerprint().layout(), layout.Text()));
  }
  RETURN_IF_ERROR(SetLayout(layout));
  session.attached = true;
  session.fingerprint = IdOf(attach.fingerprint());
  core_->AddClient(id, session.fingerprint);
  auto* attached = reply.mutable_attached();
  *attached->mutable_hello() = MakeHello(options_.self);
  attached->set_pool_bytes(options_.pool.size());
  attached->set_slot_bytes(static_cast<uint32_t>(slot_bytes_));
  attached->set_slot_count(core_->stats().slots);
  if (options_.transport != nullptr) attached->set_data_address(options_.transport->address());
  attached->set_rpc_address(options_.rpc_address);
  LogInfo("{} attached: layout {}, {} slots", attach.hello().node(), layout.Text(),
          core_->stats().slots);
  return absl::OkStatus();
}

// The first attachment slices the pool, for the life of this store.
absl::Status StoreNode::SetLayout(const KvLayout& layout) {
  if (layout_.has_value()) {
    if (*layout_ == layout) return absl::OkStatus();
    return absl::FailedPreconditionError(
        fmt::format("the pool has the layout '{}', the worker has '{}'; use one model and one "
                    "worker.block_tokens on this host, or restart the store",
                    layout_->Text(), layout.Text()));
  }
  RETURN_IF_ERROR(CheckHeaderFits(layout));
  const size_t slots = options_.pool.size() / layout.slot_bytes();
  if (slots == 0) {
    return absl::FailedPreconditionError(
        fmt::format("kvstore.pool of {} bytes holds no slot of {} bytes; make it larger",
                    options_.pool.size(), layout.slot_bytes()));
  }
  layout_ = layout;
  slot_bytes_ = layout.slot_bytes();
  core_ = std::make_unique<StoreCore>(
      static_cast<uint32_t>(std::min<size_t>(slots, std::numeric_limits<uint32_t>::max())));
  return absl::OkStatus();
}

absl::Status StoreNode::Commit(SessionId id, const wire::StoreRequest& request,
                               wire::StoreReply& reply) {
  const auto& commit = request.commit();
  const wire::BlockMeta& meta = commit.meta();
  const SlotId slot = SlotFromProto(commit.slot());
  SlotHeader header{.fingerprint = sessions_.at(id).fingerprint,
                    .generation = slot.generation,
                    .position = meta.position()};
  ASSIGN_OR_RETURN(header.key, KeyFrom(meta.key(), "meta.key"));
  if (!meta.parent().empty()) {
    ASSIGN_OR_RETURN(header.parent, KeyFrom(meta.parent(), "meta.parent"));
  } else if (meta.position() > 0) {
    return absl::InvalidArgumentError("meta.parent is missing; only block 0 may go without");
  }
  header.token_ids.assign(meta.token_ids().begin(), meta.token_ids().end());
  header.layer_checksums.assign(meta.layer_checksums().begin(), meta.layer_checksums().end());
  if (const absl::Status s = CheckHeaderContent(header, *layout_); !s.ok()) {
    return absl::InvalidArgumentError(fmt::format("meta: {}", std::string(s.message())));
  }
  const BlockPlace place{.name = {header.fingerprint, header.key},
                         .parent = header.parent,
                         .position = header.position};
  if (writing_.contains(slot.slot)) {
    return absl::FailedPreconditionError(
        fmt::format("slot {} is still being fetched into", slot.slot));
  }
  ASSIGN_OR_RETURN(const auto committed, core_->Commit(id, slot, place));
  WriteSlotHeader(header, SlotAt(slot.slot));
  reply.mutable_committed()->set_duplicate(committed.duplicate);
  return absl::OkStatus();
}

void StoreNode::Reply(SessionId session, uint64_t id, const absl::Status& status) {
  wire::StoreReply reply;
  reply.set_id(id);
  Reply(session, reply, status);
}

void StoreNode::Reply(SessionId session, wire::StoreReply& reply, const absl::Status& status) {
  auto it = sessions_.find(session);
  if (it == sessions_.end() || !it->second.sink) return;
  if (!status.ok()) {
    reply.clear_result();
    reply.mutable_status()->set_code(static_cast<int>(status.code()));
    reply.mutable_status()->set_message(std::string(status.message()));
  }
  it->second.sink(reply);
}

ClientId StoreNode::OpenLease() {
  const ClientId id = next_client_++;
  leases_[id] = false;
  return id;
}

absl::Status StoreNode::HandleLease(ClientId lease, const wire::LeaseRequest& request,
                                    wire::LeaseReply& reply) {
  auto it = leases_.find(lease);
  if (it == leases_.end()) return absl::NotFoundError("the lease has ended");
  const auto fingerprint = FingerprintId::FromBytes(request.fingerprint_id());
  if (!it->second) {
    if (!request.has_hello()) return absl::InvalidArgumentError("hello is missing");
    RETURN_IF_ERROR(Negotiate(options_.self, request.hello()).status());
    if (!fingerprint.has_value()) {
      return absl::InvalidArgumentError(
          fmt::format("fingerprint_id has {} bytes; 16 expected", request.fingerprint_id().size()));
    }
    *reply.mutable_hello() = MakeHello(options_.self);
  }
  ASSIGN_OR_RETURN(const auto keys, KeysFrom(request.keys()));
  if (options_.transport != nullptr) reply.set_data_address(options_.transport->address());
  if (core_ == nullptr || draining_) return absl::OkStatus();  // holds nothing
  if (!it->second) {
    core_->AddClient(lease, *fingerprint);
    it->second = true;
  }
  for (const SlotId& slot : core_->PinPrefix(lease, keys)) {
    auto header = ReadSlotHeader({SlotAt(slot.slot), kSlotHeaderBytes});
    if (!header.ok()) {
      CountChecksumFailure(header.status());
      break;
    }
    *reply.add_slots() = SlotToProto(slot);
    wire::BlockMeta* meta = reply.add_metas();
    meta->set_key(header->key.ToBytes());
    meta->set_parent(header->parent.ToBytes());
    meta->set_position(header->position);
    meta->mutable_token_ids()->Add(header->token_ids.begin(), header->token_ids.end());
    meta->mutable_layer_checksums()->Add(header->layer_checksums.begin(),
                                         header->layer_checksums.end());
  }
  Settle();
  return absl::OkStatus();
}

void StoreNode::CloseLease(ClientId lease) {
  leases_.erase(lease);
  if (core_ != nullptr) core_->RemoveClient(lease);
  Settle();
}

void StoreNode::FillSnapshot(wire::StoreEvents& events) const {
  events.set_snapshot(true);
  events.set_seq(1);
  if (core_ == nullptr) return;
  for (const BlockPlace& block : core_->Snapshot()) FillEvent(block, false, *events.add_events());
  // The next change follows the snapshot's last event.
  events.set_seq(core_->next_seq() - static_cast<uint64_t>(events.events_size()));
}

bool StoreNode::TakeEvents(wire::StoreEvents& events) {
  if (core_ == nullptr) return false;
  const BlockChanges changes = core_->TakeChanges();
  if (changes.changes.empty()) return false;
  events.set_seq(changes.first_seq);
  for (const BlockChange& c : changes.changes) FillEvent(c.block, c.removed, *events.add_events());
  return true;
}

void StoreNode::FillLoad(wire::StoreLoad& load) const {
  if (core_ == nullptr) return;
  const CoreStats stats = core_->stats();
  load.set_slots_free(draining_ ? 0 : stats.free + stats.idle);
  load.set_slots_pinned(stats.pinned);
  load.set_slots_cached(stats.committed);
  load.set_slots(stats.slots);
}

void StoreNode::Settle() {
  if (core_ == nullptr) return;
  metrics_->Set(core_->stats(), slot_bytes_, fetch_count());
  if (core_->has_changes() && options_.on_changes) options_.on_changes();
}

void StoreNode::CountChecksumFailure(const absl::Status& status) {
  if (!absl::IsDataLoss(status)) return;
  metrics_->checksum_failures.Add();
  LogWarning("a block failed verification and is a miss: {}", std::string(status.message()));
}

}  // namespace antiphon::kvstore
