// What an operator may have meant by a key that does not exist.
#ifndef ANTIPHON_COMMON_CONFIG_SPELLING_H_
#define ANTIPHON_COMMON_CONFIG_SPELLING_H_

#include <string>
#include <string_view>

namespace google::protobuf {
class Descriptor;
}

namespace antiphon {

// Insertions, deletions, replacements and swaps of neighbours that turn `a` into `b`.
int EditDistance(std::string_view a, std::string_view b);

// The dotted path of the key nearest to `key`: a sibling in `section` (found at path `parent`) when
// one is near, else a key of exactly that name elsewhere below `root`; empty when there is neither.
std::string NearestKey(const google::protobuf::Descriptor& root,
                       const google::protobuf::Descriptor& section, std::string_view parent,
                       std::string_view key);

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_CONFIG_SPELLING_H_
