// Memory that several processes map: a sealed memfd.
#ifndef ANTIPHON_COMMON_SHARED_MEMORY_H_
#define ANTIPHON_COMMON_SHARED_MEMORY_H_

#include <cstddef>
#include <string>

#include "absl/status/statusor.h"

namespace antiphon {

// Owns its mapping and, when it made the memory, the descriptor. The memory lives until the last
// process has unmapped and closed it.
class SharedMemory {
 public:
  // Zeroed, of whole pages, never to shrink or grow. RESOURCE_EXHAUSTED: the kernel has none.
  static absl::StatusOr<SharedMemory> Create(const std::string& name, size_t bytes);
  // All of what `fd`, which stays the caller's, refers to. INVALID_ARGUMENT: it is smaller than
  // `bytes_min`, or may shrink under us, which would be a SIGBUS.
  static absl::StatusOr<SharedMemory> Map(int fd, size_t bytes_min);
  // The same, on huge pages (MakeHugePages).
  static absl::StatusOr<SharedMemory> MapHuge(int fd, size_t bytes_min);
  // To read only, and populated. `fd` is sealed against writing too: INVALID_ARGUMENT otherwise.
  // data() must not be written to.
  static absl::StatusOr<SharedMemory> MapSealed(int fd, size_t bytes_min);

  SharedMemory() = default;
  SharedMemory(SharedMemory&& other) noexcept;
  SharedMemory& operator=(SharedMemory&& other) noexcept;
  ~SharedMemory();

  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  int fd() const { return fd_; }  // close-on-exec; -1 of a mapping

 private:
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
  int fd_ = -1;
};

// Touches shared memory on huge pages where the kernel has them: MADV_COLLAPSE (Linux 6.1) makes
// them though transparent_hugepage/shmem_enabled is never, as it is by default. That takes the time
// that page faults would. `data` and what follows are mapped at a multiple of 2 MiB; the rest of
// `bytes` past whole ones stays as it is. A hint: without it the pages are small.
void MakeHugePages(std::byte* data, size_t bytes);

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_SHARED_MEMORY_H_
