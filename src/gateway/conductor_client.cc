#include "gateway/conductor_client.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <map>
#include <set>

#include "absl/synchronization/mutex.h"
#include "antiphon/v1/control.grpc.pb.h"
#include "common/clock.h"
#include "common/logging.h"
#include "common/rpc.h"
#include "common/status_macros.h"

namespace antiphon::gateway {
namespace {

constexpr absl::Duration kRetryMin = absl::Milliseconds(100);
constexpr absl::Duration kRetryMax = absl::Seconds(1);
constexpr auto kBlobTimeout = std::chrono::seconds(30);
constexpr auto kFinishTimeout = std::chrono::seconds(2);

using Stub = wire::Conductor::Stub;

std::chrono::system_clock::time_point After(std::chrono::milliseconds timeout) {
  return absl::ToChronoTime(Clock::Real().WallNow()) + timeout;
}

// One unary call: lives until its callback has run.
template <typename Request, typename Reply>
struct UnaryCall {
  grpc::ClientContext context;
  Request request;
  Reply reply;
};

struct AdmitCall {
  uint64_t name = 0;
  wire::AdmitRequest request;
  absl::AnyInvocable<void(absl::StatusOr<wire::AdmitReply>)> done;
  size_t tried = 0;
  size_t conductor = 0;  // of the attempt
  std::shared_ptr<UnaryCall<wire::AdmitRequest, wire::AdmitReply>> attempt;
};

class GrpcConductorClient;

// The stream of model sets from one conductor.
class Watch final : public grpc::ClientReadReactor<wire::ModelSet> {
 public:
  Watch(GrpcConductorClient* client, Stub* stub, wire::Hello hello);
  void Begin() {
    StartRead(&set_);
    StartCall();
  }
  void Cancel() { context_.TryCancel(); }
  void OnReadDone(bool ok) override;
  void OnDone(const grpc::Status& status) override;

 private:
  GrpcConductorClient* const client_;
  grpc::ClientContext context_;
  wire::WatchModelsRequest request_;
  wire::ModelSet set_;
};

class GrpcConductorClient final : public ConductorClient {
 public:
  explicit GrpcConductorClient(ConductorClientOptions options)
      : options_(std::move(options)), work_("gw-models") {
    for (const std::string& address : options_.conductors) {
      channels_.push_back(MakeChannel(address));
      stubs_.push_back(wire::Conductor::NewStub(channels_.back()));
    }
    catalog_.not_ready =
        fmt::format("no conductor reached yet ({})", fmt::join(options_.conductors, ", "));
    work_.Post([this] { StartWatch(); });
  }

  ~GrpcConductorClient() override {
    // Nothing may call back once this is gone, nor begin once nothing is pending.
    work_.Post([this] {
      stopping_ = true;
      if (watch_ != nullptr) watch_->Cancel();
      absl::MutexLock lock(&mu_);
      last_watch_begun_ = true;
    });
    std::vector<std::shared_ptr<UnaryCall<wire::AdmitRequest, wire::AdmitReply>>> attempts;
    {
      absl::MutexLock lock(&mu_);
      for (auto& [name, call] : admits_) attempts.push_back(call->attempt);
      admits_.clear();
    }
    for (auto& attempt : attempts) attempt->context.TryCancel();
    {
      absl::MutexLock lock(&mu_);
      const auto quiet = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
        return last_watch_begun_ && pending_ == 0;
      };
      mu_.Await(absl::Condition(&quiet));
    }
    work_.Shutdown();
  }

  uint64_t Admit(wire::AdmitRequest request,
                 absl::AnyInvocable<void(absl::StatusOr<wire::AdmitReply>)> done) override {
    auto call = std::make_shared<AdmitCall>();
    *request.mutable_hello() = MakeHello(options_.self);
    call->request = std::move(request);
    call->done = std::move(done);
    {
      absl::MutexLock lock(&mu_);
      call->name = next_call_++;
      call->conductor = active_;
      admits_[call->name] = call;
    }
    Attempt(call);
    return call->name;
  }

  void AbandonAdmit(uint64_t name) override {
    std::shared_ptr<UnaryCall<wire::AdmitRequest, wire::AdmitReply>> attempt;
    {
      absl::MutexLock lock(&mu_);
      const auto it = admits_.find(name);
      if (it == admits_.end()) return;
      attempt = it->second->attempt;
      admits_.erase(it);
    }
    if (attempt != nullptr) attempt->context.TryCancel();
  }

