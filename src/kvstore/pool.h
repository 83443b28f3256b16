// The memory of the store: a memfd that workers map, touched before use so that it is charged to
// the store.
#ifndef ANTIPHON_KVSTORE_POOL_H_
#define ANTIPHON_KVSTORE_POOL_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/shared_memory.h"

namespace antiphon::kvstore {

class Pool {
 public:
  // `bytes`: rounded down to 2 MiB. RESOURCE_EXHAUSTED: that much memory cannot be had now (both
  // sizes in the text); INVALID_ARGUMENT: less than 2 MiB.
  static absl::StatusOr<std::unique_ptr<Pool>> Create(uint64_t bytes);
  ~Pool();

  // Touches every page, huge ones where the kernel allows. Blocks; ends early once `stop` is set.
  // RESOURCE_EXHAUSTED: the kernel has no more.
  absl::Status Populate(const std::atomic<bool>& stop);
  // Of Populate; any thread.
  uint64_t populated_bytes() const { return populated_.load(std::memory_order_relaxed); }

  absl::Span<std::byte> memory() const { return {memory_.data(), memory_.bytes()}; }
  int fd() const { return fd_; }

 private:
  Pool(int fd, SharedMemory memory) : fd_(fd), memory_(std::move(memory)) {}
  const int fd_;
  const SharedMemory memory_;
  std::atomic<uint64_t> populated_{0};
};

}  // namespace antiphon::kvstore

#endif  // ANTIPHON_KVSTORE_POOL_H_
