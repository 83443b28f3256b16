// gRPC servers and channels with our settings: message sizes, keepalive, deadlines. Includes gRPC's
// headers: slow to compile, include it only where a service is served or called.
#ifndef ANTIPHON_COMMON_RPC_H_
#define ANTIPHON_COMMON_RPC_H_

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace antiphon {

inline constexpr int kRpcMessageBytesMax = 64 << 20;

grpc::Status ToGrpc(const absl::Status& status);
absl::Status FromGrpc(const grpc::Status& status);

// A channel that reconnects by itself: keepalive 10 s/5 s, backoff 100 ms .. 1 s. Its last
// reference may be dropped anywhere, in a call's callback too.
std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address);

// Owns a server; Shutdown on destruction.
class RpcServer {
 public:
  // `listen` is host:port; port 0 is chosen by the kernel. `services` outlive the server. Health
  // service always, for the server as a whole and for `health_names` (full service names);
  // reflection when asked for. UNAVAILABLE "port 7401 on 127.0.0.1 is taken: ...".
  static absl::StatusOr<std::unique_ptr<RpcServer>> Start(
      const std::string& listen, const std::vector<grpc::Service*>& services,
      bool reflection = false, std::vector<std::string> health_names = {});
  ~RpcServer();
  int port() const { return port_; }
  void SetServing(bool serving);
  // Ends streams that still run after `grace`.
  void Shutdown(absl::Duration grace);

 private:
  RpcServer() = default;
  std::unique_ptr<grpc::Server> server_;
  std::vector<std::string> health_names_;
  int port_ = 0;
};

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_RPC_H_
