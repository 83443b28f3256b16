#include "kvstore/client/store_client.h"

#include <poll.h>
#include <pthread.h>
#include <spdlog/fmt/fmt.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "antiphon/v1/model.pb.h"
#include "antiphon/v1/store.pb.h"
#include "common/clock.h"
#include "common/fd_passing.h"
#include "common/shared_memory.h"
#include "common/status_macros.h"
#include "common/thread.h"
#include "kvstore/client/connection.h"
#include "kvstore/client/framing.h"

namespace antiphon::kvstore {
namespace {

using Done = absl::AnyInvocable<void(const wire::StoreReply&)>;

// More than this unsent means that the store has hung.
constexpr size_t kUnsentBytesMax = 64 << 20;
constexpr absl::Duration kDetachPatience = absl::Milliseconds(500);

wire::StoreReply RefusalOf(uint64_t id, const absl::Status& why) {
  wire::StoreReply reply;
  reply.set_id(id);
  reply.mutable_status()->set_code(static_cast<int>(why.code()));
  reply.mutable_status()->set_message(std::string(why.message()));
  return reply;
}

// Callbacks run while the gate is open; Close waits for the one that runs, unless it is the caller.
class Gate {
 public:
  template <typename Body>
  void Run(Body body) {
    {
      absl::MutexLock lock(&mu_);
      if (closed_) return;
      running_ = true;
      runner_ = pthread_self();
    }
    body();
    absl::MutexLock lock(&mu_);
    running_ = false;
  }
  void Close() {
    absl::MutexLock lock(&mu_);
    closed_ = true;
    if (running_ && pthread_equal(runner_, pthread_self()) != 0) return;
    mu_.Await(absl::Condition(this, &Gate::Idle));
  }

 private:
  bool Idle() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return !running_; }
  absl::Mutex mu_;
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
  bool running_ ABSL_GUARDED_BY(mu_) = false;
  pthread_t runner_ ABSL_GUARDED_BY(mu_){};
};

class SocketStoreClient final : public StoreClient {
 public:
  SocketStoreClient(AttachOptions options, Fd socket)
      : executor_(options.executor),
        socket_(std::move(socket)),
        wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
        gate_(std::make_shared<Gate>()),
        callbacks_(std::make_shared<Callbacks>()) {
    callbacks_->on_event = std::move(options.on_event);
    callbacks_->on_refused = std::move(options.on_refused);
    callbacks_->on_lost = std::move(options.on_lost);
  }

  ~SocketStoreClient() override {
    gate_->Close();
    {
      absl::MutexLock lock(&mu_);
      stopping_ = true;
      Wake();
    }
    reader_.Join();
    const bool mapped = pool_.data() != nullptr;
    pool_ = SharedMemory();
    absl::MutexLock lock(&mu_);
    if (lost_ || !mapped) return;
    // The pool is out of our hands: the store need not wait for this process to end.
    wire::StoreRequest detach;
    detach.set_id(next_id_);
    detach.mutable_detach();
    unsent_ += EncodeFrame(detach);
    (void)SendAll(socket_.get(), unsent_, -1, Clock::Real().Now() + kDetachPatience);
  }

  absl::Status Handshake(const Identity& self, const KvLayout& layout,
                         const wire::Fingerprint& fingerprint, absl::Time deadline) {
    wire::StoreRequest request;
    request.set_id(1);
    auto* attach = request.mutable_attach();
    *attach->mutable_hello() = MakeHello(self);
    *attach->mutable_layout() = LayoutToProto(layout);
    *attach->mutable_fingerprint() = fingerprint;
    // Tells the store when this process can write no more. Old kernels have none: the store then
    // takes the closed connection for our end.
    const Fd pidfd(static_cast<int>(syscall(SYS_pidfd_open, getpid(), 0)));
    RETURN_IF_ERROR(SendAll(socket_.get(), EncodeFrame(request), pidfd.get(), deadline));
    std::vector<int> fds;
    auto reply = AwaitReply(socket_.get(), cutter_, deadline, fds);
    Fd memfd(fds.empty() ? -1 : fds[0]);
    for (size_t i = 1; i < fds.size(); ++i) close(fds[i]);
    RETURN_IF_ERROR(reply.status());
    RETURN_IF_ERROR(StatusOf(*reply));
    if (!reply->has_attached() || memfd.get() < 0) {
      return absl::InternalError("the store's answer to attach has no pool");
    }
    RETURN_IF_ERROR(Negotiate(self, reply->attached().hello()).status());
    RETURN_IF_ERROR(MapPool(reply->attached(), layout, memfd.get()));
    memfd_ = std::move(memfd);
    return absl::OkStatus();
  }

  void StartReader() {
    reader_ = Thread("store-client", [this] { Read(); });
  }

