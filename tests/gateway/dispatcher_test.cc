#include "gateway/dispatcher.h"

#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "antiphon/v1/inference.pb.h"
#include "tests/gateway/model_fixture.h"

namespace antiphon::gateway {
namespace {

// Runs a timer when told to, and nothing else.
class ManualExecutor final : public Executor {
 public:
  void Post(Closure) override {}
  TimerId PostAfter(absl::Duration delay, Closure closure) override {
    EXPECT_FALSE(timer) << "one at a time";
    delays.push_back(delay);
    timer = std::move(closure);
    return delays.size();
  }
  void CancelTimer(TimerId id) override {
    EXPECT_EQ(id, delays.size());
    timer = nullptr;
  }

  std::vector<absl::Duration> delays;
  Closure timer;
};

// Cluster and client at once: what reaches them, in order.
class Recorder final : public Upstream, public ResponseSink {
 public:
  using AdmitDone = absl::AnyInvocable<void(absl::StatusOr<wire::AdmitReply>)>;

  uint64_t Admit(wire::AdmitRequest, AdmitDone done) override {
    events.emplace_back("admit");
    admitted = std::move(done);
    return 1;
  }
  void AbandonAdmit(uint64_t) override { events.emplace_back("abandon"); }
  void Start(const std::string&, wire::Start) override { events.emplace_back("start"); }
  void Cancel(const std::string&, wire::Cancel) override { events.emplace_back("cancel"); }
  void Finish(wire::FinishReport report) override {
    events.emplace_back(report.finished() ? "report of the end" : "report of the first token");
  }
  void OnDelta(const ChoiceDelta&) override { events.emplace_back("text"); }
  void OnChoiceEnd(const ChoiceEnd&) override { events.emplace_back("choice ends"); }
  void OnDone(const RequestEnd&, const Exchange*) override { events.emplace_back("done"); }

  std::vector<std::string> Take() { return std::exchange(events, {}); }
  AdmitDone admitted;
  std::vector<std::string> events;
};

class DispatcherTest : public testing::Test {
 protected:
  void SetUp() override {
    dispatcher_.SetUpstream(recorder_.get());
    api::CompletionRequest request;
    request.add_prompts()->set_text("prompt");
    PreparedRequest prepared;
    ASSERT_FALSE(Prepare(request, TestModel(), {}, prepared));
    dispatcher_.Submit(
        kId, std::make_unique<Exchange>(std::move(prepared), std::vector{kId}, GenerationLimits{}),
        recorder_);
    wire::AdmitReply reply;
    reply.mutable_placement()->set_decode_address("d");
    recorder_->admitted(reply);
    EXPECT_EQ(recorder_->Take(), (std::vector<std::string>{"admit", "start"}));
  }
  void Token(uint32_t index, bool finish) {
    wire::TokenBatch batch;
    wire::SequenceUpdate* update = batch.add_updates();
    update->set_id(kId.ToBytes());
    update->set_epoch(1);
    update->set_first_index(index);
    update->add_ids('a');
    if (finish) update->set_finish(wire::FINISH_REASON_LENGTH);
    dispatcher_.OnTokens(batch);
  }

  const RequestId kId{{1}};
  ManualExecutor executor_;
  std::shared_ptr<Recorder> recorder_ = std::make_shared<Recorder>();
  Dispatcher dispatcher_{{.executor = &executor_, .clock = &Clock::Real()}};
};

TEST_F(DispatcherTest, TheClientsTextGoesAheadOfTheConductorsReports) {
  Token(0, false);
  EXPECT_EQ(recorder_->Take(), (std::vector<std::string>{"text", "report of the first token"}));
  Token(1, true);
  EXPECT_EQ(recorder_->Take(),
            (std::vector<std::string>{"text", "choice ends", "done", "report of the end"}));
  EXPECT_EQ(dispatcher_.running(), 0u);
}

TEST_F(DispatcherTest, SleepsUntilTheFirstTimerOfARequest) {
  EXPECT_TRUE(executor_.delays.empty());  // it has no deadline
  Token(0, false);                        // from here on its decode worker may stall
  Token(1, false);
  ASSERT_EQ(executor_.delays.size(), 1u);
  EXPECT_LE(executor_.delays[0], GenerationLimits{}.stall_min);
  EXPECT_GT(executor_.delays[0], absl::ZeroDuration());
  std::exchange(executor_.timer, nullptr)();  // too early: tokens came
  ASSERT_EQ(executor_.delays.size(), 2u);
  Token(2, true);
  std::exchange(executor_.timer, nullptr)();
  EXPECT_EQ(executor_.delays.size(), 2u) << "nothing runs, nothing wakes";
}

TEST_F(DispatcherTest, ARequestOfOneTokenIsReportedTwice) {
  Token(0, true);
  EXPECT_EQ(recorder_->Take(),
            (std::vector<std::string>{"text", "choice ends", "done", "report of the first token",
                                      "report of the end"}));
  EXPECT_EQ(dispatcher_.running(), 0u);
}

TEST_F(DispatcherTest, TheDecodeWorkerIsToldAtOnceThatTheClientHasLeft) {
  Token(0, false);
  recorder_->Take();
  dispatcher_.Cancel(kId);
  EXPECT_EQ(recorder_->Take(), (std::vector<std::string>{"cancel", "done", "report of the end"}));
  EXPECT_EQ(dispatcher_.running(), 0u);
}

}  // namespace
}  // namespace antiphon::gateway
