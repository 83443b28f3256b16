#include "common/conductor_link.h"

#include <algorithm>
#include <deque>
#include <optional>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "antiphon/v1/control.grpc.pb.h"
#include "common/logging.h"
#include "common/rpc.h"

namespace antiphon {
namespace {

constexpr size_t kQueueBytesMax = 64 << 20;
constexpr int kBlobsPerDirectiveMax = 64;
constexpr absl::Duration kBackoffMin = absl::Milliseconds(100);
constexpr absl::Duration kBackoffMax = absl::Seconds(2);

class Stream;

// One conductor. `mu` of the link guards all of it.
struct Peer {
  std::string address;
  std::unique_ptr<wire::Conductor::Stub> stub;
  Stream* stream = nullptr;  // the running call, else null
  bool accepted = false;
  int failures = 0;  // since the last acceptance
  // What waits to be written, oldest first. Loads are apart: only the newest counts.
  std::deque<wire::NodeReport> queue;
  size_t queue_bytes = 0;
  std::optional<wire::NodeReport> load;
  std::optional<wire::NodeReport> store_load;
  // Events before the snapshot would only be a gap to the conductor.
  bool awaits_snapshot = true;
  bool snapshot_due = false;  // ask for it when the queue has drained
};

// Shared by the link, its streams and its posted closures, whichever lives longest.
struct Shared : std::enable_shared_from_this<Shared> {
  explicit Shared(ConductorLinkOptions o) : options(std::move(o)), jitter(Seed(options.self)) {}

  ConductorLinkOptions options;  // the callbacks are used under `callback_mu` only
  // Held while a callback runs: the destructor waits for it, and none starts after.
  absl::Mutex callback_mu;
  bool closed ABSL_GUARDED_BY(callback_mu) = false;

  absl::Mutex mu;
  absl::CondVar streams_gone;
  bool stopping ABSL_GUARDED_BY(mu) = false;
  int streams ABSL_GUARDED_BY(mu) = 0;
  std::string last_error ABSL_GUARDED_BY(mu);
  uint64_t jitter ABSL_GUARDED_BY(mu);
  std::vector<std::unique_ptr<Peer>> peers;  // fixed after Start; contents guarded by mu

  // Incarnations are random, so nodes that lost one conductor do not come back in step.
  static uint64_t Seed(const Identity& self) { return self.incarnation | 1; }

  void Connect(Peer* peer);
  void ConnectAfter(Peer* peer, absl::Duration delay);
  void Enqueue(Peer& peer, const wire::NodeReport& report) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu);
  std::optional<wire::NodeReport> Next(Peer& peer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu);
  void AskSnapshot(Peer* peer);
  void AnswerBlobs(Peer* peer, wire::NodeDirective::Blobs need);
  absl::Duration Backoff(Peer& peer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu);
  void OnDirective(Peer* peer, const wire::NodeDirective& directive);
  void OnStreamDone(Peer* peer, const grpc::Status& status);
};

// One Join call; deletes itself when gRPC is done with it.
class Stream final : public grpc::ClientBidiReactor<wire::NodeReport, wire::NodeDirective> {
 public:
  Stream(std::shared_ptr<Shared> shared, Peer* peer) : shared_(std::move(shared)), peer_(peer) {
    // The channel keeps trying by itself, at most a second apart; the call goes out with the first
    // success. Our own backoff is for conductors that answer and refuse.
    context_.set_wait_for_ready(true);
  }

  void Begin(const wire::NodeReport& hello) {
    writing_ = hello;
    busy_ = true;
    peer_->stub->async()->Join(&context_, this);
    // Writes start outside of reactions, so the call must not end under them.
    AddHold();
    StartWrite(&writing_);
    StartRead(&directive_);
    StartCall();
  }

  // All under the link's mu.
  void Pump() {
    shared_->mu.AssertHeld();
    if (busy_ || !open_) return;
    std::optional<wire::NodeReport> next = shared_->Next(*peer_);
    if (!next) return;
    writing_ = *std::move(next);
    busy_ = true;
    StartWrite(&writing_);
  }
  void Cancel() { context_.TryCancel(); }

  void OnWriteDone(bool ok) override {
    absl::MutexLock lock(&shared_->mu);
    busy_ = false;
    if (ok) Pump();
  }

  void OnReadDone(bool ok) override {
    if (!ok) {
      {
        absl::MutexLock lock(&shared_->mu);
        open_ = false;
      }
      RemoveHold();
      return;
    }
    shared_->OnDirective(peer_, directive_);
    directive_.Clear();
    StartRead(&directive_);
  }

