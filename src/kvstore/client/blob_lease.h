// A worker's hold on a blob of its host's store (store.proto OpenBlob): memory that one worker
// fills and the others, and later ones, only read.
#ifndef ANTIPHON_KVSTORE_CLIENT_BLOB_LEASE_H_
#define ANTIPHON_KVSTORE_CLIENT_BLOB_LEASE_H_

#include <atomic>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/wire.h"
#include "kvstore/client/connection.h"

namespace antiphon::kvstore {

// Size of the memory of a blob: whole huge pages of 2 MiB, or less than one.
constexpr uint64_t BlobMemoryBytes(uint64_t bytes) {
  constexpr uint64_t kHugePage = 2 << 20;
  return bytes < kHugePage ? bytes : (bytes + kHugePage - 1) / kHugePage * kHugePage;
}

struct BlobOptions {
  std::string socket_path;
  Identity self;
  std::string name;   // 1 to 500 bytes
  std::string model;  // likewise: unused blobs of other models are dropped to make room
  uint64_t bytes = 0;
  absl::Duration connect_patience = absl::Seconds(3);  // for a store that starts meanwhile
  absl::Duration fill_patience = absl::Seconds(60);    // for another worker that fills
};

// Not thread-safe. Its connection tells the store that the blob is in use. The memory lives on,
// where it is mapped, when store or lease end.
class BlobLease {
 public:
  // Blocks until the blob is there or is ours to fill, at most both patiences. UNAVAILABLE: no
  // store, one that hung, or a filler that did not end in time; FAILED_PRECONDITION: as store.proto
  // says, or a store that knows no blobs and asks for an attachment; RESOURCE_EXHAUSTED: as
  // store.proto says.
  static absl::StatusOr<BlobLease> Open(const BlobOptions& options);
  // Hands a finished blob, of a lease whose store is gone, to the store that came after it.
  static absl::StatusOr<BlobLease> Offer(const BlobOptions& options, int fd);

  bool fill() const { return fill_; }
  int fd() const { return memfd_.get(); }
  // Of the store that this is a lease of.
  uint64_t store_incarnation() const { return store_incarnation_; }
  // After a fill, when the memory is mapped for writing nowhere. Whatever it returns, the memory
  // can be mapped and read; when it is not OK, others do not get it.
  absl::Status Publish();

 private:
  BlobLease(Fd socket, Fd memfd) : socket_(std::move(socket)), memfd_(std::move(memfd)) {}
  Fd socket_;
  Fd memfd_;
  FrameCutter cutter_;
  bool fill_ = false;
  uint64_t store_incarnation_ = 0;
};

}  // namespace antiphon::kvstore

#endif  // ANTIPHON_KVSTORE_CLIENT_BLOB_LEASE_H_
