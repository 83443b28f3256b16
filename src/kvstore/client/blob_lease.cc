#include "kvstore/client/blob_lease.h"

#include <fcntl.h>
#include <poll.h>
#include <spdlog/fmt/fmt.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <utility>
#include <vector>

#include "antiphon/v1/store.pb.h"
#include "common/clock.h"
#include "common/status_macros.h"

namespace antiphon::kvstore {
namespace {

constexpr absl::Duration kAnswer = absl::Seconds(5);  // of a store that need not wait for others
constexpr int kRetryMillis = 10;

absl::StatusOr<Fd> ConnectPatiently(const BlobOptions& options) {
  const absl::Time deadline = Clock::Real().Now() + options.connect_patience;
  while (true) {
    auto socket = ConnectToStore(options.socket_path);
    if (!absl::IsUnavailable(socket.status()) || Clock::Real().Now() >= deadline) return socket;
    poll(nullptr, 0, kRetryMillis);
  }
}

// What only this process fills need not be sealed by a store; an old one that does not answer to
// its name is none of ours.
absl::Status CheckMemory(int fd, bool fill, uint64_t bytes) {
  struct stat info {};
  const int seals = fcntl(fd, F_GET_SEALS);
  const int wanted = F_SEAL_SHRINK | F_SEAL_GROW | (fill ? 0 : F_SEAL_WRITE);
  if (fd < 0 || seals < 0 || (seals & wanted) != wanted || fstat(fd, &info) != 0 ||
      static_cast<uint64_t>(info.st_size) < bytes) {
    return absl::InternalError("the store's blob is not sealed, or of another size");
  }
  return absl::OkStatus();
}

template <typename Request>
void Describe(const BlobOptions& options, Request& request) {
  *request.mutable_hello() = MakeHello(options.self);
  request.set_name(options.name);
  request.set_model(options.model);
  request.set_bytes(options.bytes);
}

absl::StatusOr<wire::StoreReply> Ask(int socket, FrameCutter& cutter,
                                     const wire::StoreRequest& request, int passed,
                                     absl::Duration patience, Fd& came) {
  const absl::Time deadline = Clock::Real().Now() + patience;
  RETURN_IF_ERROR(SendAll(socket, EncodeFrame(request), passed, deadline));
  std::vector<int> fds;
  auto reply = AwaitReply(socket, cutter, deadline, fds);
  if (!fds.empty()) came = Fd(fds[0]);
  for (size_t i = 1; i < fds.size(); ++i) close(fds[i]);
  RETURN_IF_ERROR(reply.status());
  RETURN_IF_ERROR(StatusOf(*reply));
  return reply;
}

}  // namespace

absl::StatusOr<BlobLease> BlobLease::Open(const BlobOptions& options) {
  ASSIGN_OR_RETURN(Fd socket, ConnectPatiently(options));
  BlobLease lease(std::move(socket), Fd());
  wire::StoreRequest request;
  request.set_id(1);
  Describe(options, *request.mutable_open_blob());
  ASSIGN_OR_RETURN(const wire::StoreReply reply,
                   Ask(lease.socket_.get(), lease.cutter_, request, -1,
                       kAnswer + options.fill_patience, lease.memfd_));
  if (!reply.has_blob()) return absl::InternalError("the store's answer has no blob");
  RETURN_IF_ERROR(Negotiate(options.self, reply.blob().hello()).status());
  lease.fill_ = reply.blob().fill();
  lease.store_incarnation_ = reply.blob().hello().incarnation();
  RETURN_IF_ERROR(CheckMemory(lease.fd(), lease.fill_, options.bytes));
  return lease;
}

absl::StatusOr<BlobLease> BlobLease::Offer(const BlobOptions& options, int fd) {
  ASSIGN_OR_RETURN(Fd socket, ConnectPatiently(options));
  BlobLease lease(std::move(socket), Fd(fcntl(fd, F_DUPFD_CLOEXEC, 3)));
  wire::StoreRequest request;
  request.set_id(1);
  Describe(options, *request.mutable_offer_blob());
  Fd none;
  ASSIGN_OR_RETURN(const wire::StoreReply reply,
                   Ask(lease.socket_.get(), lease.cutter_, request, lease.fd(), kAnswer, none));
  lease.store_incarnation_ = reply.blob().hello().incarnation();
  return lease;
}

absl::Status BlobLease::Publish() {
  // Also without the store, to which it may be offered later.
  if (fcntl(memfd_.get(), F_ADD_SEALS, F_SEAL_WRITE) != 0 && errno == EBUSY) {
    return absl::FailedPreconditionError("the blob is still mapped for writing");
  }
  wire::StoreRequest request;
  request.set_id(2);
  request.mutable_publish_blob();
  Fd none;
  return Ask(socket_.get(), cutter_, request, -1, kAnswer, none).status();
}

}  // namespace antiphon::kvstore
