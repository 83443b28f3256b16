#include "kvstore/service.h"

#include <grpcpp/impl/service_type.h>
#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <functional>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "antiphon/v1/config.pb.h"
#include "antiphon/v1/control.pb.h"
#include "antiphon/v1/model.pb.h"
#include "antiphon/v1/store.pb.h"
#include "antiphon/v1/worker.pb.h"
#include "common/conductor_link.h"
#include "common/executor.h"
#include "common/logging.h"
#include "common/memory.h"
#include "common/net.h"
#include "common/rpc.h"
#include "common/status_macros.h"
#include "common/thread.h"
#include "kvstore/blob_desk.h"
#include "kvstore/lease_rpc.h"
#include "kvstore/node.h"
#include "kvstore/pool.h"
#include "kvstore/socket_server.h"
#include "transfer/tcp_transport.h"

namespace antiphon::kvstore {
namespace {

// The conductors hear how full the pool is when its blocks change, and that the store is alive.
constexpr absl::Duration kLoadEvery = absl::Milliseconds(500);
constexpr absl::Duration kLoadSpacing = absl::Milliseconds(100);
constexpr absl::Duration kEventsAfter = absl::Milliseconds(2);  // collects a batch
constexpr absl::Duration kIdleCheckEvery = absl::Milliseconds(50);

class KvStoreService final : public Service {
 public:
  explicit KvStoreService(DaemonContext& context)
      : config_(*context.config),
        self_(context.self),
        registry_(*context.registry),
        seed_(context.random_seed),
        clock_(Clock::Real()),
        announce_(context.announce) {}

  ~KvStoreService() override {
    stop_.store(true);
    populate_.Join();
    link_ = nullptr;
    if (rpc_ != nullptr) rpc_->Shutdown(absl::ZeroDuration());
    executor_.Shutdown();
    verifier_.Shutdown();
    socket_ = nullptr;
    leases_ = nullptr;
    blobs_ = nullptr;
    transport_ = nullptr;
    node_ = nullptr;
  }

  absl::Status Start() {
    ASSIGN_OR_RETURN(pool_, Pool::Create(config_.kvstore().pool().bytes()));
    ASSIGN_OR_RETURN(transport_,
                     transfer::MakeTcpTransport({.listen = config_.kvstore().data().listen(),
                                                 .advertise =
                                                     [this](uint16_t port) {
                                                       return AdvertisedAddress(
                                                           config_.kvstore().data(), port);
                                                     },
                                                 .seed = seed_,
                                                 .clock = &clock_,
                                                 .registry = &registry_}));
    RETURN_IF_ERROR(
        transport_->Export(self_.incarnation, pool_->memory().data(), pool_->memory().size()));
    leases_ = MakeGrpcLeaseClient(self_, &executor_, &clock_);
    NodeOptions options{.self = self_,
                        .pool = pool_->memory(),
                        .executor = &executor_,
                        .verifier = &verifier_,
                        .transport = transport_.get(),
                        .leases = leases_.get(),
                        .clock = &clock_,
                        .registry = &registry_,
                        .on_changes = [this] { ScheduleEvents(); }};
    // The node names its RPC address to workers, and the RPC server serves the node.
    node_ = std::make_unique<StoreNode>(std::move(options));
    node_->set_not_ready("the store is still touching its pool");
    blobs_ = std::make_unique<BlobDesk>(
        BlobDeskOptions{.self = self_,
                        .limits = {.bytes = MemoryLimitBytes()},
                        .memory_available = [this] { return BlobBytesAvailable(); },
                        .registry = &registry_});
    lease_service_ = MakeLeaseService(node_.get(), &executor_);
    ASSIGN_OR_RETURN(rpc_,
                     RpcServer::Start(config_.kvstore().rpc().listen(), {lease_service_.get()}));
    rpc_address_ = AdvertisedAddress(config_.kvstore().rpc(), static_cast<uint16_t>(rpc_->port()));
    node_->set_rpc_address(rpc_address_);
    // With an automatic port only the parent knows it.
    const auto ops = ParseHostPort(config_.kvstore().ops().listen());
    if (ops.ok() && ops->port != 0) {
      ops_address_ = AdvertisedAddress(config_.kvstore().ops(), ops->port);
    }
    announce_("kvstore.rpc", rpc_address_);
    announce_("kvstore.data", transport_->address());
    RETURN_IF_ERROR(BindSocket());
    StartLink();
    populate_ = Thread("kv-populate", [this] { Populate(); });
    return absl::OkStatus();
  }

  std::string NotReadyReason() const override {
    absl::MutexLock lock(&mu_);
    return not_ready_.empty() && !serving_.load()
               ? fmt::format("touching the pool, {}%",
                             pool_->populated_bytes() * 100 / pool_->memory().size())
               : not_ready_;
  }

  std::string StuckReason() const override {
    absl::MutexLock lock(&mu_);
    return stuck_;
  }

  // Workers of this host drain first and leave; a lease of another store needs no waiting for.
  void Drain(absl::Duration delay, absl::Duration deadline,
             absl::AnyInvocable<void()> done) override {
    {
      absl::MutexLock lock(&mu_);
      not_ready_ = "draining";
    }
    executor_.Post([this, delay, deadline, done = std::move(done)]() mutable {
      wire::NodeReport report;
      report.mutable_draining()->set_deadline_s(absl::ToDoubleSeconds(delay + deadline));
      if (link_ != nullptr) link_->Broadcast(report);
      drained_ = std::move(done);
      executor_.PostAfter(delay, [this] {
        node_->Drain();
        FinishWhenIdle();
      });
      executor_.PostAfter(delay + deadline, [this] { Drained(); });
    });
  }

