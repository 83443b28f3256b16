#include "common/memory.h"

#include <malloc.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <optional>
#include <string>

namespace antiphon {
namespace {

constexpr uint64_t kNone = std::numeric_limits<uint64_t>::max();

uint64_t MemInfoBytes(const std::string& key) {
  std::ifstream in("/proc/meminfo");
  for (std::string line; std::getline(in, line);) {
    if (line.rfind(key + ":", 0) == 0) {
      return std::strtoull(line.c_str() + key.size() + 1, nullptr, 10) * 1024;
    }
  }
  return kNone;
}

std::optional<uint64_t> ReadNumber(const std::string& path) {
  std::ifstream in(path);
  std::string text;
  if (!(in >> text) || text == "max") return std::nullopt;
  return std::strtoull(text.c_str(), nullptr, 10);
}

// memory.stat's inactive_file: page cache that the kernel gives back before anything is killed.
uint64_t ReclaimableBytes(const std::string& group) {
  std::ifstream in(group + "/memory.stat");
  for (std::string key, value; in >> key >> value;) {
    if (key == "inactive_file") return std::strtoull(value.c_str(), nullptr, 10);
  }
  return 0;
}

struct Limits {
  uint64_t limit = kNone;
  uint64_t available = kNone;
};

// Of the cgroup v2 that we are in and of all above it.
Limits CgroupLimits() {
  Limits limits;
  std::ifstream in("/proc/self/cgroup");
  for (std::string line; std::getline(in, line);) {
    if (line.rfind("0::", 0) != 0) continue;
    std::string path = line.substr(3);
    while (true) {
      const std::string group = "/sys/fs/cgroup" + (path == "/" ? "" : path);
      if (const auto max = ReadNumber(group + "/memory.max")) {
        limits.limit = std::min(limits.limit, *max);
        const uint64_t used = ReadNumber(group + "/memory.current").value_or(0);
        const uint64_t held = used - std::min(used, ReclaimableBytes(group));
        limits.available = std::min(limits.available, *max - std::min(*max, held));
      }
      if (path.empty() || path == "/") break;
      path.resize(path.rfind('/'));
    }
  }
  // cgroup v1 shows a huge number when there is no limit, which the minimum ignores.
  if (const auto v1 = ReadNumber("/sys/fs/cgroup/memory/memory.limit_in_bytes")) {
    limits.limit = std::min(limits.limit, *v1);
  }
  return limits;
}

}  // namespace

uint64_t MemoryLimitBytes() { return std::min(MemInfoBytes("MemTotal"), CgroupLimits().limit); }

uint64_t MemoryAvailableBytes() {
  return std::min(MemInfoBytes("MemAvailable"), CgroupLimits().available);
}

void FreeLargeBuffersAtOnce() {
#ifdef __GLIBC__
  mallopt(M_MMAP_THRESHOLD, 256 << 10);
#endif
}

void ReturnFreeMemory() {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
}

uint64_t DefaultPoolBytes() {
  constexpr uint64_t kHugePage = 2 << 20;
  const uint64_t quarter = std::min(MemoryLimitBytes() / 4, uint64_t{8} << 30);
  return std::max(quarter / kHugePage, uint64_t{1}) * kHugePage;
}

}  // namespace antiphon
