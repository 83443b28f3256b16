// Workers as they run, with the hash model for an engine: gRPC, the step loop, real store
// processes.
#include <signal.h>

#include <atomic>

#include "common/clock.h"
#include "tests/fakes/hash_runner.h"
#include "tests/kvstore/store_process.h"
#include "tests/worker/test_worker.h"

namespace antiphon::worker {
namespace {

// The hash model in blocks that the store takes.
std::unique_ptr<fakes::HashRunner> HashModel(bool makes_checksums = false) {
  KvLayout layout = fakes::SmallLayout();
  layout.layer_align = 4096;
  return std::make_unique<fakes::HashRunner>(
      layout, engine::RunnerShape{.vocab = 1000,
                                  .context = 4096,
                                  .step_tokens_max = 64,
                                  .makes_checksums = makes_checksums});
}

// What a test does to a worker's device, and sees of it.
struct Device {
  std::atomic<bool> lost{false};
  std::atomic<size_t> pinned_bytes{0};
  std::atomic<int> strangers{0};  // blocks outside of pinned memory
};

// The hash model on a device that pins memory and can be lost.
class DeviceRunner final : public engine::ModelRunner {
 public:
  explicit DeviceRunner(Device* device) : device_(device), model_(HashModel()) {}
  const engine::RunnerShape& shape() const override { return model_->shape(); }
  const KvLayout& layout() const override { return model_->layout(); }
  std::string rope_text() const override { return model_->rope_text(); }
  std::string kernel_class() const override { return model_->kernel_class(); }
  absl::Status UsePool(const engine::PoolMemory& pool) override {
    pinned_ = {pool.base, pool.bytes};
    device_->pinned_bytes = pool.bytes;
    return absl::OkStatus();
  }
  absl::Status Health() const override { return device_->lost ? Lost() : absl::OkStatus(); }
  absl::Status Submit(engine::Step step) override {
    for (const engine::SequenceChunk& chunk : step.chunks) {
      for (std::byte* block : chunk.blocks) {
        if (block < pinned_.data() || block >= pinned_.data() + pinned_.size()) {
          ++device_->strangers;
        }
      }
    }
    if (device_->lost) return Lost();
    return model_->Submit(std::move(step));
  }
  engine::StepProgress Progress() const override { return model_->Progress(); }
  engine::StepProgress Await(engine::StepProgress seen, absl::Duration timeout) override {
    return model_->Await(seen, timeout);
  }
  void Interrupt() override { model_->Interrupt(); }
  absl::StatusOr<engine::StepResult> Take() override {
    auto result = model_->Take();
    if (device_->lost) return Lost();
    return result;
  }

