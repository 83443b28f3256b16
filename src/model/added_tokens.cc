#include "model/added_tokens.h"

namespace antiphon::model {

void AddedTokens::Add(std::string_view text, uint32_t id) {
  if (text.empty() || text.size() > kTextBytesMax) return;
  uint32_t node = 0;
  for (const char c : text) {
    const auto [it, inserted] = edges_.emplace(Edge(node, c), static_cast<uint32_t>(nodes_.size()));
    if (inserted) nodes_.push_back(-1);
    node = it->second;
  }
  nodes_[node] = id;
  first_bytes_.set(static_cast<uint8_t>(text[0]));
}

std::optional<AddedTokens::Match> AddedTokens::FindFrom(std::string_view text, size_t from) const {
  for (size_t begin = from; begin < text.size(); ++begin) {
    if (!first_bytes_[static_cast<uint8_t>(text[begin])]) continue;
    std::optional<Match> longest;
    uint32_t node = 0;
    for (size_t at = begin; at < text.size(); ++at) {
      const auto it = edges_.find(Edge(node, text[at]));
      if (it == edges_.end()) break;
      node = it->second;
      if (nodes_[node] >= 0) longest = Match{begin, at + 1, static_cast<uint32_t>(nodes_[node])};
    }
    if (longest) return longest;
  }
  return std::nullopt;
}

int64_t AddedTokens::Find(std::string_view text) const {
  uint32_t node = 0;
  for (const char c : text) {
    const auto it = edges_.find(Edge(node, c));
    if (it == edges_.end()) return -1;
    node = it->second;
  }
  return text.empty() ? -1 : nodes_[node];
}

}  // namespace antiphon::model
