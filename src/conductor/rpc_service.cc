#include "conductor/rpc_service.h"

#include <sys/stat.h>

#include <deque>
#include <optional>
#include <utility>

#include "antiphon/v1/admin.grpc.pb.h"
#include "antiphon/v1/control.grpc.pb.h"
#include "common/logging.h"
#include "common/rpc.h"
#include "common/status_macros.h"

namespace antiphon::conductor {
namespace {

namespace admin = ::antiphon::admin::v1;

// A message is read when the one before it has been worked off, so a fast node cannot fill memory.
// Lives until gRPC's OnDone has been posted: every earlier closure finds it alive.
class JoinStream final : public grpc::ServerBidiReactor<wire::NodeReport, wire::NodeDirective>,
                         public Session {
 public:
  JoinStream(Conductor& conductor, Executor& executor)
      : conductor_(conductor), executor_(executor) {
    executor_.Post([this] {
      id_ = conductor_.Open(this);
      StartRead(&report_);
    });
  }

  void OnReadDone(bool ok) override {
    executor_.Post([this, ok] {
      if (finished_) return;
      if (!ok) return Close(absl::OkStatus());
      conductor_.OnReport(id_, report_);
      if (!finished_) StartRead(&report_);
    });
  }
  void OnWriteDone(bool ok) override {
    executor_.Post([this, ok] {
      writing_ = false;
      if (ok) Pump();
    });
  }
  void OnDone() override {
    executor_.Post([this] { delete this; });
  }

  // Session, on the executor.
  void Send(const wire::NodeDirective& directive) override {
    if (finished_) return;
    // Directives are answers to what the node sent, a few each; a node that does not read them is
    // no use.
    if (directives_.size() >= kDirectivesMax) {
      return Close(absl::ResourceExhaustedError("this node does not read its directives"));
    }
    directives_.push_back(directive);
    Pump();
  }
  void Close(const absl::Status& status) override {
    if (std::exchange(finished_, true)) return;
    conductor_.OnEnd(id_);
    Finish(ToGrpc(status));
  }

 private:
  static constexpr size_t kDirectivesMax = 1024;

  ~JoinStream() override = default;
  void Pump() {
    if (writing_ || finished_ || directives_.empty()) return;
    current_ = std::move(directives_.front());
    directives_.pop_front();
    writing_ = true;
    StartWrite(&current_);
  }

  Conductor& conductor_;
  Executor& executor_;
  SessionId id_ = 0;
  wire::NodeReport report_;
  wire::NodeDirective current_;
  std::deque<wire::NodeDirective> directives_;
  bool writing_ = false;
  bool finished_ = false;
};

// Keeps only the newest set while a gateway reads slowly.
class ModelStream final : public grpc::ServerWriteReactor<wire::ModelSet>, public Watcher {
 public:
  ModelStream(Conductor& conductor, Executor& executor, absl::Status refused)
      : conductor_(conductor), executor_(executor) {
    executor_.Post([this, refused] {
      if (!refused.ok()) return End(refused);
      conductor_.Watch(this);
      watching_ = true;
    });
  }

  void OnWriteDone(bool ok) override {
    executor_.Post([this, ok] {
      writing_ = false;
      if (!ok) return End(absl::CancelledError("the watcher is gone"));
      Pump();
    });
  }
  void OnCancel() override {
    executor_.Post([this] { End(absl::CancelledError("the watcher is gone")); });
  }
  void OnDone() override {
    executor_.Post([this] { delete this; });
  }

  void Push(const wire::ModelSet& models) override {
    next_ = models;
    Pump();
  }

 private:
  ~ModelStream() override = default;
  void Pump() {
    if (writing_ || finished_ || !next_) return;
    current_ = *std::move(next_);
    next_.reset();
    writing_ = true;
    StartWrite(&current_);
  }
  void End(const absl::Status& status) {
    if (std::exchange(finished_, true)) return;
    if (watching_) conductor_.Unwatch(this);
    Finish(ToGrpc(status));
  }

  Conductor& conductor_;
  Executor& executor_;
  wire::ModelSet current_;
  std::optional<wire::ModelSet> next_;
  bool writing_ = false;
  bool finished_ = false;
  bool watching_ = false;
};

class ControlService final : public wire::Conductor::CallbackService {
 public:
  ControlService(Conductor& conductor, Executor& executor)
      : conductor_(conductor), executor_(executor) {}

  grpc::ServerBidiReactor<wire::NodeReport, wire::NodeDirective>* Join(
      grpc::CallbackServerContext*) override {
    return new JoinStream(conductor_, executor_);
  }

  grpc::ServerUnaryReactor* Admit(grpc::CallbackServerContext* context,
                                  const wire::AdmitRequest* proto,
                                  wire::AdmitReply* reply) override {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    if (!Greeted(reactor, proto->hello())) return reactor;
    absl::StatusOr<Request> request = RequestFromProto(*proto);
    if (!request.ok()) return Fail(reactor, request.status());
    executor_.Post([this, reactor, reply, request = *std::move(request)]() mutable {
      conductor_.Admit(std::move(request), reply,
                       [reactor](absl::Status status) { reactor->Finish(ToGrpc(status)); });
    });
    return reactor;
  }

