// The slots of one pool: who writes them, who reads them, which block each holds, and which goes
// when room is needed. Pure: no threads, clocks or memory of the pool inside.
//
// A slot's life is FREE(g) -> RESERVED(g) -> COMMITTED(g) -> RETIRED(g) -> FREE(g+1):
//   RESERVED   one client writes it; others may pin it and read what they are told is complete;
//   COMMITTED  written, in the index under (fingerprint, key); may be evicted when unpinned;
//   RETIRED    in no index (a duplicate, or a reservation whose owner let go while others read);
//              FREE as soon as the last pin goes.
// Only clients' own acts and their end free a slot; time never does.
#ifndef ANTIPHON_KVSTORE_CORE_H_
#define ANTIPHON_KVSTORE_CORE_H_

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/ids.h"

namespace antiphon::kvstore {

// One attached worker, one lease of another store, or the store itself. Chosen by the caller.
using ClientId = uint64_t;
// Acts for the store: destinations of copies in flight. Bound to no fingerprint, never removed.
inline constexpr ClientId kStoreItself = 0;

enum class SlotState : uint8_t { kFree, kReserved, kCommitted, kRetired };

// A block as the index knows it.
struct BlockName {
  FingerprintId fingerprint;
  BlockKey key;
  friend bool operator==(const BlockName&, const BlockName&) = default;
  friend auto operator<=>(const BlockName&, const BlockName&) = default;
  template <typename H>
  friend H AbslHashValue(H h, const BlockName& n) {
    return H::combine(std::move(h), n.fingerprint, n.key);
  }
};

struct BlockPlace {
  BlockName name;
  BlockKey parent;        // of position > 0
  uint32_t position = 0;  // block index in its sequence
};

struct BlockChange {
  BlockPlace block;
  bool removed = false;
};

// Changes since the last call; the first has number `first_seq`, the others follow.
struct BlockChanges {
  uint64_t first_seq = 0;
  std::vector<BlockChange> changes;
};

struct CoreStats {
  uint32_t slots = 0;
  uint32_t free = 0;
  uint32_t reserved = 0;
  uint32_t committed = 0;
  uint32_t retired = 0;
  uint32_t pinned = 0;     // slots with at least one pin, of any state
  uint32_t idle = 0;       // committed and unpinned
  uint64_t pins = 0;       // pin counts of all clients
  uint64_t evictions = 0;  // since start
  uint32_t clients = 0;    // without the store itself
};

// Not thread-safe: lives on one serial executor. All operations are O(slots named * log slots).
class StoreCore {
 public:
  // `slot_count` > 0. Generations start at 1.
  explicit StoreCore(uint32_t slot_count);

  // `fingerprint`: the blocks that this client may see and add.
  void AddClient(ClientId client, FingerprintId fingerprint);
  // Gives back all that the client held. No effect on an unknown one.
  void RemoveClient(ClientId client);
  bool HasClient(ClientId client) const { return clients_.contains(client); }

  // All `count` slots or RESOURCE_EXHAUSTED, in which case nothing was evicted. Evicts least
  // recently used leaves first: a block goes only after its children in this store.
  absl::StatusOr<std::vector<SlotId>> Reserve(ClientId client, uint32_t count);
  // Pins the longest prefix of `keys` that is committed here under the client's fingerprint.
  std::vector<SlotId> PinPrefix(ClientId client, absl::Span<const BlockKey> keys);
  // One more pin on each, RESERVED and RETIRED slots included. All or NOT_FOUND.
  absl::Status PinSlots(ClientId client, absl::Span<const SlotId> slots);
  struct Committed {
    bool duplicate = false;
  };
  // Ends the client's writing; the reservation becomes a pin. duplicate: the key is here already,
  // the slot stays private to those who hold it. NOT_FOUND: not this client's reservation. `name`'s
  // fingerprint must be the client's (the store itself may commit any): INVALID_ARGUMENT.
  absl::StatusOr<Committed> Commit(ClientId client, SlotId slot, const BlockPlace& block);
  // One count back for each entry, a pin before the reservation. Unknown ones: NOT_FOUND naming the
  // first, after all others were released.
  absl::Status Release(ClientId client, absl::Span<const SlotId> slots);
  // True while `client` may write the slot.
  bool MayWrite(ClientId client, SlotId slot) const;

  std::optional<SlotId> Find(const BlockName& name) const;
  // The block that a committed slot holds; nullopt when it was freed or is none.
  std::optional<BlockPlace> BlockOf(SlotId slot) const;
  // Every indexed block, in the order of slots.
  std::vector<BlockPlace> Snapshot() const;
  BlockChanges TakeChanges();
  bool has_changes() const { return !changes_.empty(); }
  uint64_t next_seq() const { return next_seq_; }
  CoreStats stats() const;

  // INTERNAL naming the first broken invariant. O(slots); for tests and simulation.
  absl::Status CheckInvariants() const;

 private:
  struct Slot {
    SlotState state = SlotState::kFree;
    uint64_t generation = 1;
    ClientId owner = kStoreItself;  // while kReserved
    uint32_t pins = 0;
    uint64_t used = 0;  // tick of the last use
    BlockPlace block;   // while kCommitted; its fingerprint while not kFree
  };
  struct Client {
    FingerprintId fingerprint;
    std::set<uint32_t> reserved;
    std::map<uint32_t, uint32_t> pins;  // slot -> count
  };

  Slot* Lookup(SlotId id);
  const Slot* Lookup(SlotId id) const;
  void Pin(Client& client, uint32_t slot);
  void Unpin(uint32_t slot);
  void DropReservation(uint32_t slot);
  void FreeIfUnheld(uint32_t slot);
  void Index(uint32_t slot);
  void Unindex(uint32_t slot);
  bool Evictable(uint32_t slot) const;
  void UpdateEvictable(uint32_t slot);
  // The `count` slots to evict in order; empty when there are not that many.
  std::vector<uint32_t> PlanEviction(uint32_t count) const;
  BlockName ParentOf(const BlockPlace& block) const {
    return {block.name.fingerprint, block.parent};
  }

  std::vector<Slot> slots_;
  std::vector<uint32_t> free_;  // stack
  std::map<ClientId, Client> clients_;
  absl::flat_hash_map<BlockName, uint32_t> index_;
  absl::flat_hash_map<BlockName, uint32_t> children_;  // indexed blocks by parent
  std::set<std::pair<uint64_t, uint32_t>> evictable_;  // (used, slot)
  std::vector<BlockChange> changes_;
  uint64_t next_seq_ = 1;
  uint64_t tick_ = 0;
  uint64_t evictions_ = 0;
  uint64_t pins_ = 0;
  uint32_t pinned_ = 0, reserved_ = 0, committed_ = 0, retired_ = 0, idle_ = 0;
};

}  // namespace antiphon::kvstore

#endif  // ANTIPHON_KVSTORE_CORE_H_
