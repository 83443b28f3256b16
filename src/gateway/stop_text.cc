#include "gateway/stop_text.h"

#include <algorithm>
#include <utility>

namespace antiphon::gateway {

StopText::Result StopText::Push(std::string_view piece, bool armed) {
  if (matched_) return {};
  if (stops_.empty() || !armed) {
    std::string text = std::exchange(held_, {});
    text += piece;
    return {.text = std::move(text)};
  }
  const size_t old = held_.size();
  held_ += piece;
  size_t match_begin = std::string::npos;
  size_t match_end = std::string::npos;
  const std::string* match = nullptr;
  for (const std::string& stop : stops_) {
    // A match that ended within the old text would have been found then.
    const size_t from = old >= stop.size() ? old - stop.size() + 1 : 0;
    const size_t begin = held_.find(stop, from);
    if (begin == std::string::npos) continue;
    const size_t end = begin + stop.size();
    if (match == nullptr || end < match_end || (end == match_end && begin < match_begin)) {
      match_begin = begin;
      match_end = end;
      match = &stop;
    }
  }
  if (match != nullptr) {
    matched_ = true;
    held_.resize(include_ ? match_end : match_begin);
    return {.text = std::exchange(held_, {}), .match = *match};
  }
  // The longest suffix that is a proper prefix of a stop string waits.
  size_t hold = 0;
  for (const std::string& stop : stops_) {
    for (size_t n = std::min(stop.size() - 1, held_.size()); n > hold; --n) {
      if (std::string_view(held_).substr(held_.size() - n) == std::string_view(stop).substr(0, n)) {
        hold = n;
      }
    }
  }
  // A stop string cut by the hold is never in the middle of a character: stops are valid UTF-8, and
  // so is the text before the suffix that begins like one.
  std::string text = held_.substr(0, held_.size() - hold);
  held_.erase(0, held_.size() - hold);
  return {.text = std::move(text)};
}

std::string StopText::Finish() {
  if (matched_) return {};
  return std::exchange(held_, {});
}

}  // namespace antiphon::gateway
