#include "kvstore/core.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>

#include "common/status_macros.h"

namespace antiphon::kvstore {
namespace {

absl::Status Gone(SlotId id) {
  return absl::NotFoundError(fmt::format("slot {} has no generation {}", id.slot, id.generation));
}

}  // namespace

StoreCore::StoreCore(uint32_t slot_count) : slots_(slot_count) {
  CHECK(slot_count > 0);
  free_.reserve(slot_count);
  for (uint32_t s = slot_count; s > 0; --s) free_.push_back(s - 1);
  clients_[kStoreItself];
}

void StoreCore::AddClient(ClientId client, FingerprintId fingerprint) {
  CHECK(client != kStoreItself && !clients_.contains(client));
  clients_[client].fingerprint = fingerprint;
}

void StoreCore::RemoveClient(ClientId client) {
  auto it = clients_.find(client);
  if (it == clients_.end() || client == kStoreItself) return;
  Client held = std::move(it->second);
  clients_.erase(it);
  for (uint32_t slot : held.reserved) DropReservation(slot);
  for (auto [slot, count] : held.pins) {
    for (uint32_t i = 0; i < count; ++i) Unpin(slot);
  }
}

absl::StatusOr<std::vector<SlotId>> StoreCore::Reserve(ClientId client, uint32_t count) {
  Client& c = clients_.at(client);
  const uint32_t free = static_cast<uint32_t>(free_.size());
  std::vector<uint32_t> victims;
  if (count > free) {
    if (count - free <= idle_) victims = PlanEviction(count - free);
    if (victims.empty()) {
      return absl::ResourceExhaustedError(fmt::format(
          "{} slots asked, {} free and {} of {} unpinned", count, free, idle_, slots_.size()));
    }
  }
  for (uint32_t slot : victims) {
    Unindex(slot);
    FreeIfUnheld(slot);
    ++evictions_;
  }
  std::vector<SlotId> out;
  out.reserve(count);
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t s = free_.back();
    free_.pop_back();
    Slot& slot = slots_[s];
    slot.state = SlotState::kReserved;
    slot.owner = client;
    slot.block.name.fingerprint = c.fingerprint;
    ++reserved_;
    c.reserved.insert(s);
    out.push_back({s, slot.generation});
  }
  return out;
}

std::vector<SlotId> StoreCore::PinPrefix(ClientId client, absl::Span<const BlockKey> keys) {
  Client& c = clients_.at(client);
  std::vector<SlotId> out;
  for (const BlockKey& key : keys) {
    auto it = index_.find(BlockName{c.fingerprint, key});
    if (it == index_.end()) break;
    Pin(c, it->second);
    out.push_back({it->second, slots_[it->second].generation});
  }
  return out;
}

absl::Status StoreCore::PinSlots(ClientId client, absl::Span<const SlotId> slots) {
  Client& c = clients_.at(client);
  for (const SlotId& id : slots) {
    const Slot* slot = Lookup(id);
    if (slot == nullptr) return Gone(id);
    // A reader must not see another fingerprint's bytes under its own name.
    if (client != kStoreItself && slot->block.name.fingerprint != c.fingerprint) {
      return absl::NotFoundError(fmt::format("slot {} is of another fingerprint", id.slot));
    }
  }
  for (const SlotId& id : slots) Pin(c, id.slot);
  return absl::OkStatus();
}

absl::StatusOr<StoreCore::Committed> StoreCore::Commit(ClientId client, SlotId id,
                                                       const BlockPlace& block) {
  Client& c = clients_.at(client);
  if (!MayWrite(client, id)) {
    return absl::NotFoundError(fmt::format("slot {} generation {} is no reservation of this client",
                                           id.slot, id.generation));
  }
  if (client != kStoreItself && block.name.fingerprint != c.fingerprint) {
    return absl::InvalidArgumentError("commit under another fingerprint");
  }
  c.reserved.erase(id.slot);
  --reserved_;
  Slot& slot = slots_[id.slot];
  slot.block = block;
  const bool duplicate = index_.contains(block.name);
  if (duplicate) {
    slot.state = SlotState::kRetired;
    ++retired_;
  } else {
    slot.state = SlotState::kCommitted;
    ++committed_;
    if (slot.pins == 0) ++idle_;
    Index(id.slot);
  }
  Pin(c, id.slot);
  return Committed{.duplicate = duplicate};
}

