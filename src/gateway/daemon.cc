#include "gateway/daemon.h"

#include <atomic>
#include <utility>

#include "antiphon/v1/config.pb.h"
#include "common/logging.h"
#include "common/net.h"
#include "common/status_macros.h"
#include "gateway/gateway.h"
#include "gateway/grpc_front.h"
#include "gateway/http_front.h"

namespace antiphon::gateway {
namespace {

constexpr int kIoThreads = 2;

// Beyond this machine without keys only when somebody wrote so.
absl::Status CheckExposure(const config::v1::Gateway& config) {
  if (!config.auth().keys_file().empty() || config.auth().mode() == "none") {
    return absl::OkStatus();
  }
  for (const auto* listener : {&config.http(), &config.grpc()}) {
    ASSIGN_OR_RETURN(const HostPort address, ParseHostPort(listener->listen()));
    if (!IsLoopback(address.host)) {
      return absl::InvalidArgumentError(
          fmt::format("gateway listens on {}, beyond this machine, without API keys; set "
                      "gateway.auth.keys_file, or write gateway.auth.mode: none if that is meant",
                      listener->listen()));
    }
  }
  return absl::OkStatus();
}

absl::Status Named(const char* key, const absl::Status& status) {
  return absl::Status(status.code(), fmt::format("{}: {}", key, std::string(status.message())));
}

class GatewayDaemon final : public Service {
 public:
  GatewayDaemon(DaemonContext& context, std::unique_ptr<Auth> auth)
      : auth_(std::move(auth)),
        gateway_(
            {.self = context.self,
             .conductors = {context.config->cluster().conductors().begin(),
                            context.config->cluster().conductors().end()},
             .registry = context.registry,
             .clock = &Clock::Real(),
             .auth = auth_.get(),
             .seed = context.random_seed,
             .timeout = ToDuration(context.config->gateway().timeout()),
             .max_n = context.config->gateway().max_n(),
             .max_inflight = context.config->gateway().max_inflight(),
             .overload_status = static_cast<int>(context.config->gateway().overload_status())}) {}

  absl::Status Listen(DaemonContext& context) {
    const config::v1::Gateway& config = context.config->gateway();
    ASSIGN_OR_RETURN(const HostPort http_address, ParseHostPort(config.http().listen()));
    HttpFrontOptions options;
    options.gateway = &gateway_;
    options.operations = IsLoopback(http_address.host) || config.api_metrics();
    options.metrics = [registry = context.registry] { return registry->Render(); };
    options.not_ready = [this] { return draining_ ? "draining" : gateway_.NotReadyReason(); };
    http_front_ = std::make_unique<HttpFront>(std::move(options));
    http::Limits limits;
    limits.body_bytes = config.max_body().bytes();
    auto server =
        http::Server::Start(config.http().listen(), limits, kIoThreads, http_front_.get());
    if (!server.ok()) return Named("gateway.http.listen", server.status());
    http_ = *std::move(server);
    const std::string address = AdvertisedAddress(config.http(), http_->port());
    http_front_->SetBaseUrl("http://" + address);
    context.announce("gateway.http", address);

    auto grpc = GrpcFront::Start(config.grpc().listen(), &gateway_);
    if (!grpc.ok()) return Named("gateway.grpc.listen", grpc.status());
    grpc_ = *std::move(grpc);
    context.announce("gateway.grpc",
                     AdvertisedAddress(config.grpc(), static_cast<uint16_t>(grpc_->port())));
    return absl::OkStatus();
  }

  ~GatewayDaemon() override {
    grpc_.reset();
    http_.reset();
  }

  std::string NotReadyReason() const override {
    std::string reason = gateway_.NotReadyReason();
    if (grpc_ != nullptr) grpc_->SetServing(reason.empty() && !draining_);
    return reason;
  }
  std::string ReadyDetails() const override { return gateway_.ReadyDetails(); }

  void Drain(absl::Duration delay, absl::Duration deadline,
             absl::AnyInvocable<void()> done) override {
    draining_ = true;
    grpc_->SetServing(false);
    gateway_.Drain(delay, deadline, [this, done = std::move(done)]() mutable {
      http_->Drain();
      done();
    });
  }

  void Reload() override {
    if (absl::Status s = auth_->Reload(); !s.ok()) {
      LogError("gateway.auth.keys_file: the old keys stay: {}", std::string(s.message()));
    }
  }

 private:
  std::unique_ptr<Auth> auth_;
  Gateway gateway_;
  std::atomic<bool> draining_{false};
  std::unique_ptr<HttpFront> http_front_;
  std::unique_ptr<http::Server> http_;
  std::unique_ptr<GrpcFront> grpc_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Service>> MakeGateway(DaemonContext& context) {
  const config::v1::Gateway& config = context.config->gateway();
  RETURN_IF_ERROR(CheckExposure(config));
  ASSIGN_OR_RETURN(auto auth, Auth::Create(config.auth().keys_file()));
  auto daemon = std::make_unique<GatewayDaemon>(context, std::move(auth));
  RETURN_IF_ERROR(daemon->Listen(context));
  return daemon;
}

}  // namespace antiphon::gateway
