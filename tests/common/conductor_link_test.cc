// ConductorLink against a conductor that a test controls.
#include "common/conductor_link.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <deque>
#include <optional>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "antiphon/v1/control.grpc.pb.h"
#include "common/clock.h"
#include "common/rpc.h"

namespace antiphon {
namespace {

using ::testing::HasSubstr;

constexpr absl::Duration kPatience = absl::Seconds(20);

// Accepts everybody, or nobody; keeps what it reads; sends what it is told.
class FakeConductor final : public wire::Conductor::Service {
 public:
  grpc::Status Join(
      grpc::ServerContext* context,
      grpc::ServerReaderWriter<wire::NodeDirective, wire::NodeReport>* stream) override {
    wire::NodeReport report;
    if (!stream->Read(&report)) return grpc::Status::OK;
    {
      absl::MutexLock lock(&mu_);
      reports_.push_back(report);
      if (!refusal_.empty()) {
        return grpc::Status(grpc::StatusCode::FAILED_PRECONDITION, refusal_);
      }
    }
    wire::NodeDirective accepted;
    accepted.mutable_accepted()->set_conductor("c");
    stream->Write(accepted);
    {
      absl::MutexLock lock(&mu_);
      stream_ = stream;
    }
    bool reading = true;
    while (reading) {
      {
        absl::MutexLock lock(&mu_);
        const auto may_read = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return !paused_; };
        mu_.Await(absl::Condition(&may_read));
      }
      reading = stream->Read(&report);
      absl::MutexLock lock(&mu_);
      if (reading) reports_.push_back(report);
    }
    absl::MutexLock lock(&mu_);
    stream_ = nullptr;
    return grpc::Status::OK;
  }

  void Refuse(const std::string& why) {
    absl::MutexLock lock(&mu_);
    refusal_ = why;
  }
  void Pause(bool paused) {
    absl::MutexLock lock(&mu_);
    paused_ = paused;
  }
  bool Send(const wire::NodeDirective& directive) {
    absl::MutexLock lock(&mu_);
    const auto joined = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return stream_ != nullptr; };
    return mu_.AwaitWithTimeout(absl::Condition(&joined), kPatience) && stream_->Write(directive);
  }
  // The next report that is not `skip`ped, in order.
  std::optional<wire::NodeReport> Next() {
    absl::MutexLock lock(&mu_);
    const auto some = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return !reports_.empty(); };
    if (!mu_.AwaitWithTimeout(absl::Condition(&some), kPatience)) return std::nullopt;
    wire::NodeReport report = std::move(reports_.front());
    reports_.pop_front();
    return report;
  }

 private:
  absl::Mutex mu_;
  std::deque<wire::NodeReport> reports_ ABSL_GUARDED_BY(mu_);
  std::string refusal_ ABSL_GUARDED_BY(mu_);
  bool paused_ ABSL_GUARDED_BY(mu_) = false;
  grpc::ServerReaderWriter<wire::NodeDirective, wire::NodeReport>* stream_ ABSL_GUARDED_BY(mu_) =
      nullptr;
};

wire::NodeReport Events(uint64_t seq, bool snapshot, size_t padding = 0) {
  wire::NodeReport report;
  report.mutable_events()->set_seq(seq);
  report.mutable_events()->set_snapshot(snapshot);
  if (padding > 0) report.mutable_events()->add_events()->set_key(std::string(padding, 'x'));
  return report;
}

class ConductorLinkTest : public ::testing::Test {
 protected:
  ConductorLinkTest() : executor_("node") { Serve("127.0.0.1:0"); }
  ~ConductorLinkTest() override {
    link_.reset();
    server_.reset();
  }

  void Serve(const std::string& listen) {
    auto server = RpcServer::Start(listen, {&conductor_});
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    address_ = "127.0.0.1:" + std::to_string(server_->port());
  }
  void Start(std::vector<std::string> more = {}) {
    ConductorLinkOptions options;
    options.conductors = {address_};
    options.conductors.insert(options.conductors.end(), more.begin(), more.end());
    options.self = {.cluster = "test", .node = NodeId("n"), .incarnation = 12345};
    options.executor = &executor_;
    options.hello = [] {
      wire::NodeHello hello;
      hello.set_rpc_address("here:1");
      return hello;
    };
    options.blob = [](const std::string& digest) {
      return digest == "known" ? std::string("content") : std::string();
    };
    options.on_need_snapshot = [this](const std::string& conductor) {
      absl::MutexLock lock(&mu_);
      snapshots_.push_back(conductor);
    };
    link_ = ConductorLink::Start(std::move(options));
  }
  bool SnapshotAsked() {
    absl::MutexLock lock(&mu_);
    const auto some = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return !snapshots_.empty(); };
    if (!mu_.AwaitWithTimeout(absl::Condition(&some), kPatience)) return false;
    EXPECT_EQ(snapshots_.front(), address_);
    snapshots_.pop_front();
    return true;
  }
  // Its turn on the executor has come: earlier callbacks have run.
  void Drain() {
    absl::Notification done;
    executor_.Post([&done] { done.Notify(); });
    done.WaitForNotification();
  }

  SerialExecutor executor_;
  FakeConductor conductor_;
  std::unique_ptr<RpcServer> server_;
  std::string address_;
  absl::Mutex mu_;
  std::deque<std::string> snapshots_ ABSL_GUARDED_BY(mu_);
  std::unique_ptr<ConductorLink> link_;
};

