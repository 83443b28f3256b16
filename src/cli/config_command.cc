#include <cstdio>

#include "cli/arguments.h"
#include "cli/commands.h"
#include "common/config.h"
#include "common/daemon.h"
#include "common/logging.h"

namespace antiphon::cli {

int RunConfig(const CommandArguments& arguments) {
  const auto parsed = ParseArguments(
      arguments,
      {.values = {"config"}, .switches = {"help"}, .config_keys = true, .positional_max = 1});
  if (!parsed.ok()) return UsageError("config", parsed.status());
  const std::string verb = parsed->positional.empty() ? "" : parsed->positional[0];
  if (parsed->switches.count("help") > 0) {
    fmt::print(
        "usage: antiphon config check|print [--config FILE] [--section.key=value ...]\n\n"
        "check says whether the configuration is good (exit 0 or 78); print shows every value and\n"
        "where it came from: a default, FILE:LINE, or a flag. Without --config the file is\n"
        "/etc/antiphon/antiphon.yaml when it exists.\n");
    return 0;
  }
  if (verb != "check" && verb != "print") {
    return UsageError("config", absl::InvalidArgumentError("say check or print"));
  }
  const auto config = LoadConfig({.file = parsed->Get("config"),
                                  .file_required = parsed->Has("config"),
                                  .flags = parsed->config_keys});
  if (!config.ok()) {
    fmt::print(stderr, "{}\n", std::string(config.status().message()));
    return kExitConfig;
  }
  if (verb == "print") {
    fmt::print("{}", config->Print());
  } else {
    fmt::print("the configuration is good\n");
  }
  return 0;
}

}  // namespace antiphon::cli
