#include "model/mapped_file.h"

#include <fcntl.h>
#include <spdlog/fmt/fmt.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

namespace antiphon::model {
namespace {

std::string IdentityOf(const struct stat& info) {
  const auto time = [](const timespec& t) { return fmt::format("{}.{:09}", t.tv_sec, t.tv_nsec); };
  return fmt::format("{:x}-{}-{}-{}-{}", info.st_dev, info.st_ino, info.st_size, time(info.st_mtim),
                     time(info.st_ctim));
}

}  // namespace

absl::StatusOr<MappedFile> MappedFile::Map(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) {
    return absl::NotFoundError(fmt::format("cannot open {}: {}", path, std::strerror(errno)));
  }
  struct stat info {};
  if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    close(fd);
    return absl::InvalidArgumentError(fmt::format("{} is not a regular file{}", path,
                                                  S_ISDIR(info.st_mode) ? " but a folder" : ""));
  }
  MappedFile file;
  file.identity_ = IdentityOf(info);
  const size_t size = static_cast<size_t>(info.st_size);
  void* mapping = size == 0 ? nullptr : mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);
  const int error = errno;
  close(fd);
  if (mapping == MAP_FAILED) {
    return absl::UnavailableError(fmt::format("cannot map {}: {}", path, std::strerror(error)));
  }
  file.bytes_ = std::string_view(static_cast<const char*>(mapping), size);
  return file;
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : bytes_(std::exchange(other.bytes_, {})), identity_(std::move(other.identity_)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(bytes_, other.bytes_);
  std::swap(identity_, other.identity_);
  return *this;
}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) munmap(const_cast<char*>(bytes_.data()), bytes_.size());
}

void MappedFile::DropPages() const {
  if (!bytes_.empty()) {
    madvise(const_cast<char*>(bytes_.data()), bytes_.size(), MADV_DONTNEED);
  }
}

}  // namespace antiphon::model
