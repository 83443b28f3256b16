#include "conductor/decide.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>

#include "tests/conductor/harness.h"

namespace antiphon::conductor {
namespace {

constexpr auto kPrefill = wire::ROLE_PREFILL;
constexpr auto kDecode = wire::ROLE_DECODE;

// Hosts 1..n with a store and a prefill worker each, and one decode worker on host 1.
void AddHosts(Harness& h, int n) {
  for (int i = 1; i <= n; ++i) {
    h.Store("s" + std::to_string(i), 100 + i);
    h.Worker("p" + std::to_string(i), kPrefill, 100 + i);
  }
  h.Worker("d1", kDecode, 101);
}

TEST(DecideTest, PlacesOnAnyPair) {
  Harness h;
  h.Worker("p", kPrefill);
  h.Worker("d", kDecode);
  const Decision d = h.Admit(100);
  EXPECT_EQ(PrefillOf(d), "p");
  EXPECT_EQ(DecodeOf(d), "d");
  EXPECT_DOUBLE_EQ(d.predicted_ttft_s, 0.1);
  EXPECT_DOUBLE_EQ(d.predicted_tbt_s, 0.011);
}

TEST(DecideTest, PrefersTheLongestPrefixWhenQueuesAreEqual) {
  Harness h;
  AddHosts(h, 3);
  const auto keys = Chain(1, 30);
  h.Report("s2", EventsReport(0, keys));
  const Decision d = h.Admit(500, keys);
  EXPECT_EQ(PrefillOf(d), "p2");
  EXPECT_EQ(d.prefills[0].local_blocks, 30u);
  EXPECT_DOUBLE_EQ(d.prefills[0].prefill_s, 0.020);
  EXPECT_EQ(d.source_store, -1) << "nothing to fetch";
}

TEST(DecideTest, LeavesTheCacheWhenItsQueueCostsMoreThanItSaves) {
  Harness h;
  AddHosts(h, 2);
  const auto keys = Chain(1, 30);
  h.Report("s1", EventsReport(0, keys));
  h.Report("p1", LoadReport(0.300));  // saves 480 ms, less what the other fetches in 48 ms
  Decision d = h.Admit(500, keys);
  EXPECT_EQ(PrefillOf(d), "p2");
  EXPECT_EQ(d.source.value(), "s1") << "the hot prefix is copied on the way";
  EXPECT_EQ(d.prefills[0].used_blocks, 30u);
  EXPECT_NEAR(d.prefills[0].transfer_s, 0.048, 1e-9);
  wire::Placement placement;
  h.core.FillPlacement(d, placement);
  ASSERT_EQ(placement.sources_size(), 1);
  EXPECT_EQ(placement.sources(0).blocks(), 30u);
  EXPECT_EQ(placement.sources(0).incarnation(), 101u);
}

TEST(DecideTest, RecomputesWhenTheNetworkIsSlower) {
  Harness h;
  h.Store("s1", 101);
  h.Store("s2", 102);
  h.Worker("p1", kPrefill, 101);
  wire::NodeReport slow = WorkerHello("p2", kPrefill, 102);
  slow.mutable_hello()->mutable_cost()->set_transfer_bytes_per_s(1e5);  // 10 ms a token
  h.Join("p2", slow);
  h.Worker("d1", kDecode, 102);
  const auto keys = Chain(1, 30);
  h.Report("s1", EventsReport(0, keys));
  h.Report("p1", LoadReport(10));
  const Decision d = h.Admit(500, keys);
  EXPECT_EQ(PrefillOf(d), "p2");
  EXPECT_EQ(d.prefills[0].used_blocks, 0u);
  EXPECT_EQ(d.source_store, -1);
}

TEST(DecideTest, FetchesOnlyBeyondTheBalancingThreshold) {
  for (const auto& [threshold, fetched] : std::map<double, bool>{{1.4, true}, {1.6, false}}) {
    CoreOptions options;
    options.policy.balancing_threshold = threshold;
    Harness h(options);
    AddHosts(h, 2);
    const auto keys = Chain(1, 30);
    h.Report("s1", EventsReport(0, keys));
    h.Report("s2", EventsReport(0, {keys.begin(), keys.begin() + 20}));
    h.Report("p1", LoadReport(10));
    const Decision d = h.Admit(500, keys);
    EXPECT_EQ(PrefillOf(d), "p2");
    EXPECT_EQ(d.prefills[0].used_blocks, fetched ? 30u : 20u);
  }
}

TEST(DecideTest, ReadersOfOnePrefixTakeItFromDifferentHolders) {
  Harness h;
  AddHosts(h, 4);
  const auto keys = Chain(1, 30);
  h.Report("s1", EventsReport(0, keys));
  h.Report("s2", EventsReport(0, keys));
  h.Report("p1", LoadReport(10));
  h.Report("p2", LoadReport(10));
  std::set<std::string> sources;
  for (int i = 0; i < 2; ++i) sources.insert(h.Admit(500, keys).source.value());
  EXPECT_EQ(sources, (std::set<std::string>{"s1", "s2"}));
}

// The conversation trace: block 0 is in every request.
TEST(DecideTest, AUniversallySharedBlockDoesNotCollapseRouting) {
  Harness h;
  AddHosts(h, 4);
  const auto shared = Chain(1, 1);
  h.Report("s1", EventsReport(0, shared));
  std::map<std::string, int> placed;
  for (uint64_t i = 0; i < 40; ++i) {
    std::vector<BlockKey> keys = shared;
    for (const BlockKey& key : Chain(10 + i, 29)) keys.push_back(key);
    ++placed[PrefillOf(h.Admit(480, keys))];
  }
  ASSERT_EQ(placed.size(), 4u);
  for (const auto& [node, n] : placed) EXPECT_NEAR(n, 10, 2) << node;
}

TEST(DecideTest, CountsWhatWasPlacedSinceTheLastReport) {
  Harness h;
  AddHosts(h, 2);
  EXPECT_EQ(PrefillOf(h.Admit(500)), "p1");
  const Decision second = h.Admit(500);
  EXPECT_EQ(PrefillOf(second), "p2");
  EXPECT_NEAR(second.prefills[1].queue_s, 0.5, 1e-9);
  // The report that shows it replaces it.
  h.Advance(absl::Milliseconds(200));
  h.Report("p1", LoadReport(0.3, 1));
  h.Report("p2", LoadReport(0.3, 1));
  EXPECT_NEAR(h.Admit(500).prefills[0].queue_s, 0.3, 1e-9);
}

TEST(DecideTest, AQueueShrinksWhileNobodyReports) {
  Harness h;
  AddHosts(h, 1);
  h.Report("p1", LoadReport(1.0));
  h.Advance(absl::Milliseconds(400));
  EXPECT_NEAR(h.Admit(100).prefills[0].queue_s, 0.6, 1e-9);
}

TEST(DecideTest, TiesGoToTheShorterQueueThenToTheLowerName) {
  Harness h;
  AddHosts(h, 3);
  h.Report("p1", LoadReport(0, 2));
  EXPECT_EQ(PrefillOf(h.Admit(100)), "p2");
}

TEST(DecideTest, DecodeGoesWhereAStepIsQuickest) {
  Harness h;
  AddHosts(h, 1);
  h.Worker("d2", kDecode, 101);
  h.Report("d1", LoadReport(0, 0, 8, 1000));
  h.Report("d2", LoadReport(0, 0, 3, 1000));
  EXPECT_EQ(DecodeOf(h.Admit(100)), "d2");
}

TEST(DecideTest, DecodeOnPrefillsHostWinsATie) {
  Harness h;
  h.Store("s1", 101);
  h.Store("s2", 102);
  h.Worker("d1", kDecode, 101);
  h.Worker("d2", kDecode, 102);
  h.Worker("p1", kPrefill, 102);
  EXPECT_EQ(DecodeOf(h.Admit(100)), "d2");
}

TEST(DecideTest, MovingKvToAnotherHostCountsBeyondPrefill) {
  Harness h;
  h.Store("s1", 101);
  h.Store("s2", 102);
  wire::NodeReport hello = WorkerHello("p", kPrefill, 101);
  hello.mutable_hello()->mutable_cost()->set_transfer_bytes_per_s(2.5e5);  // 4 ms a token
  h.Join("p", hello);
  h.Worker("d", kDecode, 102);
  const Decision d = h.Admit(100);
  EXPECT_NEAR(d.handoff_s, 0.3, 1e-9);  // 400 ms of transfer behind 100 ms of prefill
  EXPECT_NEAR(d.predicted_ttft_s, 0.4, 1e-9);
}

TEST(DecideTest, RejectsWhenThePredictedTtftMissesTheSlo) {
  CoreOptions options;
  options.policy.slo_ttft = absl::Seconds(1);
  Harness h(options);
  AddHosts(h, 1);
  h.Report("p1", LoadReport(3.5, 4));
  const Decision d = h.Admit(100);
  EXPECT_EQ(d.verdict, Verdict::kPredictedTtft);
  EXPECT_NEAR(d.predicted_ttft_s, 3.6, 1e-9);
  EXPECT_NEAR(d.retry_after_s, 2.6, 1e-9);
  EXPECT_EQ(d.queue_depth, 4u);
  EXPECT_FALSE(d.retry_is_useless);
  wire::Rejected rejected;
  Core::FillRejected(d, rejected);
  EXPECT_EQ(rejected.reason(), wire::Rejected::PREDICTED_TTFT);
  EXPECT_EQ(rejected.message(), "the first token is predicted after 3.60 s, slo.ttft is 1.00 s");
}

TEST(DecideTest, WhatMissesTheSloOnAnIdleClusterIsBestEffortUnlessStrict) {
  CoreOptions options;
  options.policy.slo_ttft = absl::Seconds(1);
  Harness lax(options);
  AddHosts(lax, 1);
  Decision d = lax.Admit(5000);
  EXPECT_TRUE(d.placed());
  EXPECT_TRUE(d.best_effort);
  options.policy.strict = true;
  Harness strict(options);
  AddHosts(strict, 1);
  d = strict.Admit(5000);
  EXPECT_EQ(d.verdict, Verdict::kPredictedTtft);
  EXPECT_TRUE(d.retry_is_useless);
}

TEST(DecideTest, TheRequestsOwnTimeoutIsALimitToo) {
  Harness h;
  AddHosts(h, 1);
  Request request = h.MakeRequest(100);
  request.deadline = absl::Milliseconds(50);
  const Decision d = h.Admit(request);
  EXPECT_EQ(d.verdict, Verdict::kPredictedTtft);
  EXPECT_TRUE(d.retry_is_useless);
}

TEST(DecideTest, RejectsWhenThePredictedTbtMissesTheSlo) {
  CoreOptions options;
  options.policy.slo_tbt = absl::Milliseconds(15);
  Harness h(options);
  AddHosts(h, 1);
  h.Report("d1", LoadReport(0, 0, 4, 100));
  EXPECT_TRUE(h.Admit(100).placed());  // 10 + 5 * 1 ms
  const Decision d = h.Admit(100);     // the first one will have begun
  EXPECT_EQ(d.verdict, Verdict::kPredictedTbt);
  EXPECT_NEAR(d.predicted_tbt_s, 0.016, 1e-9);
  EXPECT_GE(d.retry_after_s, 1);
}

// arXiv 2407.00079, section 7.4: answers that end before this prefill does make room.
TEST(DecideTest, PredictsTheDecodeLoadForTheTimeWhenPrefillEnds) {
  CoreOptions options;
  options.policy.slo_tbt = absl::Milliseconds(12);  // two rows
  Harness h(options);
  AddHosts(h, 1);
  // An answer that lasted two seconds sets the mean.
  const Request first = h.MakeRequest(10);
  ASSERT_TRUE(h.Admit(first).placed());
  h.core.OnFinish({.id = first.id, .epoch = 1, .first_token_seen = true}, h.now);
  h.Advance(absl::Seconds(2));
  h.core.OnFinish({.id = first.id, .epoch = 1, .finished = true}, h.now);
  EXPECT_NEAR(h.core.view().decode_seconds, 2, 1e-9);
  // Two run now.
  for (int i = 0; i < 2; ++i) {
    const Request r = h.MakeRequest(10);
    ASSERT_TRUE(h.Admit(r).placed());
    h.core.OnFinish({.id = r.id, .epoch = 1, .first_token_seen = true}, h.now);
  }
  h.Advance(absl::Milliseconds(500));
  h.Report("d1", LoadReport(0, 0, 2, 20));
  h.Report("p1", LoadReport(0));
  EXPECT_EQ(h.Admit(10).verdict, Verdict::kPredictedTbt) << "they still run in 10 ms";
  const Decision late = h.Admit(1600);
  EXPECT_TRUE(late.placed()) << "they will have ended in 1.6 s";
  EXPECT_NEAR(late.predicted_tbt_s, 0.011, 1e-9);
}

TEST(DecideTest, TheQueueIsBounded) {
  CoreOptions options;
  options.policy.max_queue = 3;
  Harness h(options);
  AddHosts(h, 1);
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(h.Admit(10).placed());
  const Decision d = h.Admit(10);
  EXPECT_EQ(d.verdict, Verdict::kQueueFull);
  EXPECT_EQ(d.queue_depth, 3u);
}

TEST(DecideTest, DecodeTakesNoMoreSequencesThanItMay) {
  Harness h;
  h.Worker("p", kPrefill);
  wire::NodeReport hello = WorkerHello("d", kDecode);
  hello.mutable_hello()->set_max_sequences(2);
  h.Join("d", hello);
  EXPECT_TRUE(h.Admit(10).placed());
  EXPECT_TRUE(h.Admit(10).placed());
  EXPECT_EQ(h.Admit(10).verdict, Verdict::kQueueFull);
}

TEST(DecideTest, AFullPoolIsNoPlace) {
  Harness h;
  AddHosts(h, 2);
  h.Report("s1", StoreLoadReport(5));
  h.Report("s2", StoreLoadReport(1000));
  h.Worker("d2", kDecode, 102);
  const Decision d = h.Admit(160);  // 11 blocks
  EXPECT_EQ(PrefillOf(d), "p2");
  EXPECT_EQ(DecodeOf(d), "d2");
  h.Report("s2", StoreLoadReport(5));
  EXPECT_EQ(h.Admit(160).verdict, Verdict::kNoKvSpace);
}

TEST(DecideTest, SlotsThatWerePromisedAreNotPromisedTwice) {
  Harness h;
  AddHosts(h, 1);
  h.Report("s1", StoreLoadReport(20));
  EXPECT_TRUE(h.Admit(160).placed());  // 12 slots
  EXPECT_EQ(h.Admit(160).verdict, Verdict::kNoKvSpace);
}

TEST(DecideTest, APromptLargerThanEveryPoolIsTold) {
  Harness h;
  h.Join("s", StoreHello("s", 101, 10));
  h.Worker("p", kPrefill, 101);
  h.Worker("d", kDecode, 101);
  const Decision d = h.Admit(1600);
  EXPECT_EQ(d.verdict, Verdict::kNoKvSpace);
  EXPECT_TRUE(d.retry_is_useless);
  EXPECT_EQ(d.message, "1600 tokens need 101 KV blocks; the largest pool has 10");
}

TEST(DecideTest, APoolWhoseSizeComesLaterCounts) {
  Harness h;
  h.Join("s", StoreHello("s", 101, 0));  // no worker has brought the layout
  h.Worker("p", kPrefill, 101);
  h.Worker("d", kDecode, 101);
  wire::NodeReport load = StoreLoadReport(10);
  load.mutable_store_load()->set_slots(10);
  h.Report("s", load);
  EXPECT_TRUE(h.Admit(1600).retry_is_useless);
}

TEST(DecideTest, NamesTheReasonWhenThereIsNobody) {
  Harness h;
  EXPECT_EQ(h.Admit(10).verdict, Verdict::kNoWorkers);
  h.Worker("p", kPrefill);
  EXPECT_EQ(h.Admit(10).message, "no decode worker is ready");
  h.Worker("d", kDecode);
  Request request = h.MakeRequest(10);
  request.model = "large";
  EXPECT_EQ(h.Admit(request).verdict, Verdict::kUnknownModel);
  request.model = "gpt-small";
  EXPECT_TRUE(h.Admit(request).placed()) << "an alias";
  wire::NodeReport draining;
  draining.mutable_draining();
  h.Report("d", draining);
  EXPECT_EQ(h.Admit(10).verdict, Verdict::kDraining);
  h.Lose("d");
  EXPECT_EQ(h.Admit(10).verdict, Verdict::kNoWorkers);
}

TEST(DecideTest, AnExcludedStoreExcludesItsWorkers) {
  Harness h;
  AddHosts(h, 2);
  Request request = h.MakeRequest(10);
  request.excluded = {NodeId("s2"), NodeId("p1")};
  EXPECT_EQ(h.Admit(request).verdict, Verdict::kNoWorkers);
  request.excluded = {NodeId("s2")};
  EXPECT_EQ(PrefillOf(h.Admit(request)), "p1");
}

// ---- properties over random clusters
// -------------------------------------------------------------

struct RandomCluster {
  Harness h;
  std::mt19937_64 rng;
  std::vector<std::string> workers, stores;
  std::set<std::string> unusable;

