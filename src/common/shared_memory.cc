#include "common/shared_memory.h"

#include <fcntl.h>
#include <spdlog/fmt/fmt.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <utility>

#include "common/status_macros.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22  // Linux 5.14
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1
#endif

namespace antiphon {
namespace {

constexpr size_t kHugePage = 2 << 20;

absl::StatusOr<size_t> SizeOf(int fd, size_t bytes_min, int seals_wanted) {
  struct stat info;
  if (fstat(fd, &info) != 0) {
    return absl::InvalidArgumentError(fmt::format("no shared memory: {}", std::strerror(errno)));
  }
  const size_t bytes = static_cast<size_t>(info.st_size);
  if (bytes < bytes_min || bytes == 0) {
    return absl::InvalidArgumentError(
        fmt::format("the shared memory has {} bytes, {} are needed", bytes, bytes_min));
  }
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & seals_wanted) != seals_wanted) {
    return absl::InvalidArgumentError(
        "the shared memory is not sealed: it might shrink, or change");
  }
  return bytes;
}

// At a multiple of a huge page, so that huge pages can be mapped as such.
absl::StatusOr<std::byte*> MapAligned(int fd, size_t bytes, int protection, int flags) {
  const auto failed = [&] {
    return absl::ResourceExhaustedError(
        fmt::format("{} bytes of shared memory cannot be mapped: {}", bytes, std::strerror(errno)));
  };
  const size_t reserved = bytes + kHugePage;
  void* space = mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (space == MAP_FAILED) return failed();
  std::byte* const begin = static_cast<std::byte*>(space);
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(space) % kHugePage) % kHugePage;
  std::byte* const data = begin + before;
  if (mmap(data, bytes, protection, flags | MAP_FIXED, fd, 0) == MAP_FAILED) {
    const absl::Status status = failed();
    munmap(space, reserved);
    return status;
  }
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  std::byte* const end = data + (bytes + page - 1) / page * page;
  if (before > 0) munmap(begin, before);
  if (end < begin + reserved) munmap(end, static_cast<size_t>(begin + reserved - end));
  return data;
}

}  // namespace

absl::StatusOr<SharedMemory> SharedMemory::Create(const std::string& name, size_t bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  bytes = (bytes + page - 1) / page * page;
  const auto failed = [&] {
    return absl::ResourceExhaustedError(
        fmt::format("{} bytes of shared memory cannot be made: {}", bytes, std::strerror(errno)));
  };
  SharedMemory memory;
  memory.fd_ = memfd_create(name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (memory.fd_ < 0 || ftruncate(memory.fd_, static_cast<off_t>(bytes)) != 0 ||
      fcntl(memory.fd_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    return failed();
  }
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory.fd_, 0);
  if (data == MAP_FAILED) return failed();
  memory.data_ = static_cast<std::byte*>(data);
  memory.bytes_ = bytes;
  return memory;
}

absl::StatusOr<SharedMemory> SharedMemory::Map(int fd, size_t bytes_min) {
  ASSIGN_OR_RETURN(const size_t bytes, SizeOf(fd, bytes_min, F_SEAL_SHRINK));
  SharedMemory memory;
  ASSIGN_OR_RETURN(memory.data_, MapAligned(fd, bytes, PROT_READ | PROT_WRITE, MAP_SHARED));
  memory.bytes_ = bytes;
  return memory;
}

absl::StatusOr<SharedMemory> SharedMemory::MapHuge(int fd, size_t bytes_min) {
  ASSIGN_OR_RETURN(SharedMemory memory, Map(fd, bytes_min));
  MakeHugePages(memory.data_, memory.bytes_);
  return memory;
}

void MakeHugePages(std::byte* data, size_t bytes) {
  const size_t whole = bytes / kHugePage * kHugePage;
  if (whole == 0 || madvise(data, whole, MADV_HUGEPAGE) != 0) return;
  // Collapses only what has a page.
  for (size_t at = 0; at < whole; at += kHugePage) {
    volatile std::byte& touched = data[at];
    touched = touched;
  }
  madvise(data, whole, MADV_COLLAPSE);
}

absl::StatusOr<SharedMemory> SharedMemory::MapSealed(int fd, size_t bytes_min) {
  ASSIGN_OR_RETURN(const size_t bytes, SizeOf(fd, bytes_min, F_SEAL_SHRINK | F_SEAL_WRITE));
  SharedMemory memory;
  // Private: kernels before 6.7 refuse shared mappings of what is sealed against writing. Nobody
  // writes, so nothing is copied.
  ASSIGN_OR_RETURN(memory.data_, MapAligned(fd, bytes, PROT_READ, MAP_PRIVATE));
  memory.bytes_ = bytes;
  madvise(memory.data_, bytes, MADV_HUGEPAGE);
  madvise(memory.data_, bytes, MADV_POPULATE_READ);
  return memory;
}

SharedMemory::SharedMemory(SharedMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      fd_(std::exchange(other.fd_, -1)) {}

SharedMemory& SharedMemory::operator=(SharedMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(fd_, other.fd_);
  return *this;
}

SharedMemory::~SharedMemory() {
  if (data_ != nullptr) munmap(data_, bytes_);
  if (fd_ >= 0) close(fd_);
}

}  // namespace antiphon