 private:
  static absl::Status Lost() {
    return absl::UnavailableError("the GPU is lost: uncorrectable ECC error encountered");
  }
  Device* const device_;
  const std::unique_ptr<engine::ModelRunner> model_;
  absl::Span<std::byte> pinned_;
};

class ServiceTest : public testing::Test {
 protected:
  wire::Start MakeStart(uint32_t tokens, uint32_t max_tokens, const TestWorker& prefill,
                        uint32_t first = 1) {
    wire::Start start;
    start.set_id(std::string(15, 'i') + static_cast<char>(next_id_++));
    start.set_epoch(1);
    for (uint32_t i = 0; i < tokens; ++i) start.add_prompt_ids((first + 7 * i) % 1000);
    start.mutable_stop()->set_max_tokens(max_tokens);
    start.mutable_placement()->set_prefill_node("prefill");
    start.mutable_placement()->set_prefill_address(prefill.address());
    start.set_root_key(std::string(16, 'r'));
    return start;
  }
  std::vector<uint32_t> Reference(const wire::Start& start) {
    return fakes::ReferenceTokens({start.prompt_ids().begin(), start.prompt_ids().end()},
                                  {.temperature = 0}, start.stop().max_tokens(), 0, {});
  }
  uint8_t next_id_ = 1;
};

TEST_F(ServiceTest, OneHostServesAndReusesBlocks) {
  kvstore::StoreProcess store;
  TestWorker prefill("prefill", store.socket_path(), HashModel());
  TestWorker decode("decode", store.socket_path(), HashModel());
  ASSERT_TRUE(prefill.AwaitAttached(true) && decode.AwaitAttached(true));
  Gateway gateway(decode.address());
  for (const uint32_t cached : {0, 36}) {
    const wire::Start start = MakeStart(38, 20, prefill);
    gateway.Start(start);
    auto first = gateway.Next();
    ASSERT_TRUE(first.has_value());
    EXPECT_EQ(first->prompt_source().dram(), cached);
    EXPECT_EQ(first->prompt_source().computed(), 38 - cached);
    std::vector<uint32_t> ids(first->ids().begin(), first->ids().end());
    wire::SequenceUpdate last;
    while (last.end_case() == wire::SequenceUpdate::END_NOT_SET) {
      last = *gateway.Next();
      ids.insert(ids.end(), last.ids().begin(), last.ids().end());
    }
    EXPECT_EQ(last.finish(), wire::FINISH_REASON_LENGTH);
    EXPECT_EQ(ids, Reference(start));
  }
  ASSERT_TRUE(prefill.AwaitIdle() && decode.AwaitIdle());
}

TEST_F(ServiceTest, TwoHostsServeTheSameTokens) {
  for (const bool engine_makes_checksums : {false, true}) {
    SCOPED_TRACE(engine_makes_checksums);
    kvstore::StoreProcess one, two;
    TestWorker prefill("prefill", one.socket_path(), HashModel(engine_makes_checksums));
    TestWorker decode("decode", two.socket_path(), HashModel(engine_makes_checksums));
    ASSERT_TRUE(prefill.AwaitAttached(true) && decode.AwaitAttached(true));
    Gateway gateway(decode.address());
    for (const uint32_t tokens : {1, 4, 17, 64, 150}) {
      const wire::Start start = MakeStart(tokens, 9, prefill);
      gateway.Start(start);
      wire::SequenceUpdate last;
      EXPECT_EQ(gateway.ReadAll(last), Reference(start));
      EXPECT_EQ(last.finish(), wire::FINISH_REASON_LENGTH);
    }
    ASSERT_TRUE(prefill.AwaitIdle() && decode.AwaitIdle());
  }
}

// What the engine made is what the other host verifies: here it is wrong.
TEST_F(ServiceTest, TheOtherHostVerifiesTheChecksumsThatTheEngineMade) {
  kvstore::StoreProcess one, two;
  auto model = HashModel(/*makes_checksums=*/true);
  model->SpoilChecksums();
  TestWorker prefill("prefill", one.socket_path(), std::move(model));
  TestWorker decode("decode", two.socket_path(), HashModel());
  ASSERT_TRUE(prefill.AwaitAttached(true) && decode.AwaitAttached(true));
  Gateway gateway(decode.address());
  gateway.Start(MakeStart(17, 9, prefill));
  wire::SequenceUpdate last;
  EXPECT_LE(gateway.ReadAll(last).size(), 1u);  // the first token comes with the announcement
  EXPECT_NE(last.error().code(), 0);
  ASSERT_TRUE(prefill.AwaitIdle() && decode.AwaitIdle());
}

TEST_F(ServiceTest, CancelsAndBrokenStreamsGiveEverythingBack) {
  kvstore::StoreProcess store;
  TestWorker prefill("prefill", store.socket_path(), HashModel());
  TestWorker decode("decode", store.socket_path(), HashModel());
  ASSERT_TRUE(prefill.AwaitAttached(true) && decode.AwaitAttached(true));
  {
    Gateway gateway(decode.address());
    const wire::Start start = MakeStart(30, 1000, prefill);
    gateway.Start(start);
    ASSERT_TRUE(gateway.Next().has_value());
    gateway.Cancel(start);
    wire::SequenceUpdate last;
    while (last.end_case() == wire::SequenceUpdate::END_NOT_SET) last = *gateway.Next();
    EXPECT_EQ(last.error().code(), static_cast<int>(absl::StatusCode::kCancelled));
    gateway.Start(MakeStart(30, 1000, prefill));
    ASSERT_TRUE(gateway.Next().has_value());
    gateway.Break();
  }
  ASSERT_TRUE(prefill.AwaitIdle() && decode.AwaitIdle());
}

// The engine failed at `failing` in `code`: the stream's error at the gateway.
wire::SequenceUpdate ErrorAfter(absl::StatusCode code, bool in_prefill, wire::Start start) {
  kvstore::StoreProcess store;
  auto prefill_model = HashModel(), decode_model = HashModel();
  (in_prefill ? *prefill_model : *decode_model).FailStep(absl::Status(code, "rank 2 died"));
  TestWorker prefill("prefill", store.socket_path(), std::move(prefill_model));
  TestWorker decode("decode", store.socket_path(), std::move(decode_model));
  EXPECT_TRUE(prefill.AwaitAttached(true) && decode.AwaitAttached(true));
  Gateway gateway(decode.address());
  start.mutable_placement()->set_prefill_address(prefill.address());
  gateway.Start(start);
  wire::SequenceUpdate last;
  gateway.ReadAll(last);
  EXPECT_TRUE(prefill.AwaitIdle() && decode.AwaitIdle());
  return last;
}

// It is not the sequence's fault: it goes on elsewhere.
TEST_F(ServiceTest, ALostRankEndsSequencesUnavailableAndOtherFailuresInternal) {
  kvstore::StoreProcess store;
  TestWorker anybody("anybody", store.socket_path(), HashModel());
  for (const bool in_prefill : {true, false}) {
    SCOPED_TRACE(in_prefill);
    for (const auto code : {absl::StatusCode::kUnavailable, absl::StatusCode::kDeadlineExceeded}) {
      const wire::SequenceUpdate last = ErrorAfter(code, in_prefill, MakeStart(30, 9, anybody));
      EXPECT_EQ(last.error().code(), static_cast<int>(absl::StatusCode::kUnavailable));
      EXPECT_EQ(last.failed_node(), in_prefill ? "prefill" : "decode");
      EXPECT_NE(last.error().message().find("rank 2 died"), std::string::npos);
    }
  }
  const wire::SequenceUpdate last =
      ErrorAfter(absl::StatusCode::kInternal, false, MakeStart(30, 9, anybody));
  EXPECT_EQ(last.error().code(), static_cast<int>(absl::StatusCode::kInternal));
}

TEST_F(ServiceTest, AnUnreachablePrefillIsNamedAsTheFailedNode) {
  kvstore::StoreProcess store;
  TestWorker decode("decode", store.socket_path(), HashModel());
  ASSERT_TRUE(decode.AwaitAttached(true));
  Gateway gateway(decode.address());
  wire::Start start = MakeStart(30, 5, decode);
  start.mutable_placement()->set_prefill_address("127.0.0.1:1");
  gateway.Start(start);
  wire::SequenceUpdate last;
  EXPECT_TRUE(gateway.ReadAll(last).empty());
  EXPECT_EQ(last.error().code(), static_cast<int>(absl::StatusCode::kUnavailable));
  EXPECT_EQ(last.failed_node(), "prefill");
  ASSERT_TRUE(decode.AwaitIdle());
}

TEST_F(ServiceTest, ALostStoreEndsSequencesAndANewOneIsAttached) {
  auto store = std::make_unique<kvstore::StoreProcess>();
  const std::string socket = store->socket_path();
  // The second one takes the first one's folder.
  const std::string flag = "--cluster.runtime_dir=" + store->dir();
  TestWorker prefill("prefill", socket, HashModel());
  TestWorker decode("decode", socket, HashModel());
  ASSERT_TRUE(prefill.AwaitAttached(true) && decode.AwaitAttached(true));
  Gateway gateway(decode.address());
  gateway.Start(MakeStart(30, 4000, prefill));
  ASSERT_TRUE(gateway.Next().has_value());
  store->Kill(SIGKILL);
  store->Wait();
  wire::SequenceUpdate last;
  while (last.end_case() == wire::SequenceUpdate::END_NOT_SET) last = *gateway.Next();
  EXPECT_EQ(last.error().code(), static_cast<int>(absl::StatusCode::kUnavailable));
  EXPECT_EQ(last.failed_node(), "decode");
  kvstore::StoreProcess again({flag});
  ASSERT_TRUE(again.ready());
  ASSERT_TRUE(prefill.AwaitAttached(true) && decode.AwaitAttached(true));
  const wire::Start start = MakeStart(30, 7, prefill);
  gateway.Start(start);
  EXPECT_EQ(gateway.ReadAll(last), Reference(start));
  ASSERT_TRUE(prefill.AwaitIdle() && decode.AwaitIdle());
}

TEST_F(ServiceTest, ALostDeviceEndsItsSequencesForOthersToGoOn) {
  kvstore::StoreProcess store;
  Device prefill_device, decode_device;
  TestWorker prefill("prefill", store.socket_path(),
                     std::make_unique<DeviceRunner>(&prefill_device));
  TestWorker decode("decode", store.socket_path(), std::make_unique<DeviceRunner>(&decode_device));
  ASSERT_TRUE(prefill.AwaitAttached(true) && decode.AwaitAttached(true));
  EXPECT_GT(decode_device.pinned_bytes, 0u);
  Gateway gateway(decode.address());
  gateway.Start(MakeStart(30, 4000, prefill));
  gateway.Start(MakeStart(17, 4000, prefill, 2));
  ASSERT_TRUE(gateway.Next().has_value());
  decode_device.lost = true;
  for (int ended = 0; ended < 2;) {
    auto update = gateway.Next();
    ASSERT_TRUE(update.has_value());
    if (update->end_case() == wire::SequenceUpdate::END_NOT_SET) continue;
    ++ended;
    EXPECT_EQ(update->error().code(), static_cast<int>(absl::StatusCode::kUnavailable));
    EXPECT_NE(update->error().message().find("ECC"), std::string::npos);
    EXPECT_EQ(update->failed_node(), "decode");
  }
  EXPECT_TRUE(absl::IsUnavailable(decode.AwaitEngineLost()));
  // Nothing new is taken.
  wire::SequenceUpdate refused;
  gateway.Start(MakeStart(3, 5, prefill));
  EXPECT_TRUE(gateway.ReadAll(refused).empty());
  EXPECT_EQ(refused.error().code(), static_cast<int>(absl::StatusCode::kUnavailable));
  ASSERT_TRUE(prefill.AwaitIdle() && decode.AwaitIdle());
  EXPECT_EQ(prefill_device.strangers + decode_device.strangers, 0);
}

TEST_F(ServiceTest, ALostPrefillDeviceIsNamedAsTheFailedNode) {
  kvstore::StoreProcess store;
  Device device;
  TestWorker prefill("prefill", store.socket_path(), std::make_unique<DeviceRunner>(&device));
  TestWorker decode("decode", store.socket_path(), HashModel());
  ASSERT_TRUE(prefill.AwaitAttached(true) && decode.AwaitAttached(true));
  device.lost = true;
  Gateway gateway(decode.address());
  gateway.Start(MakeStart(30, 5, prefill));
  wire::SequenceUpdate last;
  EXPECT_TRUE(gateway.ReadAll(last).empty());
  EXPECT_EQ(last.error().code(), static_cast<int>(absl::StatusCode::kUnavailable));
  EXPECT_EQ(last.failed_node(), "prefill");
  EXPECT_TRUE(absl::IsUnavailable(prefill.AwaitEngineLost()));
  ASSERT_TRUE(prefill.AwaitIdle() && decode.AwaitIdle());
}

TEST_F(ServiceTest, ThePoolIsReleasedBeforeItGoes) {
  auto store = std::make_unique<kvstore::StoreProcess>();
  const std::string flag = "--cluster.runtime_dir=" + store->dir();
  Device device;
  TestWorker worker("prefill", store->socket_path(), std::make_unique<DeviceRunner>(&device));
  ASSERT_TRUE(worker.AwaitAttached(true));
  EXPECT_GT(device.pinned_bytes, 0u);
  store->Kill(SIGKILL);
  store->Wait();
  ASSERT_TRUE(worker.AwaitAttached(false));
  kvstore::StoreProcess again({flag});
  ASSERT_TRUE(again.ready());
  ASSERT_TRUE(worker.AwaitAttached(true));
  EXPECT_GT(device.pinned_bytes, 0u);
  worker.loop().Stop();
  EXPECT_EQ(device.pinned_bytes, 0u);
}

// A loop that waited for events between two steps would need 20 ms a token.
TEST_F(ServiceTest, StepsFollowOneAnotherWithoutWaiting) {
  kvstore::StoreProcess store;
  TestWorker prefill("prefill", store.socket_path(), HashModel());
  TestWorker decode("decode", store.socket_path(), HashModel());
  ASSERT_TRUE(prefill.AwaitAttached(true) && decode.AwaitAttached(true));
  Gateway gateway(decode.address());
  const absl::Time begin = Clock::Real().Now();
  gateway.Start(MakeStart(5, 500, prefill));
  wire::SequenceUpdate last;
  EXPECT_EQ(gateway.ReadAll(last).size(), 500u);
  EXPECT_LT(Clock::Real().Now() - begin, absl::Seconds(5));
}

TEST_F(ServiceTest, AWorkerThatDrainsFinishesWhatRunsAndRefusesTheRest) {
  kvstore::StoreProcess store;
  TestWorker prefill("prefill", store.socket_path(), HashModel());
  TestWorker decode("decode", store.socket_path(), HashModel());
  ASSERT_TRUE(prefill.AwaitAttached(true) && decode.AwaitAttached(true));
  Gateway gateway(decode.address()), second(decode.address());
  const wire::Start start = MakeStart(30, 200, prefill);
  gateway.Start(start);
  auto first = gateway.Next();
  ASSERT_TRUE(first.has_value());
  decode.loop().SetDraining();
  second.Start(MakeStart(3, 5, prefill));
  wire::SequenceUpdate refused;
  EXPECT_TRUE(second.ReadAll(refused).empty());
  EXPECT_EQ(refused.error().code(), static_cast<int>(absl::StatusCode::kUnavailable));
  EXPECT_EQ(refused.error().message(), "draining");
  std::vector<uint32_t> ids(first->ids().begin(), first->ids().end());
  wire::SequenceUpdate last;
  while (last.end_case() == wire::SequenceUpdate::END_NOT_SET) {
    last = *gateway.Next();
    ids.insert(ids.end(), last.ids().begin(), last.ids().end());
  }
  EXPECT_EQ(ids, Reference(start));
  ASSERT_TRUE(decode.AwaitIdle());
}

TEST_F(ServiceTest, BadFirstMessagesAreRefusedWithAReason) {
  kvstore::StoreProcess store;
  TestWorker worker("decode", store.socket_path(), HashModel());
  {
    grpc::ClientContext context;
    auto stub = wire::Decode::NewStub(MakeChannel(worker.address()));
    auto stream = stub->Generate(&context);
    wire::GenerateDown down;
    *down.mutable_start() = MakeStart(3, 5, worker);
    stream->Write(down);
    wire::GenerateUp up;
    EXPECT_FALSE(stream->Read(&up));
    EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  }
  {
    grpc::ClientContext context;
    auto stub = wire::Decode::NewStub(MakeChannel(worker.address()));
    auto stream = stub->Generate(&context);
    wire::GenerateDown down;
    *down.mutable_hello() = MakeHello({.cluster = "other", .node = NodeId("gateway")});
    stream->Write(down);
    wire::GenerateUp up;
    EXPECT_FALSE(stream->Read(&up));
    const grpc::Status status = stream->Finish();
    EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
    EXPECT_NE(status.error_message().find("other"), std::string::npos);
  }
  {
    grpc::ClientContext context;
    auto stub = wire::Prefill::NewStub(MakeChannel(worker.address()));
    auto stream = stub->Prefill(&context);
    wire::PrefillDown down;
    *down.mutable_hello() = MakeHello({.cluster = "antiphon", .node = NodeId("decode")});
    stream->Write(down);
    wire::PrefillUp up;
    EXPECT_FALSE(stream->Read(&up));
    EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  }
  ASSERT_TRUE(worker.AwaitAttached(true));
}

}  // namespace
}  // namespace antiphon::worker
