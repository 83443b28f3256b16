// A file mapped for reading.
#ifndef ANTIPHON_MODEL_MAPPED_FILE_H_
#define ANTIPHON_MODEL_MAPPED_FILE_H_

#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace antiphon::model {

// Immutable, thread-safe; moving leaves an empty one behind.
class MappedFile {
 public:
  MappedFile() = default;
  // NOT_FOUND when it cannot be opened, INVALID_ARGUMENT when it is no regular file, UNAVAILABLE
  // when it cannot be mapped; all name the path. An empty file has no bytes. Never blocks on a
  // pipe.
  static absl::StatusOr<MappedFile> Map(const std::string& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::string_view bytes() const { return bytes_; }
  // Which file this is on this host: device, inode, size and the times of its last changes, as of
  // Map.
  const std::string& identity() const { return identity_; }
  // Takes the pages out of this process's memory; what is read again comes from the page cache, or
  // from the disk.
  void DropPages() const;

 private:
  std::string_view bytes_;
  std::string identity_;
};

}  // namespace antiphon::model

#endif  // ANTIPHON_MODEL_MAPPED_FILE_H_
