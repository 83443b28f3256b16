// Memory that a thread is about to read, brought to its second-level cache a few lines at a time:
// while it computes what needs no memory, and while it waits for other threads.
#ifndef ANTIPHON_ENGINE_CPU_LOOK_AHEAD_H_
#define ANTIPHON_ENGINE_CPU_LOOK_AHEAD_H_

#include <cstddef>
#include <vector>

#include "engine/cpu/kernels.h"
#include "engine/pause.h"

namespace antiphon::engine::cpu {

class LookAhead {
 public:
  // Forgets what has not been fetched.
  void Clear() {
    ranges_.clear();
    at_ = 0;
  }
  void Add(const std::byte* begin, size_t bytes) {
    while (at_ < ranges_.size() && BytesOf(ranges_[at_]) == 0) ++at_;
    ranges_.push_back({begin, begin + bytes});
  }
  // Not fetched so far.
  size_t bytes() const {
    size_t bytes = 0;
    for (size_t i = at_; i < ranges_.size(); ++i) bytes += BytesOf(ranges_[i]);
    return bytes;
  }
  // For those who fetch by themselves: they move `begin` of what they have fetched. Until Add.
  MemoryRange* ranges() { return ranges_.data() + at_; }
  int count() const { return static_cast<int>(ranges_.size() - at_); }
  // Up to `lines` of it, in the order it was added. False: nothing was left. Takes its time: the
  // processor drops prefetches where too many are under way.
  bool Fetch(int lines) {
    if (at_ == ranges_.size()) return false;
    for (int fetched = 0; at_ < ranges_.size(); ++at_) {
      MemoryRange& range = ranges_[at_];
      for (; range.begin < range.end; range.begin += kLine) {
        if (fetched == lines) return true;
        __builtin_prefetch(range.begin, 0, 2);
        if (++fetched % kBurst == 0) Pause();
      }
    }
    return true;
  }

 private:
  static constexpr size_t kLine = 64;
  static constexpr int kBurst = 16;  // lines
  static size_t BytesOf(const MemoryRange& range) {
    return range.begin < range.end ? static_cast<size_t>(range.end - range.begin) : 0;
  }

  std::vector<MemoryRange> ranges_;
  size_t at_ = 0;
};

}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_LOOK_AHEAD_H_