  uint64_t Call(wire::StoreRequest request, Done done) override {
    absl::MutexLock lock(&mu_);
    const uint64_t id = next_id_++;
    request.set_id(id);
    const absl::Status status = Enqueue(request);
    if (status.ok()) {
      pending_[id] = std::move(done);
    } else {
      Deliver(std::move(done), RefusalOf(id, status));
    }
    return id;
  }

  void Tell(wire::StoreRequest request) override {
    absl::MutexLock lock(&mu_);
    const uint64_t id = next_id_++;
    request.set_id(id);
    request.set_quiet(true);
    const absl::Status status = Enqueue(request);
    if (status.ok()) return;
    Deliver(
        [callbacks = callbacks_](const wire::StoreReply& reply) {
          if (callbacks->on_refused) callbacks->on_refused(reply);
        },
        RefusalOf(id, status));
  }

  void Cork() override {
    absl::MutexLock lock(&mu_);
    corked_ = true;
  }
  void Uncork() override {
    absl::MutexLock lock(&mu_);
    corked_ = false;
    if (!unsent_.empty() && !lost_) SendUnsent();
  }

  std::byte* Payload(uint32_t slot) const override {
    if (slot >= slot_count_) return nullptr;
    return pool_.data() + size_t{slot} * slot_bytes_ + kSlotHeaderBytes;
  }
  PoolMapping pool() const override { return {pool_.data(), pool_.bytes(), memfd_.get()}; }
  uint64_t store_incarnation() const override { return incarnation_; }
  const std::string& data_address() const override { return data_address_; }
  const std::string& rpc_address() const override { return rpc_address_; }
  uint32_t slot_count() const override { return slot_count_; }

 private:
  struct Callbacks {
    absl::AnyInvocable<void(const wire::StoreReply&)> on_event;
    absl::AnyInvocable<void(const wire::StoreReply&)> on_refused;
    absl::AnyInvocable<void(absl::Status)> on_lost;
  };

  absl::Status MapPool(const wire::StoreReply::Attached& attached, const KvLayout& layout,
                       int memfd) {
    if (attached.slot_bytes() != layout.slot_bytes() || attached.slot_count() == 0 ||
        uint64_t{attached.slot_count()} * attached.slot_bytes() > attached.pool_bytes()) {
      return absl::InternalError(
          fmt::format("the store's pool makes no sense: {} bytes, {} slots of {} bytes",
                      attached.pool_bytes(), attached.slot_count(), attached.slot_bytes()));
    }
    auto pool = SharedMemory::Map(memfd, attached.pool_bytes());
    if (!pool.ok()) {
      return absl::UnavailableError(
          fmt::format("cannot map the pool: {}", std::string(pool.status().message())));
    }
    pool_ = *std::move(pool);
    slot_bytes_ = attached.slot_bytes();
    slot_count_ = attached.slot_count();
    incarnation_ = attached.hello().incarnation();
    data_address_ = attached.data_address();
    rpc_address_ = attached.rpc_address();
    return absl::OkStatus();
  }

  void Wake() {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t n = write(wake_.get(), &one, sizeof(one));
  }

  absl::Status Enqueue(const wire::StoreRequest& request) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const std::string frame = EncodeFrame(request);
    if (frame.size() > kFrameBytesMax) return absl::InvalidArgumentError("request too large");
    if (lost_) return absl::UnavailableError("the store is gone");
    const bool waiting = !unsent_.empty();
    unsent_ += frame;
    if (!corked_ && !waiting) SendUnsent();
    return absl::OkStatus();
  }

