// Blobs as memfds, which the store holds and never maps.
#ifndef ANTIPHON_KVSTORE_BLOB_MEMORY_H_
#define ANTIPHON_KVSTORE_BLOB_MEMORY_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "kvstore/blob_shelf.h"
#include "kvstore/client/connection.h"

namespace antiphon::kvstore {

// Zeroed, of whole huge pages where it is larger than one, never to shrink or grow. Its pages come
// when they are first written, and are charged to the writer. RESOURCE_EXHAUSTED: it is more than
// `available` bytes, or the kernel refuses.
absl::StatusOr<BlobMemoryRef> MakeMemfdBlob(const std::string& name, uint64_t bytes,
                                            uint64_t available);

// INVALID_ARGUMENT: it is no memfd of this size that is sealed against writing.
absl::StatusOr<BlobMemoryRef> AdoptMemfdBlob(Fd fd, uint64_t bytes);

}  // namespace antiphon::kvstore

#endif  // ANTIPHON_KVSTORE_BLOB_MEMORY_H_