  grpc::ServerUnaryReactor* Finish(grpc::CallbackServerContext* context,
                                   const wire::FinishReport* proto, wire::FinishReply*) override {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    if (!Greeted(reactor, proto->hello())) return reactor;
    const absl::StatusOr<antiphon::conductor::Finish> finish = FinishFromProto(*proto);
    if (!finish.ok()) return Fail(reactor, finish.status());
    executor_.Post([this, reactor, finish = *finish] {
      conductor_.OnFinish(finish);
      reactor->Finish(grpc::Status::OK);
    });
    return reactor;
  }

  grpc::ServerWriteReactor<wire::ModelSet>* WatchModels(
      grpc::CallbackServerContext*, const wire::WatchModelsRequest* request) override {
    return new ModelStream(conductor_, executor_,
                           Negotiate(conductor_.self(), request->hello()).status());
  }

  grpc::ServerUnaryReactor* GetBlob(grpc::CallbackServerContext* context,
                                    const wire::GetBlobRequest* request,
                                    wire::Blob* reply) override {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    if (!Greeted(reactor, request->hello())) return reactor;
    if (absl::Status status = CheckText("digest", request->digest(), 128, false); !status.ok()) {
      return Fail(reactor, status);
    }
    executor_.Post([this, reactor, reply, digest = request->digest()] {
      conductor_.GetBlob(digest, reply,
                         [reactor](absl::Status status) { reactor->Finish(ToGrpc(status)); });
    });
    return reactor;
  }

  grpc::ServerUnaryReactor* GetView(grpc::CallbackServerContext* context,
                                    const wire::GetViewRequest*,
                                    wire::ClusterView* reply) override {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    executor_.Post([this, reactor, reply] {
      conductor_.FillView(*reply);
      reactor->Finish(grpc::Status::OK);
    });
    return reactor;
  }

 private:
  static grpc::ServerUnaryReactor* Fail(grpc::ServerUnaryReactor* reactor,
                                        const absl::Status& status) {
    reactor->Finish(ToGrpc(status));
    return reactor;
  }
  bool Greeted(grpc::ServerUnaryReactor* reactor, const wire::Hello& hello) const {
    const absl::Status status = Negotiate(conductor_.self(), hello).status();
    if (!status.ok()) reactor->Finish(ToGrpc(status));
    return status.ok();
  }

  Conductor& conductor_;
  Executor& executor_;
};

class AdminService final : public admin::Admin::CallbackService {
 public:
  AdminService(Conductor& conductor, Executor& executor, absl::AnyInvocable<void()> drain)
      : conductor_(conductor), executor_(executor), drain_(std::move(drain)) {}

  grpc::ServerUnaryReactor* GetStatus(grpc::CallbackServerContext* context,
                                      const admin::GetStatusRequest*,
                                      admin::GetStatusResponse* reply) override {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    executor_.Post([this, reactor, reply] {
      conductor_.FillStatus(*reply);
      reactor->Finish(grpc::Status::OK);
    });
    return reactor;
  }

  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext* context, const admin::DrainRequest*,
                                  admin::DrainResponse*) override {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    executor_.Post([this, reactor] {
      if (drain_) drain_();
      reactor->Finish(grpc::Status::OK);
    });
    return reactor;
  }

  grpc::ServerUnaryReactor* SetLogLevel(grpc::CallbackServerContext* context,
                                        const admin::SetLogLevelRequest* request,
                                        admin::SetLogLevelResponse*) override {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    reactor->Finish(antiphon::SetLogLevel(request->level())
                        ? grpc::Status::OK
                        : grpc::Status(grpc::StatusCode::INVALID_ARGUMENT,
                                       fmt::format("level is '{}'; known are debug, info, warning, "
                                                   "error",
                                                   EscapeForLog(request->level(), false))));
    return reactor;
  }

 private:
  Conductor& conductor_;
  Executor& executor_;
  absl::AnyInvocable<void()> drain_;
};

class GrpcService final : public RpcService {
 public:
  explicit GrpcService(RpcServiceOptions& options)
      : control_(*options.conductor, *options.executor),
        admin_(*options.conductor, *options.executor, std::move(options.drain)) {}

  absl::Status Listen(const RpcServiceOptions& options) {
    ASSIGN_OR_RETURN(server_, RpcServer::Start(options.listen, {&control_}));
    if (options.local_socket.empty()) return absl::OkStatus();
    auto local = RpcServer::Start("unix:" + options.local_socket, {&admin_});
    if (!local.ok()) {
      // The cluster works without; only `antiphon status` and its like do not.
      LogWarning("no administration on {}: {}", options.local_socket,
                 std::string(local.status().message()));
      return absl::OkStatus();
    }
    local_ = *std::move(local);
    chmod(options.local_socket.c_str(), 0660);
    return absl::OkStatus();
  }
  int port() const override { return server_->port(); }

 private:
  ControlService control_;
  AdminService admin_;
  // Destroyed first: their streams use the services.
  std::unique_ptr<RpcServer> server_;
  std::unique_ptr<RpcServer> local_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<RpcService>> RpcService::Start(RpcServiceOptions options) {
  auto service = std::make_unique<GrpcService>(options);
  RETURN_IF_ERROR(service->Listen(options));
  return service;
}

}  // namespace antiphon::conductor
