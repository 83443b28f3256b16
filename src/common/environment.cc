#include <spdlog/fmt/fmt.h>
#include <sys/random.h>
#include <unistd.h>

#include <cstdlib>

#include "antiphon/v1/config.pb.h"
#include "common/daemon.h"
#include "common/status_macros.h"

namespace antiphon {

int ExitCodeOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return 0;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kNotFound:
      return kExitConfig;
    case absl::StatusCode::kDataLoss:
    case absl::StatusCode::kFailedPrecondition:
      return kExitData;
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kResourceExhausted:
      return kExitUnavailable;
    case absl::StatusCode::kInternal:
      return 70;
    default:
      return 1;
  }
}

uint64_t RandomSeed() {
  uint64_t seed = 0;
  CHECK(getrandom(&seed, sizeof(seed), 0) == sizeof(seed));
  return seed;
}

std::string Environment(std::string_view name, std::string_view otherwise) {
  const char* value = std::getenv(std::string(name).c_str());
  return value == nullptr ? std::string(otherwise) : std::string(value);
}

std::string RuntimeDir(const config::v1::Config& config) {
  if (!config.cluster().runtime_dir().empty()) return config.cluster().runtime_dir();
  const std::string user = Environment("XDG_RUNTIME_DIR", "");
  const std::string& name = config.cluster().name();
  if (!user.empty()) return fmt::format("{}/antiphon/{}", user, name);
  // systemd's RuntimeDirectory=antiphon, and what tmpfiles.d makes.
  if (geteuid() == 0 || access("/run/antiphon", W_OK) == 0) return "/run/antiphon";
  return fmt::format("/tmp/antiphon-{}/{}", geteuid(), name);
}

}  // namespace antiphon
