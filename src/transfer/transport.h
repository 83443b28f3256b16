// The transfer engine: consumers pull, nobody's memory is remotely writable.
//
// A process exports regions of its memory for reading and pulls slices of other processes' regions
// into its own. The bytes pulled may be stale or torn when the owner reuses them meanwhile; whoever
// pulls verifies what came (checksums in the block headers).
#ifndef ANTIPHON_TRANSFER_TRANSPORT_H_
#define ANTIPHON_TRANSFER_TRANSPORT_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace antiphon::transfer {

// Names a region at its owner. Chosen by the owner, never reused: stores use their incarnation, so
// a pull meant for a dead incarnation fails instead of reading another pool.
using RegionId = uint64_t;

struct Slice {
  uint64_t remote_offset = 0;
  std::byte* local = nullptr;
  uint32_t bytes = 0;
};

struct PullRequest {
  std::string peer;  // data address, host:port
  RegionId region = 0;
  std::vector<Slice> slices;
  absl::Time deadline = absl::InfiniteFuture();  // of the transport's Clock
};

using PullId = uint64_t;  // never 0
using PullDone = absl::AnyInvocable<void(absl::Status)>;

// Thread-safe. `done` runs exactly once, on a thread of the transport (post, do not work there),
// and not before the local memory of all slices is out of the transport's hands: after `done`, ok
// or not, nothing writes there any more. Destroying the transport ends all pulls CANCELLED first.
//
// Codes: OK; NOT_FOUND the peer has no such region (restarted); OUT_OF_RANGE a slice passes the
// region's end; UNAVAILABLE the peer cannot be reached or broke off; DEADLINE_EXCEEDED; CANCELLED.
class Transport {
 public:
  virtual ~Transport() = default;

  // Makes [base, base + bytes) readable by peers until Unexport. INVALID_ARGUMENT: id taken or
  // empty.
  virtual absl::Status Export(RegionId id, const std::byte* base, size_t bytes) = 0;
  // Returns when no peer can read the region any more.
  virtual void Unexport(RegionId id) = 0;

  virtual PullId Pull(PullRequest request, PullDone done) = 0;
  // Ends the pull early; `done` still runs (CANCELLED unless it ended first). No effect on an
  // unknown id.
  virtual void Cancel(PullId id) = 0;

  // host:port where peers reach this process, with the real port.
  virtual std::string address() const = 0;
};

}  // namespace antiphon::transfer

#endif  // ANTIPHON_TRANSFER_TRANSPORT_H_
