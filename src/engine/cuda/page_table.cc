#include "engine/cuda/page_table.h"

#include <algorithm>

namespace antiphon::engine::cuda {

PageTable::PageTable(int32_t first, uint32_t count, uint32_t block_tokens)
    : total_(count), block_tokens_(block_tokens) {
  free_.reserve(count);
  for (uint32_t i = count; i > 0; --i) free_.push_back(first + static_cast<int32_t>(i) - 1);
}

void PageTable::BeginStep() { ++step_; }

bool PageTable::Place(uint64_t sequence, std::byte* const* blocks, uint32_t start, uint32_t end,
                      Placement* out) {
  Resident& resident = residents_[sequence];
  resident.step = step_;
  const uint32_t needed = (end + block_tokens_ - 1) / block_tokens_;
  // A block that moved, and all behind it, is not what the page holds.
  const size_t known = std::min<size_t>(resident.blocks.size(), needed);
  const auto differs = std::mismatch(
      resident.blocks.begin(), resident.blocks.begin() + static_cast<ptrdiff_t>(known), blocks);
  const auto same = static_cast<uint32_t>(differs.first - resident.blocks.begin());
  const uint32_t valid = std::min({resident.tokens, start, same * block_tokens_});
  while (resident.pages.size() > needed) {
    free_.push_back(resident.pages.back());
    resident.pages.pop_back();
  }
  resident.tokens = 0;  // until all is placed
  while (resident.pages.size() < needed) {
    while (free_.empty()) {
      if (!Evict()) return false;  // one that held no page frees none
    }
    resident.pages.push_back(free_.back());
    free_.pop_back();
  }
  resident.blocks.assign(blocks, blocks + needed);
  resident.tokens = end;
  out->pages = resident.pages.data();
  out->load_begin = valid / block_tokens_;
  out->load_end = valid == start ? out->load_begin : (start + block_tokens_ - 1) / block_tokens_;
  return true;
}

void PageTable::AbandonStep() {
  for (auto& [sequence, resident] : residents_) {
    if (resident.step == step_) resident.tokens = 0;
  }
}

bool PageTable::Evict() {
  auto oldest = residents_.end();
  for (auto it = residents_.begin(); it != residents_.end(); ++it) {
    if (it->second.step == step_) continue;
    if (oldest == residents_.end() || it->second.step < oldest->second.step) oldest = it;
  }
  if (oldest == residents_.end()) return false;
  free_.insert(free_.end(), oldest->second.pages.begin(), oldest->second.pages.end());
  residents_.erase(oldest);
  return true;
}

}  // namespace antiphon::engine::cuda