TEST_F(ConductorLinkTest, SaysHelloFirstAndIsAskedForASnapshot) {
  Start();
  const auto hello = conductor_.Next();
  ASSERT_TRUE(hello);
  EXPECT_EQ(hello->hello().rpc_address(), "here:1");
  ASSERT_TRUE(SnapshotAsked());
  EXPECT_EQ(link_->accepted_count(), 1);
  EXPECT_EQ(link_->last_error(), "");
}

TEST_F(ConductorLinkTest, DropsEventsBeforeTheSnapshot) {
  Start();
  ASSERT_TRUE(SnapshotAsked());
  link_->Broadcast(Events(1, false));
  link_->Send(address_, Events(5, true));
  link_->Broadcast(Events(9, false));
  link_->Send("another:1", Events(10, false));
  EXPECT_TRUE(conductor_.Next()->has_hello());
  EXPECT_EQ(conductor_.Next()->events().seq(), 5u);
  EXPECT_EQ(conductor_.Next()->events().seq(), 9u);
}

TEST_F(ConductorLinkTest, AnswersForBlobsAndSnapshots) {
  Start();
  ASSERT_TRUE(SnapshotAsked());
  wire::NodeDirective directive;
  directive.mutable_need_blobs()->add_digests("known");
  directive.mutable_need_blobs()->add_digests("unknown");
  ASSERT_TRUE(conductor_.Send(directive));
  EXPECT_TRUE(conductor_.Next()->has_hello());
  const auto blob = conductor_.Next();
  EXPECT_EQ(blob->blob().digest(), "known");
  EXPECT_EQ(blob->blob().content(), "content");
  EXPECT_EQ(conductor_.Next()->blob().content(), "");
  directive.mutable_resnapshot();
  ASSERT_TRUE(conductor_.Send(directive));
  EXPECT_TRUE(SnapshotAsked());
}

TEST_F(ConductorLinkTest, TellsWhyItWasRefusedAndTriesAgain) {
  conductor_.Refuse("fingerprint differs: kv_dtype bf16 != f32");
  Start();
  ASSERT_TRUE(conductor_.Next());
  ASSERT_TRUE(conductor_.Next()) << "a second attempt";
  EXPECT_THAT(link_->last_error(), HasSubstr("kv_dtype bf16 != f32"));
  EXPECT_EQ(link_->accepted_count(), 0);
  conductor_.Refuse("");
  ASSERT_TRUE(SnapshotAsked());
  EXPECT_EQ(link_->last_error(), "");
}

TEST_F(ConductorLinkTest, ComesBackAfterTheConductorsRestart) {
  Start();
  ASSERT_TRUE(SnapshotAsked());
  server_.reset();
  Serve(address_);
  const absl::Time begin = Clock::Real().Now();
  ASSERT_TRUE(SnapshotAsked());
  EXPECT_LT(Clock::Real().Now() - begin, absl::Seconds(2));
}

TEST_F(ConductorLinkTest, AnAbsentConductorDoesNotHinderAnother) {
  Start({"127.0.0.1:1"});
  ASSERT_TRUE(SnapshotAsked());
  EXPECT_EQ(link_->accepted_count(), 1);
}

TEST_F(ConductorLinkTest, TheNewestLoadReplacesOneThatWaits) {
  Start();
  ASSERT_TRUE(SnapshotAsked());
  conductor_.Pause(true);
  // Some megabytes fill the stream's window, so that what follows waits.
  link_->Broadcast(Events(0, true, 16 << 20));
  for (uint32_t i = 1; i <= 100; ++i) {
    wire::NodeReport load;
    load.mutable_load()->set_running(i);
    link_->Broadcast(load);
  }
  conductor_.Pause(false);
  int loads = 0;
  uint32_t last = 0;
  while (last != 100) {
    const auto report = conductor_.Next();
    ASSERT_TRUE(report);
    if (!report->has_load()) continue;
    ++loads;
    last = report->load().running();
  }
  EXPECT_LT(loads, 50);
}

TEST_F(ConductorLinkTest, WhenEventsOverflowASnapshotFollows) {
  Start();
  ASSERT_TRUE(SnapshotAsked());
  conductor_.Pause(true);
  link_->Broadcast(Events(0, true));
  for (uint64_t i = 0; i < 9; ++i) link_->Broadcast(Events(i, false, 10 << 20));
  conductor_.Pause(false);
  EXPECT_TRUE(SnapshotAsked()) << "90 MB do not wait";
  link_->Broadcast(Events(100, false));
  link_->Send(address_, Events(200, true));
  std::vector<uint64_t> seqs;
  while (seqs.empty() || seqs.back() != 200) {
    const auto report = conductor_.Next();
    ASSERT_TRUE(report);
    if (report->has_events()) seqs.push_back(report->events().seq());
  }
  EXPECT_THAT(seqs, testing::Not(testing::Contains(100u)));
}

TEST_F(ConductorLinkTest, EndsWhileItStreams) {
  for (int i = 0; i < 5; ++i) {
    Start();
    ASSERT_TRUE(SnapshotAsked());
    link_->Broadcast(Events(0, true, 1 << 20));
    link_.reset();
    Drain();
    while (conductor_.Next()->has_hello()) {
      break;
    }
  }
}

TEST_F(ConductorLinkTest, EndsWhileNobodyAnswers) {
  server_.reset();
  Start();
  Drain();
  link_.reset();
}

}  // namespace
}  // namespace antiphon
