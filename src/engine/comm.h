// What the ranks of a tensor-parallel group say to each other.
//
// A group runs in lockstep: every rank calls the same operations in the same order, with the same
// sizes and root. ShmComm (shm_comm.h) joins the processes of one host.
#ifndef ANTIPHON_ENGINE_COMM_H_
#define ANTIPHON_ENGINE_COMM_H_

#include <cstddef>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

namespace antiphon::engine {

// One thread at a time, but for Abort, which any thread may call. `timeout` is how long an
// operation waits for the other ranks; infinite ones still end when a rank dies.
//
// Errors: DEADLINE_EXCEEDED, a rank did not come in time; UNAVAILABLE, a rank died, left or gave
// up; INTERNAL, the ranks called different operations. Any error breaks the group: no rank waits on
// it any longer, every later operation of every rank fails, and what an operation was to fill in is
// undefined.
class Comm {
 public:
  virtual ~Comm() = default;

  virtual int rank() const = 0;
  virtual int size() const = 0;

  // values[i] = the sum of all ranks' values[i], added in ascending order of rank: the same bits on
  // every rank, whatever else the span holds.
  virtual absl::Status AllReduceSum(absl::Span<float> values, absl::Duration timeout) = 0;
  // bytes = those of `root`, which does not wait for the others to have read them.
  virtual absl::Status Broadcast(absl::Span<std::byte> bytes, int root, absl::Duration timeout) = 0;
  // On `root`: all = mine of rank 0, of rank 1, ... `all` is size() times as long as `mine` there,
  // and not used elsewhere.
  virtual absl::Status Gather(absl::Span<const std::byte> mine, absl::Span<std::byte> all, int root,
                              absl::Duration timeout) = 0;
  // Returns when every rank has come to it.
  virtual absl::Status Barrier(absl::Duration timeout) = 0;

  // Breaks the group: operations that wait, here and elsewhere, end UNAVAILABLE with `why`.
  virtual void Abort(const absl::Status& why) = 0;
};

}  // namespace antiphon::engine

#endif  // ANTIPHON_ENGINE_COMM_H_
