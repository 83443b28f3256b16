// The prefill core alone, between a store and a consumer played by hand.
#include <gtest/gtest.h>

#include <string>
#include <tuple>
#include <variant>
#include <vector>

#include "antiphon/v1/store.pb.h"
#include "antiphon/v1/worker.pb.h"
#include "prefill/core.h"
#include "tests/fakes/fake_store.h"

namespace antiphon::prefill {
namespace {

constexpr uint64_t kStream = 1, kWorker = 1, kIncarnation = 9;
constexpr uint32_t kTokens = 10;  // two whole blocks and a half
const KvLayout kLayout{.block_tokens = 4, .layers = 3, .kv_heads = 1, .head_dim = 8};

struct Done {
  std::vector<wire::Ready> readies;
  std::vector<wire::StoreRequest> commits;
};

class PrefillCoreTest : public testing::Test {
 protected:
  PrefillCoreTest() {
    core_.OnStoreAttached({.incarnation = kIncarnation,
                           .data_address = "store",
                           .payload = [this](uint32_t slot) { return store_.Payload(slot); }});
  }

  // Performs what the core wants, and what follows from that.
  Done Perform() { return Perform(core_); }
  Done Perform(PrefillCore& core) {
    Done done;
    for (std::vector<Action> actions; !(actions = core.TakeActions()).empty();) {
      for (Action& action : actions) {
        if (auto* send = std::get_if<Send>(&action)) {
          done.readies.push_back(send->message.ready());
        } else if (auto* call = std::get_if<StoreCall>(&action)) {
          if (call->request.has_commit()) done.commits.push_back(call->request);
          store_.Handle(kWorker, call->request);
        } else {
          ADD_FAILURE() << std::get<End>(action).status;
        }
      }
      for (; !store_.replies().empty(); store_.replies().pop_front()) {
        core.OnStoreReply(store_.replies().front().reply, now_);
      }
    }
    return done;
  }

  static wire::PrefillOpen MakeOpen(uint64_t consumers_store) {
    wire::PrefillOpen open;
    open.set_id(std::string(16, 'i'));
    open.set_epoch(1);
    for (uint32_t i = 0; i < kTokens; ++i) open.add_ids(i);
    open.set_prompt_count(kTokens);
    open.set_root_key(std::string(16, 'r'));
    open.set_store_incarnation(consumers_store);
    return open;
  }

  // A prompt up to the end of its only step.
  void Compute(uint64_t consumers_store) {
    core_.OnOpen(kStream, MakeOpen(consumers_store), now_);
    Perform();
    std::vector<engine::SequenceChunk> chunks;
    core_.Plan(512, now_, chunks);
    ASSERT_EQ(chunks.size(), 1u);
    Perform();
    std::vector<engine::ChunkResult> results(1);
    results[0].sampled = engine::SampledToken{.id = 7};
    core_.OnStepDone(absl::MakeConstSpan(results), now_);
  }

