#include "worker/worker.h"

#include <unistd.h>

#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "antiphon/v1/config.pb.h"
#include "antiphon/v1/control.pb.h"
#include "common/conductor_link.h"
#include "common/logging.h"
#include "common/net.h"
#include "common/status_macros.h"
#include "common/thread.h"
#include "decode/prefill_client.h"
#include "decode/service.h"
#include "engine/shm_comm.h"
#include "kvstore/client/store_client.h"
#include "prefill/service.h"
#include "worker/host_blobs.h"
#include "worker/listener.h"
#include "worker/model_host.h"
#include "worker/rank_processes.h"
#include "worker/step_loop.h"

namespace antiphon::worker {
namespace {

// After the last work ended: what is written to gateways leaves before the process does.
constexpr absl::Duration kFlush = absl::Milliseconds(200);
// For all ranks to have started.
constexpr absl::Duration kJoin = absl::Seconds(60);

class Worker final : public Service {
 public:
  Worker(DaemonContext& context, StartRole role)
      : config_(*context.config), self_(context.self), prefill_role_(role == StartRole::kPrefill) {
    StepLoopOptions options;
    options.self = self_;
    options.clock = &Clock::Real();
    options.registry = context.registry;
    options.prefill_role = prefill_role_;
    options.max_sequences = config_.worker().max_sequences();
    options.chunk_tokens = config_.worker().chunk_tokens();
    options.tbt_max =
        config_.slo().has_tbt() ? ToDuration(config_.slo().tbt()) : absl::InfiniteDuration();
    options.store_socket = StoreSocket(config_);
    options.attach = &kvstore::StoreClient::Attach;
    StepLoopEvents events;
    events.on_attached = [this](uint64_t incarnation) { Register(incarnation); };
    events.on_lost = [this] { Unregister(); };
    events.on_load = [this](const internal::v1::WorkerLoad& load) { Broadcast(load); };
    // The streams go on elsewhere; this process starts again, if whoever started it wants that.
    events.on_engine_lost = [this](const absl::Status& why) {
      LogError("the engine is lost, this worker leaves: {}", std::string(why.message()));
      Unregister();
      loop_->executor()->PostAfter(kFlush, [] { _exit(kExitUnavailable); });
    };
    loop_ = std::make_unique<StepLoop>(std::move(options), std::move(events));
    prefills_ = prefill::PrefillService::Make(self_, loop_->executor(), loop_.get());
    gateways_ = decode::DecodeService::Make(self_, loop_->executor(), loop_.get());
    client_ = decode::PrefillClient::Make(self_, loop_->executor(), loop_.get());
    loop_->SetPeers(prefills_.get(), gateways_.get(), client_.get());
  }

  ~Worker() override {
    loader_.Join();
    if (ranks_ != nullptr) ranks_->StopWatching();
    if (listener_ != nullptr) listener_->Shutdown();
    // The loop is the link's executor: it must run while the link ends.
    {
      absl::MutexLock lock(&mu_);
      stopping_ = true;
    }
    Unregister();
    loop_->Stop();
    client_ = nullptr;
    listener_ = nullptr;
  }

  absl::Status Start(DaemonContext& context) {
    ASSIGN_OR_RETURN(file_, OpenModel(config_));
    host_blobs_ = std::make_unique<HostBlobs>(StoreSocket(config_), self_, file_->identity());
    const auto& worker = config_.worker();
    const auto& listen = prefill_role_ ? worker.prefill() : worker.decode();
    const std::string key = prefill_role_ ? "worker.prefill" : "worker.decode";
    auto listener = Listener::Start(listen.listen(), prefills_->service(), gateways_->service());
    if (!listener.ok()) {
      return absl::Status(
          listener.status().code(),
          fmt::format("{}.listen: {}", key, std::string(listener.status().message())));
    }
    listener_ = *std::move(listener);
    rpc_address_ = AdvertisedAddress(listen, listener_->port());
    if (context.announce) context.announce(key, rpc_address_);
    if (worker.tensor_parallel() > 1) {
      ASSIGN_OR_RETURN(ranks_,
                       RankProcesses::Start(config_, prefill_role_,
                                            [this](const absl::Status& why) { OnRankDeath(why); }));
    }
    loader_ = Thread("loader", [this] { Load(); });
    return absl::OkStatus();
  }

