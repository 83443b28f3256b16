#include "cli/arguments.h"

#include <algorithm>
#include <charconv>

#include "common/config/spelling.h"
#include "common/logging.h"

namespace antiphon::cli {
namespace {

bool Contains(const std::vector<std::string_view>& names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

absl::Status Unknown(const std::string& name, const Syntax& syntax) {
  std::string_view nearest;
  int best = 3;
  for (const auto& names : {syntax.values, syntax.switches}) {
    for (std::string_view candidate : names) {
      const int distance = EditDistance(name.substr(0, 64), candidate);
      if (distance < best) {
        best = distance;
        nearest = candidate;
      }
    }
  }
  const std::string shown = EscapeForLog(name.substr(0, 64), false);
  return absl::InvalidArgumentError(
      nearest.empty() ? fmt::format("unknown flag --{}", shown)
                      : fmt::format("unknown flag --{}; did you mean --{}?", shown, nearest));
}

}  // namespace

absl::StatusOr<Arguments> ParseArguments(const std::vector<std::string>& arguments,
                                         const Syntax& syntax) {
  Arguments out;
  bool flags_ended = false;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    if (argument == "--" && !flags_ended) {
      flags_ended = true;
      continue;
    }
    const bool output = argument == "-o" && !flags_ended;
    if (!output && (flags_ended || argument.size() < 3 || argument.compare(0, 2, "--") != 0)) {
      if (!flags_ended && argument.size() > 1 && argument[0] == '-') {
        return absl::InvalidArgumentError(
            fmt::format("unknown flag {}", EscapeForLog(argument.substr(0, 64), false)));
      }
      if (out.positional.size() >= syntax.positional_max) {
        return absl::InvalidArgumentError(
            fmt::format("unexpected argument '{}'", EscapeForLog(argument.substr(0, 64), false)));
      }
      out.positional.push_back(argument);
      continue;
    }
    const size_t equals = output ? std::string::npos : argument.find('=');
    const std::string name =
        output ? "output" : argument.substr(2, equals == std::string::npos ? equals : equals - 2);
    if (Contains(syntax.switches, name)) {
      if (equals != std::string::npos) {
        return absl::InvalidArgumentError(fmt::format("--{} takes no value", name));
      }
      out.switches.insert(name);
      continue;
    }
    const bool config_key =
        syntax.config_keys && (name.find('.') != std::string::npos || name == "models");
    if (!config_key && !Contains(syntax.values, name)) return Unknown(name, syntax);
    std::string value;
    if (equals != std::string::npos) {
      value = argument.substr(equals + 1);
    } else if (i + 1 < arguments.size()) {
      value = arguments[++i];
    } else {
      return absl::InvalidArgumentError(fmt::format("--{} needs a value", name));
    }
    if (config_key) {
      out.config_keys.emplace_back(name, value);
    } else {
      out.values[name] = value;
    }
  }
  return out;
}

absl::StatusOr<int> IntFlag(const Arguments& arguments, const std::string& name, int otherwise,
                            int min, int max) {
  const auto it = arguments.values.find(name);
  if (it == arguments.values.end()) return otherwise;
  int value = 0;
  const char* end = it->second.data() + it->second.size();
  const auto [stop, error] = std::from_chars(it->second.data(), end, value);
  if (error != std::errc() || stop != end || value < min || value > max) {
    return absl::InvalidArgumentError(
        fmt::format("--{} must be a whole number from {} to {}", name, min, max));
  }
  return value;
}

}  // namespace antiphon::cli