  void Finish(wire::FinishReport report) override {
    auto call = std::make_shared<UnaryCall<wire::FinishReport, wire::FinishReply>>();
    call->request = std::move(report);
    *call->request.mutable_hello() = MakeHello(options_.self);
    call->context.set_deadline(After(kFinishTimeout));
    size_t conductor;
    {
      absl::MutexLock lock(&mu_);
      conductor = active_;
      ++pending_;
    }
    stubs_[conductor]->async()->Finish(&call->context, &call->request, &call->reply,
                                       [this, call](grpc::Status) { Settled(); });
  }

  // From the watch, on gRPC's threads.
  void OnModels(Watch* watch, wire::ModelSet set) {
    work_.Post([this, watch, set = std::move(set)]() mutable {
      if (watch != watch_) return;
      retry_ = kRetryMin;
      set_ = std::move(set);
      Resolve();
    });
  }
  // The watch ends on work_, where it may be about to be cancelled.
  void OnWatchDone(Watch* watch, const grpc::Status& status) {
    work_.Post([this, watch, status] {
      const std::unique_ptr<Watch> ended(watch);
      watch_ = nullptr;
      if (!stopping_) {
        if (catalog_.connected) {
          LogWarning("conductor {} lost: {}", options_.conductors[watched_],
                     status.error_message());
        }
        if (catalog_.models.empty()) {
          catalog_.not_ready = fmt::format("conductor {}: {}", options_.conductors[watched_],
                                           status.error_message());
        }
        catalog_.connected = false;
        Publish();
        work_.PostAfter(retry_, [this] { StartWatch(); });
        retry_ = std::min(2 * retry_, kRetryMax);
        MoveOn(watched_);
      }
      Settled();
    });
  }

 private:
  void Settled() {
    absl::MutexLock lock(&mu_);
    --pending_;
  }
  void MoveOn(size_t failed) {
    absl::MutexLock lock(&mu_);
    if (active_ == failed) active_ = (failed + 1) % stubs_.size();
  }

  void Attempt(const std::shared_ptr<AdmitCall>& call) {
    auto attempt = std::make_shared<UnaryCall<wire::AdmitRequest, wire::AdmitReply>>();
    attempt->request = call->request;
    if (call->request.deadline_ms() > 0) {
      attempt->context.set_deadline(After(std::chrono::milliseconds(call->request.deadline_ms())));
    }
    {
      absl::MutexLock lock(&mu_);
      if (admits_.find(call->name) == admits_.end()) return;  // abandoned
      call->attempt = attempt;
      ++call->tried;
      ++pending_;
    }
    stubs_[call->conductor]->async()->Admit(&attempt->context, &attempt->request, &attempt->reply,
                                            [this, call, attempt](grpc::Status status) {
                                              OnAdmit(call, std::move(status),
                                                      std::move(attempt->reply));
                                              Settled();
                                            });
  }

  void OnAdmit(const std::shared_ptr<AdmitCall>& call, grpc::Status status,
               wire::AdmitReply reply) {
    if (status.error_code() == grpc::StatusCode::UNAVAILABLE && call->tried < stubs_.size()) {
      MoveOn(call->conductor);
      call->conductor = (call->conductor + 1) % stubs_.size();
      return Attempt(call);
    }
    absl::StatusOr<wire::AdmitReply> result = std::move(reply);
    if (!status.ok()) result = FromGrpc(status);
    {
      absl::MutexLock lock(&mu_);
      if (admits_.find(call->name) == admits_.end()) return;
    }
    options_.executor->Post([this, call, result = std::move(result)]() mutable {
      {
        absl::MutexLock lock(&mu_);
        if (admits_.erase(call->name) == 0) return;
      }
      call->done(std::move(result));
    });
  }

  // ---- models, all on work_
  // -------------------------------------------------------------------------

  void StartWatch() {
    if (stopping_) return;
    {
      absl::MutexLock lock(&mu_);
      watched_ = active_;
      ++pending_;
    }
    watch_ = new Watch(this, stubs_[watched_].get(), MakeHello(options_.self));  // OnWatchDone's
    watch_->Begin();
  }

