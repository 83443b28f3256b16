#include "gateway/decode_streams.h"

#include <spdlog/fmt/fmt.h>

#include <deque>
#include <map>

#include "absl/synchronization/mutex.h"
#include "antiphon/v1/worker.grpc.pb.h"
#include "common/logging.h"
#include "common/rpc.h"
#include "common/status_macros.h"

namespace antiphon::gateway {
namespace {

// Unsent messages of one stream; a worker that does not read is as good as gone.
constexpr size_t kQueuedBytesMax = 256u << 20;

class GrpcDecodeStreams;

// Deletes itself at its end, after the owner has been told.
class Stream final : public grpc::ClientBidiReactor<wire::GenerateDown, wire::GenerateUp> {
 public:
  Stream(GrpcDecodeStreams* owner, std::string address, std::shared_ptr<grpc::Channel> channel)
      : owner_(owner), address_(std::move(address)), stub_(wire::Decode::NewStub(channel)) {}

  void Begin(const wire::Hello& hello) {
    stub_->async()->Generate(&context_, this);
    wire::GenerateDown down;
    *down.mutable_hello() = hello;
    Send(std::move(down));
    StartRead(&up_);
    // Reads are started again outside of reactions, after the executor has used what came.
    AddHold();
    StartCall();
  }

  void Send(wire::GenerateDown message) {
    absl::MutexLock lock(&mu_);
    if (failed_) return;  // OnDone tells everybody
    queued_bytes_ += message.ByteSizeLong();
    if (queued_bytes_ > kQueuedBytesMax) {
      failed_ = true;
      context_.TryCancel();
      return;
    }
    queue_.push_back(std::move(message));
    if (queue_.size() == 1) StartWrite(&queue_.front());
  }

  void TryCancel() { context_.TryCancel(); }
  // After the executor has used the last message.
  void ReadOn() { StartRead(&up_); }
  // No more reads; without the hold no write may begin either.
  void LetGo() {
    {
      absl::MutexLock lock(&mu_);
      failed_ = true;
    }
    RemoveHold();
  }
  const std::string& address() const { return address_; }
  wire::GenerateUp& up() { return up_; }

  void OnWriteDone(bool ok) override {
    absl::MutexLock lock(&mu_);
    if (!ok) {
      failed_ = true;
      return;
    }
    queued_bytes_ -= queue_.front().ByteSizeLong();
    queue_.pop_front();
    if (!queue_.empty()) StartWrite(&queue_.front());
  }
  void OnReadDone(bool ok) override;
  void OnDone(const grpc::Status& status) override;

 private:
  GrpcDecodeStreams* const owner_;
  const std::string address_;
  std::unique_ptr<wire::Decode::Stub> stub_;
  grpc::ClientContext context_;
  wire::GenerateUp up_;
  absl::Mutex mu_;
  std::deque<wire::GenerateDown> queue_ ABSL_GUARDED_BY(mu_);  // the first is being written
  size_t queued_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  bool failed_ ABSL_GUARDED_BY(mu_) = false;
};

class GrpcDecodeStreams final : public DecodeStreams {
 public:
  GrpcDecodeStreams(Identity self, Executor* executor, Upstream::Listener* listener)
      : self_(std::move(self)), executor_(executor), listener_(listener) {}

  ~GrpcDecodeStreams() override {
    executor_->Post([this] {
      listener_ = nullptr;
      for (auto& [address, stream] : streams_) stream->TryCancel();
      absl::MutexLock lock(&mu_);
      ending_ = true;
    });
    absl::MutexLock lock(&mu_);
    const auto quiet = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return ending_ && open_ == 0; };
    mu_.Await(absl::Condition(&quiet));
  }

  void Start(const std::string& address, wire::Start start) override {
    wire::GenerateDown down;
    *down.mutable_start() = std::move(start);
    Stream*& stream = streams_[address];
    if (stream == nullptr) {
      // The channel outlives its stream, so that its backoff does.
      std::shared_ptr<grpc::Channel>& channel = channels_[address];
      if (channel == nullptr) channel = MakeChannel(address);
      stream = new Stream(this, address, channel);
      {
        absl::MutexLock lock(&mu_);
        ++open_;
      }
      stream->Begin(MakeHello(self_));
    }
    stream->Send(std::move(down));
  }

  void Cancel(const std::string& address, wire::Cancel cancel) override {
    const auto it = streams_.find(address);
    if (it == streams_.end()) return;
    wire::GenerateDown down;
    *down.mutable_cancel() = std::move(cancel);
    it->second->Send(std::move(down));
  }

  // On the executor, with the stream's hold: it lives.
  void OnMessage(Stream* stream) {
    const wire::GenerateUp& up = stream->up();
    if (up.has_hello()) {
      const absl::StatusOr<uint32_t> version = Negotiate(self_, up.hello());
      if (!version.ok()) {
        const std::string why(version.status().message());
        LogError("decode worker {}: {}", stream->address(), why);
        stream->TryCancel();
      }
    } else if (up.has_tokens() && listener_ != nullptr) {
      listener_->OnTokens(up.tokens());
    }
    stream->ReadOn();
  }
  void OnEnd(Stream* stream, const absl::Status& status) {
    const std::string address = stream->address();
    const auto it = streams_.find(address);
    if (it != streams_.end() && it->second == stream) streams_.erase(it);
    if (listener_ != nullptr) {
      const std::string why(status.message());
      LogInfo("stream to decode worker {} ended: {}", address, why);
      listener_->OnDecodeBroken(
          address, status.ok() ? absl::UnavailableError("it closed the stream") : status);
      // Addresses change when workers restart; idle channels of the dead are not kept for ever.
      if (channels_.size() > 256) {
        std::erase_if(channels_, [&](const auto& c) { return streams_.count(c.first) == 0; });
      }
    }
    delete stream;
    absl::MutexLock lock(&mu_);
    --open_;
  }
  Executor* executor() { return executor_; }

 private:
  const Identity self_;
  Executor* const executor_;
  Upstream::Listener* listener_;
  std::map<std::string, Stream*> streams_;
  std::map<std::string, std::shared_ptr<grpc::Channel>> channels_;
  absl::Mutex mu_;
  int open_ ABSL_GUARDED_BY(mu_) = 0;
  bool ending_ ABSL_GUARDED_BY(mu_) = false;
};

void Stream::OnReadDone(bool ok) {
  if (!ok) return LetGo();
  owner_->executor()->Post([this] { owner_->OnMessage(this); });
}

void Stream::OnDone(const grpc::Status& status) {
  owner_->executor()->Post([this, status = FromGrpc(status)] { owner_->OnEnd(this, status); });
}

}  // namespace

std::unique_ptr<DecodeStreams> DecodeStreams::Create(Identity self, Executor* executor,
                                                     Upstream::Listener* listener) {
  return std::make_unique<GrpcDecodeStreams>(std::move(self), executor, listener);
}

}  // namespace antiphon::gateway
