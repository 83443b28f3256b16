#include "gateway/exchange.h"

#include <gtest/gtest.h>

#include "antiphon/v1/inference.pb.h"
#include "tests/gateway/model_fixture.h"

namespace antiphon::gateway {
namespace {

constexpr absl::Time kNow = absl::UnixEpoch();

struct World {
  World(int prompts, uint32_t n) {
    api::CompletionRequest r;
    for (int i = 0; i < prompts; ++i) r.add_prompts()->set_text("prompt");
    r.mutable_options()->set_n(n);
    PreparedRequest prepared;
    EXPECT_FALSE(Prepare(r, TestModel(), {}, prepared));
    std::vector<RequestId> ids;
    for (size_t i = 0; i < prepared.choices.size(); ++i) {
      ids.push_back(RequestId({static_cast<uint8_t>(i + 1)}));
    }
    exchange = std::make_unique<Exchange>(std::move(prepared), ids, GenerationLimits{});
    exchange->Begin(kNow);
    Take();
  }
  void Take() {
    for (Output& o : exchange->TakeOutputs()) {
      EXPECT_TRUE(ends.empty()) << "an output after the end";
      if (auto* c = std::get_if<ToCluster>(&o)) {
        if (std::holds_alternative<Admit>(c->action)) admitted.push_back(c->choice);
        if (std::holds_alternative<AbandonAdmit>(c->action)) abandoned.push_back(c->choice);
        if (std::holds_alternative<CancelOn>(c->action)) cancelled.push_back(c->choice);
      } else if (auto* d = std::get_if<ChoiceDelta>(&o)) {
        deltas.push_back(*d);
      } else if (auto* e = std::get_if<ChoiceEnd>(&o)) {
        choice_ends.push_back(*e);
      } else {
        ends.push_back(std::get<RequestEnd>(o));
      }
    }
  }
  void Place(uint32_t choice) {
    exchange->Deliver(choice, kNow, [](Generation& g) {
      wire::AdmitReply reply;
      reply.mutable_placement()->set_decode_address("d");
      g.OnAdmitReply(g.epoch(), reply, kNow);
    });
    Take();
  }
  void Token(uint32_t choice, bool finish = false, uint32_t dram = 0) {
    exchange->Deliver(choice, kNow, [&](Generation& g) {
      wire::SequenceUpdate u;
      u.set_epoch(g.epoch());
      u.set_first_index(static_cast<uint32_t>(g.emitted().size()));
      u.add_ids('a');
      if (dram > 0) u.mutable_prompt_source()->set_dram(dram);
      if (finish) u.set_finish(wire::FINISH_REASON_LENGTH);
      g.OnUpdate(u, kNow);
    });
    Take();
  }
  std::unique_ptr<Exchange> exchange;
  std::vector<uint32_t> admitted, abandoned, cancelled;
  std::vector<ChoiceDelta> deltas;
  std::vector<ChoiceEnd> choice_ends;
  std::vector<RequestEnd> ends;
};

TEST(ExchangeTest, LetsTheFirstChoiceComputeThePrefix) {
  World w(2, 3);
  EXPECT_EQ(w.admitted, (std::vector<uint32_t>{0, 3}));
  w.Place(0);
  EXPECT_EQ(w.admitted.size(), 2u);
  w.Token(0);
  EXPECT_EQ(w.admitted, (std::vector<uint32_t>{0, 3, 1, 2}));
}

TEST(ExchangeTest, CountsEachPromptOnceAndEveryOutputToken) {
  World w(1, 2);
  w.Place(0);
  w.Token(0, false, 4);
  w.Place(1);
  w.Token(1, true, 6);
  w.Token(0, true);
  ASSERT_EQ(w.ends.size(), 1u);
  EXPECT_FALSE(w.ends[0].error.has_value());
  EXPECT_EQ(w.ends[0].usage.prompt_tokens, 6u);
  EXPECT_EQ(w.ends[0].usage.completion_tokens, 3u);
  EXPECT_EQ(w.ends[0].usage.cached_tokens, 4u);
  EXPECT_EQ(w.exchange->prompt_source().computed(), 2u);
  EXPECT_EQ(w.choice_ends.size(), 2u);
  EXPECT_TRUE(w.deltas[0].first && w.deltas[1].first && !w.deltas[2].first);
}

TEST(ExchangeTest, EndsTheRequestWhenOneChoiceFails) {
  World w(2, 1);
  w.Place(0);
  w.Token(0);
  w.exchange->Deliver(1, kNow, [](Generation& g) {
    wire::AdmitReply reply;
    reply.mutable_rejected()->set_reason(wire::Rejected::QUEUE_FULL);
    g.OnAdmitReply(g.epoch(), reply, kNow);
  });
  w.Take();
  ASSERT_EQ(w.ends.size(), 1u);
  EXPECT_EQ(w.ends[0].error->code, "queue_full");
  EXPECT_EQ(w.cancelled, (std::vector<uint32_t>{0}));
}

TEST(ExchangeTest, CancelsEverythingWhenTheClientLeaves) {
  World w(3, 1);
  w.Place(0);
  w.exchange->OnCancel(kNow);
  w.Take();
  EXPECT_EQ(w.cancelled, (std::vector<uint32_t>{0}));
  EXPECT_EQ(w.abandoned, (std::vector<uint32_t>{1, 2}));
  ASSERT_EQ(w.ends.size(), 1u);
  EXPECT_TRUE(w.ends[0].cancelled);
  w.exchange->OnCancel(kNow);
  w.Take();
  EXPECT_EQ(w.ends.size(), 1u);
}

}  // namespace
}  // namespace antiphon::gateway