  void OnDone(const grpc::Status& status) override {
    const std::shared_ptr<Shared> shared = shared_;
    Peer* const peer = peer_;
    // `this` must be gone before the link's destructor may return.
    {
      absl::MutexLock lock(&shared->mu);
      peer->stream = nullptr;
    }
    delete this;
    shared->OnStreamDone(peer, status);
  }

 private:
  ~Stream() override = default;

  const std::shared_ptr<Shared> shared_;
  Peer* const peer_;
  grpc::ClientContext context_;
  wire::NodeReport writing_;
  wire::NodeDirective directive_;
  bool busy_ = false;  // a write is on its way
  bool open_ = true;   // the conductor still reads
};

absl::Duration Shared::Backoff(Peer& peer) {
  const absl::Duration full =
      std::min(kBackoffMax, kBackoffMin * (int64_t{1} << std::min(peer.failures, 8)));
  ++peer.failures;
  // xorshift64: full jitter over the upper half.
  jitter ^= jitter << 13;
  jitter ^= jitter >> 7;
  jitter ^= jitter << 17;
  return full * (0.5 + 0.5 * static_cast<double>(jitter >> 11) * 0x1.0p-53);
}

void Shared::ConnectAfter(Peer* peer, absl::Duration delay) {
  auto connect = [shared = shared_from_this(), peer] { shared->Connect(peer); };
  if (delay > absl::ZeroDuration()) {
    options.executor->PostAfter(delay, std::move(connect));
  } else {
    options.executor->Post(std::move(connect));
  }
}

void Shared::Connect(Peer* peer) {
  wire::NodeReport report;
  {
    absl::MutexLock lock(&callback_mu);
    if (closed) return;
    *report.mutable_hello() = options.hello();
  }
  absl::MutexLock lock(&mu);
  if (stopping || peer->stream != nullptr) return;
  peer->stream = new Stream(shared_from_this(), peer);
  ++streams;
  peer->stream->Begin(report);
}

void Shared::Enqueue(Peer& peer, const wire::NodeReport& report) {
  if (!peer.accepted || stopping) return;
  switch (report.report_case()) {
    case wire::NodeReport::kLoad:
      peer.load = report;
      break;
    case wire::NodeReport::kStoreLoad:
      peer.store_load = report;
      break;
    case wire::NodeReport::kEvents:
      if (report.events().snapshot()) {
        peer.awaits_snapshot = false;
      } else if (peer.awaits_snapshot) {
        return;
      }
      [[fallthrough]];
    default: {
      const size_t bytes = report.ByteSizeLong();
      if (peer.queue_bytes + bytes > kQueueBytesMax && !peer.queue.empty()) {
        LogWarning("conductor {} reads too slowly: {} bytes of events dropped, a snapshot follows",
                   peer.address, peer.queue_bytes + bytes);
        peer.queue.clear();
        peer.queue_bytes = 0;
        peer.awaits_snapshot = true;
        peer.snapshot_due = true;
        break;
      }
      peer.queue_bytes += bytes;
      peer.queue.push_back(report);
    }
  }
  if (peer.stream != nullptr) peer.stream->Pump();
}

std::optional<wire::NodeReport> Shared::Next(Peer& peer) {
  // Loads first: there are few, and a late one makes every placement worse.
  if (peer.load) return std::exchange(peer.load, std::nullopt);
  if (peer.store_load) return std::exchange(peer.store_load, std::nullopt);
  if (!peer.queue.empty()) {
    std::optional<wire::NodeReport> next = std::move(peer.queue.front());
    peer.queue.pop_front();
    peer.queue_bytes -= std::min(peer.queue_bytes, next->ByteSizeLong());
    return next;
  }
  if (std::exchange(peer.snapshot_due, false)) AskSnapshot(&peer);
  return std::nullopt;
}

void Shared::AskSnapshot(Peer* peer) {
  options.executor->Post([shared = shared_from_this(), peer] {
    absl::MutexLock lock(&shared->callback_mu);
    if (!shared->closed && shared->options.on_need_snapshot) {
      shared->options.on_need_snapshot(peer->address);
    }
  });
}

void Shared::AnswerBlobs(Peer* peer, wire::NodeDirective::Blobs need) {
  options.executor->Post([shared = shared_from_this(), peer, need = std::move(need)] {
    for (const std::string& digest : need.digests()) {
      wire::NodeReport report;
      report.mutable_blob()->set_digest(digest);
      {
        absl::MutexLock lock(&shared->callback_mu);
        if (shared->closed || !shared->options.blob) return;
        report.mutable_blob()->set_content(shared->options.blob(digest));
      }
      absl::MutexLock lock(&shared->mu);
      shared->Enqueue(*peer, report);
    }
  });
}

void Shared::OnDirective(Peer* peer, const wire::NodeDirective& directive) {
  switch (directive.directive_case()) {
    case wire::NodeDirective::kAccepted: {
      {
        absl::MutexLock lock(&mu);
        if (peer->accepted) return;
        peer->accepted = true;
        peer->failures = 0;
        peer->awaits_snapshot = true;
        last_error.clear();
      }
      LogInfo("registered with conductor {} at {}", directive.accepted().conductor(),
              peer->address);
      AskSnapshot(peer);
      return;
    }
    case wire::NodeDirective::kNeedBlobs:
      if (directive.need_blobs().digests_size() > kBlobsPerDirectiveMax) {
        LogWarning("conductor {} asks for {} blobs at once; ignored", peer->address,
                   directive.need_blobs().digests_size());
        return;
      }
      AnswerBlobs(peer, directive.need_blobs());
      return;
    case wire::NodeDirective::kResnapshot: {
      absl::MutexLock lock(&mu);
      peer->awaits_snapshot = true;
      AskSnapshot(peer);
      return;
    }
    case wire::NodeDirective::DIRECTIVE_NOT_SET:
      return;  // a newer conductor's; it negotiated a version that lets us ignore it
  }
}

void Shared::OnStreamDone(Peer* peer, const grpc::Status& status) {
  absl::MutexLock lock(&mu);
  const bool was_accepted = std::exchange(peer->accepted, false);
  peer->queue.clear();
  peer->queue_bytes = 0;
  peer->load.reset();
  peer->store_load.reset();
  peer->awaits_snapshot = true;
  peer->snapshot_due = false;
  if (!stopping) {
    std::string why = fmt::format("conductor {}: {}", peer->address,
                                  status.ok() ? "ended the stream" : status.error_message());
    if (last_error != why || was_accepted) LogWarning("{}", why);
    last_error = std::move(why);
    ConnectAfter(peer, Backoff(*peer));
  }
  --streams;
  streams_gone.SignalAll();
}

class Link final : public ConductorLink {
 public:
  explicit Link(ConductorLinkOptions options)
      : shared_(std::make_shared<Shared>(std::move(options))) {
    for (const std::string& address : shared_->options.conductors) {
      auto peer = std::make_unique<Peer>();
      peer->address = address;
      peer->stub = wire::Conductor::NewStub(MakeChannel(address));
      shared_->peers.push_back(std::move(peer));
    }
    for (auto& peer : shared_->peers) shared_->ConnectAfter(peer.get(), absl::ZeroDuration());
  }

