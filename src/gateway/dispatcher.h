// Runs the exchanges of all requests on one executor: performs their actions on the cluster, brings
// them its events and the time, and gives what comes out to the fronts.
#ifndef ANTIPHON_GATEWAY_DISPATCHER_H_
#define ANTIPHON_GATEWAY_DISPATCHER_H_

#include <map>
#include <memory>

#include "absl/container/flat_hash_map.h"
#include "common/clock.h"
#include "common/executor.h"
#include "common/ids.h"
#include "gateway/exchange.h"
#include "gateway/upstream.h"

namespace antiphon::gateway {

// Where the answer to a request goes. Called on the dispatcher's executor: OnDelta and OnChoiceEnd
// as they come, then OnDone once.
class ResponseSink {
 public:
  virtual ~ResponseSink() = default;
  // The model that answers; before everything else, unless the request ends early.
  virtual void OnPrepared(const ServedModelPtr& model) {}
  virtual void OnDelta(const ChoiceDelta& delta) = 0;
  virtual void OnChoiceEnd(const ChoiceEnd& end) = 0;
  // `exchange` is nullptr when the request ended before it was submitted.
  virtual void OnDone(const RequestEnd& end, const Exchange* exchange) = 0;
  // Intervals between tokens, for metrics.
  virtual void OnIntervals(const std::vector<float>& seconds) {}
};

class Dispatcher final : public Upstream::Listener {
 public:
  struct Options {
    Executor* executor = nullptr;  // all outlive the dispatcher
    Clock* clock = nullptr;
  };
  explicit Dispatcher(Options options) : options_(options) {}

  // Before the first Submit.
  void SetUpstream(Upstream* upstream) { upstream_ = upstream; }

  // All of these on the executor.
  void Submit(const RequestId& request, std::unique_ptr<Exchange> exchange,
              std::shared_ptr<ResponseSink> sink);
  void Cancel(const RequestId& request);
  // Every request ends with `error`.
  void AbortAll(const ApiError& error);
  void OnTokens(const wire::TokenBatch& batch) override;
  void OnDecodeBroken(const std::string& address, const absl::Status& why) override;
  size_t running() const { return requests_.size(); }

 private:
  struct Running {
    std::unique_ptr<Exchange> exchange;
    std::shared_ptr<ResponseSink> sink;
    std::map<uint32_t, uint64_t> admits;  // choice -> call
  };
  struct Place {
    RequestId request;
    uint32_t choice = 0;
  };

  void Perform(const RequestId& request, Running& running);
  void PerformOnCluster(const RequestId& request, Running& running, uint32_t choice,
                        Action& action);
  void Deliver(const RequestId& request, uint32_t choice,
               const std::function<void(Generation&)>& event);
  void Remove(const RequestId& request);
  void WakeAt(absl::Time due);
  void Tick();

  const Options options_;
  Upstream* upstream_ = nullptr;
  absl::flat_hash_map<RequestId, std::unique_ptr<Running>> requests_;
  absl::flat_hash_map<RequestId, Place> generations_;
  absl::Time wake_at_ = absl::InfiniteFuture();
  Executor::TimerId timer_ = 0;  // 0: none is set
};

}  // namespace antiphon::gateway

#endif  // ANTIPHON_GATEWAY_DISPATCHER_H_
