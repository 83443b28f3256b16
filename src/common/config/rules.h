// What the schema's types cannot say: ranges, enumerations, addresses, defaults, and what must hold
// between keys.
#ifndef ANTIPHON_COMMON_CONFIG_RULES_H_
#define ANTIPHON_COMMON_CONFIG_RULES_H_

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace antiphon::config::v1 {
class Config;
}

namespace antiphon {

// `path` is dotted and without indices: "models.sampling.top_p". All return INVALID_ARGUMENT whose
// text continues "PATH: "; paths without a rule are fine.
absl::Status CheckNumber(std::string_view path, double value);
absl::Status CheckText(std::string_view path, std::string_view value);
absl::Status CheckDuration(std::string_view path, absl::Duration value);
absl::Status CheckByteSize(std::string_view path, uint64_t bytes);

// Fills every key that has a default and does not depend on others.
void SetDefaults(config::v1::Config& config);
// Fills those that do (names of models, the runtime folder).
void SetDependentDefaults(config::v1::Config& config);

struct ConfigProblem {
  std::string path;
  std::string text;
};
std::vector<ConfigProblem> CheckTogether(const config::v1::Config& config);

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_CONFIG_RULES_H_
