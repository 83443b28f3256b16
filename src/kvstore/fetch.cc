#include "kvstore/fetch.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <utility>

#include "common/status_macros.h"

namespace antiphon::kvstore {

absl::Status StreamFetch::Extend(std::vector<LayerCopy> copies) {
  if (ended_) return status_;
  uint64_t last = last_tag_;
  for (const LayerCopy& copy : copies) {
    if (copy.tag <= last) {
      return absl::InvalidArgumentError(
          fmt::format("copies.tag {} does not ascend after {}", copy.tag, last));
    }
    last = copy.tag;
  }
  if (queued_.size() + copies.size() > kQueuedMax) {
    return absl::ResourceExhaustedError(
        fmt::format("more than {} copies queued in one fetch", kQueuedMax));
  }
  last_tag_ = last;
  for (LayerCopy& copy : copies) {
    open_[copy.tag] = false;
    queued_.push_back({std::move(copy)});
  }
  return absl::OkStatus();
}

std::vector<LayerCopy> StreamFetch::TakeStarts() {
  std::vector<LayerCopy> out;
  while (!ended_ && !queued_.empty() && in_flight_.size() < kInFlightMax) {
    out.push_back(queued_.front().copy);
    in_flight_.emplace(out.back().tag, std::move(queued_.front()));
    queued_.pop_front();
  }
  return out;
}

void StreamFetch::Done(uint64_t tag, const absl::Status& status) {
  auto it = in_flight_.find(tag);
  CHECK(it != in_flight_.end());
  Flight flight = std::move(it->second);
  in_flight_.erase(it);
  if (status.ok()) {
    open_[tag] = true;
    while (!open_.empty() && open_.begin()->second) {
      done_tag_ = open_.begin()->first;
      open_.erase(open_.begin());
    }
    return;
  }
  if (absl::IsDataLoss(status) && flight.attempts == 1 && !ended_) {
    ++flight.attempts;
    queued_.push_front(std::move(flight));
    return;
  }
  End(status);
}

void StreamFetch::End(absl::Status status) {
  if (ended_) return;
  ended_ = true;
  status_ = std::move(status);
  queued_.clear();
}

std::optional<StreamFetch::Progress> StreamFetch::TakeProgress() {
  const bool tell_end = ended_ && !told_end_ && idle();
  if (done_tag_ == told_tag_ && !tell_end) return std::nullopt;
  told_tag_ = done_tag_;
  Progress progress{.done_tag = done_tag_};
  if (tell_end) {
    told_end_ = true;
    progress.status = status_;
  }
  return progress;
}

std::vector<uint32_t> PrefixFetch::TakeStarts() {
  std::vector<uint32_t> out;
  while (!ended_ && next_ < limit_ && in_flight_ < kInFlightMax) {
    state_[next_] = State::kInFlight;
    ++in_flight_;
    out.push_back(next_++);
  }
  return out;
}

void PrefixFetch::Done(uint32_t block, bool ok) {
  CHECK(state_[block] == State::kInFlight);
  --in_flight_;
  state_[block] = ok ? State::kOk : State::kBad;
  if (!ok) limit_ = std::min(limit_, block);
}

std::vector<uint32_t> PrefixFetch::TakeVerified() {
  std::vector<uint32_t> out;
  while (verified_ < limit_ && state_[verified_] == State::kOk) out.push_back(verified_++);
  return out;
}

bool PrefixFetch::finished() const { return in_flight_ == 0 && (ended_ || next_ >= limit_); }

}  // namespace antiphon::kvstore
