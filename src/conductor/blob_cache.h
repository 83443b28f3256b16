// Tokenizers and chat templates by the SHA-256 of their bytes. Obtained from workers, served to
// gateways, so that only workers need the model's files.
#ifndef ANTIPHON_CONDUCTOR_BLOB_CACHE_H_
#define ANTIPHON_CONDUCTOR_BLOB_CACHE_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "absl/status/status.h"

namespace antiphon::conductor {

// Not thread-safe; contents are shared and immutable.
class BlobCache {
 public:
  explicit BlobCache(size_t bytes_max) : bytes_max_(bytes_max) {}

  // Null when absent.
  std::shared_ptr<const std::string> Find(const std::string& digest);
  // DATA_LOSS when the content's digest is another; RESOURCE_EXHAUSTED when it is larger than the
  // cache. Makes room by dropping what was not used for longest.
  absl::Status Put(const std::string& digest, std::string content);
  size_t bytes() const { return bytes_; }

 private:
  struct Entry {
    std::shared_ptr<const std::string> content;
    uint64_t used = 0;
  };
  const size_t bytes_max_;
  size_t bytes_ = 0;
  uint64_t uses_ = 0;
  std::map<std::string, Entry> entries_;  // a handful
};

}  // namespace antiphon::conductor

#endif  // ANTIPHON_CONDUCTOR_BLOB_CACHE_H_