  explicit RandomCluster(uint64_t seed, std::vector<size_t> order = {}) : rng(seed) {
    struct Spec {
      std::string name;
      wire::NodeReport hello;
      double queue_s;
      uint32_t running;
      int fate;
      std::vector<BlockKey> blocks;
    };
    std::vector<Spec> specs;
    const int hosts = 1 + static_cast<int>(rng() % 5);
    for (int i = 0; i < hosts; ++i) {
      const std::string s = "s" + std::to_string(i);
      auto chain = Chain(rng() % 2, 20);
      chain.resize(rng() % 21);
      specs.push_back({s, StoreHello(s, 100 + i), 0, 0, static_cast<int>(rng() % 12), chain});
      stores.push_back(s);
    }
    const int n = 2 + static_cast<int>(rng() % 12);
    for (int i = 0; i < n; ++i) {
      const std::string w = "w" + std::to_string(i);
      specs.push_back({w,
                       WorkerHello(w, i % 2 == 0 ? kPrefill : kDecode, 100 + rng() % hosts),
                       static_cast<double>(rng() % 4) * 0.1,
                       static_cast<uint32_t>(rng() % 4),
                       static_cast<int>(rng() % 8),
                       {}});
      workers.push_back(w);
    }
    std::vector<size_t> at(specs.size());
    for (size_t i = 0; i < at.size(); ++i) at[i] = i;
    if (!order.empty()) {
      std::mt19937_64 shuffle(order[0]);
      std::shuffle(at.begin(), at.end(), shuffle);
    }
    for (size_t i : at) {
      const Spec& spec = specs[i];
      h.Join(spec.name, spec.hello);
      if (spec.name[0] == 's') {
        h.Report(spec.name, EventsReport(0, spec.blocks, {}, true));
      } else {
        h.Report(spec.name, LoadReport(spec.queue_s, 0, spec.running, spec.running * 100));
      }
    }
    for (size_t i : at) {
      const Spec& spec = specs[i];
      if (spec.fate == 0) {
        h.Lose(spec.name);
        unusable.insert(spec.name);
      } else if (spec.fate == 1) {
        wire::NodeReport draining;
        draining.mutable_draining();
        h.Report(spec.name, draining);
        unusable.insert(spec.name);
      }
    }
  }

