#include "kvstore/lease_rpc.h"

#include <atomic>
#include <map>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "antiphon/v1/store.grpc.pb.h"
#include "common/rpc.h"

namespace antiphon::kvstore {
namespace {

// ---- service

// One stream of another store. gRPC's threads only pass messages; the lease lives on the executor,
// where this object is also deleted.
class LeaseStream final : public grpc::ServerBidiReactor<wire::LeaseRequest, wire::LeaseReply> {
 public:
  LeaseStream(StoreNode* node, Executor* executor, std::atomic<int>* count,
              grpc::CallbackServerContext* context)
      : node_(node), executor_(executor), count_(count), context_(context) {
    if (count_->fetch_add(1) >= kLeasesMax) {
      Finish(grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "too many leases on this store"));
      return;
    }
    executor_->Post([this] {
      lease_ = node_->OpenLease();
      timer_ = executor_->PostAfter(kLeaseLife, [this] {
        absl::MutexLock lock(&mu_);
        if (!done_) context_->TryCancel();
      });
    });
    StartRead(&request_);
  }

  void OnReadDone(bool ok) override {
    if (!ok) {
      Finish(grpc::Status::OK);
      return;
    }
    executor_->Post([this] {
      reply_.Clear();
      const absl::Status status = node_->HandleLease(lease_, request_, reply_);
      if (status.ok()) {
        StartWrite(&reply_);
      } else {
        Finish(ToGrpc(status));
      }
    });
  }
  void OnWriteDone(bool ok) override {
    if (ok) {
      StartRead(&request_);
    } else {
      Finish(grpc::Status::OK);
    }
  }
  void OnDone() override {
    {
      // The context ends with this reaction; the timer may still come.
      absl::MutexLock lock(&mu_);
      done_ = true;
    }
    executor_->Post([this] {
      if (timer_ != 0) executor_->CancelTimer(timer_);
      if (lease_ != 0) node_->CloseLease(lease_);
      count_->fetch_sub(1);
      delete this;
    });
  }

 private:
  StoreNode* const node_;
  Executor* const executor_;
  std::atomic<int>* const count_;
  grpc::CallbackServerContext* const context_;
  absl::Mutex mu_;
  bool done_ ABSL_GUARDED_BY(mu_) = false;
  wire::LeaseRequest request_;
  wire::LeaseReply reply_;
  ClientId lease_ = 0;           // the executor's
  Executor::TimerId timer_ = 0;  // the executor's
};

class LeaseService final : public wire::KvStore::CallbackService {
 public:
  LeaseService(StoreNode* node, Executor* executor) : node_(node), executor_(executor) {}
  grpc::ServerBidiReactor<wire::LeaseRequest, wire::LeaseReply>* Lease(
      grpc::CallbackServerContext* context) override {
    return new LeaseStream(node_, executor_, &count_, context);
  }

 private:
  StoreNode* const node_;
  Executor* const executor_;
  std::atomic<int> count_{0};
};

// ---- client

class LeaseCall;

// What calls share with their client; outlives both.
struct CallBook {
  absl::Mutex mu;
  std::map<LeaseClient::LeaseId, LeaseCall*> calls ABSL_GUARDED_BY(mu);
};

class LeaseCall final : public grpc::ClientBidiReactor<wire::LeaseRequest, wire::LeaseReply> {
 public:
  using Answer = absl::AnyInvocable<void(absl::StatusOr<wire::LeaseReply>)>;  // any thread

  LeaseCall(std::shared_ptr<CallBook> book, LeaseClient::LeaseId id,
            std::shared_ptr<grpc::Channel> channel, wire::LeaseRequest request, Answer answer)
      : book_(std::move(book)),
        id_(id),
        stub_(wire::KvStore::NewStub(channel)),
        request_(std::move(request)),
        answer_(std::move(answer)) {}

  void Start(std::chrono::system_clock::time_point deadline) {
    context_.set_deadline(deadline);
    stub_->async()->Lease(&context_, this);
    StartWrite(&request_);
    StartRead(&reply_);
    StartCall();
  }
  void Cancel() { context_.TryCancel(); }