  std::string NotReadyReason() const override {
    absl::MutexLock lock(&mu_);
    if (!loading_.empty()) return loading_;
    if (std::string error = loop_->StoreError(); !error.empty()) {
      return fmt::format("no KV store: {}", error);
    }
    if (link_ == nullptr || link_->accepted_count() == 0) {
      const std::string error = link_ == nullptr ? "" : link_->last_error();
      return error.empty() ? "no conductor has accepted this worker yet"
                           : fmt::format("no conductor has accepted this worker: {}", error);
    }
    return "";
  }

  std::string StuckReason() const override { return loop_->StuckReason(); }

  void Drain(absl::Duration delay, absl::Duration deadline,
             absl::AnyInvocable<void()> done) override {
    {
      absl::MutexLock lock(&mu_);
      draining_ = deadline + delay;
      SendDraining();
    }
    // Whichever comes first ends it, once.
    auto end = std::make_shared<absl::AnyInvocable<void()>>(std::move(done));
    const auto finish = [this, end] {
      if (!*end) return;
      loop_->executor()->PostAfter(kFlush, [done = std::move(*end)]() mutable { done(); });
      *end = nullptr;
    };
    loop_->executor()->PostAfter(delay, [this, finish] {
      loop_->SetDraining();
      loop_->WhenIdle(finish);
    });
    loop_->executor()->PostAfter(delay + deadline, [this, finish] {
      loop_->EndAll(absl::UnavailableError("draining: the worker's deadline passed"));
      loop_->executor()->Post(finish);
    });
  }

 private:
  absl::StatusOr<engine::TensorGroup> JoinRanks() {
    engine::TensorGroup group;
    if (ranks_ == nullptr) return group;
    ASSIGN_OR_RETURN(comm_, engine::ShmComm::Join(ranks_->group_fd(), 0, kJoin));
    group.comm = comm_.get();
    group.sockets = ranks_->sockets();
    group.fence = [this] { ranks_->Kill(); };
    return group;
  }

  absl::StatusOr<LoadedModel> LoadOnAllRanks() {
    ASSIGN_OR_RETURN(const engine::TensorGroup group, JoinRanks());
    return LoadModel(*file_, config_, prefill_role_, Clock::Real(), group, host_blobs_.get(),
                     [this](std::string progress) {
                       absl::MutexLock lock(&mu_);
                       loading_ = std::move(progress);
                     });
  }

  // Nothing is left to step with. Whoever streams from here goes elsewhere; our supervisor starts
  // us again.
  void OnRankDeath(const absl::Status& why) {
    LogError("{}: this worker ends", std::string(why.message()));
    loop_->EndAll(absl::UnavailableError(
        fmt::format("a process of this worker is gone: {}", std::string(why.message()))));
    loop_->executor()->Post([this] { Unregister(); });
    loop_->executor()->PostAfter(kFlush, [] { _exit(kExitUnavailable); });
  }

  void Load() {
    auto loaded = LoadOnAllRanks();
    if (!loaded.ok()) {
      // There is nobody left to tell but the log: the factory has returned long ago.
      LogError("cannot start: {}", std::string(loaded.status().message()));
      _exit(ExitCodeOf(loaded.status()));
    }
    {
      absl::MutexLock lock(&mu_);
      card_ = loaded->card;
      fingerprint_ = loaded->fingerprint;
      cost_ = loaded->cost;
      blobs_ = std::move(loaded->blobs);
      loading_.clear();
    }
    loop_->Begin(std::move(loaded->runner), loaded->cost, loaded->fingerprint);
  }

  // On the loop, at every attachment: a new incarnation of the store is a new registration.
  void Register(uint64_t store_incarnation) {
    Unregister();
    offerer_.Post([this, store_incarnation] { host_blobs_->OfferTo(store_incarnation); });
    ConductorLinkOptions options;
    options.conductors.assign(config_.cluster().conductors().begin(),
                              config_.cluster().conductors().end());
    options.self = self_;
    options.executor = loop_->executor();
    options.hello = [this, store_incarnation] { return MakeNodeHello(store_incarnation); };
    options.blob = [this](const std::string& digest) {
      absl::MutexLock lock(&mu_);
      auto blob = blobs_.find(digest);
      return blob == blobs_.end() ? std::string() : blob->second;
    };
    options.on_need_snapshot = [this](const std::string&) {
      absl::MutexLock lock(&mu_);
      SendDraining();
    };
    auto link = ConductorLink::Start(std::move(options));
    absl::MutexLock lock(&mu_);
    if (!stopping_) link_ = std::move(link);
  }

