// Configuration: one YAML file for all daemons (schema: config.proto), conf.d beside it, flags.
#ifndef ANTIPHON_COMMON_CONFIG_H_
#define ANTIPHON_COMMON_CONFIG_H_

#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace antiphon::config::v1 {
class Config;
}
namespace google::protobuf {
class Duration;
}

namespace antiphon {

// A configuration with every default filled in. Paths are dotted: "gateway.http.listen".
class LoadedConfig {
 public:
  LoadedConfig();
  LoadedConfig(LoadedConfig&&) noexcept;
  LoadedConfig& operator=(LoadedConfig&&) noexcept;
  ~LoadedConfig();

  const config::v1::Config& operator*() const { return *config_; }
  const config::v1::Config* operator->() const { return config_.get(); }
  config::v1::Config& mutable_config() { return *config_; }
  // "default", "FILE:LINE" or "--flag"; one for each leaf.
  const std::map<std::string, std::string>& origins() const { return origins_; }
  std::map<std::string, std::string>& mutable_origins() { return origins_; }
  // Each leaf as YAML with its origin in a comment.
  std::string Print() const;

 private:
  std::unique_ptr<config::v1::Config> config_;
  std::map<std::string, std::string> origins_;
};

// One --path=value (or --path value) override, or a file.
struct ConfigSource {
  // Empty: /etc/antiphon/antiphon.yaml when it exists, else defaults.
  std::string file;
  bool file_required = false;                              // given by --config
  std::vector<std::pair<std::string, std::string>> flags;  // dotted path, value as YAML text
};

// INVALID_ARGUMENT: "FILE:LINE: gateway.htp: unknown key; did you mean gateway.http?" and the like,
// one line for each problem (at most ten); NOT_FOUND: the file does not exist.
absl::StatusOr<LoadedConfig> LoadConfig(const ConfigSource& source);
// From text, for tests and fuzzing.
absl::StatusOr<LoadedConfig> ParseConfig(std::string_view yaml, std::string_view file_name);

// "30s", "250ms", "1m30s", "off" (infinite). INVALID_ARGUMENT with an example.
absl::StatusOr<absl::Duration> ParseDuration(std::string_view text);
// "8GiB", "512MiB", "64KiB", "4096B". INVALID_ARGUMENT with an example.
absl::StatusOr<uint64_t> ParseByteSize(std::string_view text);
// Infinite when the proto says off.
absl::Duration ToDuration(const google::protobuf::Duration& d);

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_CONFIG_H_
