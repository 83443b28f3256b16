// The operator's tool.
#include <spdlog/fmt/fmt.h>

#include <cstdio>

#include "cli/commands.h"
#include "common/config/spelling.h"
#include "common/daemon.h"
#include "common/logging.h"

namespace antiphon::cli {
namespace {

struct Command {
  std::string_view name;
  int (*run)(const CommandArguments&);
  std::string_view summary;
};

constexpr Command kCommands[] = {
    {"up", RunUp, "start a whole cluster on this machine"},
    {"chat", RunChat, "talk to a model"},
    {"status", RunStatus, "what a cluster does and how its nodes are"},
    {"model", RunModel, "inspect FILE | render | tokenize: what a model file says"},
    {"config", RunConfig, "check | print: the configuration"},
};

void PrintHelp(FILE* to) {
  fmt::print(to,
             "antiphon {}: LLM serving with separate prefill and decode\n\nusage: antiphon COMMAND "
             "[arguments]\n\n",
             kVersion);
  for (const Command& command : kCommands) {
    fmt::print(to, "  {:<8} {}\n", command.name, command.summary);
  }
  fmt::print(
      to,
      "  version  print the version\n  help     print this\n\n"
      "antiphon COMMAND --help tells more. Exit codes: 0 ok, 1 failed, 2 degraded, 64 usage,\n"
      "65 bad model file, 69 unreachable or taken, 78 configuration.\n");
}

int Run(int argc, char** argv) {
  if (argc < 2) {
    PrintHelp(stderr);
    return kExitUsage;
  }
  const std::string_view name = argv[1];
  if (name == "help" || name == "--help" || name == "-h") {
    PrintHelp(stdout);
    return 0;
  }
  if (name == "version" || name == "--version") {
    fmt::print("antiphon {}\n", kVersion);
    return 0;
  }
  std::string_view nearest;
  for (const Command& command : kCommands) {
    if (command.name == name) return command.run(CommandArguments(argv + 2, argv + argc));
    if (EditDistance(name.substr(0, 32), command.name) <= 2) nearest = command.name;
  }
  fmt::print(stderr, "antiphon: unknown command '{}'{}; see antiphon help\n",
             EscapeForLog(name.substr(0, 64), false),
             nearest.empty() ? "" : fmt::format("; did you mean {}?", nearest));
  return kExitUsage;
}

}  // namespace

int UsageError(std::string_view command, const absl::Status& status) {
  fmt::print(stderr, "antiphon {}: {}; see antiphon {} --help\n", command,
             std::string(status.message()), command);
  return kExitUsage;
}

int Failure(std::string_view command, const absl::Status& status) {
  fmt::print(stderr, "antiphon {}: {}\n", command, std::string(status.message()));
  return ExitCodeOf(status);
}

}  // namespace antiphon::cli

int main(int argc, char** argv) { return antiphon::cli::Run(argc, argv); }