  ~Link() override {
    {
      absl::MutexLock lock(&shared_->callback_mu);
      shared_->closed = true;
      // What they captured may die with the caller.
      shared_->options.hello = nullptr;
      shared_->options.blob = nullptr;
      shared_->options.on_need_snapshot = nullptr;
    }
    // The end of a process's last channel joins gRPC's callback threads and so must not run on one:
    // a stream's OnDone, which keeps `shared_`, may return after us.
    std::vector<std::unique_ptr<wire::Conductor::Stub>> stubs;
    absl::MutexLock lock(&shared_->mu);
    shared_->stopping = true;
    for (auto& peer : shared_->peers) {
      if (peer->stream != nullptr) peer->stream->Cancel();
    }
    while (shared_->streams > 0) shared_->streams_gone.Wait(&shared_->mu);
    for (auto& peer : shared_->peers) stubs.push_back(std::move(peer->stub));
  }

  void Broadcast(const wire::NodeReport& report) override {
    absl::MutexLock lock(&shared_->mu);
    for (auto& peer : shared_->peers) shared_->Enqueue(*peer, report);
  }

  void Send(const std::string& conductor, const wire::NodeReport& report) override {
    absl::MutexLock lock(&shared_->mu);
    for (auto& peer : shared_->peers) {
      if (peer->address == conductor) shared_->Enqueue(*peer, report);
    }
  }

  int accepted_count() const override {
    absl::MutexLock lock(&shared_->mu);
    return static_cast<int>(std::count_if(shared_->peers.begin(), shared_->peers.end(),
                                          [](const auto& peer) { return peer->accepted; }));
  }

  std::string last_error() const override {
    absl::MutexLock lock(&shared_->mu);
    return shared_->last_error;
  }

 private:
  const std::shared_ptr<Shared> shared_;
};

}  // namespace

std::unique_ptr<ConductorLink> ConductorLink::Start(ConductorLinkOptions options) {
  return std::make_unique<Link>(std::move(options));
}

}  // namespace antiphon