  // What does not fit is the reader's to send.
  void SendUnsent() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const ssize_t n = SendWithFd(socket_.get(), unsent_, -1);
    if (n > 0) unsent_.erase(0, static_cast<size_t>(n));  // errors show when the reader meets them
    if (!unsent_.empty()) Wake();
  }

  void Deliver(Done done, wire::StoreReply reply) {
    executor_->Post([gate = gate_, done = std::move(done), reply = std::move(reply)]() mutable {
      gate->Run([&] {
        if (done) done(reply);
      });
    });
  }

  void Read() {
    std::string why;
    while (why.empty()) {
      short events = POLLIN;
      {
        absl::MutexLock lock(&mu_);
        if (stopping_) return;
        if (!corked_) {
          why = Flush();
          if (!unsent_.empty()) events |= POLLOUT;
        }
      }
      if (why.empty()) why = ReadOnce(events);
    }
    Lose(why);
  }

  // Sends what Call could not. Not empty: why the connection is lost.
  std::string Flush() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (unsent_.size() > kUnsentBytesMax) return "the store takes no requests";
    while (!unsent_.empty()) {
      const ssize_t n = SendWithFd(socket_.get(), unsent_, -1);
      if (n < 0) return errno == EAGAIN || errno == EWOULDBLOCK ? "" : std::strerror(errno);
      unsent_.erase(0, static_cast<size_t>(n));
    }
    return "";
  }

  std::string ReadOnce(short events) {
    pollfd polled[] = {{.fd = socket_.get(), .events = events, .revents = 0},
                       {.fd = wake_.get(), .events = POLLIN, .revents = 0}};
    if (poll(polled, 2, -1) < 0) return errno == EINTR ? "" : std::strerror(errno);
    if (polled[1].revents != 0) {
      uint64_t count = 0;
      [[maybe_unused]] const ssize_t n = read(wake_.get(), &count, sizeof(count));
    }
    if ((polled[0].revents & (POLLIN | POLLHUP | POLLERR)) == 0) return "";
    std::vector<int> fds;
    const ssize_t n = RecvWithFds(socket_.get(), buffer_, sizeof(buffer_), fds);
    for (int fd : fds) close(fd);  // none is expected here
    if (n == 0) return "the store closed the connection";
    if (n < 0) return errno == EAGAIN || errno == EWOULDBLOCK ? "" : std::strerror(errno);
    cutter_.Append({buffer_, static_cast<size_t>(n)});
    std::vector<wire::StoreReply> replies;
    const std::string why = CutReplies(replies);
    if (!replies.empty()) Dispatch(std::move(replies));
    return why;
  }

  std::string CutReplies(std::vector<wire::StoreReply>& replies) {
    while (true) {
      const auto frame = cutter_.Next();
      if (!frame.ok()) return std::string(frame.status().message());
      if (!frame->has_value()) return "";
      wire::StoreReply reply;
      if (!reply.ParseFromArray((*frame)->data(), static_cast<int>((*frame)->size()))) {
        return "a reply cannot be read";
      }
      replies.push_back(std::move(reply));
    }
  }

  // What came together is handed over together: the executor wakes once.
  void Dispatch(std::vector<wire::StoreReply> replies) {
    std::vector<Done> done(replies.size());
    {
      absl::MutexLock lock(&mu_);
      for (size_t i = 0; i < replies.size(); ++i) {
        auto it = pending_.find(replies[i].id());
        if (it == pending_.end()) continue;
        done[i] = std::move(it->second);
        pending_.erase(it);
      }
    }
    executor_->Post([gate = gate_, callbacks = callbacks_, replies = std::move(replies),
                     done = std::move(done)]() mutable {
      for (size_t i = 0; i < replies.size(); ++i) {
        gate->Run([&] {
          if (replies[i].id() == 0) {
            if (callbacks->on_event) callbacks->on_event(replies[i]);
          } else if (done[i]) {
            done[i](replies[i]);
          } else if (replies[i].status().code() != 0 && callbacks->on_refused) {
            callbacks->on_refused(replies[i]);
          }
        });
      }
    });
  }

  void Lose(const std::string& why) {
    std::map<uint64_t, Done> pending;
    {
      absl::MutexLock lock(&mu_);
      lost_ = true;
      pending.swap(pending_);
      unsent_.clear();
    }
    for (auto& [id, done] : pending) {
      Deliver(std::move(done), RefusalOf(id, absl::UnavailableError(why)));
    }
    executor_->Post([gate = gate_, callbacks = callbacks_, why] {
      gate->Run([&] {
        if (callbacks->on_lost) callbacks->on_lost(absl::UnavailableError(why));
      });
    });
  }

  Executor* const executor_;
  Fd socket_;
  Fd wake_;
  const std::shared_ptr<Gate> gate_;
  const std::shared_ptr<Callbacks> callbacks_;  // used on the executor only
  FrameCutter cutter_;                          // the attaching thread's, then the reader's
  char buffer_[64 << 10];                       // the reader's

  Fd memfd_;
  SharedMemory pool_;
  size_t slot_bytes_ = 0;
  uint32_t slot_count_ = 0;
  uint64_t incarnation_ = 0;
  std::string data_address_, rpc_address_;

  absl::Mutex mu_;
  uint64_t next_id_ ABSL_GUARDED_BY(mu_) = 2;  // 1 is the attachment
  std::map<uint64_t, Done> pending_ ABSL_GUARDED_BY(mu_);
  std::string unsent_ ABSL_GUARDED_BY(mu_);
  bool corked_ ABSL_GUARDED_BY(mu_) = false;
  bool lost_ ABSL_GUARDED_BY(mu_) = false;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  Thread reader_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<StoreClient>> StoreClient::Attach(AttachOptions options) {
  CHECK(options.executor != nullptr && options.fingerprint != nullptr);
  const absl::Time deadline = Clock::Real().Now() + options.timeout;
  ASSIGN_OR_RETURN(Fd socket, ConnectToStore(options.socket_path));
  const Identity self = options.self;
  const KvLayout layout = options.layout;
  const wire::Fingerprint& fingerprint = *options.fingerprint;
  auto client = std::make_unique<SocketStoreClient>(std::move(options), std::move(socket));
  RETURN_IF_ERROR(client->Handshake(self, layout, fingerprint, deadline));
  client->StartReader();
  return client;
}

}  // namespace antiphon::kvstore
