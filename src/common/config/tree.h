// YAML as a plain tree with line numbers. Hostile input: no aliases, no tags, bounded size, depth
// and number of nodes.
#ifndef ANTIPHON_COMMON_CONFIG_TREE_H_
#define ANTIPHON_COMMON_CONFIG_TREE_H_

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"

namespace antiphon {

inline constexpr size_t kConfigBytesMax = 256 << 10;

struct ConfigTree {
  enum class Kind { kNull, kScalar, kList, kMap };
  struct Entry;
  Kind kind = Kind::kNull;
  int line = 1;
  std::string scalar;
  std::vector<ConfigTree> items;  // kList
  std::vector<Entry> entries;     // kMap, in the file's order, keys unique
};
struct ConfigTree::Entry {
  std::string key;
  int line = 1;
  ConfigTree value;
};

// INVALID_ARGUMENT "FILE:LINE: ...". Empty text is kNull.
absl::StatusOr<ConfigTree> ParseYaml(std::string_view text, std::string_view file_name);

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_CONFIG_TREE_H_
