// What this worker owes its store: one entry for each reservation and pin that was granted and not
// released. Empty when no sequence runs, or something leaks.
#ifndef ANTIPHON_WORKER_SLOT_LEDGER_H_
#define ANTIPHON_WORKER_SLOT_LEDGER_H_

#include <cstdint>

#include "absl/container/flat_hash_map.h"
#include "antiphon/v1/store.pb.h"
#include "common/ids.h"

namespace antiphon::worker {

// Not thread-safe.
class SlotLedger {
 public:
  // Books the grants of a successful reply.
  void OnReply(const internal::v1::StoreRequest& request, const internal::v1::StoreReply& reply);
  // False when a slot is given back that is not held: our bug.
  bool OnRelease(const internal::v1::StoreRequest::Release& release);
  // The store is gone, and all debts with it.
  void Clear();
  // Slots, each counted once.
  uint32_t slots() const { return counts_.size(); }

 private:
  void Add(const internal::v1::SlotRef& ref);
  absl::flat_hash_map<SlotId, uint32_t> counts_;
};

}  // namespace antiphon::worker

#endif  // ANTIPHON_WORKER_SLOT_LEDGER_H_
