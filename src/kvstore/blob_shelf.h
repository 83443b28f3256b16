// The blobs that a store keeps for the workers of its host: who fills, who waits, who uses. Named
// memory, filled once by one of those who want it and from then on only read; what is in it is the
// workers' business (repacked weights, a digest, a measurement).
//
//   absent -> filling (one session; others wait) -> finished (any number of users) -> dropped
//
// When a filler's session ends, the first who waits fills fresh memory: what the other still maps
// is nobody's. A finished blob stays while somebody uses it, and after that until room is needed:
// whoever makes a blob drops the unused ones of other models, and, where limits or memory still
// refuse, unused ones of any model, longest unused first.
#ifndef ANTIPHON_KVSTORE_BLOB_SHELF_H_
#define ANTIPHON_KVSTORE_BLOB_SHELF_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kvstore/core.h"

namespace antiphon::kvstore {

inline constexpr size_t kBlobNameBytesMax = 500;

// Freed with the last reference, here and in the processes that map it.
class BlobMemory {
 public:
  virtual ~BlobMemory() = default;
  virtual int fd() const = 0;
  // Nobody can write to it any more. FAILED_PRECONDITION: somebody still maps it for writing.
  virtual absl::Status Seal() = 0;
};
using BlobMemoryRef = std::shared_ptr<BlobMemory>;
// Zeroed. RESOURCE_EXHAUSTED: there is none.
using MakeBlobMemory =
    std::function<absl::StatusOr<BlobMemoryRef>(const std::string& name, uint64_t bytes)>;

struct BlobLimits {
  size_t blobs = 64;   // names held at a time, those that are being filled included
  uint64_t bytes = 0;  // of all of them
};

struct BlobName {
  std::string name;
  std::string model;  // what makes it useless when another model is served
  uint64_t bytes = 0;
};

// The answer to a request, which may come much later than the request.
struct BlobAnswer {
  ClientId session = 0;
  uint64_t request = 0;
  absl::Status status;
  BlobMemoryRef memory;  // of an opened blob
  bool fill = false;
};

// Pure but for `make`. Not thread-safe. A session has at most one blob, so no more requests wait
// than there are sessions.
class BlobShelf {
 public:
  BlobShelf(BlobLimits limits, MakeBlobMemory make);

  // INVALID_ARGUMENT: name, model or size out of bounds; FAILED_PRECONDITION: the session has a
  // blob already, or the name is held with another model or size; RESOURCE_EXHAUSTED.
  std::vector<BlobAnswer> Open(ClientId session, uint64_t request, const BlobName& name);
  // FAILED_PRECONDITION: the session fills no blob, or still maps it.
  std::vector<BlobAnswer> Publish(ClientId session, uint64_t request);
  // `memory` is sealed. As Open, and ALREADY_EXISTS: the name is held.
  std::vector<BlobAnswer> Offer(ClientId session, uint64_t request, const BlobName& name,
                                BlobMemoryRef memory);
  std::vector<BlobAnswer> End(ClientId session);

  size_t count() const { return blobs_.size(); }
  uint64_t bytes() const { return bytes_; }

 private:
  struct Waiter {
    ClientId session;
    uint64_t request;
  };
  struct Blob {
    BlobName name;
    BlobMemoryRef memory;
    ClientId filler = 0;  // 0: finished
    std::deque<Waiter> waiters;
    std::set<ClientId> users;
    uint64_t unused_since = 0;  // in ends of sessions
  };
  using Blobs = std::map<std::string, Blob>;

  absl::Status Check(ClientId session, const BlobName& name) const;
  // Drops unused blobs until one more of this size is within the limits.
  absl::Status MakeRoom(const BlobName& name);
  absl::StatusOr<BlobMemoryRef> Make(const BlobName& name);
  bool DropLongestUnused();
  void Drop(Blobs::iterator blob);
  // The filler is gone: the first waiter gets fresh memory, or all are told why there is none.
  void PassOn(Blobs::iterator blob, std::vector<BlobAnswer>& answers);

  const BlobLimits limits_;
  const MakeBlobMemory make_;
  Blobs blobs_;
  std::map<ClientId, std::string> names_;  // of each session's blob
  uint64_t bytes_ = 0;
  uint64_t ends_ = 0;
};

}  // namespace antiphon::kvstore

#endif  // ANTIPHON_KVSTORE_BLOB_SHELF_H_
