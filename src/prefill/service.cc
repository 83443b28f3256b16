#include "prefill/service.h"

#include <deque>
#include <map>
#include <optional>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "antiphon/v1/worker.grpc.pb.h"
#include "common/rpc.h"

namespace antiphon::prefill {
namespace {

class Call;

// What the calls share; its mutex guards them all.
struct Shared {
  Identity self;
  Executor* executor = nullptr;
  StreamHandler* handler = nullptr;
  absl::Mutex mu;
  uint64_t next_stream ABSL_GUARDED_BY(mu) = 1;
  std::map<uint64_t, Call*> calls ABSL_GUARDED_BY(mu);
};

class Call final : public grpc::ServerBidiReactor<wire::PrefillDown, wire::PrefillUp> {
 public:
  Call(Shared* shared, grpc::CallbackServerContext* context) : shared_(shared), context_(context) {
    {
      absl::MutexLock lock(&shared_->mu);
      stream_ = shared_->next_stream++;
      shared_->calls[stream_] = this;
    }
    StartRead(&down_);
  }

  void Send(wire::PrefillUp message) ABSL_EXCLUSIVE_LOCKS_REQUIRED(shared_->mu) {
    if (finished_ || end_.has_value()) return;
    if (std::exchange(first_, false)) *message.mutable_hello() = MakeHello(shared_->self);
    queue_.push_back(std::move(message));
    Pump();
  }

  void End(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(shared_->mu) {
    if (finished_ || end_.has_value()) return;
    end_ = status;
    Pump();
  }

  void OnReadDone(bool ok) override {
    const uint64_t stream = stream_;
    StreamHandler* const handler = shared_->handler;
    if (!ok) {
      if (!opened_) {
        absl::MutexLock lock(&shared_->mu);
        return End(absl::InvalidArgumentError("the stream ended before its open message"));
      }
      // A broken stream ends its reads too; OnCancel tells of it.
      if (context_->IsCancelled()) return;
      shared_->executor->Post([handler, stream] { handler->OnPrefillHalfClose(stream); });
      return;
    }
    absl::Status refusal;
    if (opened_) {
      refusal = absl::InvalidArgumentError("one open message a stream");
    } else if (!down_.has_open()) {
      refusal = absl::InvalidArgumentError("open is absent from the first message");
    } else {
      refusal = Negotiate(shared_->self, down_.hello()).status();
    }
    if (!refusal.ok()) {
      if (opened_) shared_->executor->Post([handler, stream] { handler->OnPrefillBroken(stream); });
      absl::MutexLock lock(&shared_->mu);
      return End(refusal);
    }
    opened_ = true;
    shared_->executor->Post([handler, stream, open = std::move(*down_.mutable_open())] {
      handler->OnPrefillOpen(stream, open);
    });
    down_.Clear();
    StartRead(&down_);
  }

  void OnWriteDone(bool ok) override {
    absl::MutexLock lock(&shared_->mu);
    busy_ = false;
    if (!ok) queue_.clear();
    Pump();
  }

  void OnCancel() override {
    const uint64_t stream = stream_;
    StreamHandler* const handler = shared_->handler;
    shared_->executor->Post([handler, stream] { handler->OnPrefillBroken(stream); });
    absl::MutexLock lock(&shared_->mu);
    End(absl::CancelledError("the stream broke"));
  }

  void OnDone() override {
    {
      absl::MutexLock lock(&shared_->mu);
      shared_->calls.erase(stream_);
    }
    delete this;
  }

 private:
  void Pump() ABSL_EXCLUSIVE_LOCKS_REQUIRED(shared_->mu) {
    if (busy_ || finished_) return;
    if (!queue_.empty()) {
      writing_ = std::move(queue_.front());
      queue_.pop_front();
      busy_ = true;
      StartWrite(&writing_);
    } else if (end_.has_value()) {
      finished_ = true;
      Finish(ToGrpc(*end_));
    }
  }

  Shared* const shared_;
  grpc::CallbackServerContext* const context_;
  uint64_t stream_ = 0;
  wire::PrefillDown down_;
  bool opened_ = false;  // of reads only
  wire::PrefillUp writing_ ABSL_GUARDED_BY(shared_->mu);
  std::deque<wire::PrefillUp> queue_ ABSL_GUARDED_BY(shared_->mu);
  std::optional<absl::Status> end_ ABSL_GUARDED_BY(shared_->mu);
  bool first_ ABSL_GUARDED_BY(shared_->mu) = true;
  bool busy_ ABSL_GUARDED_BY(shared_->mu) = false;
  bool finished_ ABSL_GUARDED_BY(shared_->mu) = false;
};

class GrpcPrefillService final : public PrefillService, public wire::Prefill::CallbackService {
 public:
  GrpcPrefillService(const Identity& self, Executor* executor, StreamHandler* handler) {
    shared_.self = self;
    shared_.executor = executor;
    shared_.handler = handler;
  }

  grpc::Service* service() override { return this; }

  grpc::ServerBidiReactor<wire::PrefillDown, wire::PrefillUp>* Prefill(
      grpc::CallbackServerContext* context) override {
    return new Call(&shared_, context);
  }

  void Send(uint64_t stream, wire::PrefillUp message) override {
    absl::MutexLock lock(&shared_.mu);
    auto it = shared_.calls.find(stream);
    if (it != shared_.calls.end()) it->second->Send(std::move(message));
  }

  void End(uint64_t stream, const absl::Status& status) override {
    absl::MutexLock lock(&shared_.mu);
    auto it = shared_.calls.find(stream);
    if (it != shared_.calls.end()) it->second->End(status);
  }

 private:
  Shared shared_;
};

}  // namespace

std::unique_ptr<PrefillService> PrefillService::Make(const Identity& self, Executor* executor,
                                                     StreamHandler* handler) {
  return std::make_unique<GrpcPrefillService>(self, executor, handler);
}

}  // namespace antiphon::prefill
