// Calls that wait: admissions just after a start, blobs on their way, watchers.
#include <gtest/gtest.h>

#include <deque>
#include <functional>
#include <optional>

#include "antiphon/v1/admin.pb.h"
#include "conductor/conductor.h"
#include "tests/conductor/harness.h"

namespace antiphon::conductor {
namespace {

// Runs what is posted at once and timers when time reaches them.
class ManualExecutor final : public Executor {
 public:
  explicit ManualExecutor(FakeClock& clock) : clock_(clock) {}
  void Post(Closure closure) override { closure(); }
  TimerId PostAfter(absl::Duration delay, Closure closure) override {
    timers_.emplace(std::pair(clock_.Now() + delay, ++last_), std::move(closure));
    return last_;
  }
  void CancelTimer(TimerId id) override {
    std::erase_if(timers_, [id](const auto& timer) { return timer.first.second == id; });
  }
  void Advance(absl::Duration d) {
    const absl::Time until = clock_.Now() + d;
    while (!timers_.empty() && timers_.begin()->first.first <= until) {
      clock_.Set(timers_.begin()->first.first);
      Closure closure = std::move(timers_.begin()->second);
      timers_.erase(timers_.begin());
      closure();
    }
    clock_.Set(until);
  }

 private:
  FakeClock& clock_;
  std::map<std::pair<absl::Time, TimerId>, Closure> timers_;
  TimerId last_ = 0;
};

struct FakeSession final : Session {
  void Send(const wire::NodeDirective& directive) override { sent.push_back(directive); }
  void Close(const absl::Status& status) override { closed = status; }
  std::vector<wire::NodeDirective> sent;
  std::optional<absl::Status> closed;
};

struct FakeWatcher final : Watcher {
  void Push(const wire::ModelSet& models) override { pushed.push_back(models); }
  std::vector<wire::ModelSet> pushed;
};

struct Call {
  wire::AdmitReply reply;
  std::optional<absl::Status> status;
};

class WaitingTest : public ::testing::Test {
 protected:
  WaitingTest()
      : executor_(clock_),
        registry_(Labels{{"daemon", "conductor"}}),
        conductor_({.core = Harness::With({}),
                    .executor = &executor_,
                    .clock = &clock_,
                    .registry = &registry_}) {
    conductor_.Start();
  }

  SessionId Join(FakeSession& session, const wire::NodeReport& hello) {
    const SessionId id = conductor_.Open(&session);
    conductor_.OnReport(id, hello);
    return id;
  }
  void Admit(Call& call) {
    Request request = Harness().MakeRequest(100);
    request.id = *RequestId::FromBytes(Sha256Hex(std::to_string(++requests_)).substr(0, 16));
    conductor_.Admit(std::move(request), &call.reply,
                     [&call](absl::Status status) { call.status = status; });
  }