  const absl::Time now_ = absl::FromUnixSeconds(1000);
  fakes::StoreNet net_;
  fakes::FakeStore store_{kLayout, 8, kIncarnation, "store", &net_};
  PrefillCore core_{{.layout = kLayout, .vocab = 100, .context = 100}};
};

TEST_F(PrefillCoreTest, AConsumerOnTheSameHostHearsBeforeTheStore) {
  Compute(kIncarnation);
  const Done told = Perform();
  ASSERT_EQ(told.readies.size(), 1u);
  EXPECT_EQ(told.readies[0].first().id(), 7u);
  EXPECT_EQ(told.readies[0].blocks_size(), 3);
  EXPECT_TRUE(told.commits.empty());
  core_.CommitStep();
  const Done committed = Perform();
  ASSERT_EQ(committed.commits.size(), 2u);
  for (const auto& request : committed.commits) {
    EXPECT_EQ(request.commit().meta().layer_checksums_size(), 3);
  }
  EXPECT_EQ(store_.errors(), 0u) << store_.last_error();
}

TEST_F(PrefillCoreTest, SaysWhenTheFirstDeadlinePasses) {
  EXPECT_EQ(core_.next_deadline(), absl::InfiniteFuture());
  wire::PrefillOpen open = MakeOpen(kIncarnation);
  open.set_deadline_ms(50);
  core_.OnOpen(kStream, open, now_);
  EXPECT_EQ(core_.next_deadline(), now_ + absl::Milliseconds(50));
  open.set_id(std::string(16, 'j'));
  open.set_deadline_ms(20);
  core_.OnOpen(kStream + 1, open, now_);
  EXPECT_EQ(core_.next_deadline(), now_ + absl::Milliseconds(20));
  core_.Tick(now_ + absl::Milliseconds(20));
  EXPECT_EQ(core_.next_deadline(), now_ + absl::Milliseconds(50));
}

TEST_F(PrefillCoreTest, AConsumerElsewhereGetsTheChecksumsWithTheToken) {
  Compute(kIncarnation + 1);
  const Done told = Perform();
  ASSERT_EQ(told.readies.size(), 1u);
  ASSERT_EQ(told.readies[0].blocks_size(), 3);
  for (const auto& block : told.readies[0].blocks()) EXPECT_EQ(block.checksums_size(), 3);
  core_.CommitStep();
  EXPECT_EQ(Perform().commits.size(), 2u);
}

// A number for each checksum: which one it is shows where it comes out.
uint64_t Marked(uint32_t block, uint32_t layer) { return 1000 + 100 * block + layer; }

TEST_F(PrefillCoreTest, TheEnginesChecksumsAreToldLayerByLayerAndCommitted) {
  PrefillCore core({.layout = kLayout,
                    .vocab = 100,
                    .context = 100,
                    .publish_layers = 1,
                    .engine_makes_checksums = true});
  core.OnStoreAttached({.incarnation = kIncarnation,
                        .data_address = "store",
                        .payload = [this](uint32_t slot) { return store_.Payload(slot); }});
  core.OnOpen(kStream, MakeOpen(kIncarnation + 1), now_);
  Perform(core);
  // One block, then one and a half.
  for (const uint32_t first : {0, 1}) {
    const uint32_t count = first + 1;
    SCOPED_TRACE(first);
    std::vector<engine::SequenceChunk> chunks;
    core.Plan(first == 0 ? 5 : 512, now_, chunks);
    ASSERT_EQ(chunks.size(), 1u);
    ASSERT_EQ(chunks[0].checksums.size(), count * kLayout.layers);
    Perform(core);
    const auto make = [&](uint32_t layer) {
      for (uint32_t i = 0; i < count; ++i) {
        chunks[0].checksums[i * kLayout.layers + layer] = Marked(first + i, layer);
      }
    };
    const auto expect_told = [&](const Done& done, uint32_t first_layer, uint32_t end_layer) {
      ASSERT_EQ(done.readies.size(), 1u);
      ASSERT_EQ(done.readies[0].blocks_size(), static_cast<int>(count));
      for (uint32_t i = 0; i < count; ++i) {
        const auto& block = done.readies[0].blocks(static_cast<int>(i));
        EXPECT_EQ(block.index(), first + i);
        EXPECT_EQ(block.first_layer(), first_layer);
        ASSERT_EQ(block.checksums_size(), static_cast<int>(end_layer - first_layer));
        for (uint32_t layer = first_layer; layer < end_layer; ++layer) {
          EXPECT_EQ(block.checksums(static_cast<int>(layer - first_layer)),
                    Marked(first + i, layer));
        }
      }
    };
    make(0);
    core.OnProgress(1);
    expect_told(Perform(core), 0, 1);
    make(1);
    make(2);
    std::vector<engine::ChunkResult> results(1);
    if (first > 0) results[0].sampled = engine::SampledToken{.id = 7};
    core.OnStepDone(absl::MakeConstSpan(results), now_);
    expect_told(Perform(core), 1, 3);
    core.CommitStep();
    const Done committed = Perform(core);
    ASSERT_EQ(committed.commits.size(), 1u);  // the last block is half full
    const auto& meta = committed.commits[0].commit().meta();
    EXPECT_EQ(meta.position(), first);
    for (uint32_t layer = 0; layer < kLayout.layers; ++layer) {
      EXPECT_EQ(meta.layer_checksums(static_cast<int>(layer)), Marked(first, layer));
    }
  }
}

TEST_F(PrefillCoreTest, AnEngineThatMakesNoChecksumsIsNotAskedForThem) {
  core_.OnOpen(kStream, MakeOpen(kIncarnation), now_);
  Perform();
  std::vector<engine::SequenceChunk> chunks;
  core_.Plan(512, now_, chunks);
  ASSERT_EQ(chunks.size(), 1u);
  EXPECT_TRUE(chunks[0].checksums.empty());
}

TEST_F(PrefillCoreTest, LooksForBlocksAndReservesTheOthersInOneCall) {
  wire::PrefillOpen open = MakeOpen(kIncarnation);
  core_.OnOpen(kStream, open, now_);
  std::vector<Action> actions = core_.TakeActions();
  ASSERT_EQ(actions.size(), 1u);
  const wire::StoreRequest request = std::get<StoreCall>(actions[0]).request;
  EXPECT_EQ(request.pin_prefix().keys_size(), 2);
  EXPECT_EQ(request.pin_prefix().reserve_to(), 3u);
  store_.Handle(kWorker, request);
  core_.OnStoreReply(store_.replies().front().reply, now_);
  store_.replies().pop_front();
  std::vector<engine::SequenceChunk> chunks;
  core_.Plan(512, now_, chunks);
  ASSERT_EQ(chunks.size(), 1u);
  EXPECT_EQ(chunks[0].tokens.size(), kTokens);
  EXPECT_EQ(chunks[0].blocks.size(), 3u);
}

TEST_F(PrefillCoreTest, AStoreThatOnlyPinsIsAskedForSlotsThen) {
  core_.OnOpen(kStream, MakeOpen(kIncarnation), now_);
  wire::StoreRequest request = std::get<StoreCall>(core_.TakeActions()[0]).request;
  request.mutable_pin_prefix()->clear_reserve_to();
  store_.Handle(kWorker, request);
  core_.OnStoreReply(store_.replies().front().reply, now_);
  store_.replies().pop_front();
  std::vector<Action> actions = core_.TakeActions();
  ASSERT_EQ(actions.size(), 1u);
  EXPECT_EQ(std::get<StoreCall>(actions[0]).request.reserve().count(), 3u);
}

TEST_F(PrefillCoreTest, WhatAnotherStoreMayHaveIsNotReservedBeforeItIsAsked) {
  wire::PrefillOpen open = MakeOpen(kIncarnation);
  auto& source = *open.add_sources();
  source.set_incarnation(kIncarnation + 1);
  source.set_blocks(2);
  core_.OnOpen(kStream, open, now_);
  const wire::StoreRequest request = std::get<StoreCall>(core_.TakeActions()[0]).request;
  EXPECT_EQ(request.pin_prefix().keys_size(), 2);
  EXPECT_EQ(request.pin_prefix().reserve_to(), 0u);
}

TEST_F(PrefillCoreTest, WithoutSlotsNothingIsPinned) {
  Compute(kIncarnation);
  Perform();
  core_.CommitStep();
  Perform();
  core_.OnHalfClose(kStream, now_);
  core_.TakeActions();  // its End, and the release of its blocks, which the store never sees
  const size_t held = store_.held();
  wire::PrefillOpen open = MakeOpen(kIncarnation);
  open.set_id(std::string(16, 'j'));
  for (uint32_t i = 0; i < 30; ++i) open.add_ids(i);
  open.set_prompt_count(40);
  core_.OnOpen(kStream + 1, open, now_);
  wire::StoreRequest request = std::get<StoreCall>(core_.TakeActions()[0]).request;
  EXPECT_EQ(request.pin_prefix().reserve_to(), 10u);  // the store has 8, of which 3 are held
  store_.Handle(kWorker, request);
  EXPECT_EQ(store_.held(), held);
  core_.OnStoreReply(store_.replies().front().reply, now_);
  store_.replies().pop_front();
  std::vector<Action> actions = core_.TakeActions();
  ASSERT_EQ(actions.size(), 1u);
  EXPECT_TRUE(absl::IsResourceExhausted(std::get<End>(actions[0]).status));
  EXPECT_EQ(core_.counters().refused, 1u);
}

TEST_F(PrefillCoreTest, BlocksOfAStreamThatEndedMeanwhileAreReleasedAndNotCommitted) {
  Compute(kIncarnation);
  core_.OnBroken(kStream);
  core_.CommitStep();
  EXPECT_TRUE(Perform().commits.empty());
  EXPECT_EQ(store_.held(), 0u);
  EXPECT_EQ(store_.errors(), 0u) << store_.last_error();
  EXPECT_TRUE(core_.idle());
}

}  // namespace
}  // namespace antiphon::prefill
