#include "decode/service.h"

#include <deque>
#include <map>
#include <optional>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "antiphon/v1/worker.grpc.pb.h"
#include "common/rpc.h"

namespace antiphon::decode {
namespace {

class Call;

// What the calls share; its mutex guards them all.
struct Shared {
  Identity self;
  Executor* executor = nullptr;
  GatewayHandler* handler = nullptr;
  absl::Mutex mu;
  uint64_t next_stream ABSL_GUARDED_BY(mu) = 1;
  std::map<uint64_t, Call*> calls ABSL_GUARDED_BY(mu);

  void ReadNext(uint64_t stream);
};

class Call final : public grpc::ServerBidiReactor<wire::GenerateDown, wire::GenerateUp> {
 public:
  explicit Call(Shared* shared) : shared_(shared) {
    {
      absl::MutexLock lock(&shared_->mu);
      stream_ = shared_->next_stream++;
      shared_->calls[stream_] = this;
    }
    StartRead(&down_);
  }

  void ReadNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(shared_->mu) {
    if (!finished_) StartRead(&down_);
  }

  void Send(wire::GenerateUp message) ABSL_EXCLUSIVE_LOCKS_REQUIRED(shared_->mu) {
    if (finished_ || end_.has_value()) return;
    unread_bytes_ += message.ByteSizeLong();
    queue_.push_back(std::move(message));
    if (unread_bytes_ > kUnreadBytesMax) {
      queue_.clear();
      return End(absl::ResourceExhaustedError("the gateway reads its tokens too slowly"));
    }
    Pump();
  }

  void End(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(shared_->mu) {
    if (finished_ || end_.has_value()) return;
    end_ = status;
    Broken();
    Pump();
  }

  void OnReadDone(bool ok) override {
    absl::MutexLock lock(&shared_->mu);
    // A half-close is an end too: a gateway that wants tokens keeps its side open.
    if (!ok) return End(absl::OkStatus());
    GatewayHandler* const handler = shared_->handler;
    Shared* const shared = shared_;
    const uint64_t stream = stream_;
    switch (down_.message_case()) {
      case wire::GenerateDown::kHello: {
        if (absl::Status status = Negotiate(shared_->self, down_.hello()).status(); !status.ok()) {
          return End(status);
        }
        if (!std::exchange(greeted_, true)) {
          wire::GenerateUp up;
          *up.mutable_hello() = MakeHello(shared_->self);
          Send(std::move(up));
        }
        return ReadNext();
      }
      case wire::GenerateDown::kStart:
        if (!greeted_) break;
        return shared_->executor->Post(
            [shared, handler, stream, start = std::move(*down_.mutable_start())] {
              handler->OnStart(stream, start);
              shared->ReadNext(stream);
            });
      case wire::GenerateDown::kCancel:
        if (!greeted_) break;
        return shared_->executor->Post(
            [shared, handler, stream, cancel = std::move(*down_.mutable_cancel())] {
              handler->OnCancel(stream, cancel);
              shared->ReadNext(stream);
            });
      case wire::GenerateDown::MESSAGE_NOT_SET:
        return ReadNext();  // of a newer wire version
    }
    End(absl::InvalidArgumentError("hello must be the first message"));
  }

  void OnWriteDone(bool ok) override {
    absl::MutexLock lock(&shared_->mu);
    busy_ = false;
    unread_bytes_ -= writing_bytes_;
    if (!ok) queue_.clear();
    Pump();
  }

  void OnCancel() override {
    absl::MutexLock lock(&shared_->mu);
    End(absl::CancelledError("the stream broke"));
    Broken();
  }

  void OnDone() override {
    {
      absl::MutexLock lock(&shared_->mu);
      Broken();
      shared_->calls.erase(stream_);
    }
    delete this;
  }

 private:
  void Broken() ABSL_EXCLUSIVE_LOCKS_REQUIRED(shared_->mu) {
    if (std::exchange(broken_, true)) return;
    shared_->executor->Post(
        [handler = shared_->handler, stream = stream_] { handler->OnGatewayBroken(stream); });
  }

  void Pump() ABSL_EXCLUSIVE_LOCKS_REQUIRED(shared_->mu) {
    if (busy_ || finished_) return;
    if (!queue_.empty()) {
      writing_ = std::move(queue_.front());
      queue_.pop_front();
      writing_bytes_ = writing_.ByteSizeLong();
      busy_ = true;
      StartWrite(&writing_);
    } else if (end_.has_value()) {
      finished_ = true;
      Finish(ToGrpc(*end_));
    }
  }

  Shared* const shared_;
  uint64_t stream_ = 0;
  wire::GenerateDown down_;
  bool greeted_ ABSL_GUARDED_BY(shared_->mu) = false;
  wire::GenerateUp writing_ ABSL_GUARDED_BY(shared_->mu);
  std::deque<wire::GenerateUp> queue_ ABSL_GUARDED_BY(shared_->mu);
  size_t unread_bytes_ ABSL_GUARDED_BY(shared_->mu) = 0;
  size_t writing_bytes_ ABSL_GUARDED_BY(shared_->mu) = 0;
  std::optional<absl::Status> end_ ABSL_GUARDED_BY(shared_->mu);
  bool busy_ ABSL_GUARDED_BY(shared_->mu) = false;
  bool finished_ ABSL_GUARDED_BY(shared_->mu) = false;
  bool broken_ ABSL_GUARDED_BY(shared_->mu) = false;
};

void Shared::ReadNext(uint64_t stream) {
  absl::MutexLock lock(&mu);
  auto it = calls.find(stream);
  if (it != calls.end()) it->second->ReadNext();
}

class GrpcDecodeService final : public DecodeService, public wire::Decode::CallbackService {
 public:
  GrpcDecodeService(const Identity& self, Executor* executor, GatewayHandler* handler) {
    shared_.self = self;
    shared_.executor = executor;
    shared_.handler = handler;
  }

  grpc::Service* service() override { return this; }

  grpc::ServerBidiReactor<wire::GenerateDown, wire::GenerateUp>* Generate(
      grpc::CallbackServerContext* context) override {
    return new Call(&shared_);
  }

  void Send(uint64_t gateway, wire::TokenBatch batch) override {
    wire::GenerateUp up;
    *up.mutable_tokens() = std::move(batch);
    absl::MutexLock lock(&shared_.mu);
    auto it = shared_.calls.find(gateway);
    if (it != shared_.calls.end()) it->second->Send(std::move(up));
  }

  void EndAll(const absl::Status& status) override {
    absl::MutexLock lock(&shared_.mu);
    for (auto& [stream, call] : shared_.calls) call->End(status);
  }

 private:
  Shared shared_;
};

}  // namespace

std::unique_ptr<DecodeService> DecodeService::Make(const Identity& self, Executor* executor,
                                                   GatewayHandler* handler) {
  return std::make_unique<GrpcDecodeService>(self, executor, handler);
}

}  // namespace antiphon::decode
