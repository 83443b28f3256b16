// Workers as they run, for tests: step loop, gRPC services and listener around any engine, and the
// gateway's end of a Decode stream.
#ifndef ANTIPHON_TESTS_WORKER_TEST_WORKER_H_
#define ANTIPHON_TESTS_WORKER_TEST_WORKER_H_

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "antiphon/v1/worker.grpc.pb.h"
#include "common/rpc.h"
#include "common/status_macros.h"
#include "worker/listener.h"
#include "worker/step_loop.h"

namespace antiphon::worker {

inline constexpr absl::Duration kPatience = absl::Seconds(60);

struct TestWorkerOptions {
  uint32_t chunk_tokens = 16;
  uint32_t max_sequences = 8;
};

// A worker with the engine that it is given, on a port of its own.
class TestWorker {
 public:
  TestWorker(const std::string& name, const std::string& socket,
             std::unique_ptr<engine::ModelRunner> runner, TestWorkerOptions options = {})
      : registry_(Labels{{"daemon", "worker"}}) {
    Identity self{.cluster = "antiphon", .node = NodeId(name), .incarnation = 7};
    StepLoopEvents events;
    events.on_attached = [this](uint64_t) {
      absl::MutexLock lock(&mu_);
      attached_ = true;
    };
    events.on_lost = [this] {
      absl::MutexLock lock(&mu_);
      attached_ = false;
    };
    events.on_load = [](const wire::WorkerLoad&) {};
    events.on_engine_lost = [this](const absl::Status& why) {
      absl::MutexLock lock(&mu_);
      engine_lost_ = why;
    };
    loop_ = std::make_unique<StepLoop>(StepLoopOptions{.self = self,
                                                       .clock = &Clock::Real(),
                                                       .registry = &registry_,
                                                       .max_sequences = options.max_sequences,
                                                       .chunk_tokens = options.chunk_tokens,
                                                       .store_socket = socket,
                                                       .attach = &kvstore::StoreClient::Attach},
                                       std::move(events));
    prefills_ = prefill::PrefillService::Make(self, loop_->executor(), loop_.get());
    gateways_ = decode::DecodeService::Make(self, loop_->executor(), loop_.get());
    client_ = decode::PrefillClient::Make(self, loop_->executor(), loop_.get());
    loop_->SetPeers(prefills_.get(), gateways_.get(), client_.get());
    auto listener = Listener::Start("127.0.0.1:0", prefills_->service(), gateways_->service());
    CHECK(listener.ok());
    listener_ = *std::move(listener);
    address_ = absl::StrCat("127.0.0.1:", listener_->port());
    wire::Fingerprint fingerprint;
    fingerprint.set_weights_digest("hash");
    fingerprint.set_layout(runner->layout().Text());
    wire::CostModel cost;
    cost.set_step_base(1e-4);
    cost.set_prefill_base(1e-4);
    loop_->Begin(std::move(runner), cost, fingerprint);
  }

  ~TestWorker() {
    listener_->Shutdown();
    loop_->Stop();
    client_ = nullptr;
  }

  bool AwaitAttached(bool attached) {
    absl::MutexLock lock(&mu_);
    const auto reached = [this, attached] {
      mu_.AssertHeld();
      return attached_ == attached;
    };
    return mu_.AwaitWithTimeout(absl::Condition(&reached), kPatience);
  }
  // OK when the engine was not lost in time.
  absl::Status AwaitEngineLost() {
    absl::MutexLock lock(&mu_);
    const auto lost = [this] {
      mu_.AssertHeld();
      return !engine_lost_.ok();
    };
    mu_.AwaitWithTimeout(absl::Condition(&lost), kPatience);
    return engine_lost_;
  }
  // Every sequence is over and every slot is back.
  bool AwaitIdle() {
    absl::Notification idle;
    loop_->WhenIdle([&idle] { idle.Notify(); });
    if (!idle.WaitForNotificationWithTimeout(kPatience)) return false;
    EXPECT_EQ(Metric("antiphon_kv_blocks{daemon=\"worker\",state=\"held\"}"), 0);
    return true;
  }
  double Metric(const std::string& line) const {
    const std::string text = registry_.Render();
    const size_t at = text.find("\n" + line + " ");
    return at == std::string::npos ? -1 : std::stod(text.substr(at + line.size() + 2));
  }
  void Shutdown() { listener_->Shutdown(); }
  StepLoop& loop() { return *loop_; }
  const std::string& address() const { return address_; }

 private:
  Registry registry_;
  absl::Mutex mu_;
  bool attached_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status engine_lost_ ABSL_GUARDED_BY(mu_);
  std::unique_ptr<StepLoop> loop_;
  std::unique_ptr<prefill::PrefillService> prefills_;
  std::unique_ptr<decode::DecodeService> gateways_;
  std::unique_ptr<decode::PrefillClient> client_;
  std::unique_ptr<Listener> listener_;
  std::string address_;
};

// One gateway's stream to a decode worker.
class Gateway {
 public:
  explicit Gateway(const std::string& address)
      : stub_(wire::Decode::NewStub(MakeChannel(address))), stream_(stub_->Generate(&context_)) {
    wire::GenerateDown down;
    *down.mutable_hello() = MakeHello({.cluster = "antiphon", .node = NodeId("gateway")});
    CHECK(stream_->Write(down));
    wire::GenerateUp up;
    CHECK(stream_->Read(&up) && up.has_hello());
  }
  ~Gateway() { Break(); }

  void Start(const wire::Start& start) {
    wire::GenerateDown down;
    *down.mutable_start() = start;
    EXPECT_TRUE(stream_->Write(down));
  }
  void Cancel(const wire::Start& start) {
    wire::GenerateDown down;
    down.mutable_cancel()->set_id(start.id());
    down.mutable_cancel()->set_epoch(start.epoch());
    EXPECT_TRUE(stream_->Write(down));
  }
  // The next update of any sequence; nullopt when the stream ended.
  std::optional<wire::SequenceUpdate> Next() {
    while (next_ == batch_.updates_size()) {
      wire::GenerateUp up;
      if (!stream_->Read(&up)) return std::nullopt;
      batch_ = up.tokens();
      next_ = 0;
    }
    return batch_.updates(next_++);
  }
  // Reads until the sequence ends.
  std::vector<uint32_t> ReadAll(wire::SequenceUpdate& last) {
    std::vector<uint32_t> ids;
    while (true) {
      auto update = Next();
      if (!update.has_value()) {
        ADD_FAILURE() << "the stream ended";
        return ids;
      }
      EXPECT_EQ(update->first_index(), ids.size());
      ids.insert(ids.end(), update->ids().begin(), update->ids().end());
      if (update->end_case() != wire::SequenceUpdate::END_NOT_SET) {
        last = *update;
        return ids;
      }
    }
  }
  void Break() { context_.TryCancel(); }
  grpc::Status Finish() { return stream_->Finish(); }

 private:
  grpc::ClientContext context_;
  std::unique_ptr<wire::Decode::Stub> stub_;
  std::unique_ptr<grpc::ClientReaderWriter<wire::GenerateDown, wire::GenerateUp>> stream_;
  wire::TokenBatch batch_;
  int next_ = 0;
};

}  // namespace antiphon::worker

#endif  // ANTIPHON_TESTS_WORKER_TEST_WORKER_H_