  FakeClock clock_;
  ManualExecutor executor_;
  Registry registry_;
  Conductor conductor_;
  int requests_ = 0;
};

TEST_F(WaitingTest, JustAfterAStartARequestWaitsForTheNodesToComeBack) {
  Call call;
  Admit(call);
  EXPECT_FALSE(call.status);
  FakeSession p, d;
  Join(p, WorkerHello("p", wire::ROLE_PREFILL));
  EXPECT_FALSE(call.status);
  Join(d, WorkerHello("d", wire::ROLE_DECODE));
  ASSERT_TRUE(call.status);
  EXPECT_EQ(call.reply.placement().prefill_node(), "p");
  EXPECT_EQ(call.reply.placement().decode_node(), "d");
}

TEST_F(WaitingTest, AfterTwoSecondsNobodyIsNobody) {
  Call early, late;
  Admit(early);
  executor_.Advance(absl::Seconds(2.1));
  ASSERT_TRUE(early.status);
  EXPECT_EQ(early.reply.rejected().reason(), wire::Rejected::NO_WORKERS);
  Admit(late);
  EXPECT_TRUE(late.status) << "at once from then on";
}

TEST_F(WaitingTest, DrainingAnswersWhatWaits) {
  Call call;
  Admit(call);
  conductor_.StopAdmitting();
  ASSERT_TRUE(call.status);
  EXPECT_EQ(call.status->code(), absl::StatusCode::kUnavailable);
}

TEST_F(WaitingTest, WatchersHearOfEveryChange) {
  FakeWatcher watcher;
  conductor_.Watch(&watcher);
  ASSERT_EQ(watcher.pushed.size(), 1u);
  EXPECT_EQ(watcher.pushed[0].cards_size(), 0);
  FakeSession p;
  const SessionId id = Join(p, WorkerHello("p", wire::ROLE_PREFILL));
  ASSERT_EQ(watcher.pushed.size(), 2u);
  EXPECT_EQ(watcher.pushed[1].prefill_ready(), 1u);
  conductor_.OnReport(id, LoadReport(0));
  EXPECT_EQ(watcher.pushed.size(), 2u) << "a load is no change";
  conductor_.OnEnd(id);
  ASSERT_EQ(watcher.pushed.size(), 3u);
  EXPECT_EQ(watcher.pushed[2].prefill_ready(), 0u);
  EXPECT_EQ(watcher.pushed[2].cards_size(), 1) << "the model is known while its workers are away";
  conductor_.Unwatch(&watcher);
}

TEST_F(WaitingTest, ABlobIsHandedOverWhenItArrives) {
  FakeSession p;
  const SessionId id = Join(p, WorkerHello("p", wire::ROLE_PREFILL));
  ASSERT_EQ(p.sent.size(), 2u);
  EXPECT_EQ(p.sent[0].accepted().conductor(), "conductor");
  EXPECT_EQ(p.sent[1].need_blobs().digests_size(), 2);
  wire::Blob blob;
  std::optional<absl::Status> status;
  conductor_.GetBlob(Sha256Hex("template"), &blob, [&](absl::Status s) { status = s; });
  EXPECT_FALSE(status);
  wire::NodeReport report;
  report.mutable_blob()->set_digest(Sha256Hex("template"));
  report.mutable_blob()->set_content("template");
  conductor_.OnReport(id, report);
  ASSERT_TRUE(status);
  EXPECT_TRUE(status->ok());
  EXPECT_EQ(blob.content(), "template");
}

TEST_F(WaitingTest, ABlobThatNobodySendsIsUnavailableInTheEnd) {
  FakeSession p;
  const SessionId id = Join(p, WorkerHello("p", wire::ROLE_PREFILL));
  wire::Blob blob;
  std::optional<absl::Status> status;
  conductor_.GetBlob(Sha256Hex("template"), &blob, [&](absl::Status s) { status = s; });
  for (int i = 0; i < 11; ++i) {
    executor_.Advance(absl::Seconds(1));
    conductor_.OnReport(id, LoadReport(0));
  }
  ASSERT_TRUE(status);
  EXPECT_EQ(status->code(), absl::StatusCode::kUnavailable);
  EXPECT_GT(p.sent.size(), 5u) << "asked again meanwhile";
  conductor_.GetBlob("unknown", &blob, [&](absl::Status s) { status = s; });
  EXPECT_EQ(status->code(), absl::StatusCode::kNotFound);
}

TEST_F(WaitingTest, ARefusedNodeIsClosedWithTheReason) {
  FakeSession p, d;
  Join(p, WorkerHello("p", wire::ROLE_PREFILL));
  wire::NodeReport hello = WorkerHello("d", wire::ROLE_DECODE);
  hello.mutable_hello()->mutable_fingerprint()->set_rope("other");
  Join(d, hello);
  ASSERT_TRUE(d.closed);
  EXPECT_EQ(d.closed->code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_FALSE(p.closed);
}

TEST_F(WaitingTest, StatusAndMetricsTellTheState) {
  admin::v1::GetStatusResponse status;
  conductor_.FillStatus(status);
  EXPECT_EQ(status.state(), "down");
  FakeSession p, d, d2;
  Join(p, WorkerHello("p", wire::ROLE_PREFILL));
  Join(d, WorkerHello("d", wire::ROLE_DECODE));
  Call call;
  Admit(call);
  status.Clear();
  conductor_.FillStatus(status);
  EXPECT_EQ(status.state(), "ok");
  EXPECT_EQ(status.admitted(), 1u);
  const SessionId lost = Join(d2, WorkerHello("d2", wire::ROLE_DECODE));
  conductor_.OnEnd(lost);
  status.Clear();
  conductor_.FillStatus(status);
  EXPECT_EQ(status.state(), "degraded");
  executor_.Advance(absl::Milliseconds(500));
  const std::string page = registry_.Render();
  for (const char* line :
       {"antiphon_admission_decisions_total{daemon=\"conductor\",decision=\"admit\","
        "reason=\"within_slo\"} 1",
        "antiphon_admission_decisions_total{daemon=\"conductor\",decision=\"reject\","
        "reason=\"queue_full\"} 0",
        "antiphon_worker_state{daemon=\"conductor\",state=\"ready\"} 2",
        "antiphon_worker_state{daemon=\"conductor\",state=\"lost\"} 1",
        "antiphon_queue_depth{daemon=\"conductor\",role=\"decode\"} 1"}) {
    EXPECT_NE(page.find(line), std::string::npos) << line << "\n" << page;
  }
}

}  // namespace
}  // namespace antiphon::conductor
