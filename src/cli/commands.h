// The subcommands. Each takes what follows its name and returns the exit code of SURFACE.md:
// 0 ok, 1 failed, 2 degraded, 64 usage, 65 bad model file, 69 unreachable, 78 configuration.
#ifndef ANTIPHON_CLI_COMMANDS_H_
#define ANTIPHON_CLI_COMMANDS_H_

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"

namespace antiphon::cli {

using CommandArguments = std::vector<std::string>;

int RunUp(const CommandArguments& arguments);
int RunChat(const CommandArguments& arguments);
int RunStatus(const CommandArguments& arguments);
int RunModel(const CommandArguments& arguments);
int RunConfig(const CommandArguments& arguments);

// Prints "antiphon COMMAND: message" to standard error.
int UsageError(std::string_view command, const absl::Status& status);  // 64
int Failure(std::string_view command, const absl::Status& status);     // by ExitCodeOf

}  // namespace antiphon::cli

#endif  // ANTIPHON_CLI_COMMANDS_H_
