#include "common/config/flags.h"

#include <spdlog/fmt/fmt.h>

#include <charconv>

#include "common/logging.h"

namespace antiphon {

absl::StatusOr<DaemonFlags> ParseDaemonFlags(int argc, const char* const* argv) {
  DaemonFlags flags;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    const std::string shown = EscapeForLog(argument.substr(0, 80), false);
    if (argument == "-h") {
      flags.help = true;
      continue;
    }
    if (argument.size() < 3 || argument.substr(0, 2) != "--") {
      return absl::InvalidArgumentError(fmt::format("unexpected argument '{}'; see --help", shown));
    }
    const size_t equals = argument.find('=');
    const std::string name(
        argument.substr(2, equals == std::string_view::npos ? equals : equals - 2));
    bool* const toggle = name == "check-config"   ? &flags.check_config
                         : name == "print-config" ? &flags.print_config
                         : name == "version"      ? &flags.version
                         : name == "help"         ? &flags.help
                                                  : nullptr;
    if (toggle != nullptr) {
      if (equals != std::string_view::npos) {
        return absl::InvalidArgumentError(fmt::format("--{} takes no value", name));
      }
      *toggle = true;
      continue;
    }
    std::string value;
    if (equals != std::string_view::npos) {
      value = std::string(argument.substr(equals + 1));
    } else if (i + 1 < argc) {
      value = argv[++i];
    } else {
      return absl::InvalidArgumentError(fmt::format("{} needs a value; see --help", shown));
    }
    if (name == "config") {
      flags.source.file = value;
      flags.source.file_required = true;
    } else if (name == "node") {
      if (value.empty() || value.size() > 128 || EscapeForLog(value, true) != value ||
          value.find(' ') != std::string::npos) {
        return absl::InvalidArgumentError(
            "--node must be 1 to 128 characters without spaces, e.g. prefill-0@host");
      }
      flags.node = value;
    } else if (name == "announce-fd") {
      const auto [end, error] =
          std::from_chars(value.data(), value.data() + value.size(), flags.announce_fd);
      if (error != std::errc() || end != value.data() + value.size() || flags.announce_fd < 3) {
        return absl::InvalidArgumentError("--announce-fd needs the number of an open descriptor");
      }
    } else if (name.find('.') != std::string::npos || name == "models") {
      flags.source.flags.emplace_back(name, value);
    } else {
      return absl::InvalidArgumentError(fmt::format(
          "unknown flag '{}'; configuration keys are written --section.key=value; see --help",
          shown));
    }
  }
  return flags;
}

std::string DaemonUsage(std::string_view program) {
  return fmt::format(
      "usage: {} [flags]\n"
      "\n"
      "  --config FILE        configuration; default /etc/antiphon/antiphon.yaml when it exists\n"
      "  --section.key=value  overrides a key of the configuration, e.g. --log.level=debug\n"
      "  --node NAME          the name of this node; default {}@HOST\n"
      "  --check-config       says whether the configuration is good (exit 0 or 78)\n"
      "  --print-config       shows every value and where it came from\n"
      "  --announce-fd N      writes addresses and readiness as JSON lines to descriptor N\n"
      "  --version, --help\n"
      "\n"
      "SIGTERM drains, a second one ends at once, SIGHUP reloads.\n"
      "Exit codes: 0 ok, 1 failed, 64 usage, 65 bad model file, 69 something needed is "
      "unavailable,\n"
      "70 a bug of ours, 78 configuration.\n",
      program, program.substr(program.find('-') + 1));
}

}  // namespace antiphon
