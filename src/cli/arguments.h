// The command line of a subcommand, before it means anything.
#ifndef ANTIPHON_CLI_ARGUMENTS_H_
#define ANTIPHON_CLI_ARGUMENTS_H_

#include <map>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"

namespace antiphon::cli {

struct Syntax {
  std::vector<std::string_view> values;    // flags with a value, without dashes: "model"
  std::vector<std::string_view> switches;  // flags without one
  bool config_keys = false;                // --section.key=value is accepted
  size_t positional_max = 0;
};

struct Arguments {
  std::map<std::string, std::string> values;
  std::set<std::string> switches;
  std::vector<std::pair<std::string, std::string>> config_keys;
  std::vector<std::string> positional;

  bool Has(const std::string& name) const { return values.count(name) > 0; }
  std::string Get(const std::string& name, std::string_view otherwise = "") const {
    const auto it = values.find(name);
    return it == values.end() ? std::string(otherwise) : it->second;
  }
};

// "-o X" is --output X; "--" ends flags. INVALID_ARGUMENT names the argument and the nearest flag.
absl::StatusOr<Arguments> ParseArguments(const std::vector<std::string>& arguments,
                                         const Syntax& syntax);
// A whole number from `min` to `max`. INVALID_ARGUMENT names the flag.
absl::StatusOr<int> IntFlag(const Arguments& arguments, const std::string& name, int otherwise,
                            int min, int max);

}  // namespace antiphon::cli

#endif  // ANTIPHON_CLI_ARGUMENTS_H_
