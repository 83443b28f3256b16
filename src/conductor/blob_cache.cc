#include "conductor/blob_cache.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <utility>

#include "common/block_key.h"

namespace antiphon::conductor {

std::shared_ptr<const std::string> BlobCache::Find(const std::string& digest) {
  auto it = entries_.find(digest);
  if (it == entries_.end()) return nullptr;
  it->second.used = ++uses_;
  return it->second.content;
}

absl::Status BlobCache::Put(const std::string& digest, std::string content) {
  if (entries_.contains(digest)) return absl::OkStatus();
  if (content.size() > bytes_max_) {
    return absl::ResourceExhaustedError(
        fmt::format("blob {} has {} bytes; {} are the most", digest, content.size(), bytes_max_));
  }
  if (const std::string actual = Sha256Hex(content); actual != digest) {
    return absl::DataLossError(fmt::format("blob {} arrived with the digest {}", digest, actual));
  }
  while (bytes_ + content.size() > bytes_max_) {
    auto oldest = std::min_element(
        entries_.begin(), entries_.end(),
        [](const auto& a, const auto& b) { return a.second.used < b.second.used; });
    bytes_ -= oldest->second.content->size();
    entries_.erase(oldest);
  }
  bytes_ += content.size();
  entries_[digest] = {std::make_shared<const std::string>(std::move(content)), ++uses_};
  return absl::OkStatus();
}

}  // namespace antiphon::conductor
