// The gateway behind its fronts: prepares requests, runs them on the cluster, keeps the books
// (metrics, access lines), drains. Both fronts hand their validated messages to Submit.
#ifndef ANTIPHON_GATEWAY_GATEWAY_H_
#define ANTIPHON_GATEWAY_GATEWAY_H_

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/synchronization/mutex.h"
#include "common/clock.h"
#include "common/daemon.h"
#include "common/executor.h"
#include "gateway/auth.h"
#include "gateway/conductor_client.h"
#include "gateway/decode_streams.h"
#include "gateway/dispatcher.h"
#include "gateway/gateway_metrics.h"
#include "gateway/prepare.h"
#include "gateway/validate.h"

namespace antiphon::gateway {

// What a front knows of a request when it hands it over.
struct RequestMeta {
  RequestId id;
  std::string label;  // what the client sees as x-request-id
  std::string tenant = "default";
  std::string request_class;
  Endpoint endpoint = Endpoint::kOther;
  bool stream = false;
  absl::Duration timeout = absl::InfiniteDuration();  // the client's; ours bounds it
  absl::Time began;                                   // Clock::Now
};

// Whether a class may go on to the cluster and into logs; `header` as the client wrote it.
MaybeError CheckClass(std::string_view header, std::string_view request_class);

// Thread-safe.
class Gateway final : private Upstream {
 public:
  struct Options {
    Identity self;
    std::vector<std::string> conductors;
    Registry* registry = nullptr;
    Clock* clock = nullptr;
    Auth* auth = nullptr;
    uint64_t seed = 0;
    absl::Duration timeout = absl::Seconds(600);
    uint32_t max_n = 16;
    uint32_t max_inflight = 4096;
    int overload_status = 429;
  };
  explicit Gateway(Options options);
  ~Gateway() override;

  // A new request's id and meta; `label` is the client's, used when it is good.
  RequestMeta NewRequest(Endpoint endpoint, std::string_view label);

  // Runs a chat or completion: validation against limits, preparation, cluster. `sink` hears of it
  // on a thread of the gateway's, an early error as OnDone.
  void Submit(const RequestMeta& meta, std::shared_ptr<const api::ChatRequest> request,
              std::shared_ptr<ResponseSink> sink);
  void Submit(const RequestMeta& meta, std::shared_ptr<const api::CompletionRequest> request,
              std::shared_ptr<ResponseSink> sink);
  // The client left. `slow`: because it did not take what it was sent.
  void Cancel(const RequestMeta& meta, bool slow);

  MaybeError Tokenize(const api::TokenizeRequest& request, api::TokenizeResponse& out);
  MaybeError Detokenize(const api::DetokenizeRequest& request, api::DetokenizeResponse& out);

  // Counts and logs a request that Submit did not see.
  void Account(const RequestMeta& meta, int status, std::string_view error_type,
               std::string_view reason);
  // Fields that no one knows, in a request that is served.
  void CountIgnored(size_t fields) { metrics_.ignored_fields->Add(static_cast<double>(fields)); }

  CatalogPtr catalog() const;
  Auth& auth() { return *options_.auth; }
  absl::Time WallNow() const { return options_.clock->WallNow(); }
  // Empty: ready. A cluster that was complete once stays ready.
  std::string NotReadyReason() const;
  std::string ReadyDetails() const;

  // New requests are refused after `delay`, what runs at `deadline` ends with a draining error.
  void Drain(absl::Duration delay, absl::Duration deadline, absl::AnyInvocable<void()> done);

 private:
  class AccountedSink;

  template <typename RequestType>
  void SubmitAny(const RequestMeta& meta, std::shared_ptr<const RequestType> request,
                 std::shared_ptr<ResponseSink> sink);
  MaybeError Enter();
  void WhenIdle();
  uint64_t Random();

  // Upstream, on executor_.
  uint64_t Admit(wire::AdmitRequest request,
                 absl::AnyInvocable<void(absl::StatusOr<wire::AdmitReply>)> done) override;
  void AbandonAdmit(uint64_t call) override;
  void Start(const std::string& address, wire::Start start) override;
  void Cancel(const std::string& address, wire::Cancel cancel) override;
  void Finish(wire::FinishReport report) override;

  const Options options_;
  GatewayMetrics metrics_;
  mutable absl::Mutex mu_;
  CatalogPtr catalog_ ABSL_GUARDED_BY(mu_) = std::make_shared<Catalog>();
  std::atomic<uint64_t> next_random_{0};
  std::atomic<uint32_t> inflight_{0};
  std::atomic<bool> refusing_{false};
  SerialExecutor executor_{"gateway"};  // the dispatcher's
  SerialExecutor prepare_[2] = {SerialExecutor("prepare-0"), SerialExecutor("prepare-1")};
  Dispatcher dispatcher_;
  absl::AnyInvocable<void()> drained_;  // on executor_
  std::unique_ptr<DecodeStreams> streams_;
  std::unique_ptr<ConductorClient> conductor_;
};

}  // namespace antiphon::gateway

#endif  // ANTIPHON_GATEWAY_GATEWAY_H_