 private:
  absl::Status BindSocket() {
    const std::string dir = RuntimeDir(config_);
    std::error_code error;
    std::filesystem::create_directories(dir, error);
    if (error) {
      return absl::UnavailableError(fmt::format(
          "cannot create {}: {}; set cluster.runtime_dir to a folder that this user may write", dir,
          error.message()));
    }
    ASSIGN_OR_RETURN(socket_, SocketServer::Bind({.path = dir + "/kvstore.sock",
                                                  .pool_fd = pool_->fd(),
                                                  .node = node_.get(),
                                                  .blobs = blobs_.get(),
                                                  .executor = &executor_,
                                                  .clock = &clock_}));
    // Workers repack their weights while the pool is touched.
    return socket_->Serve();
  }

  // What the pool has not touched yet is spoken for.
  uint64_t BlobBytesAvailable() const {
    const uint64_t available = MemoryAvailableBytes();
    const uint64_t untouched = pool_->memory().size() - pool_->populated_bytes();
    return available - std::min(available, untouched);
  }

  void Populate() {
    absl::Status status = pool_->Populate(stop_);
    if (stop_.load()) return;
    if (status.ok()) {
      executor_.Post([this] {
        node_->set_not_ready("");
        serving_.store(true);
        LogInfo("serving workers, pool of {} MiB", pool_->memory().size() >> 20);
      });
      return;
    }
    LogError("{}", std::string(status.message()));
    absl::MutexLock lock(&mu_);
    not_ready_ = stuck_ = std::string(status.message());
  }

  void StartLink() {
    ConductorLinkOptions options{.conductors = {config_.cluster().conductors().begin(),
                                                config_.cluster().conductors().end()},
                                 .self = self_,
                                 .executor = &executor_,
                                 .hello = [this] { return MakeNodeHello(); },
                                 .on_need_snapshot =
                                     [this](const std::string& conductor) {
                                       // What is pending is in the snapshot too.
                                       FlushEvents();
                                       wire::NodeReport report;
                                       node_->FillSnapshot(*report.mutable_events());
                                       link_->Send(conductor, report);
                                       SendLoad();
                                     }};
    // Started on the executor, so that its callbacks find link_ set.
    executor_.Post([this, options = std::move(options)]() mutable {
      link_ = ConductorLink::Start(std::move(options));
      ReportLoad();
    });
  }

  wire::NodeHello MakeNodeHello() {
    wire::NodeHello hello;
    *hello.mutable_hello() = MakeHello(self_);
    hello.set_kind(wire::NODE_KIND_STORE);
    hello.set_rpc_address(rpc_address_);
    hello.set_ops_address(ops_address_);
    hello.set_data_address(transport_->address());
    if (node_->core() != nullptr) hello.set_slot_count(node_->core()->stats().slots);
    return hello;
  }

  void ScheduleEvents() {
    if (events_scheduled_) return;
    events_scheduled_ = true;
    executor_.PostAfter(kEventsAfter, [this] { FlushEvents(); });
  }

  void FlushEvents() {
    events_scheduled_ = false;
    wire::NodeReport report;
    if (!node_->TakeEvents(*report.mutable_events()) || link_ == nullptr) return;
    link_->Broadcast(report);
    if (clock_.Now() >= load_sent_ + kLoadSpacing) SendLoad();
  }

  void SendLoad() {
    if (link_ == nullptr) return;
    wire::NodeReport report;
    // Until a worker has brought the layout, nobody can say how many slots there will be: no load
    // is better than "none free". That the report comes says that the store is alive.
    if (node_->core() != nullptr) node_->FillLoad(*report.mutable_store_load());
    link_->Broadcast(report);
    load_sent_ = clock_.Now();
  }

  void ReportLoad() {
    SendLoad();
    executor_.PostAfter(kLoadEvery, [this] { ReportLoad(); });
  }

  void FinishWhenIdle() {
    if (!drained_) return;
    if (node_->session_count() == 0) {
      Drained();
    } else {
      executor_.PostAfter(kIdleCheckEvery, [this] { FinishWhenIdle(); });
    }
  }

  void Drained() {
    if (drained_) std::exchange(drained_, nullptr)();
  }

  const config::v1::Config config_;
  const Identity self_;
  Registry& registry_;
  const uint64_t seed_;
  const Clock& clock_;
  const std::function<void(std::string_view, std::string_view)> announce_;
  std::string rpc_address_, ops_address_;

  std::unique_ptr<Pool> pool_;
  SerialExecutor executor_{"kv-core"};
  SerialExecutor verifier_{"kv-verify"};
  std::unique_ptr<transfer::Transport> transport_;
  std::unique_ptr<LeaseClient> leases_;
  std::unique_ptr<StoreNode> node_;
  std::unique_ptr<BlobDesk> blobs_;
  std::unique_ptr<grpc::Service> lease_service_;
  std::unique_ptr<RpcServer> rpc_;
  std::unique_ptr<SocketServer> socket_;
  std::unique_ptr<ConductorLink> link_;
  Thread populate_;
  std::atomic<bool> stop_{false};
  std::atomic<bool> serving_{false};

  mutable absl::Mutex mu_;
  std::string not_ready_ ABSL_GUARDED_BY(mu_);
  std::string stuck_ ABSL_GUARDED_BY(mu_);

  // The executor's.
  bool events_scheduled_ = false;
  absl::Time load_sent_ = absl::InfinitePast();
  absl::AnyInvocable<void()> drained_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Service>> MakeKvStore(DaemonContext& context) {
  auto service = std::make_unique<KvStoreService>(context);
  RETURN_IF_ERROR(service->Start());
  return service;
}

}  // namespace antiphon::kvstore