  void Unregister() {
    std::unique_ptr<ConductorLink> link;  // ended outside of the lock: its callbacks take it
    absl::MutexLock lock(&mu_);
    link = std::move(link_);
  }

  internal::v1::NodeHello MakeNodeHello(uint64_t store_incarnation) {
    internal::v1::NodeHello hello;
    *hello.mutable_hello() = MakeHello(self_);
    hello.set_kind(internal::v1::NODE_KIND_WORKER);
    hello.set_rpc_address(rpc_address_);
    const auto& worker = config_.worker();
    const auto& ops = prefill_role_ ? worker.prefill_ops() : worker.decode_ops();
    if (auto address = ParseHostPort(ops.listen()); address.ok() && address->port != 0) {
      hello.set_ops_address(AdvertisedAddress(ops, address->port));
    } else {
      hello.set_ops_address(ops.advertise());
    }
    hello.set_role(prefill_role_ ? internal::v1::ROLE_PREFILL : internal::v1::ROLE_DECODE);
    hello.set_store_incarnation(store_incarnation);
    hello.set_max_sequences(worker.max_sequences());
    absl::MutexLock lock(&mu_);
    *hello.mutable_card() = card_;
    *hello.mutable_fingerprint() = fingerprint_;
    *hello.mutable_cost() = cost_;
    return hello;
  }

  void Broadcast(const internal::v1::WorkerLoad& load) {
    internal::v1::NodeReport report;
    *report.mutable_load() = load;
    absl::MutexLock lock(&mu_);
    if (link_ != nullptr) link_->Broadcast(report);
  }

  void SendDraining() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (draining_ == absl::ZeroDuration() || link_ == nullptr) return;
    internal::v1::NodeReport report;
    report.mutable_draining()->set_deadline_s(absl::ToDoubleSeconds(draining_));
    link_->Broadcast(report);
  }

  const config::v1::Config config_;
  const Identity self_;
  const bool prefill_role_;
  std::unique_ptr<model::ModelFile> file_;  // the runner reads it
  std::unique_ptr<HostBlobs> host_blobs_;   // of the file
  std::unique_ptr<RankProcesses> ranks_;    // null: this process is the worker
  std::unique_ptr<engine::ShmComm> comm_;   // of the runner
  std::unique_ptr<StepLoop> loop_;
  std::unique_ptr<prefill::PrefillService> prefills_;
  std::unique_ptr<decode::DecodeService> gateways_;
  std::unique_ptr<decode::PrefillClient> client_;
  std::unique_ptr<Listener> listener_;
  std::string rpc_address_;
  mutable absl::Mutex mu_;
  std::string loading_ ABSL_GUARDED_BY(mu_) = "loading weights 0%";
  internal::v1::ModelCard card_ ABSL_GUARDED_BY(mu_);
  internal::v1::Fingerprint fingerprint_ ABSL_GUARDED_BY(mu_);
  internal::v1::CostModel cost_ ABSL_GUARDED_BY(mu_);
  std::map<std::string, std::string> blobs_ ABSL_GUARDED_BY(mu_);
  std::unique_ptr<ConductorLink> link_ ABSL_GUARDED_BY(mu_);
  absl::Duration draining_ ABSL_GUARDED_BY(mu_);  // zero: not draining
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  Thread loader_;
  SerialExecutor offerer_{"blobs"};  // may block on a store
};

}  // namespace

int RunWorker(int argc, char** argv, StartRole role) {
  if (argc == 3 && std::string_view(argv[1]) == kRankFlag) return RunRank(argv[2]);
  const std::string name = role == StartRole::kPrefill ? "prefill" : "decode";
  return RunDaemon(argc, argv, {.name = name, .metrics_name = "worker"},
                   [role](DaemonContext& context) { return StartWorker(context, role); });
}

absl::StatusOr<std::unique_ptr<Service>> StartWorker(DaemonContext& context, StartRole role) {
  auto worker = std::make_unique<Worker>(context, role);
  RETURN_IF_ERROR(worker->Start(context));
  return worker;
}

}  // namespace antiphon::worker
