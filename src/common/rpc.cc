#include "common/rpc.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/health_check_service_interface.h>
#include <spdlog/fmt/fmt.h>
#include <unistd.h>

#include "absl/time/clock.h"
#include "common/net.h"
#include "common/status_macros.h"

namespace antiphon {

namespace {

// gRPC runs callbacks on threads which all channels share and which end with the last channel that
// had a call. If a callback drops that channel's last reference, gRPC 1.51 joins the thread that it
// runs on and frees the queue under it ("assertion failed: prior > 0"). One channel that lives as
// long as the process spares every client the care; it has no connection, and its one call ends at
// once.
void KeepCallbackThreads() {
  struct Keeper {
    std::shared_ptr<grpc::Channel> channel =
        grpc::CreateChannel("unix:/dev/null/nobody", grpc::InsecureChannelCredentials());
    grpc::GenericStub stub{channel};
    grpc::ClientContext context;
    grpc::Slice nothing;
    grpc::ByteBuffer request{&nothing, 1}, reply;
  };
  static Keeper* const keeper = [] {
    auto* k = new Keeper;
    k->stub.UnaryCall(&k->context, "/antiphon.Nobody/Call", {}, &k->request, &k->reply,
                      [](const grpc::Status&) {});
    return k;
  }();
  static_cast<void>(keeper);
}

// gRPC measures a connection with a ping whenever data comes, to size its window by: on a busy host
// each ping costs two threads a wake-up, token after token. Our windows are large from the
// beginning instead.
constexpr int kWindowBytes = 1 << 20;

}  // namespace

// The numbers of absl's and gRPC's codes are the same by design.
grpc::Status ToGrpc(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), std::string(status.message()));
}

absl::Status FromGrpc(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address) {
  KeepCallbackThreads();
  grpc::ChannelArguments args;
  args.SetMaxReceiveMessageSize(kRpcMessageBytesMax);
  args.SetMaxSendMessageSize(kRpcMessageBytesMax);
  args.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 10'000);
  args.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 5'000);
  args.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  args.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  args.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  args.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, kWindowBytes);
  args.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  // Despite its name: how long an attempt to connect may take. A busy machine needs more than the
  // first backoff.
  args.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 3'000);
  args.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1'000);
  // Nodes of one cluster are never behind an operator's web proxy.
  args.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), args);
}

absl::StatusOr<std::unique_ptr<RpcServer>> RpcServer::Start(
    const std::string& listen, const std::vector<grpc::Service*>& services, bool reflection,
    std::vector<std::string> health_names) {
  const bool local = listen.rfind("unix:", 0) == 0;
  HostPort address;
  std::string target = listen;
  if (!local) {
    ASSIGN_OR_RETURN(address, ParseHostPort(listen));
    target = address.host.empty() ? fmt::format("[::]:{}", address.port) : address.Text();
  }
  grpc::EnableDefaultHealthCheckService(true);
  if (reflection) grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort(target, grpc::InsecureServerCredentials(), &port);
  builder.SetMaxReceiveMessageSize(kRpcMessageBytesMax);
  builder.SetMaxSendMessageSize(kRpcMessageBytesMax);
  // Without this a second server would share the port and take half of the calls.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 10'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 5'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 2'000);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, kWindowBytes);
  for (grpc::Service* service : services) builder.RegisterService(service);
  std::unique_ptr<RpcServer> server(new RpcServer);
  server->server_ = builder.BuildAndStart();
  if (server->server_ == nullptr || (!local && port == 0)) {
    // gRPC only logs why; a probe of our own finds out.
    if (!local) {
      uint16_t probe_port = 0;
      ASSIGN_OR_RETURN(const int fd, ListenTcp(address, probe_port));
      close(fd);
    }
    return absl::UnavailableError(fmt::format("cannot serve RPC on {}", listen));
  }
  server->port_ = port;
  server->health_names_ = std::move(health_names);
  return server;
}

RpcServer::~RpcServer() { Shutdown(absl::ZeroDuration()); }

void RpcServer::SetServing(bool serving) {
  if (server_ == nullptr) return;
  auto* health = server_->GetHealthCheckService();
  if (health == nullptr) return;
  health->SetServingStatus(serving);  // the server's and the known names'
  for (const std::string& name : health_names_) health->SetServingStatus(name, serving);
}

void RpcServer::Shutdown(absl::Duration grace) {
  if (server_ == nullptr) return;
  SetServing(false);
  server_->Shutdown(absl::ToChronoTime(absl::Now() + grace));
  server_->Wait();
  server_ = nullptr;
}

}  // namespace antiphon
