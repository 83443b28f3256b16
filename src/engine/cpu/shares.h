// A row of work items that threads share out among themselves: each begins with its own part, from
// the front, and whoever has ended its own takes the rear half of what another has left. So a
// thread mostly reads on where it has stopped, which memory likes, and none waits for a slow one's
// part. Items are handed out once each, in any order.
#ifndef ANTIPHON_ENGINE_CPU_SHARES_H_
#define ANTIPHON_ENGINE_CPU_SHARES_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace antiphon::engine::cpu {

class Shares {
 public:
  struct Range {
    int begin = 0;
    int end = 0;
    bool empty() const { return begin >= end; }
  };
  static constexpr int kItemsMax = (1 << 24) - 1;

  explicit Shares(int threads) : parts_(static_cast<size_t>(threads)) {}

  // What `thread` of `threads` begins with.
  static Range PartOf(int thread, int threads, int items) {
    return {static_cast<int>(int64_t{items} * thread / threads),
            static_cast<int>(int64_t{items} * (thread + 1) / threads)};
  }

  // By every thread, with the same number, at most kItemsMax; no thread may still be at the last
  // sharing out.
  void Begin(int thread, int items) {
    Part& own = parts_[static_cast<size_t>(thread)];
    ++own.uses;
    own.items = items;
    uint64_t word = own.word.load(std::memory_order_relaxed);
    // Unless another thread has already taken some of it.
    if (TagOf(word) != TagOf(own)) {
      own.word.compare_exchange_strong(word, Word(own, PartOf(thread, threads(), items)),
                                       std::memory_order_relaxed);
    }
  }

  // Up to `run` items for `thread`, which has begun; empty: there are no more to hand out.
  Range Next(int thread, int run) {
    Part& own = parts_[static_cast<size_t>(thread)];
    uint64_t word = own.word.load(std::memory_order_relaxed);
    for (Range left; !(left = RangeOf(word)).empty();) {
      const int end = std::min(left.begin + run, left.end);
      if (own.word.compare_exchange_weak(word, Word(own, {end, left.end}),
                                         std::memory_order_relaxed)) {
        return {left.begin, end};
      }
    }
    for (int i = 1; i < threads(); ++i) {
      const Range taken = TakeFrom((thread + i) % threads(), own, run);
      if (taken.empty()) continue;
      // Nobody changes a word that has nothing left but its own thread.
      const int end = std::min(taken.begin + run, taken.end);
      own.word.store(Word(own, {end, taken.end}), std::memory_order_relaxed);
      return {taken.begin, end};
    }
    return {};
  }

 private:
  // What is left of a thread's part: 16 bits of the use that it is of, 24 each of begin and end.
  // The word says all there is to know of a part, so it does no harm that one may come back.
  struct alignas(64) Part {
    std::atomic<uint64_t> word{0};
    // The owner's alone.
    uint64_t uses = 0;
    int items = 0;
  };

  int threads() const { return static_cast<int>(parts_.size()); }
  static uint64_t TagOf(uint64_t word) { return word >> 48; }
  static uint64_t TagOf(const Part& part) { return part.uses & 0xffff; }
  static uint64_t Word(const Part& part, Range left) {
    return TagOf(part) << 48 | static_cast<uint64_t>(left.begin) << 24 |
           static_cast<uint64_t>(left.end);
  }
  static Range RangeOf(uint64_t word) {
    return {static_cast<int>(word >> 24 & 0xffffff), static_cast<int>(word & 0xffffff)};
  }

  // The rear half, or all of one item. Less than a run is left to its owner, who is at it sooner.
  Range TakeFrom(int victim, const Part& thief, int run) {
    std::atomic<uint64_t>& of_victim = parts_[static_cast<size_t>(victim)].word;
    uint64_t word = of_victim.load(std::memory_order_relaxed);
    while (true) {
      // Of an earlier use: the victim has not even begun.
      const Range left =
          TagOf(word) == TagOf(thief) ? RangeOf(word) : PartOf(victim, threads(), thief.items);
      if (left.empty() || left.end - left.begin < run) return {};
      const int middle = left.begin + (left.end - left.begin) / 2;
      if (of_victim.compare_exchange_weak(word, Word(thief, {left.begin, middle}),
                                          std::memory_order_relaxed)) {
        return {middle, left.end};
      }
    }
  }

  std::vector<Part> parts_;
};

}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_SHARES_H_
