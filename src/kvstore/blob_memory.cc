#include "kvstore/blob_memory.h"

#include <fcntl.h>
#include <spdlog/fmt/fmt.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "kvstore/client/blob_lease.h"

namespace antiphon::kvstore {
namespace {

constexpr int kSizeSeals = F_SEAL_SHRINK | F_SEAL_GROW;

class MemfdBlob final : public BlobMemory {
 public:
  explicit MemfdBlob(Fd fd) : fd_(std::move(fd)) {}
  int fd() const override { return fd_.get(); }
  absl::Status Seal() override {
    if (fcntl(fd(), F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SEAL) == 0) return absl::OkStatus();
    return absl::FailedPreconditionError(
        fmt::format("the blob cannot be published: {}",
                    errno == EBUSY ? "it is still mapped for writing" : std::strerror(errno)));
  }

 private:
  const Fd fd_;
};

}  // namespace

absl::StatusOr<BlobMemoryRef> MakeMemfdBlob(const std::string& name, uint64_t bytes,
                                            uint64_t available) {
  if (bytes > available) {
    return absl::ResourceExhaustedError(fmt::format(
        "a blob of {} MiB is more than can be had, {} MiB", bytes >> 20, available >> 20));
  }
  Fd fd(memfd_create(fmt::format("antiphon-{}", name.substr(0, 40)).c_str(),
                     MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (fd.get() < 0 || ftruncate(fd.get(), static_cast<off_t>(BlobMemoryBytes(bytes))) != 0 ||
      fcntl(fd.get(), F_ADD_SEALS, kSizeSeals) != 0) {
    return absl::ResourceExhaustedError(
        fmt::format("a blob of {} bytes cannot be made: {}", bytes, std::strerror(errno)));
  }
  return std::make_shared<MemfdBlob>(std::move(fd));
}

absl::StatusOr<BlobMemoryRef> AdoptMemfdBlob(Fd fd, uint64_t bytes) {
  struct stat info {};
  const int seals = fcntl(fd.get(), F_GET_SEALS);
  const int wanted = kSizeSeals | F_SEAL_WRITE;
  if (seals < 0 || (seals & wanted) != wanted || fstat(fd.get(), &info) != 0 ||
      static_cast<uint64_t>(info.st_size) != BlobMemoryBytes(bytes)) {
    return absl::InvalidArgumentError(
        fmt::format("no sealed memory of {} bytes came with the offer", bytes));
  }
  return std::make_shared<MemfdBlob>(std::move(fd));
}

}  // namespace antiphon::kvstore
