// What every daemon does alike: flags, configuration, logging, signals, readiness, drain.
//
//   int main(int argc, char** argv) {
//     return antiphon::RunDaemon(argc, argv, {.name = "kvstore", ...}, MakeKvStore);
//   }
#ifndef ANTIPHON_COMMON_DAEMON_H_
#define ANTIPHON_COMMON_DAEMON_H_

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "absl/functional/any_invocable.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/config.h"
#include "common/metrics.h"
#include "common/wire.h"

namespace antiphon {

// Exit codes (sysexits.h): 0 ok, 64 usage, 65 bad model file, 69 a thing it needs is unavailable,
// 70 our bug, 78 configuration.
inline constexpr int kExitUsage = 64;
inline constexpr int kExitData = 65;
inline constexpr int kExitUnavailable = 69;
inline constexpr int kExitConfig = 78;
// Of a status that ended a daemon's start.
int ExitCodeOf(const absl::Status& status);

// One running daemon. Start-up happens in the factory; the destructor stops what still runs.
class Service {
 public:
  virtual ~Service() = default;
  // Empty: ready. Else why not, e.g. "loading weights 43%". Thread-safe, quick.
  virtual std::string NotReadyReason() const = 0;
  // Empty: alive. Else what is stuck.
  virtual std::string StuckReason() const { return ""; }
  // JSON members for /readyz's body, e.g. `"degraded":true`; may be empty.
  virtual std::string ReadyDetails() const { return ""; }
  // SIGTERM came: stop taking new work after `delay`; call `done` when the last work ended. After
  // `deadline` the rest ends with a draining error and `done` is called all the same.
  virtual void Drain(absl::Duration delay, absl::Duration deadline,
                     absl::AnyInvocable<void()> done) = 0;
  // SIGHUP.
  virtual void Reload() {}
};

struct DaemonOptions {
  std::string name;          // gateway | conductor | kvstore | prefill | decode
  std::string metrics_name;  // constant label `daemon`: gateway|conductor|kvstore|worker
};

struct DaemonContext {
  LoadedConfig config;
  Identity self;  // node id: NAME@HOST or --node; incarnation: random
  Registry* registry = nullptr;
  uint64_t random_seed = 0;  // for whoever needs randomness
  // To be called once for each listener with its configuration key ("gateway.http") and its real
  // address: logged, and told to the parent (--announce-fd). Thread-safe.
  std::function<void(std::string_view listener, std::string_view address)> announce;
};

using ServiceFactory =
    absl::AnyInvocable<absl::StatusOr<std::unique_ptr<Service>>(DaemonContext& context)>;

// Flags: --config FILE, --check-config, --print-config, --node NAME, --version, --help,
// --announce-fd N, and any configuration key as --section.key=value.
//
// --announce-fd names an inherited descriptor that gets one JSON object a line:
//   {"event":"listening","listener":"conductor.rpc","address":"127.0.0.1:40123"}
//   {"event":"state","ready":false,"reason":"loading weights 43%"}    at every change
//   {"event":"failed","code":78,"message":"..."}                      instead of serving
// With $ANTIPHON_PARENT_PID set the daemon gets SIGTERM when that parent dies, and ends at once
// when the parent is gone already. Blocks until the daemon has ended; returns main's code.
// The operations listener (/metrics /livez /readyz) is up before the factory runs and answers
// "starting" meanwhile. Tells systemd READY, STATUS, STOPPING, and the watchdog while not stuck.
int RunDaemon(int argc, char** argv, const DaemonOptions& options, ServiceFactory factory);

// A 64-bit seed from the kernel.
uint64_t RandomSeed();
// $NAME or nullptr-free default.
std::string Environment(std::string_view name, std::string_view otherwise);
// cluster.runtime_dir or its default.
std::string RuntimeDir(const config::v1::Config& config);

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_DAEMON_H_
