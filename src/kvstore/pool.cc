#include "kvstore/pool.h"

#include <fcntl.h>
#include <spdlog/fmt/fmt.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

#include "common/memory.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif

namespace antiphon::kvstore {
namespace {

constexpr uint64_t kHugePage = 2 << 20;
constexpr uint64_t kPopulateStep = 64 << 20;
// Left for the daemon itself: index, buffers, gRPC.
constexpr uint64_t kOwnBytes = 64 << 20;

}  // namespace

absl::StatusOr<std::unique_ptr<Pool>> Pool::Create(uint64_t bytes) {
  bytes = bytes / kHugePage * kHugePage;
  if (bytes == 0) {
    return absl::InvalidArgumentError("kvstore.pool is less than 2MiB; make it larger");
  }
  const uint64_t available = MemoryAvailableBytes();
  if (bytes + kOwnBytes > available) {
    return absl::ResourceExhaustedError(fmt::format(
        "kvstore.pool is {} MiB but only {} MiB of memory can be had now (machine and cgroup "
        "limits); make kvstore.pool smaller or free memory",
        bytes >> 20, available >> 20));
  }
  const int fd = memfd_create("antiphon-kv", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) return absl::UnavailableError(fmt::format("memfd_create: {}", std::strerror(errno)));
  // Sealed: a worker that shrank it would kill us with SIGBUS.
  absl::StatusOr<SharedMemory> memory = absl::UnknownError("");
  if (ftruncate(fd, static_cast<off_t>(bytes)) != 0 ||
      fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    memory = absl::UnavailableError(std::strerror(errno));
  } else {
    memory = SharedMemory::Map(fd, bytes);
  }
  if (!memory.ok()) {
    close(fd);
    return absl::ResourceExhaustedError(fmt::format("a pool of {} MiB cannot be made: {}",
                                                    bytes >> 20,
                                                    std::string(memory.status().message())));
  }
  madvise(memory->data(), bytes, MADV_DONTDUMP);
  return std::unique_ptr<Pool>(new Pool(fd, *std::move(memory)));
}

Pool::~Pool() { close(fd_); }

absl::Status Pool::Populate(const std::atomic<bool>& stop) {
  const size_t bytes = memory_.bytes();
  for (size_t at = 0; at < bytes && !stop.load(std::memory_order_relaxed); at += kPopulateStep) {
    const size_t step = std::min<size_t>(kPopulateStep, bytes - at);
    MakeHugePages(memory_.data() + at, step);
    if (madvise(memory_.data() + at, step, MADV_POPULATE_WRITE) != 0) {
      if (errno != EINVAL) {
        return absl::ResourceExhaustedError(
            fmt::format("the kernel gave {} of {} MiB for kvstore.pool and no more: {}; make "
                        "kvstore.pool smaller",
                        at >> 20, bytes >> 20, std::strerror(errno)));
      }
      // An old kernel: touch by hand.
      for (size_t page = 0; page < step; page += 4096) {
        *reinterpret_cast<volatile char*>(memory_.data() + at + page) = 0;
      }
    }
    populated_.store(at + step, std::memory_order_relaxed);
  }
  return absl::OkStatus();
}

}  // namespace antiphon::kvstore
