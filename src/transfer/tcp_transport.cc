#include "transfer/tcp_transport.h"

#include <utility>

#include "common/net.h"
#include "common/status_macros.h"
#include "transfer/tcp_client.h"
#include "transfer/tcp_metrics.h"
#include "transfer/tcp_server.h"

namespace antiphon::transfer {
namespace {

class TcpTransport final : public Transport {
 public:
  TcpTransport(const TcpOptions& options, int listen_fd, std::string address)
      : own_registry_({}),
        metrics_(options.registry != nullptr ? *options.registry : own_registry_),
        address_(std::move(address)),
        server_(listen_fd, options.connections_max, ClockOf(options), metrics_),
        client_(options, ClockOf(options), metrics_) {}

  absl::Status Export(RegionId id, const std::byte* base, size_t bytes) override {
    return server_.Export(id, base, bytes);
  }
  void Unexport(RegionId id) override { server_.Unexport(id); }
  PullId Pull(PullRequest request, PullDone done) override {
    return client_.Pull(std::move(request), std::move(done));
  }
  void Cancel(PullId id) override { client_.Cancel(id); }
  std::string address() const override { return address_; }

 private:
  static const Clock& ClockOf(const TcpOptions& options) {
    return options.clock != nullptr ? *options.clock : Clock::Real();
  }

  Registry own_registry_;
  TcpMetrics metrics_;
  const std::string address_;
  TcpServer server_;
  TcpClient client_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Transport>> MakeTcpTransport(TcpOptions options) {
  ASSIGN_OR_RETURN(HostPort address, ParseHostPort(options.listen));
  CHECK(options.lanes > 0 && options.request_bytes_max > 0 &&
        options.request_bytes_max <= kPullBytesMax && options.connections_max > 0 &&
        options.stall > absl::ZeroDuration());
  uint16_t port = 0;
  ASSIGN_OR_RETURN(const int fd, ListenTcp(address, port));
  address.port = port;
  std::string text = options.advertise ? options.advertise(port) : address.Text();
  return std::make_unique<TcpTransport>(options, fd, std::move(text));
}

}  // namespace antiphon::transfer
