#include "worker/listener.h"

#include "common/rpc.h"
#include "common/status_macros.h"

namespace antiphon::worker {
namespace {

class RpcListener final : public Listener {
 public:
  explicit RpcListener(std::unique_ptr<RpcServer> server) : server_(std::move(server)) {}
  uint16_t port() const override { return static_cast<uint16_t>(server_->port()); }
  void Shutdown() override { server_->Shutdown(absl::ZeroDuration()); }

 private:
  std::unique_ptr<RpcServer> server_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Listener>> Listener::Start(const std::string& listen,
                                                          grpc::Service* prefill,
                                                          grpc::Service* decode) {
  ASSIGN_OR_RETURN(auto server, RpcServer::Start(listen, {prefill, decode}));
  return std::make_unique<RpcListener>(std::move(server));
}

}  // namespace antiphon::worker
