// The command line of a daemon.
#ifndef ANTIPHON_COMMON_CONFIG_FLAGS_H_
#define ANTIPHON_COMMON_CONFIG_FLAGS_H_

#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "common/config.h"

namespace antiphon {

struct DaemonFlags {
  ConfigSource source;
  std::string node;
  int announce_fd = -1;
  bool check_config = false;
  bool print_config = false;
  bool version = false;
  bool help = false;
};

// INVALID_ARGUMENT names the argument. Keys of the configuration are checked by LoadConfig.
absl::StatusOr<DaemonFlags> ParseDaemonFlags(int argc, const char* const* argv);
std::string DaemonUsage(std::string_view program);

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_CONFIG_FLAGS_H_