  std::string StoreOf(const NodeId& worker) {
    const Worker* w = h.core.view().FindWorker(worker);
    return w->store >= 0 ? h.core.view().stores[w->store].id.value() : "";
  }
};

TEST(DecidePropertyTest, NeverPicksExcludedLostOrDrainingNodes) {
  int placed = 0;
  for (uint64_t seed = 0; seed < 400; ++seed) {
    RandomCluster c(seed);
    for (int i = 0; i < 10; ++i) {
      Request request = c.h.MakeRequest(330, Chain(c.rng() % 2, 20));
      std::set<std::string> bad = c.unusable;
      for (const auto& names : {c.workers, c.stores}) {
        for (const std::string& name : names) {
          if (c.rng() % 6 != 0) continue;
          request.excluded.emplace_back(name);
          bad.insert(name);
        }
      }
      const Decision d = c.h.Admit(request);
      if (!d.placed()) continue;
      ++placed;
      for (const NodeId& node : {d.prefills[0].node, d.decodes[0].node}) {
        ASSERT_FALSE(bad.contains(node.value())) << "seed " << seed;
        ASSERT_FALSE(bad.contains(c.StoreOf(node))) << "seed " << seed;
      }
      ASSERT_FALSE(bad.contains(d.source.value())) << "seed " << seed;
      ASSERT_LE(d.predicted_ttft_s, 30);
      ASSERT_EQ(d.prefills[0].ttft_s,
                d.prefills[0].queue_s + d.prefills[0].transfer_s + d.prefills[0].prefill_s);
      for (const PrefillOption& other : d.prefills) {
        ASSERT_LE(d.prefills[0].ttft_s, other.ttft_s) << "seed " << seed;
      }
    }
  }
  EXPECT_GT(placed, 1000);
}

TEST(DecidePropertyTest, DoesNotDependOnTheOrderInWhichNodesCame) {
  for (uint64_t seed = 0; seed < 100; ++seed) {
    RandomCluster a(seed), b(seed, {seed + 1});
    for (int i = 0; i < 10; ++i) {
      const auto keys = Chain(a.rng() % 2, 20);
      const Decision x = a.h.Admit(330, keys), y = b.h.Admit(330, keys);
      ASSERT_EQ(PrefillOf(x), PrefillOf(y)) << "seed " << seed;
      ASSERT_EQ(DecodeOf(x), DecodeOf(y)) << "seed " << seed;
      ASSERT_EQ(x.source, y.source) << "seed " << seed;
      ASSERT_EQ(x.predicted_ttft_s, y.predicted_ttft_s) << "seed " << seed;
    }
  }
}

}  // namespace
}  // namespace antiphon::conductor
