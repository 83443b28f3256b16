// The worker's heart: one thread that hands events to both cores, plans a step from both (decode
// rows first, prefill chunks in what is left), runs it, and performs what the cores ask for.
#ifndef ANTIPHON_WORKER_STEP_LOOP_H_
#define ANTIPHON_WORKER_STEP_LOOP_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/time/time.h"
#include "antiphon/v1/control.pb.h"
#include "antiphon/v1/model.pb.h"
#include "common/clock.h"
#include "common/metrics.h"
#include "common/thread.h"
#include "common/wire.h"
#include "decode/core.h"
#include "decode/prefill_client.h"
#include "decode/service.h"
#include "engine/model_runner.h"
#include "prefill/core.h"
#include "prefill/service.h"
#include "worker/cost_model.h"
#include "worker/metrics.h"
#include "worker/step_queue.h"
#include "worker/store_link.h"

namespace antiphon::worker {

struct StepLoopOptions {
  Identity self;
  const Clock* clock = nullptr;
  Registry* registry = nullptr;
  bool prefill_role = false;
  uint32_t max_sequences = 64;
  uint32_t chunk_tokens = 512;
  absl::Duration tbt_max = absl::InfiniteDuration();
  std::string store_socket;
  AttachFunction attach;
};

// What the loop tells of itself, on its thread.
struct StepLoopEvents {
  // Attached to a store (again): register with this incarnation.
  absl::AnyInvocable<void(uint64_t store_incarnation)> on_attached;
  absl::AnyInvocable<void()> on_lost;
  absl::AnyInvocable<void(const internal::v1::WorkerLoad&)> on_load;
  // No step will succeed any more (a lost GPU). Once; all sequences were ended UNAVAILABLE.
  absl::AnyInvocable<void(const absl::Status&)> on_engine_lost;
};

// Runs from construction to destruction. Until Begin every stream is answered UNAVAILABLE.
class StepLoop final : public prefill::StreamHandler,
                       public decode::GatewayHandler,
                       public decode::PrefillHandler {
 public:
  StepLoop(StepLoopOptions options, StepLoopEvents events);
  ~StepLoop() override;

  // The executor of the services and of the conductor link.
  Executor* executor() { return &queue_; }
  // Before the first stream; all outlive the loop's use of them: call Stop before they go.
  void SetPeers(prefill::PrefillService* prefills, decode::DecodeService* gateways,
                decode::PrefillClient* client);
  // The model is there. Posts; attaches to the store.
  void Begin(std::unique_ptr<engine::ModelRunner> runner, internal::v1::CostModel cost,
             internal::v1::Fingerprint fingerprint);
  // Refuses new work.
  void SetDraining();
  // `done` runs on the loop when no sequence is left.
  void WhenIdle(absl::AnyInvocable<void()> done);
  // Ends what still runs.
  void EndAll(const absl::Status& status);
  // Joins the thread; nothing is sent after. Idempotent.
  void Stop();

  // Any thread. Why the store is not there; empty when it is.
  std::string StoreError() const;
  // Any thread. Empty, or why the loop counts as stuck.
  std::string StuckReason() const;

  // From the services, on the loop.
  void OnPrefillOpen(uint64_t stream, const internal::v1::PrefillOpen& open) override;
  void OnPrefillHalfClose(uint64_t stream) override;
  void OnPrefillBroken(uint64_t stream) override;
  void OnStart(uint64_t gateway, const internal::v1::Start& start) override;
  void OnCancel(uint64_t gateway, const internal::v1::Cancel& cancel) override;
  void OnGatewayBroken(uint64_t gateway) override;
  void OnPrefillUp(uint64_t prefill, const internal::v1::PrefillUp& up) override;
  void OnPrefillEnd(uint64_t prefill, const absl::Status& status) override;

 private:
  void Run();
  // Plans, submits, then performs.
  void StartStep();
  void WatchStep();
  void FinishStep();
  void CountStep(absl::Time now);
  void FailStep(const absl::Status& status, absl::Time now);
  // After an error of the engine: a rank that is gone is no fault of the sequences, which end so
  // that they go elsewhere.
  void EndAfter(const absl::Status& status);
  void Perform();
  void PerformPrefill();
  void PerformDecode();
  void OnStoreAttached(kvstore::StoreClient& client);
  void OnStoreLost(const absl::Status& why);
  void LookAtEngine();
  // How long nothing may happen before the loop looks again.
  absl::Duration Patience() const;
  absl::Time ReportDue() const;
  // `heard`: something was delivered, so that what is reported may have changed.
  void Report(bool heard);
  internal::v1::WorkerLoad LoadNow() const;

  const StepLoopOptions options_;
  StepLoopEvents events_;
  StepQueue queue_;
  WorkerMetrics metrics_;
  prefill::PrefillService* prefills_ = nullptr;
  decode::DecodeService* gateways_ = nullptr;
  decode::PrefillClient* client_ = nullptr;

  // The loop's thread only.
  std::unique_ptr<engine::ModelRunner> runner_;
  std::unique_ptr<prefill::PrefillCore> prefill_;
  std::unique_ptr<decode::DecodeCore> decode_;
  std::optional<StoreLink> store_;
  std::optional<CostRefiner> cost_;
  bool store_lost_ = false;  // and a step may still touch its pool
  bool engine_lost_ = false;
  bool draining_ = false;
  bool stepping_ = false;
  bool idle_ = true;  // the last look found nothing to run
  engine::StepProgress progress_;
  size_t rows_ = 0;  // leading chunks of the step that are decode's
  StepSize step_size_;
  double step_context_ = 0;  // context tokens of rows, or context of the prefill chunk
  size_t prefill_chunks_ = 0;
  absl::Time step_begin_;
  uint64_t steps_ = 0;
  absl::Time next_tick_ = absl::InfinitePast();
  absl::Time next_count_ = absl::InfinitePast();
  absl::Time next_report_ = absl::InfinitePast();
  absl::Time last_report_ = absl::InfinitePast();
  uint64_t reported_ = 0;  // what the last report said, in short
  uint64_t noticed_ = 0;   // what the next would say, when it was looked at last
  absl::Time changed_at_ = absl::InfinitePast();
  bool report_owed_ = false;  // it has changed since
  std::vector<absl::AnyInvocable<void()>> when_idle_;

  std::atomic<bool> stop_{false};
  // For StuckReason: since when work waits without a step, in the clock's nanoseconds; 0: none.
  std::atomic<int64_t> waiting_since_ns_{0};
  std::atomic<uint32_t> waiting_{0};
  mutable absl::Mutex error_mu_;
  std::string store_error_ ABSL_GUARDED_BY(error_mu_) = "not attached to a KV store yet";
  Thread thread_;
};

}  // namespace antiphon::worker

#endif  // ANTIPHON_WORKER_STEP_LOOP_H_
