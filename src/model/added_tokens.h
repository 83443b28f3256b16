// Added tokens (control and user-defined): found in the text before anything else is done to it,
// leftmost first, longest among those that start at one place.
#ifndef ANTIPHON_MODEL_ADDED_TOKENS_H_
#define ANTIPHON_MODEL_ADDED_TOKENS_H_

#include <bitset>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"

namespace antiphon::model {

// Immutable once filled; thread-safe then.
class AddedTokens {
 public:
  static constexpr size_t kTextBytesMax = 256;  // bounds the search: O(text * kTextBytesMax)

  struct Match {
    size_t begin;
    size_t end;
    uint32_t id;
  };

  // `text` has 1 to kTextBytesMax bytes. A later token of the same text wins.
  void Add(std::string_view text, uint32_t id);
  std::optional<Match> FindFrom(std::string_view text, size_t from) const;
  // The token of exactly this text; -1: none.
  int64_t Find(std::string_view text) const;

 private:
  static uint64_t Edge(uint32_t node, char c) {
    return static_cast<uint64_t>(node) << 8 | static_cast<uint8_t>(c);
  }

  std::vector<int64_t> nodes_ = {-1};  // id of the token that ends here; -1: none
  absl::flat_hash_map<uint64_t, uint32_t> edges_;
  std::bitset<256> first_bytes_;
};

}  // namespace antiphon::model

#endif  // ANTIPHON_MODEL_ADDED_TOKENS_H_