  void OnReadDone(bool ok) override {
    if (ok && answer_) {
      std::exchange(answer_, nullptr)(std::move(reply_));
      StartRead(&reply_);  // ends with the lease
    }
  }
  void OnDone(const grpc::Status& status) override {
    if (answer_) {
      answer_(status.ok() ? absl::UnavailableError("the other store ended the lease")
                          : FromGrpc(status));
    }
    {
      absl::MutexLock lock(&book_->mu);
      book_->calls.erase(id_);
    }
    delete this;
  }

 private:
  const std::shared_ptr<CallBook> book_;
  const LeaseClient::LeaseId id_;
  std::unique_ptr<wire::KvStore::Stub> stub_;
  grpc::ClientContext context_;
  wire::LeaseRequest request_;
  wire::LeaseReply reply_;
  Answer answer_;
};

class GrpcLeaseClient final : public LeaseClient {
 public:
  GrpcLeaseClient(Identity self, Executor* executor, const Clock* clock)
      : self_(std::move(self)), executor_(executor), clock_(clock) {}

  ~GrpcLeaseClient() override {
    absl::MutexLock lock(&book_->mu);
    for (auto& [id, call] : book_->calls) call->Cancel();
    book_->mu.Await(absl::Condition(
        +[](CallBook* book) ABSL_NO_THREAD_SAFETY_ANALYSIS { return book->calls.empty(); },
        book_.get()));
  }

  LeaseId Open(LeaseQuery query, Granted granted) override {
    const LeaseId id = next_++;
    waiting_[id] = std::move(granted);
    wire::LeaseRequest request;
    *request.mutable_hello() = MakeHello(self_);
    request.set_fingerprint_id(query.fingerprint.ToBytes());
    for (const BlockKey& key : query.keys) request.add_keys(key.ToBytes());
    auto* call = new LeaseCall(book_, id, ChannelTo(query.rpc_address), std::move(request),
                               [this, id](absl::StatusOr<wire::LeaseReply> reply) {
                                 executor_->Post([this, id, reply = std::move(reply)]() mutable {
                                   auto it = waiting_.find(id);
                                   if (it == waiting_.end()) return;
                                   Granted granted = std::move(it->second);
                                   waiting_.erase(it);
                                   granted(std::move(reply));
                                 });
                               });
    {
      absl::MutexLock lock(&book_->mu);
      book_->calls[id] = call;
    }
    call->Start(absl::ToChronoTime(clock_->WallNow() + query.timeout));
    return id;
  }

  void Close(LeaseId id) override {
    waiting_.erase(id);
    absl::MutexLock lock(&book_->mu);
    if (auto it = book_->calls.find(id); it != book_->calls.end()) it->second->Cancel();
  }

 private:
  std::shared_ptr<grpc::Channel> ChannelTo(const std::string& address) {
    constexpr size_t kChannelsMax = 256;
    if (channels_.size() >= kChannelsMax && !channels_.contains(address)) channels_.clear();
    auto& channel = channels_[address];
    if (channel == nullptr) channel = MakeChannel(address);
    return channel;
  }

  const Identity self_;
  Executor* const executor_;
  const Clock* const clock_;
  LeaseId next_ = 1;
  std::map<LeaseId, Granted> waiting_;
  std::map<std::string, std::shared_ptr<grpc::Channel>> channels_;
  const std::shared_ptr<CallBook> book_ = std::make_shared<CallBook>();
};

}  // namespace

std::unique_ptr<grpc::Service> MakeLeaseService(StoreNode* node, Executor* executor) {
  return std::make_unique<LeaseService>(node, executor);
}

std::unique_ptr<LeaseClient> MakeGrpcLeaseClient(Identity self, Executor* executor,
                                                 const Clock* clock) {
  return std::make_unique<GrpcLeaseClient>(std::move(self), executor, clock);
}

}  // namespace antiphon::kvstore
