#include "conductor/daemon.h"

#include <signal.h>
#include <unistd.h>

#include <filesystem>

#include "antiphon/v1/config.pb.h"
#include "common/clock.h"
#include "common/executor.h"
#include "common/logging.h"
#include "common/net.h"
#include "common/status_macros.h"
#include "conductor/conductor.h"
#include "conductor/rpc_service.h"

namespace antiphon::conductor {
namespace {

CoreOptions OptionsOf(const DaemonContext& context) {
  const config::v1::Config& config = *context.config;
  CoreOptions options;
  options.self = context.self;
  options.policy.balancing_threshold = config.conductor().balancing_threshold();
  options.policy.max_queue = config.conductor().max_queue();
  options.policy.slo_ttft = ToDuration(config.slo().ttft());
  options.policy.slo_tbt = ToDuration(config.slo().tbt());
  options.policy.strict = config.slo().strict();
  options.node_timeout = ToDuration(config.conductor().node_timeout());
  options.seed = context.random_seed;
  return options;
}

class ConductorDaemon final : public Service {
 public:
  explicit ConductorDaemon(DaemonContext& context)
      : executor_("conductor"),
        conductor_({.core = OptionsOf(context),
                    .executor = &executor_,
                    .clock = &Clock::Real(),
                    .registry = context.registry}) {
    executor_.Post([this] { conductor_.Start(); });
  }

  absl::Status Listen(DaemonContext& context) {
    const config::v1::Listener& listener = context.config->conductor().rpc();
    const std::string folder = RuntimeDir(*context.config);
    std::error_code error;
    std::filesystem::create_directories(folder, error);
    RpcServiceOptions options;
    options.listen = listener.listen();
    options.local_socket = folder + "/conductor.sock";
    options.conductor = &conductor_;
    options.executor = &executor_;
    options.drain = [] { kill(getpid(), SIGTERM); };
    if (error) {
      LogWarning("no administration: {} cannot be made: {}", folder, error.message());
      options.local_socket.clear();
    }
    auto rpc = RpcService::Start(std::move(options));
    if (!rpc.ok()) {
      return absl::Status(rpc.status().code(), fmt::format("conductor.rpc.listen: {}",
                                                           std::string(rpc.status().message())));
    }
    rpc_ = *std::move(rpc);
    context.announce("conductor.rpc",
                     AdvertisedAddress(listener, static_cast<uint16_t>(rpc_->port())));
    return absl::OkStatus();
  }

  ~ConductorDaemon() override {
    rpc_.reset();          // ends the streams; their last words are posted
    executor_.Shutdown();  // and run here
  }

  std::string NotReadyReason() const override { return ""; }
  std::string ReadyDetails() const override { return conductor_.ReadyDetails(); }

  void Drain(absl::Duration delay, absl::Duration, absl::AnyInvocable<void()> done) override {
    // Tokens do not pass here: once gateways ask elsewhere there is nothing to wait for.
    executor_.PostAfter(delay, [this, done = std::move(done)]() mutable {
      conductor_.StopAdmitting();
      done();
    });
  }

 private:
  SerialExecutor executor_;
  Conductor conductor_;
  std::unique_ptr<RpcService> rpc_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Service>> MakeConductor(DaemonContext& context) {
  auto daemon = std::make_unique<ConductorDaemon>(context);
  RETURN_IF_ERROR(daemon->Listen(context));
  return daemon;
}

}  // namespace antiphon::conductor