absl::Status StoreCore::Release(ClientId client, absl::Span<const SlotId> slots) {
  Client& c = clients_.at(client);
  absl::Status first_error;
  for (const SlotId& id : slots) {
    const Slot* slot = Lookup(id);
    auto pin = slot == nullptr ? c.pins.end() : c.pins.find(id.slot);
    if (pin != c.pins.end()) {
      if (--pin->second == 0) c.pins.erase(pin);
      Unpin(id.slot);
    } else if (slot != nullptr && c.reserved.erase(id.slot) > 0) {
      DropReservation(id.slot);
    } else if (first_error.ok()) {
      first_error = absl::NotFoundError(
          fmt::format("slot {} generation {} is not held by this client", id.slot, id.generation));
    }
  }
  return first_error;
}

bool StoreCore::MayWrite(ClientId client, SlotId id) const {
  const Slot* slot = Lookup(id);
  return slot != nullptr && slot->state == SlotState::kReserved && slot->owner == client;
}

std::optional<SlotId> StoreCore::Find(const BlockName& name) const {
  auto it = index_.find(name);
  if (it == index_.end()) return std::nullopt;
  return SlotId{it->second, slots_[it->second].generation};
}

std::optional<BlockPlace> StoreCore::BlockOf(SlotId id) const {
  const Slot* slot = Lookup(id);
  if (slot == nullptr || slot->state != SlotState::kCommitted) return std::nullopt;
  return slot->block;
}

std::vector<BlockPlace> StoreCore::Snapshot() const {
  std::vector<BlockPlace> out;
  out.reserve(committed_);
  for (const Slot& slot : slots_) {
    if (slot.state == SlotState::kCommitted) out.push_back(slot.block);
  }
  return out;
}

BlockChanges StoreCore::TakeChanges() {
  BlockChanges out{.first_seq = next_seq_ - changes_.size()};
  out.changes.swap(changes_);
  return out;
}

CoreStats StoreCore::stats() const {
  return {.slots = static_cast<uint32_t>(slots_.size()),
          .free = static_cast<uint32_t>(free_.size()),
          .reserved = reserved_,
          .committed = committed_,
          .retired = retired_,
          .pinned = pinned_,
          .idle = idle_,
          .pins = pins_,
          .evictions = evictions_,
          .clients = static_cast<uint32_t>(clients_.size()) - 1};
}

StoreCore::Slot* StoreCore::Lookup(SlotId id) {
  return const_cast<Slot*>(static_cast<const StoreCore*>(this)->Lookup(id));
}

const StoreCore::Slot* StoreCore::Lookup(SlotId id) const {
  if (id.slot >= slots_.size()) return nullptr;
  const Slot& slot = slots_[id.slot];
  return slot.generation == id.generation && slot.state != SlotState::kFree ? &slot : nullptr;
}

void StoreCore::Pin(Client& client, uint32_t s) {
  Slot& slot = slots_[s];
  ++client.pins[s];
  ++pins_;
  if (slot.pins++ == 0) {
    ++pinned_;
    if (slot.state == SlotState::kCommitted) --idle_;
  }
  evictable_.erase({slot.used, s});
  slot.used = ++tick_;
}

void StoreCore::Unpin(uint32_t s) {
  Slot& slot = slots_[s];
  CHECK(slot.pins > 0);
  --pins_;
  if (--slot.pins > 0) return;
  --pinned_;
  if (slot.state == SlotState::kCommitted) ++idle_;
  evictable_.erase({slot.used, s});
  slot.used = ++tick_;
  FreeIfUnheld(s);
  UpdateEvictable(s);
}

void StoreCore::DropReservation(uint32_t s) {
  Slot& slot = slots_[s];
  CHECK(slot.state == SlotState::kReserved);
  slot.state = SlotState::kRetired;
  --reserved_;
  ++retired_;
  FreeIfUnheld(s);
}

// RETIRED -> FREE(g+1) after the last pin.
void StoreCore::FreeIfUnheld(uint32_t s) {
  Slot& slot = slots_[s];
  if (slot.state != SlotState::kRetired || slot.pins > 0) return;
  --retired_;
  slot.state = SlotState::kFree;
  slot.block = BlockPlace();
  slot.owner = kStoreItself;
  ++slot.generation;
  free_.push_back(s);
}

void StoreCore::Index(uint32_t s) {
  const BlockPlace& block = slots_[s].block;
  index_[block.name] = s;
  if (block.position > 0) {
    ++children_[ParentOf(block)];
    if (auto parent = index_.find(ParentOf(block)); parent != index_.end()) {
      UpdateEvictable(parent->second);
    }
  }
  changes_.push_back({block, false});
  ++next_seq_;
}

// COMMITTED -> RETIRED.
void StoreCore::Unindex(uint32_t s) {
  Slot& slot = slots_[s];
  CHECK(slot.state == SlotState::kCommitted);
  evictable_.erase({slot.used, s});
  index_.erase(slot.block.name);
  slot.state = SlotState::kRetired;
  --committed_;
  ++retired_;
  if (slot.pins == 0) --idle_;
  if (slot.block.position > 0) {
    auto children = children_.find(ParentOf(slot.block));
    if (--children->second == 0) children_.erase(children);
    if (auto parent = index_.find(ParentOf(slot.block)); parent != index_.end()) {
      UpdateEvictable(parent->second);
    }
  }
  changes_.push_back({slot.block, true});
  ++next_seq_;
}

