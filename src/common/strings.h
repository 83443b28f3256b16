// Debian 12's Abseil has a string_view of its own that does not convert to or from
// std::string_view. Our interfaces take std::string_view; ToAbsl is the door to
// absl functions, ToStd the way back.
#ifndef ANTIPHON_COMMON_STRINGS_H_
#define ANTIPHON_COMMON_STRINGS_H_

#include <string_view>

#include "absl/strings/string_view.h"

namespace antiphon {

inline absl::string_view ToAbsl(std::string_view s) { return {s.data(), s.size()}; }
inline std::string_view ToStd(absl::string_view s) { return {s.data(), s.size()}; }

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_STRINGS_H_
