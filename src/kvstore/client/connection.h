// What the ends of the store's Unix socket that workers hold are made of: blocking calls with a
// deadline on a socket that does not block.
#ifndef ANTIPHON_KVSTORE_CLIENT_CONNECTION_H_
#define ANTIPHON_KVSTORE_CLIENT_CONNECTION_H_

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/wire.h"
#include "kvstore/client/framing.h"

namespace antiphon::internal::v1 {
class StoreReply;
}

namespace antiphon::kvstore {

// Owns a descriptor; -1: none.
class Fd {
 public:
  explicit Fd(int fd = -1) : fd_(fd) {}
  Fd(Fd&& other) noexcept;
  Fd& operator=(Fd&& other) noexcept;
  ~Fd();
  int get() const { return fd_; }

 private:
  int fd_;
};

// INVALID_ARGUMENT: the path is empty or too long; UNAVAILABLE: nobody listens there.
absl::StatusOr<Fd> ConnectToStore(const std::string& path);
// UNAVAILABLE: the deadline passed, or the other end is gone. `passed`: a descriptor, or -1.
absl::Status SendAll(int socket, std::string_view bytes, int passed, absl::Time deadline);
// The next reply, and what descriptors came until then; they are the caller's. UNAVAILABLE as
// above; INTERNAL: it cannot be read.
absl::StatusOr<wire::StoreReply> AwaitReply(int socket, FrameCutter& cutter, absl::Time deadline,
                                            std::vector<int>& fds);
absl::Status StatusOf(const wire::StoreReply& reply);

}  // namespace antiphon::kvstore

#endif  // ANTIPHON_KVSTORE_CLIENT_CONNECTION_H_
