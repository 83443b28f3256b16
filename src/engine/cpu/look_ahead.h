// Memory that a thread is about to read, brought to its second-level cache a few lines at a time:
// while it computes what needs no memory, and while it waits for other threads.
#ifndef ANTIPHON_ENGINE_CPU_LOOK_AHEAD_H_
#define ANTIPHON_ENGINE_CPU_LOOK_AHEAD_H_

#include <cstddef>
#include <vector>

#include "engine/pause.h"

namespace antiphon::engine::cpu {

class LookAhead {
 public:
  // Forgets what has not been fetched.
  void Clear() {
    ranges_.clear();
    at_ = 0;
    bytes_ = 0;
  }
  void Add(const std::byte* begin, size_t bytes) {
    ranges_.push_back({begin, begin + bytes});
    bytes_ += bytes;
  }
  size_t bytes() const { return bytes_; }  // added since Clear
  // Up to `lines` of it, in the order it was added. False: nothing was left. Takes its time: the
  // processor drops prefetches where too many are under way.
  bool Fetch(int lines) {
    if (at_ == ranges_.size()) return false;
    for (int fetched = 0; at_ < ranges_.size(); ++at_) {
      Range& range = ranges_[at_];
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
  struct Range {
    const std::byte* begin;
    const std::byte* end;
  };
  std::vector<Range> ranges_;
  size_t at_ = 0;
  size_t bytes_ = 0;
};

}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_LOOK_AHEAD_H_
