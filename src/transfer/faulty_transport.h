// A Transport that lies now and then: pulls fail, come late, or bring wrong or torn bytes with an
// OK status. For tests of whoever must survive that; deterministic for a seed and an order of
// pulls.
#ifndef ANTIPHON_TRANSFER_FAULTY_TRANSPORT_H_
#define ANTIPHON_TRANSFER_FAULTY_TRANSPORT_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/time/time.h"
#include "common/executor.h"
#include "transfer/transport.h"

namespace antiphon::transfer {

// Probabilities in [0, 1], tried in this order; at most one happens to a pull.
struct FaultRates {
  double fail = 0;        // UNAVAILABLE, nothing written
  double wrong_byte = 0;  // one byte flipped, OK
  double torn = 0;        // the last half of the bytes is old, OK
  double late = 0;        // `done` waits up to `late_max`
  absl::Duration late_max = absl::Milliseconds(50);
};

// Thread-safe if `inner` is. Owns `inner`; `executor` (for late ends) outlives it. A late end still
// obeys the contract: the memory is out of hands before `done`, and destruction runs the `done`s
// that still wait, at once and on the thread that destroys.
std::unique_ptr<Transport> MakeFaultyTransport(std::unique_ptr<Transport> inner, FaultRates rates,
                                               uint64_t seed, Executor* executor);

}  // namespace antiphon::transfer

#endif  // ANTIPHON_TRANSFER_FAULTY_TRANSPORT_H_
