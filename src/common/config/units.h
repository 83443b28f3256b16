// Durations and sizes as text and in the configuration's messages. Parsing is in common/config.h.
#ifndef ANTIPHON_COMMON_CONFIG_UNITS_H_
#define ANTIPHON_COMMON_CONFIG_UNITS_H_

#include <cstdint>
#include <string>

#include "absl/time/time.h"

namespace google::protobuf {
class Duration;
}

namespace antiphon {

// "off" in a google.protobuf.Duration: its largest value, 10,000 years.
inline constexpr int64_t kOffSeconds = 315'576'000'000;

void FromDuration(absl::Duration d, google::protobuf::Duration& out);
std::string DurationText(const google::protobuf::Duration& d);  // "30s", "250ms", "off"
std::string ByteSizeText(uint64_t bytes);                       // "8GiB"

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_CONFIG_UNITS_H_