bool StoreCore::Evictable(uint32_t s) const {
  const Slot& slot = slots_[s];
  return slot.state == SlotState::kCommitted && slot.pins == 0 &&
         !children_.contains(slot.block.name);
}

void StoreCore::UpdateEvictable(uint32_t s) {
  const std::pair entry(slots_[s].used, s);
  if (Evictable(s)) {
    evictable_.insert(entry);
  } else {
    evictable_.erase(entry);
  }
}

std::vector<uint32_t> StoreCore::PlanEviction(uint32_t count) const {
  std::vector<uint32_t> victims;
  victims.reserve(count);
  std::set<std::pair<uint64_t, uint32_t>> freed;  // parents whose last child is a victim
  absl::flat_hash_map<BlockName, uint32_t> gone;  // victims by parent
  auto leaf = evictable_.begin();
  while (victims.size() < count) {
    std::pair<uint64_t, uint32_t> next;
    if (!freed.empty() && (leaf == evictable_.end() || *freed.begin() < *leaf)) {
      next = *freed.begin();
      freed.erase(freed.begin());
    } else if (leaf != evictable_.end()) {
      next = *leaf++;
    } else {
      return {};
    }
    victims.push_back(next.second);
    const BlockPlace& block = slots_[next.second].block;
    if (block.position == 0) continue;
    const BlockName parent = ParentOf(block);
    auto at = index_.find(parent);
    if (++gone[parent] < children_.at(parent) || at == index_.end()) continue;
    const Slot& slot = slots_[at->second];
    if (slot.pins == 0) freed.emplace(slot.used, at->second);
  }
  return victims;
}

absl::Status StoreCore::CheckInvariants() const {
  std::vector<uint32_t> pins(slots_.size(), 0), writers(slots_.size(), 0);
  uint64_t total_pins = 0;
  for (const auto& [id, client] : clients_) {
    for (uint32_t s : client.reserved) {
      ++writers[s];
      if (slots_[s].owner != id) return absl::InternalError(fmt::format("slot {}: owner", s));
    }
    for (auto [s, count] : client.pins) {
      if (count == 0) return absl::InternalError(fmt::format("slot {}: empty pin", s));
      pins[s] += count;
      total_pins += count;
    }
  }
  CoreStats n{};
  absl::flat_hash_map<BlockName, uint32_t> children;
  for (uint32_t s = 0; s < slots_.size(); ++s) {
    const Slot& slot = slots_[s];
    const auto broken = [s](const char* what) {
      return absl::InternalError(fmt::format("slot {}: {}", s, what));
    };
    if (slot.pins != pins[s]) return broken("pins differ from the clients'");
    if (writers[s] != (slot.state == SlotState::kReserved ? 1 : 0)) return broken("writers");
    n.pinned += slot.pins > 0;
    switch (slot.state) {
      case SlotState::kFree:
        ++n.free;
        break;
      case SlotState::kReserved:
        ++n.reserved;
        break;
      case SlotState::kRetired:
        ++n.retired;
        break;
      case SlotState::kCommitted:
        ++n.committed;
        break;
    }
    if (slot.state == SlotState::kFree && slot.pins > 0) return broken("free and pinned");
    if (slot.state == SlotState::kRetired && slot.pins == 0) return broken("retired and unheld");
    if (evictable_.contains({slot.used, s}) != Evictable(s)) return broken("evictable");
    if (slot.state != SlotState::kCommitted) continue;
    n.idle += slot.pins == 0;
    auto it = index_.find(slot.block.name);
    if (it == index_.end() || it->second != s) return broken("committed, not indexed");
    if (slot.block.position > 0) ++children[ParentOf(slot.block)];
  }
  const CoreStats got = stats();
  if (index_.size() != n.committed) return absl::InternalError("index: size");
  if (children != children_) return absl::InternalError("index: children");
  if (got.free != n.free || got.reserved != n.reserved || got.retired != n.retired ||
      got.committed != n.committed || got.pinned != n.pinned || got.idle != n.idle ||
      got.pins != total_pins) {
    return absl::InternalError("stats differ from the slots");
  }
  if (n.free + n.reserved + n.retired + n.committed != slots_.size()) {
    return absl::InternalError("slots lost");
  }
  if (evictable_.size() > n.idle) return absl::InternalError("evictable: too many");
  return absl::OkStatus();
}

}  // namespace antiphon::kvstore