  void Resolve() {
    for (const wire::ModelCard& card : set_.cards()) {
      for (const std::string& digest : parts_.Missing(card)) {
        if (digest.empty() || !asked_.insert(digest).second) continue;
        FetchBlob(digest, digest == card.tokenizer_digest());
      }
    }
    std::vector<ServedModelPtr> models;
    bool complete = true;
    for (const wire::ModelCard& card : set_.cards()) {
      if (ServedModelPtr model = parts_.Build(card)) {
        models.push_back(std::move(model));
      } else {
        complete = false;
      }
    }
    // A conductor that has just started knows nothing yet; what is known stays known.
    if (!models.empty()) catalog_.models = std::move(models);
    catalog_.connected = true;
    catalog_.prefill_ready = set_.prefill_ready();
    catalog_.decode_ready = set_.decode_ready();
    if (!was_complete_) {
      catalog_.not_ready = !complete                     ? blob_error_
                           : catalog_.models.empty()     ? "no model registered yet"
                           : catalog_.prefill_ready == 0 ? "no prefill worker ready yet"
                           : catalog_.decode_ready == 0  ? "no decode worker ready yet"
                                                         : "";
    }
    Publish();
  }

  void FetchBlob(const std::string& digest, bool is_tokenizer) {
    auto call = std::make_shared<UnaryCall<wire::GetBlobRequest, wire::Blob>>();
    *call->request.mutable_hello() = MakeHello(options_.self);
    call->request.set_digest(digest);
    call->context.set_deadline(After(kBlobTimeout));
    {
      absl::MutexLock lock(&mu_);
      ++pending_;
    }
    stubs_[watched_]->async()->GetBlob(&call->context, &call->request, &call->reply,
                                       [this, call, digest, is_tokenizer](grpc::Status status) {
                                         work_.Post([this, call, digest, is_tokenizer, status] {
                                           OnBlob(digest, is_tokenizer, FromGrpc(status),
                                                  call->reply);
                                           Settled();
                                         });
                                       });
  }

  void OnBlob(const std::string& digest, bool is_tokenizer, absl::Status status,
              const wire::Blob& blob) {
    asked_.erase(digest);
    const char* what = is_tokenizer ? "tokenizer" : "chat template";
    if (status.ok()) {
      status = is_tokenizer ? parts_.AddTokenizer(digest, blob.content())
                            : parts_.AddTemplate(digest, blob.content());
    }
    if (status.ok()) return Resolve();
    const std::string why(status.message());
    blob_error_ = fmt::format("cannot use the {} {}: {}", what, digest.substr(0, 12), why);
    LogWarning("{}", blob_error_);
    if (stopping_) return;
    catalog_.not_ready = was_complete_ ? "" : blob_error_;
    Publish();
    work_.PostAfter(kRetryMax, [this] {
      if (!stopping_) Resolve();
    });
  }

  void Publish() {
    const bool complete = catalog_.connected && !catalog_.models.empty() &&
                          catalog_.prefill_ready > 0 && catalog_.decode_ready > 0;
    was_complete_ = was_complete_ || complete;
    if (was_complete_) catalog_.not_ready.clear();
    catalog_.degraded = was_complete_ && !complete;
    options_.on_catalog(std::make_shared<const Catalog>(catalog_));
  }

  ConductorClientOptions options_;
  std::vector<std::shared_ptr<grpc::Channel>> channels_;
  std::vector<std::unique_ptr<Stub>> stubs_;

  absl::Mutex mu_;
  size_t active_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t next_call_ ABSL_GUARDED_BY(mu_) = 1;
  std::map<uint64_t, std::shared_ptr<AdmitCall>> admits_ ABSL_GUARDED_BY(mu_);
  int pending_ ABSL_GUARDED_BY(mu_) = 0;  // calls whose callback has not run
  bool last_watch_begun_ ABSL_GUARDED_BY(mu_) = false;

  bool stopping_ = false;  // from here on: on work_
  Watch* watch_ = nullptr;
  size_t watched_ = 0;
  absl::Duration retry_ = kRetryMin;
  wire::ModelSet set_;
  ModelParts parts_;
  std::set<std::string> asked_;
  std::string blob_error_ = "fetching tokenizer and chat template";
  Catalog catalog_;
  bool was_complete_ = false;
  SerialExecutor work_;  // last: its thread uses all of the above
};

Watch::Watch(GrpcConductorClient* client, Stub* stub, wire::Hello hello) : client_(client) {
  *request_.mutable_hello() = std::move(hello);
  stub->async()->WatchModels(&context_, &request_, this);
}

void Watch::OnReadDone(bool ok) {
  if (!ok) return;
  client_->OnModels(this, std::exchange(set_, {}));
  StartRead(&set_);
}

void Watch::OnDone(const grpc::Status& status) { client_->OnWatchDone(this, status); }

}  // namespace

std::unique_ptr<ConductorClient> ConductorClient::Start(ConductorClientOptions options) {
  return std::make_unique<GrpcConductorClient>(std::move(options));
}

}  // namespace antiphon::gateway
