#include "tests/fakes/fake_store.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/status/status.h"
#include "common/status_macros.h"
#include "common/wire.h"

namespace antiphon::fakes {

namespace wire = ::antiphon::internal::v1;

namespace {
int Code(absl::StatusCode code) { return static_cast<int>(code); }
}  // namespace

FakeStore::FakeStore(KvLayout layout, uint32_t slots, uint64_t incarnation, std::string address,
                     StoreNet* net)
    : layout_(layout),
      incarnation_(incarnation),
      address_(std::move(address)),
      net_(net),
      slots_(slots) {
  for (Slot& slot : slots_) slot.payload.assign(layout_.payload_bytes(), std::byte{0xDB});
  (*net_)[address_] = this;
}

FakeStore::~FakeStore() {
  auto it = net_->find(address_);
  if (it != net_->end() && it->second == this) net_->erase(it);
}

std::byte* FakeStore::Payload(uint32_t slot) {
  return slot < slots_.size() ? slots_[slot].payload.data() : nullptr;
}

uint32_t FakeStore::held() const {
  uint32_t held = 0;
  for (const Slot& slot : slots_) {
    for (const auto& [client, count] : slot.holders) held += count;
  }
  return held;
}

void FakeStore::Answer(uint64_t client, wire::StoreReply reply) {
  replies_.push_back({client, std::move(reply)});
}

void FakeStore::Error(uint64_t client, uint64_t id, int code, const std::string& message) {
  wire::StoreReply reply;
  reply.set_id(id);
  reply.mutable_status()->set_code(code);
  reply.mutable_status()->set_message(message);
  if (code == Code(absl::StatusCode::kInvalidArgument)) {
    ++errors_;
    last_error_ = message;
  }
  Answer(client, std::move(reply));
}

FakeStore::Slot* FakeStore::Named(const wire::SlotRef& ref) {
  if (ref.slot() >= slots_.size()) return nullptr;
  Slot& slot = slots_[ref.slot()];
  return slot.generation == ref.generation() && slot.state != State::kFree ? &slot : nullptr;
}

uint32_t FakeStore::Available() const {
  return std::count_if(slots_.begin(), slots_.end(), [](const Slot& s) {
    return s.state == State::kFree || (s.state == State::kCommitted && s.holders.empty());
  });
}

wire::SlotRef FakeStore::ReserveOne(uint64_t client) {
  const int slot = Allocate();
  slots_[slot].writer = client;
  Hold(slot, client);
  return SlotToProto({static_cast<uint32_t>(slot), slots_[slot].generation});
}

int FakeStore::Allocate() {
  int best = -1;
  for (size_t i = 0; i < slots_.size(); ++i) {
    const Slot& slot = slots_[i];
    if (slot.state == State::kFree) {
      best = i;
      break;
    }
    if (slot.state != State::kCommitted || !slot.holders.empty()) continue;
    if (best < 0 || std::pair(slot.used, -int64_t{slot.meta.position()}) <
                        std::pair(slots_[best].used, -int64_t{slots_[best].meta.position()})) {
      best = i;
    }
  }
  if (best >= 0 && slots_[best].state != State::kFree) Free(best);
  if (best >= 0) slots_[best].state = State::kReserved;
  return best;
}

void FakeStore::Free(uint32_t index) {
  Slot& slot = slots_[index];
  if (slot.indexed) index_.erase(slot.meta.key());
  slot.indexed = false;
  slot.state = State::kFree;
  slot.writer = 0;
  ++slot.generation;
  std::fill(slot.payload.begin(), slot.payload.end(), std::byte{0xDB});
}

void FakeStore::Hold(uint32_t slot, uint64_t client) { ++slots_[slot].holders[client]; }

bool FakeStore::Unhold(uint32_t index, uint64_t client) {
  Slot& slot = slots_[index];
  auto it = slot.holders.find(client);
  if (it == slot.holders.end()) return false;
  if (--it->second == 0) slot.holders.erase(it);
  slot.used = ++clock_;
  if (slot.holders.empty() && !slot.indexed) Free(index);
  return true;
}

void FakeStore::DropClient(uint64_t client) {
  std::erase_if(copies_, [&](const Copy& copy) { return copy.client == client; });
  std::erase_if(fetches_, [&](const auto& f) { return f.first.first == client; });
  std::erase_if(replies_, [&](const Reply& r) { return r.client == client; });
  for (size_t i = 0; i < slots_.size(); ++i) {
    while (Unhold(i, client)) {
    }
  }
}

bool FakeStore::Verified(const wire::BlockMeta& meta, const std::byte* payload) const {
  if (meta.layer_checksums_size() != static_cast<int>(layout_.layers)) return false;
  for (uint32_t layer = 0; layer < layout_.layers; ++layer) {
    if (LayerChecksum(layout_, payload + layer * layout_.layer_bytes(), layout_.block_tokens) !=
        meta.layer_checksums(layer)) {
      return false;
    }
  }
  return true;
}

void FakeStore::Handle(uint64_t client, const wire::StoreRequest& request) {
  wire::StoreReply reply;
  reply.set_id(request.id());
  const auto refuse = [&](absl::StatusCode code, const std::string& message) {
    Error(client, request.id(), Code(code), message);
  };
  const auto bug = [&](const std::string& message) {
    refuse(absl::StatusCode::kInvalidArgument, message);
  };
  switch (request.op_case()) {
    case wire::StoreRequest::kReserve: {
      if (request.reserve().count() == 0) return bug("reserve.count is 0");
      if (Available() < request.reserve().count()) {
        return refuse(absl::StatusCode::kResourceExhausted, "no slots");
      }
      for (uint32_t i = 0; i < request.reserve().count(); ++i) {
        *reply.mutable_slots()->add_slots() = ReserveOne(client);
      }
      return Answer(client, std::move(reply));
    }
    case wire::StoreRequest::kPinPrefix: {
      auto& found = *reply.mutable_slots();
      for (const std::string& key : request.pin_prefix().keys()) {
        auto it = index_.find(key);
        if (it == index_.end()) break;
        Hold(it->second, client);
        *found.add_slots() = SlotToProto({it->second, slots_[it->second].generation});
      }
      const uint32_t pinned = static_cast<uint32_t>(found.slots_size());
      if (request.pin_prefix().reserve_to() <= pinned) return Answer(client, std::move(reply));
      const uint32_t more = request.pin_prefix().reserve_to() - pinned;
      if (Available() < more) {
        for (const auto& ref : found.slots()) Unhold(ref.slot(), client);
        return refuse(absl::StatusCode::kResourceExhausted, "no slots");
      }
      for (uint32_t i = 0; i < more; ++i) *found.add_slots() = ReserveOne(client);
      found.set_reserved(more);
      return Answer(client, std::move(reply));
    }
    case wire::StoreRequest::kPinSlots: {
      for (const auto& ref : request.pin_slots().slots()) {
        if (Named(ref) == nullptr) return refuse(absl::StatusCode::kNotFound, "no such slot");
      }
      for (const auto& ref : request.pin_slots().slots()) Hold(ref.slot(), client);
      return Answer(client, std::move(reply));
    }
    case wire::StoreRequest::kCommit: {
      Slot* slot = Named(request.commit().slot());
      const auto& meta = request.commit().meta();
      if (slot == nullptr || slot->writer != client || slot->state != State::kReserved) {
        return bug("commit of a slot that the worker does not write");
      }
      if (!Verified(meta, slot->payload.data())) return bug("commit with wrong checksums");
      if (meta.key().size() != 16 ||
          meta.token_ids_size() != static_cast<int>(layout_.block_tokens)) {
        return bug("commit with malformed meta");
      }
      slot->state = State::kCommitted;
      slot->meta = meta;
      slot->indexed = index_.emplace(meta.key(), request.commit().slot().slot()).second;
      reply.mutable_committed()->set_duplicate(!slot->indexed);
      return Answer(client, std::move(reply));
    }
    case wire::StoreRequest::kRelease: {
      for (const auto& ref : request.release().slots()) {
        if (Named(ref) == nullptr || !Unhold(ref.slot(), client)) {
          return bug("release of a slot that the worker does not hold");
        }
      }
      return Answer(client, std::move(reply));
    }
    case wire::StoreRequest::kFetchOpen: {
      fetches_[{client, request.id()}] = {request.fetch_open().source_address(),
                                          request.fetch_open().source_incarnation()};
      return Answer(client, std::move(reply));
    }
    case wire::StoreRequest::kFetchExtend: {
      auto it = fetches_.find({client, request.fetch_extend().fetch()});
      if (it == fetches_.end()) return bug("extend of an unknown fetch");
      for (const auto& copy : request.fetch_extend().copies()) {
        Slot* slot = Named(copy.dest());
        if (slot == nullptr || slot->writer != client) return bug("fetch into a foreign slot");
        copies_.push_back({client, request.fetch_extend().fetch(), it->second.source,
                           it->second.incarnation, copy});
      }
      return Answer(client, std::move(reply));
    }
    case wire::StoreRequest::kFetchClose: {
      const uint64_t fetch = request.fetch_close().fetch();
      std::erase_if(copies_, [&](const Copy& c) { return c.client == client && c.fetch == fetch; });
      fetches_.erase({client, fetch});
      return Answer(client, std::move(reply));
    }
    case wire::StoreRequest::kFetchPrefix:
      return FetchPrefix(client, request);
    default:
      return bug("unknown operation");
  }
}

void FakeStore::FetchPrefix(uint64_t client, const wire::StoreRequest& request) {
  const auto& fetch = request.fetch_prefix();
  wire::StoreReply reply;
  reply.set_id(request.id());
  reply.mutable_slots();
  auto source = net_->find(fetch.source_rpc_address());
  if (source == net_->end() || source->second->incarnation_ != fetch.source_incarnation()) {
    return Error(client, request.id(), Code(absl::StatusCode::kNotFound), "source is gone");
  }
  FakeStore& from = *source->second;
  for (const std::string& key : fetch.keys()) {
    auto it = from.index_.find(key);
    if (it == from.index_.end()) break;
    auto mine = index_.find(key);
    if (mine == index_.end()) {
      const int slot = Allocate();
      if (slot < 0) break;
      const Slot& remote = from.slots_[it->second];
      slots_[slot].payload = remote.payload;
      slots_[slot].meta = remote.meta;
      if (!Verified(remote.meta, slots_[slot].payload.data())) {
        Free(slot);
        break;
      }
      slots_[slot].state = State::kCommitted;
      slots_[slot].indexed = true;
      mine = index_.emplace(key, slot).first;
    }
    Hold(mine->second, client);
    *reply.mutable_slots()->add_slots() =
        SlotToProto({mine->second, slots_[mine->second].generation});
  }
  Answer(client, std::move(reply));
}

bool FakeStore::Pump() {
  if (copies_.empty()) return false;
  const Copy item = copies_.front();
  copies_.pop_front();
  wire::StoreReply event;
  event.mutable_progress()->set_fetch(item.fetch);
  event.mutable_progress()->set_done_tag(item.copy.tag());
  auto fetch = fetches_.find({item.client, item.fetch});
  if (fetch == fetches_.end() || fetch->second.failed) return true;
  const auto fail = [&](absl::StatusCode code, const std::string& message) {
    fetch->second.failed = true;
    event.mutable_progress()->mutable_status()->set_code(Code(code));
    event.mutable_progress()->mutable_status()->set_message(message);
    Answer(item.client, event);
    return true;
  };
  auto source = net_->find(item.source);
  if (source == net_->end() || source->second->incarnation_ != item.source_incarnation) {
    return fail(absl::StatusCode::kUnavailable, "source is gone");
  }
  const uint32_t layers = item.copy.checksums_size();
  const size_t at = item.copy.first_layer() * layout_.layer_bytes();
  const size_t bytes = layers * layout_.layer_bytes();
  const std::byte* from = source->second->Payload(item.copy.source().slot());
  std::byte* to = Payload(item.copy.dest().slot());
  if (from == nullptr) return fail(absl::StatusCode::kOutOfRange, "no such slot");
  std::memcpy(to + at, from + at, bytes);
  for (uint32_t i = 0; i < layers; ++i) {
    if (LayerChecksum(layout_, to + at + i * layout_.layer_bytes(), item.copy.tokens()) !=
        item.copy.checksums(i)) {
      return fail(absl::StatusCode::kDataLoss, "checksum of a layer differs");
    }
  }
  Answer(item.client, event);
  return true;
}

}  // namespace antiphon::fakes
