// Stands for every daemon in the tests of `antiphon up`: named by its program, ready at once, and
// with the faults that its environment asks for. FAKE_FAULT=DAEMON:FAULT with
//   die      ends 50 ms after it is ready
//   refuse   cannot start: its model file is bad
//   log      writes one line of each kind
#include <spdlog/fmt/fmt.h>
#include <unistd.h>

#include <filesystem>

#include "antiphon/v1/config.pb.h"
#include "common/daemon.h"
#include "common/executor.h"
#include "common/logging.h"
#include "common/net.h"
#include "common/status_macros.h"

namespace antiphon {
namespace {

class FakeService final : public Service {
 public:
  FakeService(std::vector<int> listeners, bool dies) : listeners_(std::move(listeners)) {
    if (dies) {
      executor_.PostAfter(absl::Milliseconds(50), [] {
        LogError("last words");
        _exit(3);
      });
    }
  }
  ~FakeService() override {
    for (int fd : listeners_) close(fd);
  }
  std::string NotReadyReason() const override { return ""; }
  void Drain(absl::Duration, absl::Duration, absl::AnyInvocable<void()> done) override { done(); }

 private:
  std::vector<int> listeners_;
  SerialExecutor executor_{"fake"};
};

absl::StatusOr<std::unique_ptr<Service>> Make(const std::string& name, DaemonContext& context) {
  const std::string fault = Environment("FAKE_FAULT", "");
  const auto has = [&](const char* what) { return fault == fmt::format("{}:{}", name, what); };
  if (has("refuse")) return absl::DataLossError("the model file is cut short at byte 17");
  if (has("log")) {
    LogInfo("quiet as a mouse");
    LogWarning("the disk is slow");
    LogInfo(Req("r-7"), "access status=200");
  }
  std::vector<int> listeners;
  const auto listen = [&](const char* key, const config::v1::Listener& listener) -> absl::Status {
    ASSIGN_OR_RETURN(const HostPort address, ParseHostPort(listener.listen()));
    uint16_t port = 0;
    ASSIGN_OR_RETURN(const int fd, ListenTcp(address, port));
    listeners.push_back(fd);
    context.announce(key, AdvertisedAddress(listener, port));
    return absl::OkStatus();
  };
  if (name == "conductor")
    RETURN_IF_ERROR(listen("conductor.rpc", context.config->conductor().rpc()));
  if (name == "gateway") {
    RETURN_IF_ERROR(listen("gateway.http", context.config->gateway().http()));
    RETURN_IF_ERROR(listen("gateway.grpc", context.config->gateway().grpc()));
  }
  return std::make_unique<FakeService>(std::move(listeners), has("die"));
}

}  // namespace
}  // namespace antiphon

int main(int argc, char** argv) {
  const std::string name = std::filesystem::path(argv[0]).filename().string().substr(9);
  return antiphon::RunDaemon(
      argc, argv, {.name = name, .metrics_name = name},
      [&name](antiphon::DaemonContext& context) { return antiphon::Make(name, context); });
}
