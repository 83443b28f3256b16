// Which device pages hold which blocks of which sequences. The device's memory is a cache of the
// host's blocks: what a step computed is in both, so a page can be taken from a sequence at any
// time and is loaded again when it is needed. Pure bookkeeping; knows nothing of CUDA.
#ifndef ANTIPHON_ENGINE_CUDA_PAGE_TABLE_H_
#define ANTIPHON_ENGINE_CUDA_PAGE_TABLE_H_

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace antiphon::engine::cuda {

class PageTable {
 public:
  // Pages are numbered from `first` to `first + count - 1`.
  PageTable(int32_t first, uint32_t count, uint32_t block_tokens);

  struct Placement {
    const int32_t* pages = nullptr;  // of the blocks of [0, end); valid until the next Place
    uint32_t load_begin = 0;         // blocks [load_begin, load_end) are to be loaded from the host
    uint32_t load_end = 0;
  };
  // A step begins: pages of sequences placed in it are not taken by others.
  void BeginStep();
  // Finds pages for positions [0, end) of a sequence, of which [0, start) exist in the host's
  // blocks; after the step [0, end) count as resident. False when there are too few pages: the step
  // cannot run, and the caller is to call AbandonStep.
  bool Place(uint64_t sequence, std::byte* const* blocks, uint32_t start, uint32_t end,
             Placement* out);
  // What the step placed holds nothing that could be trusted.
  void AbandonStep();

  uint32_t pages_total() const { return total_; }
  uint32_t pages_free() const { return static_cast<uint32_t>(free_.size()); }

 private:
  struct Resident {
    std::vector<std::byte*> blocks;
    std::vector<int32_t> pages;
    uint32_t tokens = 0;  // [0, tokens) are on the device
    uint64_t step = 0;    // the last one that used it
  };
  bool Evict();

  const uint32_t total_;
  const uint32_t block_tokens_;
  uint64_t step_ = 0;
  std::vector<int32_t> free_;
  std::unordered_map<uint64_t, Resident> residents_;
};

}  // namespace antiphon::engine::cuda

#endif  // ANTIPHON_ENGINE_CUDA_PAGE_TABLE_H_
