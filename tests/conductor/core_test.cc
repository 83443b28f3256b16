#include "conductor/core.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "tests/conductor/harness.h"

namespace antiphon::conductor {
namespace {

using ::testing::HasSubstr;

constexpr auto kPrefill = wire::ROLE_PREFILL;
constexpr auto kDecode = wire::ROLE_DECODE;

std::string StateOf(const Harness& h, const std::string& node) {
  wire::ClusterView view;
  h.core.FillView(view);
  for (const wire::NodeView& n : view.nodes()) {
    if (n.node() == node) return n.state();
  }
  return "absent";
}

wire::ModelSet Models(const Harness& h) {
  wire::ModelSet models;
  h.core.FillModels(models);
  return models;
}

uint32_t Matched(Harness& h, const std::vector<BlockKey>& keys) {
  return h.Admit(static_cast<uint32_t>(keys.size() * kBlockTokens + 1), keys).best_blocks;
}

// ---- registration
// --------------------------------------------------------------------------------

TEST(CoreTest, AcceptsAWorkerAndAsksForItsBlobs) {
  Harness h;
  const SessionId session = h.Join("p", WorkerHello("p", kPrefill));
  ASSERT_EQ(h.actions.directives.size(), 2u);
  EXPECT_EQ(h.actions.directives[0].kind, Actions::Kind::kAccepted);
  EXPECT_EQ(h.actions.directives[0].session, session);
  EXPECT_EQ(h.actions.directives[1].kind, Actions::Kind::kNeedBlobs);
  EXPECT_EQ(h.actions.directives[1].digests.size(), 2u);
  EXPECT_TRUE(h.actions.models_changed);
  EXPECT_EQ(Models(h).cards(0).name(), "small");
  EXPECT_EQ(Models(h).prefill_ready(), 1u);
  EXPECT_EQ(Models(h).decode_ready(), 0u);
}

TEST(CoreTest, RefusesAnotherFingerprintAndPrintsBothValues) {
  Harness h;
  h.Worker("p", kPrefill);
  wire::NodeReport other = WorkerHello("d", kDecode);
  other.mutable_hello()->mutable_fingerprint()->set_kv_dtype("f32");
  h.Join("d", other);
  EXPECT_EQ(h.last_status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(h.last_status.message()), HasSubstr("kv_dtype bf16 != f32"));
  EXPECT_EQ(StateOf(h, "d"), "absent");
}

TEST(CoreTest, RefusesAnotherModelOrTokenizer) {
  Harness h;
  h.Worker("p", kPrefill);
  wire::NodeReport other = WorkerHello("d", kDecode);
  other.mutable_hello()->mutable_card()->set_name("large");
  other.mutable_hello()->mutable_card()->set_tokenizer_digest("t2");
  h.Join("d", other);
  EXPECT_THAT(std::string(h.last_status.message()), HasSubstr("card.name small != large"));
  EXPECT_THAT(std::string(h.last_status.message()), HasSubstr("card.tokenizer_digest"));
}

TEST(CoreTest, ANewModelMayComeWhenNoWorkerOfTheOldIsLeft) {
  Harness h;
  h.Worker("p", kPrefill);
  h.Lose("p");
  wire::NodeReport other = WorkerHello("p2", kPrefill);
  other.mutable_hello()->mutable_card()->set_name("large");
  other.mutable_hello()->mutable_fingerprint()->set_weights_digest("w2");
  h.Join("p2", other);
  EXPECT_TRUE(h.last_status.ok()) << h.last_status;
  EXPECT_EQ(Models(h).cards(0).name(), "large");
  h.Worker("p", kPrefill);
  EXPECT_EQ(h.last_status.code(), absl::StatusCode::kFailedPrecondition);
}

TEST(CoreTest, AWorkerMayComeBackWithAnotherModelWhenItIsAlone) {
  Harness h;
  h.Worker("p", kPrefill);
  wire::NodeReport other = WorkerHello("p", kPrefill, 0, 2);
  other.mutable_hello()->mutable_fingerprint()->set_weights_digest("w2");
  h.Join("p", other);
  EXPECT_TRUE(h.last_status.ok()) << h.last_status;
}

TEST(CoreTest, RefusesAnotherClusterAndAnotherWireVersion) {
  Harness h;
  wire::NodeReport hello = WorkerHello("p", kPrefill);
  hello.mutable_hello()->mutable_hello()->set_cluster("other");
  h.Join("p", hello);
  EXPECT_EQ(h.last_status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(h.last_status.message()), HasSubstr("'other'"));
  hello = WorkerHello("p", kPrefill);
  hello.mutable_hello()->mutable_hello()->set_wire_min(kWireMax + 1);
  hello.mutable_hello()->mutable_hello()->set_wire_max(kWireMax + 2);
  h.Join("p", hello);
  EXPECT_EQ(h.last_status.code(), absl::StatusCode::kFailedPrecondition);
}

TEST(CoreTest, TheFirstMessageMustBeHelloAndOnlyOne) {
  Harness h;
  EXPECT_EQ(h.core.OnReport(5, LoadReport(1), h.now, h.actions).code(),
            absl::StatusCode::kInvalidArgument);
  h.Worker("p", kPrefill);
  EXPECT_EQ(h.Report("p", WorkerHello("p", kPrefill)).code(), absl::StatusCode::kInvalidArgument);
}

TEST(CoreTest, NamesTheFieldThatIsWrong) {
  const auto refused = [](auto change) {
    Harness h;
    wire::NodeReport report = WorkerHello("p", kPrefill);
    change(*report.mutable_hello());
    h.Join("p", report);
    EXPECT_EQ(h.last_status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(StateOf(h, "p"), "absent");
    return std::string(h.last_status.message());
  };
  using H = wire::NodeHello;
  EXPECT_EQ(refused([](H& h) { h.mutable_hello()->clear_node(); }), "hello.node is empty");
  EXPECT_EQ(refused([](H& h) { h.mutable_hello()->set_node("a\nb"); }),
            "hello.node holds a control character");
  EXPECT_EQ(refused([](H& h) { h.mutable_hello()->set_node(std::string(300, 'x')); }),
            "hello.node has 300 bytes; 256 are the most");
  EXPECT_EQ(refused([](H& h) { h.mutable_hello()->set_incarnation(0); }), "hello.incarnation is 0");
  EXPECT_THAT(refused([](H& h) { h.set_kind(wire::NODE_KIND_UNSPECIFIED); }), HasSubstr("kind"));
  EXPECT_THAT(refused([](H& h) { h.clear_role(); }), HasSubstr("role"));
  EXPECT_THAT(refused([](H& h) { h.clear_rpc_address(); }), HasSubstr("rpc_address"));
  EXPECT_THAT(refused([](H& h) { h.set_rpc_address("nowhere"); }), HasSubstr("rpc_address"));
  EXPECT_THAT(refused([](H& h) { h.set_rpc_address("h:0"); }), HasSubstr("port 0"));
  EXPECT_THAT(refused([](H& h) { h.clear_card(); }), HasSubstr("card"));
  EXPECT_THAT(refused([](H& h) { h.clear_fingerprint(); }), HasSubstr("fingerprint"));
  EXPECT_THAT(refused([](H& h) { h.mutable_card()->set_block_tokens(0); }),
              HasSubstr("card.block_tokens"));
  EXPECT_THAT(refused([](H& h) { h.mutable_card()->clear_name(); }), HasSubstr("card.name"));
  EXPECT_THAT(refused([](H& h) { h.mutable_cost()->set_step_base(-1); }),
              HasSubstr("cost.step_base"));
  EXPECT_THAT(refused([](H& h) {
                h.mutable_cost()->set_prefill_per_pair(std::numeric_limits<double>::quiet_NaN());
              }),
              HasSubstr("cost.prefill_per_pair"));
}

TEST(CoreTest, ReportsOfTheWrongKindEndTheSession) {
  Harness h;
  h.Worker("p", kPrefill);
  h.Store("s", 100);
  EXPECT_EQ(h.Report("p", EventsReport(0, {})).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(h.Report("s", LoadReport(0)).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(h.Report("p", LoadReport(-1)).code(), absl::StatusCode::kInvalidArgument);
  wire::NodeReport bad = EventsReport(0, Chain(1, 1));
  bad.mutable_events()->mutable_events(0)->set_key("short");
  EXPECT_THAT(std::string(h.Report("s", bad).message()), HasSubstr("events[0].key"));
}

// ---- life and death
// ------------------------------------------------------------------------------

TEST(CoreTest, ANewIncarnationReplacesTheOldAndLateReportsAreIgnored) {
  Harness h;
  h.Worker("d", kDecode);
  h.Worker("p", kPrefill);
  const SessionId old = h.sessions["p"];
  h.Admit(500);
  h.Join("p", WorkerHello("p", kPrefill, 0, 2));
  ASSERT_EQ(h.actions.closes.size(), 1u);
  EXPECT_EQ(h.actions.closes[0].session, old);
  EXPECT_EQ(h.core.OnReport(old, LoadReport(100), h.now, h.actions).code(),
            absl::StatusCode::kAborted);
  EXPECT_EQ(h.Admit(500).prefills[0].queue_s, 0) << "the new process has an empty queue";
  h.core.OnSessionEnd(old, h.now, h.actions);
  EXPECT_EQ(StateOf(h, "p"), "ready") << "the end of the old stream is not the node's";
}

TEST(CoreTest, TheSameIncarnationComesBackWithItsWork) {
  Harness h;
  h.Worker("d", kDecode);
  h.Worker("p", kPrefill);
  h.Admit(500);
  h.Lose("p");
  EXPECT_EQ(StateOf(h, "p"), "lost");
  h.Join("p", WorkerHello("p", kPrefill));
  EXPECT_NEAR(h.Admit(500).prefills[0].queue_s, 0.5, 1e-9);
}

TEST(CoreTest, ANodeThatStopsReportingIsLostUntilItReportsAgain) {
  Harness h;
  h.Worker("p", kPrefill);
  h.Worker("d", kDecode);
  for (int i = 0; i < 35; ++i) {
    h.Advance(absl::Milliseconds(100));
    h.Report("d", LoadReport(0));
    h.Tick();
  }
  EXPECT_EQ(StateOf(h, "p"), "lost");
  EXPECT_EQ(StateOf(h, "d"), "ready");
  EXPECT_EQ(Models(h).prefill_ready(), 0u);
  h.actions = Actions();
  h.Report("p", LoadReport(0));
  EXPECT_EQ(StateOf(h, "p"), "ready");
  EXPECT_TRUE(h.actions.models_changed);
}

TEST(CoreTest, SaysWhenItWillHaveSomethingToDo) {
  Harness h;
  EXPECT_EQ(h.core.next_tick(), absl::InfiniteFuture());
  h.Worker("p", kPrefill);
  h.Worker("d", kDecode);
  h.Advance(absl::Seconds(1));
  h.Report("d", LoadReport(0));
  EXPECT_EQ(h.core.next_tick(), h.now + absl::Seconds(2));  // p is silent
  h.now = h.core.next_tick();
  h.Tick();
  EXPECT_EQ(StateOf(h, "p"), "lost");
  EXPECT_EQ(StateOf(h, "d"), "ready");
  EXPECT_EQ(h.core.next_tick(), h.now + absl::Seconds(1));  // and then d
  h.Lose("d");
  h.Lose("p");
  EXPECT_EQ(h.core.next_tick(), h.now + absl::Seconds(60));
  h.now = h.core.next_tick();
  h.Tick();
  EXPECT_EQ(StateOf(h, "p"), "absent");
}

TEST(CoreTest, ALostNodeLeavesTheViewAfterAWhile) {
  Harness h;
  h.Worker("p", kPrefill);
  h.Lose("p");
  h.Advance(absl::Seconds(61));
  h.Tick();
  EXPECT_EQ(StateOf(h, "p"), "absent");
}

TEST(CoreTest, AWorkerWhoseStoreIsGoneTakesNothing) {
  Harness h;
  h.Store("s", 100);
  h.Worker("p", kPrefill, 100);
  h.Worker("d", kDecode, 100);
  EXPECT_TRUE(h.Admit(10).placed());
  h.Lose("s");
  EXPECT_EQ(h.Admit(10).verdict, Verdict::kNoWorkers);
  h.Store("s", 200);  // the next incarnation: the worker is not attached to it yet
  EXPECT_EQ(h.Admit(10).verdict, Verdict::kNoWorkers);
  h.Join("p", WorkerHello("p", kPrefill, 200));
  h.Join("d", WorkerHello("d", kDecode, 200));
  EXPECT_TRUE(h.Admit(10).placed());
}

TEST(CoreTest, AnEmptyReportIsASignOfLife) {
  Harness h;
  h.Store("s", 100);  // no worker has brought a layout: it has no load to report
  for (int i = 0; i < 10; ++i) {
    h.Advance(absl::Seconds(1));
    EXPECT_TRUE(h.Report("s", {}).ok());
    h.Tick();
    EXPECT_EQ(StateOf(h, "s"), "ready");
  }
  h.Worker("p", kPrefill, 100);
  h.Worker("d", kDecode, 100);
  EXPECT_TRUE(h.Admit(10).placed());
  h.Advance(absl::Seconds(4));
  h.Tick();
  EXPECT_EQ(StateOf(h, "s"), "lost");
}

TEST(CoreTest, GatewaysNeedNotReport) {
  Harness h;
  wire::NodeReport hello;
  *hello.mutable_hello()->mutable_hello() = TestHello("g", 1);
  hello.mutable_hello()->set_kind(wire::NODE_KIND_GATEWAY);
  h.Join("g", hello);
  h.Advance(absl::Seconds(30));
  h.Tick();
  EXPECT_EQ(StateOf(h, "g"), "ready");
  h.Lose("g");
  EXPECT_EQ(StateOf(h, "g"), "absent");
}

TEST(CoreTest, TheNumberOfNodesIsBounded) {
  CoreOptions options;
  options.nodes_max = 2;
  Harness h(options);
  h.Worker("a", kPrefill);
  h.Worker("b", kPrefill);
  h.Worker("c", kPrefill);
  EXPECT_EQ(h.last_status.code(), absl::StatusCode::kResourceExhausted);
}

// ---- store events
// --------------------------------------------------------------------------------

TEST(CoreTest, FollowsEventsAndAsksForASnapshotAtAGap) {
  Harness h;
  h.Store("s", 100);
  h.Worker("p", kPrefill, 100);
  h.Worker("d", kDecode, 100);
  const auto keys = Chain(1, 10);
  h.Report("s", EventsReport(0, {keys.begin(), keys.begin() + 4}));
  EXPECT_EQ(Matched(h, keys), 4u);
  h.Report("s", EventsReport(4, {keys[4]}, {keys[2]}));
  EXPECT_EQ(Matched(h, keys), 2u);
  h.actions = Actions();
  h.Report("s", EventsReport(2, {keys[2]}));
  EXPECT_TRUE(h.actions.directives.empty()) << "a late duplicate is no gap";
  EXPECT_EQ(Matched(h, keys), 2u);
  h.Report("s", EventsReport(9, {keys[2]}));
  ASSERT_EQ(h.actions.directives.size(), 1u);
  EXPECT_EQ(h.actions.directives[0].kind, Actions::Kind::kResnapshot);
  h.Report("s", EventsReport(10, {keys[2]}));
  EXPECT_EQ(h.actions.directives.size(), 1u) << "asked once";
  EXPECT_EQ(Matched(h, keys), 2u) << "nothing is believed until the snapshot";
  h.Report("s", EventsReport(20, {keys.begin(), keys.begin() + 7}, {}, true));
  EXPECT_EQ(Matched(h, keys), 7u);
  h.Report("s", EventsReport(27, {keys[7]}));
  EXPECT_EQ(Matched(h, keys), 8u);
}

TEST(CoreTest, ASnapshotReplacesEverything) {
  Harness h;
  h.Worker("p", kPrefill, 100);
  h.Worker("d", kDecode, 100);
  const auto a = Chain(1, 5), b = Chain(2, 5);
  h.Store("s", 100, a);
  EXPECT_EQ(Matched(h, a), 5u);
  h.Report("s", EventsReport(0, b, {}, true));
  EXPECT_EQ(Matched(h, a), 0u);
  EXPECT_EQ(Matched(h, b), 5u);
}

TEST(CoreTest, ALostStoreTakesItsBlocksWithIt) {
  Harness h;
  const auto keys = Chain(1, 5);
  h.Store("s1", 100, keys);
  h.Store("s2", 200);
  h.Worker("p", kPrefill, 200);
  h.Worker("d", kDecode, 200);
  EXPECT_EQ(Matched(h, keys), 5u);
  h.Lose("s1");
  EXPECT_EQ(Matched(h, keys), 0u);
  EXPECT_EQ(h.core.view().index.blocks(), 0u);
}

TEST(CoreTest, ASilentStoreIsAskedAgainForItsSnapshot) {
  Harness h;
  h.Join("s", StoreHello("s", 100));
  h.actions = Actions();
  h.Report("s", EventsReport(5, Chain(1, 1)));
  EXPECT_TRUE(h.actions.directives.empty()) << "it sends one unasked after the hello";
  h.Advance(absl::Seconds(6));
  h.Report("s", EventsReport(6, Chain(1, 1)));
  EXPECT_EQ(h.actions.directives.size(), 1u);
}

// ---- requests
// ------------------------------------------------------------------------------------

TEST(CoreTest, OnlyTheNewestEpochOfARequestCounts) {
  Harness h;
  h.Worker("p", kPrefill);
  h.Worker("d", kDecode);
  Request request = h.MakeRequest(500);
  request.epoch = 2;
  EXPECT_TRUE(h.Admit(request).placed());
  request.epoch = 1;
  h.Admit(request);
  EXPECT_EQ(h.last_status.code(), absl::StatusCode::kAborted);
  request.epoch = 2;
  EXPECT_EQ(h.Admit(request).prefills[0].queue_s, 0) << "the same call again counts once";
  request.epoch = 3;
  EXPECT_EQ(h.Admit(request).prefills[0].queue_s, 0) << "a new epoch replaces the old one's work";
  EXPECT_EQ(h.core.Summarise().flights, 1u);
  EXPECT_FALSE(h.core.OnFinish({.id = request.id, .epoch = 2, .finished = true}, h.now).known);
  EXPECT_TRUE(h.core.OnFinish({.id = request.id, .epoch = 3, .finished = true}, h.now).known);
  EXPECT_EQ(h.core.Summarise().flights, 0u);
}

TEST(CoreTest, FinishingGivesBackAllThatWasPlanned) {
  Harness h;
  h.Store("s", 100);
  h.Worker("p", kPrefill, 100);
  h.Worker("d", kDecode, 100);
  h.Report("s", StoreLoadReport(1000));
  std::vector<Request> requests;
  for (int i = 0; i < 20; ++i) requests.push_back(h.MakeRequest(100 + i));
  for (const Request& r : requests) ASSERT_TRUE(h.Admit(r).placed());
  EXPECT_GT(h.core.view().stores[0].planned_slots, 0u);
  for (size_t i = 0; i < requests.size(); ++i) {
    if (i % 2 == 0) {
      h.core.OnFinish({.id = requests[i].id, .epoch = 1, .first_token_seen = true}, h.now);
    }
    h.core.OnFinish({.id = requests[i].id, .epoch = 1, .finished = true}, h.now);
  }
  const View& view = h.core.view();
  EXPECT_EQ(view.stores[0].planned_slots, 0u);
  for (const Worker& worker : view.workers) {
    EXPECT_TRUE(worker.prefills.empty());
    EXPECT_TRUE(worker.decodes.empty());
    EXPECT_EQ(worker.rows_bound, 0u);
    EXPECT_EQ(worker.context_bound, 0);
    EXPECT_EQ(worker.QueueSeconds(h.now), 0);
  }
}

TEST(CoreTest, AGatewaysDeathLeaksNothing) {
  Harness h;
  h.Worker("p", kPrefill);
  h.Worker("d", kDecode);
  Request request = h.MakeRequest(100);
  request.deadline = absl::Seconds(20);
  ASSERT_TRUE(h.Admit(request).placed());
  ASSERT_TRUE(h.Admit(100).placed());
  h.Advance(absl::Seconds(26));
  h.Tick();
  EXPECT_EQ(h.core.Summarise().flights, 1u) << "the one without a deadline has longer";
  h.Advance(absl::Minutes(15));
  h.Tick();
  EXPECT_EQ(h.core.Summarise().flights, 0u);
  EXPECT_TRUE(h.core.view().FindWorker(NodeId("d"))->decodes.empty());
}

TEST(CoreTest, RememberedRequestsAreBounded) {
  CoreOptions options;
  options.flights_max = 10;
  Harness h(options);
  h.Worker("p", kPrefill);
  h.Worker("d", kDecode);
  for (int i = 0; i < 30; ++i) EXPECT_TRUE(h.Admit(1).placed());
  EXPECT_EQ(h.core.Summarise().flights, 10u);
}

TEST(CoreTest, TellsWhatBecameOfThePrediction) {
  CoreOptions options;
  options.policy.slo_tbt = absl::Milliseconds(50);
  Harness h(options);
  h.Worker("p", kPrefill);
  h.Worker("d", kDecode);
  const Request request = h.MakeRequest(100);
  h.Admit(request);
  FinishOutcome outcome = h.core.OnFinish(
      {.id = request.id, .epoch = 1, .ttft_s = 0.2, .first_token_seen = true}, h.now);
  EXPECT_TRUE(outcome.first_token);
  EXPECT_DOUBLE_EQ(outcome.predicted_ttft_s, 0.1);
  outcome = h.core.OnFinish({.id = request.id,
                             .epoch = 1,
                             .ttft_s = 0.2,
                             .tbt_s = 0.06,
                             .first_token_seen = true,
                             .finished = true},
                            h.now);
  EXPECT_FALSE(outcome.first_token) << "told already";
  EXPECT_EQ(outcome.ttft_met, true);
  EXPECT_EQ(outcome.tbt_met, false);
}

TEST(CoreTest, KeepsTheLastThousandDecisions) {
  Harness h;
  h.Worker("p", kPrefill);
  h.Worker("d", kDecode);
  for (int i = 0; i < 1100; ++i) h.Admit(1);
  EXPECT_EQ(h.core.decisions().size(), 1000u);
}

// ---- blobs
// ---------------------------------------------------------------------------------------

wire::NodeReport BlobReport(const std::string& digest, const std::string& content) {
  wire::NodeReport report;
  report.mutable_blob()->set_digest(digest);
  report.mutable_blob()->set_content(content);
  return report;
}

TEST(CoreTest, ServesBlobsThatWorkersSend) {
  Harness h;
  h.Worker("p", kPrefill);
  const std::string digest = Sha256Hex("tokenizer");
  auto blob = h.core.GetBlob(digest, h.now, h.actions);
  ASSERT_TRUE(blob.ok());
  EXPECT_EQ(*blob, nullptr) << "asked for, not here yet";
  h.Report("p", BlobReport(digest, "tokenizer"));
  EXPECT_TRUE(h.actions.blob_arrived);
  blob = h.core.GetBlob(digest, h.now, h.actions);
  ASSERT_TRUE(blob.ok());
  EXPECT_EQ(**blob, "tokenizer");
  h.actions = Actions();
  h.Worker("p2", kPrefill);
  EXPECT_EQ(h.actions.directives[1].digests, std::vector<std::string>{Sha256Hex("template")});
}

TEST(CoreTest, ABlobThatIsNotItsDigestIsRefused) {
  Harness h;
  h.Worker("p", kPrefill);
  EXPECT_EQ(h.Report("p", BlobReport(Sha256Hex("tokenizer"), "forged")).code(),
            absl::StatusCode::kDataLoss);
  EXPECT_EQ(*h.core.GetBlob(Sha256Hex("tokenizer"), h.now, h.actions), nullptr);
  EXPECT_TRUE(h.Report("p", BlobReport(Sha256Hex("unasked"), "unasked")).ok());
  EXPECT_EQ(h.core.GetBlob(Sha256Hex("unasked"), h.now, h.actions).status().code(),
            absl::StatusCode::kNotFound);
}

TEST(BlobCacheTest, DropsWhatWasNotUsedForLongest) {
  BlobCache cache(10);
  const std::string a = "aaaa", b = "bbbb", c = "cccc";
  ASSERT_TRUE(cache.Put(Sha256Hex(a), a).ok());
  ASSERT_TRUE(cache.Put(Sha256Hex(b), b).ok());
  EXPECT_NE(cache.Find(Sha256Hex(a)), nullptr);
  ASSERT_TRUE(cache.Put(Sha256Hex(c), c).ok());
  EXPECT_EQ(cache.Find(Sha256Hex(b)), nullptr);
  EXPECT_NE(cache.Find(Sha256Hex(a)), nullptr);
  EXPECT_EQ(cache.bytes(), 8u);
  EXPECT_EQ(cache.Put("x", std::string(11, 'x')).code(), absl::StatusCode::kResourceExhausted);
}

// ---- malformed requests
// --------------------------------------------------------------------------

TEST(ValidateTest, NamesTheFieldOfABadAdmit) {
  const auto refused = [](auto change) {
    wire::AdmitRequest request;
    request.set_id(std::string(16, 'i'));
    request.set_epoch(1);
    request.set_model("small");
    request.set_prompt_count(100);
    EXPECT_TRUE(RequestFromProto(request).ok());
    change(request);
    const auto parsed = RequestFromProto(request);
    EXPECT_EQ(parsed.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(parsed.status().message());
  };
  using A = wire::AdmitRequest;
  EXPECT_EQ(refused([](A& r) { r.set_id("x"); }), "id has 1 bytes; it must have 16");
  EXPECT_EQ(refused([](A& r) { r.set_epoch(0); }), "epoch is 0; epochs start at 1");
  EXPECT_EQ(refused([](A& r) { r.clear_model(); }), "model is empty");
  EXPECT_THAT(refused([](A& r) { r.set_prompt_count(0); }), HasSubstr("prompt_count"));
  EXPECT_THAT(refused([](A& r) { r.set_prompt_count(4'000'000'000u); }), HasSubstr("prompt_count"));
  EXPECT_THAT(refused([](A& r) { r.add_block_keys("short"); }), HasSubstr("block_keys[0]"));
  EXPECT_THAT(refused([](A& r) {
                for (int i = 0; i < 101; ++i) r.add_block_keys(std::string(16, 'k'));
              }),
              HasSubstr("block_keys has 101"));
  EXPECT_THAT(refused([](A& r) {
                for (int i = 0; i < 65; ++i) r.add_excluded("n");
              }),
              HasSubstr("excluded"));
  EXPECT_THAT(refused([](A& r) { r.set_tenant(std::string(1000, 't')); }), HasSubstr("tenant"));
}

TEST(ValidateTest, NamesTheFieldOfABadFinish) {
  wire::FinishReport report;
  EXPECT_FALSE(FinishFromProto(report).ok());
  report.set_id(std::string(16, 'i'));
  EXPECT_TRUE(FinishFromProto(report).ok());
  report.set_ttft_s(-1);
  EXPECT_THAT(std::string(FinishFromProto(report).status().message()), HasSubstr("ttft_s"));
}

}  // namespace
}  // namespace antiphon::conductor
