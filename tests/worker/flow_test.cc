// Prefill and decode cores together, from Start to the last token, over every interleaving that the
// seeds draw.
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "tests/fakes/worker_cluster.h"

namespace antiphon {
namespace {

using fakes::ClusterOptions;
using fakes::Request;
using fakes::WorkerCluster;

std::vector<uint32_t> Prompt(uint32_t tokens, uint32_t first = 1) {
  std::vector<uint32_t> ids;
  for (uint32_t i = 0; i < tokens; ++i) ids.push_back((first + 7 * i) % 1000);
  return ids;
}

void ExpectServed(WorkerCluster& cluster, size_t index) {
  const Request& r = cluster.request(index);
  EXPECT_TRUE(r.over);
  EXPECT_TRUE(r.finish.has_value()) << r.error;
  EXPECT_EQ(r.emitted, cluster.Reference(index));
}

TEST(FlowTest, OneHostAnswersWithTheReferenceTokens) {
  for (uint32_t tokens : {1, 3, 4, 5, 16, 17, 40}) {
    SCOPED_TRACE(tokens);
    WorkerCluster cluster({.seed = tokens});
    const size_t r = cluster.Start({.prompt = Prompt(tokens), .max_tokens = 11});
    cluster.Run();
    ExpectServed(cluster, r);
    EXPECT_EQ(cluster.request(r).source->computed(), tokens);
    EXPECT_EQ(cluster.Leaks(), "");
  }
}

TEST(FlowTest, TwoHostsAnswerWithTheReferenceTokens) {
  for (uint32_t tokens : {1, 3, 4, 5, 16, 17, 40}) {
    SCOPED_TRACE(tokens);
    WorkerCluster cluster({.hosts = 2, .decode_hosts = {1}, .seed = tokens});
    const size_t r = cluster.Start({.prompt = Prompt(tokens), .max_tokens = 11});
    cluster.Run();
    ExpectServed(cluster, r);
    EXPECT_EQ(cluster.Leaks(), "");
  }
}

TEST(FlowTest, ASecondTurnReusesTheFirstOnesBlocks) {
  for (uint32_t decode_host : {0, 1}) {
    WorkerCluster cluster({.hosts = 2, .decode_hosts = {decode_host}});
    const size_t first = cluster.Start({.prompt = Prompt(18), .max_tokens = 15});
    cluster.Run();
    ExpectServed(cluster, first);
    std::vector<uint32_t> turn = cluster.request(first).prompt;
    const auto& answer = cluster.request(first).emitted;
    turn.insert(turn.end(), answer.begin(), answer.end());
    turn.push_back(5);
    const size_t second = cluster.Start({.prompt = turn, .max_tokens = 5});
    cluster.Run();
    ExpectServed(cluster, second);
    // 18 + 14 tokens have K and V: 8 whole blocks where decode wrote them, 4 where prefill did.
    EXPECT_EQ(cluster.request(second).source->dram(), decode_host == 0 ? 32u : 16u);
    EXPECT_EQ(cluster.Leaks(), "");
  }
}

TEST(FlowTest, PrefillFetchesThePrefixThatAnotherHostHas) {
  WorkerCluster cluster({.hosts = 2, .prefill_hosts = {0, 1}, .decode_hosts = {0}});
  const size_t first = cluster.Start({.prompt = Prompt(21), .max_tokens = 3});
  cluster.Run();
  ExpectServed(cluster, first);
  internal::v1::BlockSource source;
  source.set_rpc_address(cluster.store(0).address());
  source.set_incarnation(cluster.store(0).incarnation());
  source.set_blocks(5);
  const size_t second =
      cluster.Start({.prompt = Prompt(21), .max_tokens = 3, .prefill = 1, .sources = {source}});
  cluster.Run();
  ExpectServed(cluster, second);
  EXPECT_EQ(cluster.request(second).source->remote(), 20u);
  EXPECT_EQ(cluster.request(second).source->computed(), 1u);
  EXPECT_EQ(cluster.Leaks(), "");
}

// The stores verify what is committed and copied, so that a checksum of another layer or block
// shows as a leak; these ones are wrong, so that a core that computes its own shows as well.
TEST(FlowTest, BlocksAreCommittedWithTheChecksumsThatTheEngineMade) {
  for (const bool in_prefill : {true, false}) {
    SCOPED_TRACE(in_prefill);
    WorkerCluster cluster({.engines_make_checksums = true});
    (in_prefill ? cluster.prefill_runner(0) : cluster.decode_runner(0)).SpoilChecksums();
    const size_t r = cluster.Start({.prompt = Prompt(9), .max_tokens = 12});
    cluster.Run();
    ExpectServed(cluster, r);
    // Of five whole blocks prefill fills two, decode the others.
    EXPECT_EQ(cluster.store(0).errors(), in_prefill ? 2u : 3u) << cluster.store(0).last_error();
  }
}

TEST(FlowTest, AFullPoolPreemptsTheYoungestAndAllAreServed) {
  WorkerCluster cluster({.slots = 16, .seed = 3});
  std::vector<size_t> requests;
  for (uint32_t i = 0; i < 4; ++i) {
    requests.push_back(
        cluster.Start({.prompt = Prompt(9, 100 * i), .max_tokens = 30, .placements_max = 1000}));
  }
  cluster.Run();
  for (size_t r : requests) ExpectServed(cluster, r);
  EXPECT_GT(cluster.decode(0).counters().preempted, 0u);
  EXPECT_EQ(cluster.Leaks(), "");
}

TEST(FlowTest, StopIdsEndAfterMinTokens) {
  WorkerCluster cluster({});
  const auto prompt = Prompt(10);
  const auto free_run = fakes::ReferenceTokens(prompt, {.temperature = 0}, 10, 0, {});
  const size_t early =
      cluster.Start({.prompt = prompt, .max_tokens = 10, .stop_ids = {free_run[2]}});
  const size_t masked = cluster.Start(
      {.prompt = prompt, .max_tokens = 10, .min_tokens = 5, .stop_ids = {free_run[2]}});
  const size_t first =
      cluster.Start({.prompt = prompt, .max_tokens = 10, .stop_ids = {free_run[0]}});
  cluster.Run();
  ExpectServed(cluster, early);
  EXPECT_EQ(cluster.request(early).emitted.size(), 3u);
  EXPECT_EQ(*cluster.request(early).finish, internal::v1::FINISH_REASON_STOP);
  ExpectServed(cluster, masked);
  EXPECT_GT(cluster.request(masked).emitted.size(), 5u);
  ExpectServed(cluster, first);
  EXPECT_EQ(cluster.request(first).emitted.size(), 1u);
  EXPECT_EQ(cluster.Leaks(), "");
}

// Random clusters, requests and faults. Whatever happens: tokens are the reference's, each accepted
// placement ends once, and nothing is held in the end.
void RunSeed(uint64_t seed) {
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::mt19937_64 rng(seed);
  const auto draw = [&rng](uint64_t below) { return static_cast<uint32_t>(rng() % below); };
  ClusterOptions options{.seed = seed, .engines_make_checksums = seed % 2 == 0};
  options.hosts = 1 + draw(3);
  options.slots = 14 + draw(40);
  options.chunk_tokens = 4 + draw(20);
  options.sequences_max = 2 + draw(6);
  options.prefill_hosts = {0, draw(options.hosts)};
  options.decode_hosts = {draw(options.hosts), draw(options.hosts)};
  WorkerCluster cluster(options);
  const bool faults = draw(4) != 0;
  const uint32_t count = 1 + draw(7);
  std::vector<size_t> requests;
  std::vector<bool> cancelled(count, false);
  uint32_t moves_until_next = 0;
  for (int moves = 0;; ++moves) {
    if (requests.size() < count && (moves_until_next == 0 || !cluster.Move())) {
      Request r;
      r.prompt = Prompt(1 + draw(36), draw(3));  // few starts: prefixes are shared
      r.max_tokens = 1 + draw(14);
      r.min_tokens = draw(4);
      if (draw(3) == 0) r.stop_ids = {draw(500), 500 + draw(500)};
      r.sampling.set_temperature(draw(2));
      r.sampling.set_seed(draw(100));
      if (draw(3) == 0) r.sampling.set_repetition_penalty(1.5);
      r.sampling.set_logprobs(draw(2) == 0);
      r.prefill = draw(2);
      r.decode = draw(2);
      r.placements_max = 1000;
      for (uint32_t host = 0; host < options.hosts; ++host) {
        if (draw(2) == 0) continue;
        auto& source = r.sources.emplace_back();
        source.set_rpc_address(cluster.store(host).address());
        source.set_incarnation(cluster.store(host).incarnation());
        source.set_blocks(1 + draw(9));
      }
      requests.push_back(cluster.Start(std::move(r)));
      moves_until_next = draw(400);
      continue;
    }
    if (moves_until_next > 0) --moves_until_next;
    if (requests.size() == count && !cluster.Move()) break;
    ASSERT_LT(moves, 2'000'000);
    if (!faults || moves > 20'000 || draw(300) != 0) continue;
    switch (draw(8)) {
      case 0:
      case 1:
      case 2: {
        const uint32_t i = draw(requests.size());
        cancelled[i] = true;
        cluster.Cancel(requests[i]);
        break;
      }
      case 3:
      case 4:
        cluster.BreakPrefillStream();
        break;
      case 5:
        cluster.RestartPrefill(draw(2));
        break;
      case 6:
        cluster.RestartStore(draw(options.hosts));
        break;
      case 7:
        if (draw(4) == 0) cluster.BreakGateway(draw(2));
        break;
    }
  }
  for (uint32_t i = 0; i < count; ++i) {
    const Request& r = cluster.request(requests[i]);
    SCOPED_TRACE(absl::StrCat("request ", i));
    const auto reference = cluster.Reference(requests[i]);
    EXPECT_TRUE(r.over);
    ASSERT_LE(r.emitted.size(), reference.size());
    for (size_t k = 0; k < r.emitted.size(); ++k) ASSERT_EQ(r.emitted[k], reference[k]) << k;
    if (r.finish.has_value()) {
      EXPECT_EQ(r.emitted.size(), reference.size());
    } else if (!faults) {
      ADD_FAILURE() << "not served: " << r.error;
    }
  }
  EXPECT_EQ(cluster.Leaks(), "");
}

TEST(FlowTest, AnyInterleavingWithFaultsKeepsTokensAndLeaksNothing) {
  for (uint64_t seed = 1; seed <= 1500; ++seed) {
    RunSeed(seed);
    if (testing::Test::HasFailure()) return;
  }
}

}  // namespace
}  // namespace antiphon
