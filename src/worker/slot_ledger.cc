#include "worker/slot_ledger.h"

#include "common/wire.h"

namespace antiphon::worker {

void SlotLedger::Add(const internal::v1::SlotRef& ref) { ++counts_[SlotFromProto(ref)]; }

void SlotLedger::OnReply(const internal::v1::StoreRequest& request,
                         const internal::v1::StoreReply& reply) {
  if (reply.status().code() != 0) return;
  if (request.has_pin_slots()) {
    for (const auto& ref : request.pin_slots().slots()) Add(ref);
  } else if (request.has_reserve() || request.has_pin_prefix() || request.has_fetch_prefix()) {
    for (const auto& ref : reply.slots().slots()) Add(ref);
  }
}

bool SlotLedger::OnRelease(const internal::v1::StoreRequest::Release& release) {
  bool known = true;
  for (const auto& ref : release.slots()) {
    auto it = counts_.find(SlotFromProto(ref));
    if (it == counts_.end()) {
      known = false;
    } else if (--it->second == 0) {
      counts_.erase(it);
    }
  }
  return known;
}

void SlotLedger::Clear() { counts_.clear(); }

}  // namespace antiphon::worker
