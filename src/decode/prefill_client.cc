#include "decode/prefill_client.h"

#include <map>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "antiphon/v1/worker.grpc.pb.h"
#include "common/rpc.h"

namespace antiphon::decode {
namespace {

// Channels to workers that are gone for good cost little; past so many the idle ones are dropped.
constexpr size_t kChannelsMax = 1024;

class Call;

struct Shared {
  Identity self;
  Executor* executor = nullptr;
  PrefillHandler* handler = nullptr;
  absl::Mutex mu;
  bool closing ABSL_GUARDED_BY(mu) = false;
  std::map<uint64_t, Call*> calls ABSL_GUARDED_BY(mu);
  std::map<std::string, std::unique_ptr<wire::Prefill::Stub>> stubs ABSL_GUARDED_BY(mu);

  void ReadNext(uint64_t prefill);
};

class Call final : public grpc::ClientBidiReactor<wire::PrefillDown, wire::PrefillUp> {
 public:
  Call(std::shared_ptr<Shared> shared, uint64_t prefill)
      : shared_(std::move(shared)), prefill_(prefill) {}

  void Begin(wire::Prefill::Stub* stub, wire::PrefillOpen open)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(shared_->mu) {
    *down_.mutable_hello() = MakeHello(shared_->self);
    *down_.mutable_open() = std::move(open);
    stub->async()->Prefill(&context_, this);
    // Reads and the half-close start outside of reactions.
    AddHold();
    StartWrite(&down_);
    reading_ = true;
    StartRead(&up_);
    StartCall();
  }

  void ReadNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(shared_->mu) {
    if (released_) return;
    reading_ = true;
    StartRead(&up_);
  }
  void HalfClose() ABSL_EXCLUSIVE_LOCKS_REQUIRED(shared_->mu) {
    if (!released_ && !std::exchange(half_closed_, true)) StartWritesDone();
  }
  void Cancel() ABSL_EXCLUSIVE_LOCKS_REQUIRED(shared_->mu) {
    cancelled_ = true;
    context_.TryCancel();
    // Without a read on its way nobody else gives the hold back.
    if (!reading_ && !std::exchange(released_, true)) RemoveHold();
  }

  void OnReadDone(bool ok) override {
    absl::MutexLock lock(&shared_->mu);
    reading_ = false;
    if (!ok || cancelled_) {
      released_ = true;
      RemoveHold();
      return;
    }
    shared_->executor->Post([shared = shared_, prefill = prefill_, up = std::move(up_)] {
      shared->handler->OnPrefillUp(prefill, up);
      shared->ReadNext(prefill);
    });
    up_ = {};
  }

  void OnDone(const grpc::Status& status) override {
    const std::shared_ptr<Shared> shared = shared_;
    {
      absl::MutexLock lock(&shared->mu);
      if (!cancelled_ && !shared->closing) {
        shared->executor->Post([shared, prefill = prefill_, end = FromGrpc(status)] {
          shared->handler->OnPrefillEnd(prefill, end);
        });
      }
      shared->calls.erase(prefill_);
    }
    delete this;
  }

 private:
  const std::shared_ptr<Shared> shared_;
  const uint64_t prefill_;
  grpc::ClientContext context_;
  wire::PrefillDown down_;
  wire::PrefillUp up_;
  bool reading_ ABSL_GUARDED_BY(shared_->mu) = false;
  bool released_ ABSL_GUARDED_BY(shared_->mu) = false;
  bool half_closed_ ABSL_GUARDED_BY(shared_->mu) = false;
  bool cancelled_ ABSL_GUARDED_BY(shared_->mu) = false;
};

void Shared::ReadNext(uint64_t prefill) {
  absl::MutexLock lock(&mu);
  auto it = calls.find(prefill);
  if (it != calls.end()) it->second->ReadNext();
}

class GrpcPrefillClient final : public PrefillClient {
 public:
  GrpcPrefillClient(const Identity& self, Executor* executor, PrefillHandler* handler)
      : shared_(std::make_shared<Shared>()) {
    shared_->self = self;
    shared_->executor = executor;
    shared_->handler = handler;
  }

  ~GrpcPrefillClient() override {
    absl::MutexLock lock(&shared_->mu);
    shared_->closing = true;
    for (auto& [prefill, call] : shared_->calls) call->Cancel();
    const auto none_left = [this] {
      shared_->mu.AssertHeld();
      return shared_->calls.empty();
    };
    shared_->mu.Await(absl::Condition(&none_left));
  }

  void Open(uint64_t prefill, const std::string& address, wire::PrefillOpen open) override {
    absl::MutexLock lock(&shared_->mu);
    auto& stub = shared_->stubs[address];
    if (stub == nullptr) {
      if (shared_->stubs.size() > kChannelsMax) {
        // Running calls keep their channels alive by themselves.
        std::erase_if(shared_->stubs, [](const auto& entry) { return entry.second != nullptr; });
      }
      shared_->stubs[address] = wire::Prefill::NewStub(MakeChannel(address));
    }
    auto* call = new Call(shared_, prefill);
    shared_->calls[prefill] = call;
    call->Begin(shared_->stubs[address].get(), std::move(open));
  }

  void HalfClose(uint64_t prefill) override {
    absl::MutexLock lock(&shared_->mu);
    auto it = shared_->calls.find(prefill);
    if (it != shared_->calls.end()) it->second->HalfClose();
  }

  void Cancel(uint64_t prefill) override {
    absl::MutexLock lock(&shared_->mu);
    auto it = shared_->calls.find(prefill);
    if (it != shared_->calls.end()) it->second->Cancel();
  }

 private:
  const std::shared_ptr<Shared> shared_;
};

}  // namespace

std::unique_ptr<PrefillClient> PrefillClient::Make(const Identity& self, Executor* executor,
                                                   PrefillHandler* handler) {
  return std::make_unique<GrpcPrefillClient>(self, executor, handler);
}

}  // namespace antiphon::decode
