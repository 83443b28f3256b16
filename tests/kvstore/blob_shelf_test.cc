// Who fills, who waits and who is told what, for every order of events that the seeds draw.
#include "kvstore/blob_shelf.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <set>

#include "common/philox.h"

namespace antiphon::kvstore {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

struct FakeMemory final : BlobMemory {
  explicit FakeMemory(int number) : number(number) {}
  int fd() const override { return number; }
  absl::Status Seal() override {
    if (mapped) return absl::FailedPreconditionError("mapped");
    sealed = true;
    return absl::OkStatus();
  }
  const int number;
  bool mapped = false;
  bool sealed = false;
};

class BlobShelfTest : public testing::Test {
 protected:
  BlobAnswer One(std::vector<BlobAnswer> answers) {
    EXPECT_THAT(answers, SizeIs(1));
    return answers.empty() ? BlobAnswer{} : answers[0];
  }
  BlobAnswer Open(ClientId session, const std::string& name, uint64_t bytes = 10,
                  const std::string& model = "m") {
    return One(shelf_.Open(session, 1, {name, model, bytes}));
  }
  FakeMemory& Memory(const BlobAnswer& answer) { return static_cast<FakeMemory&>(*answer.memory); }
  // Made by a session that ends at once.
  void Finished(const std::string& name, uint64_t bytes = 10, const std::string& model = "m") {
    const ClientId session = next_session_++;
    ASSERT_TRUE(Open(session, name, bytes, model).fill);
    ASSERT_TRUE(One(shelf_.Publish(session, 2)).status.ok());
    ASSERT_THAT(shelf_.End(session), IsEmpty());
  }
  bool Held(const std::string& name, uint64_t bytes = 10, const std::string& model = "m") {
    const ClientId session = next_session_++;
    const auto answers = shelf_.Open(session, 1, {name, model, bytes});
    const bool held = !answers.empty() && answers[0].memory != nullptr && !answers[0].fill;
    shelf_.End(session);
    return held;
  }

  int made_ = 0;
  int refusals_ = 0;  // of the maker, to come
  ClientId next_session_ = 1000;
  BlobShelf shelf_{{.blobs = 4, .bytes = 100},
                   [this](const std::string&, uint64_t) -> absl::StatusOr<BlobMemoryRef> {
                     if (refusals_ > 0 && refusals_-- > 0) {
                       return absl::ResourceExhaustedError("none");
                     }
                     return std::make_shared<FakeMemory>(++made_);
                   }};
};

TEST_F(BlobShelfTest, OneFillsTheOthersWaitAndAllGetTheSame) {
  const BlobAnswer first = Open(1, "a");
  EXPECT_TRUE(first.fill);
  EXPECT_THAT(shelf_.Open(2, 7, {"a", "m", 10}), IsEmpty());
  EXPECT_THAT(shelf_.Open(3, 8, {"a", "m", 10}), IsEmpty());
  const auto answers = shelf_.Publish(1, 9);
  ASSERT_THAT(answers, SizeIs(3));
  EXPECT_EQ(answers[0].session, 1u);
  EXPECT_EQ(answers[0].request, 9u);
  EXPECT_EQ(answers[1].session, 2u);
  EXPECT_EQ(answers[1].request, 7u);
  for (const size_t i : {1, 2}) {
    EXPECT_EQ(answers[i].memory, first.memory);
    EXPECT_FALSE(answers[i].fill);
  }
  EXPECT_TRUE(Memory(first).sealed);
  EXPECT_EQ(Open(4, "a").memory, first.memory);
  EXPECT_EQ(made_, 1);
}

TEST_F(BlobShelfTest, WhenTheFillerEndsTheFirstWhoWaitsFillsFreshMemory) {
  const BlobAnswer first = Open(1, "a");
  EXPECT_THAT(shelf_.Open(2, 7, {"a", "m", 10}), IsEmpty());
  EXPECT_THAT(shelf_.Open(3, 8, {"a", "m", 10}), IsEmpty());
  const BlobAnswer second = One(shelf_.End(1));
  EXPECT_EQ(second.session, 2u);
  EXPECT_EQ(second.request, 7u);
  EXPECT_TRUE(second.fill);
  EXPECT_NE(second.memory, first.memory);  // the first may still write
  EXPECT_THAT(shelf_.Publish(2, 9), SizeIs(2));
  EXPECT_FALSE(Memory(first).sealed);
  EXPECT_THAT(shelf_.End(3), IsEmpty());
}

TEST_F(BlobShelfTest, WhoeverWaitedAndLeftIsNotAnswered) {
  Open(1, "a");
  EXPECT_THAT(shelf_.Open(2, 7, {"a", "m", 10}), IsEmpty());
  EXPECT_THAT(shelf_.End(2), IsEmpty());
  EXPECT_THAT(shelf_.Publish(1, 9), SizeIs(1));
  EXPECT_THAT(shelf_.End(1), IsEmpty());
  EXPECT_TRUE(Held("a"));  // kept though nobody uses it
}

TEST_F(BlobShelfTest, WithoutMemoryForTheNextFillerAllWhoWaitAreTold) {
  Open(1, "a");
  EXPECT_THAT(shelf_.Open(2, 7, {"a", "m", 10}), IsEmpty());
  EXPECT_THAT(shelf_.Open(3, 8, {"a", "m", 10}), IsEmpty());
  refusals_ = 1;
  const auto answers = shelf_.End(1);
  ASSERT_THAT(answers, SizeIs(2));
  for (const BlobAnswer& answer : answers) {
    EXPECT_TRUE(absl::IsResourceExhausted(answer.status));
  }
  EXPECT_EQ(shelf_.count(), 0u);
  EXPECT_EQ(shelf_.bytes(), 0u);
  EXPECT_TRUE(Open(2, "a").fill);
}

TEST_F(BlobShelfTest, WhatIsStillMappedForWritingIsThrownAway) {
  const BlobAnswer first = Open(1, "a");
  EXPECT_THAT(shelf_.Open(2, 7, {"a", "m", 10}), IsEmpty());
  Memory(first).mapped = true;
  const auto answers = shelf_.Publish(1, 9);
  ASSERT_THAT(answers, SizeIs(2));
  EXPECT_TRUE(absl::IsFailedPrecondition(answers[0].status));
  EXPECT_EQ(answers[1].session, 2u);
  EXPECT_TRUE(answers[1].fill);
  EXPECT_NE(answers[1].memory, first.memory);
}

TEST_F(BlobShelfTest, RefusalsNameWhatIsWrong) {
  const struct {
    BlobName name;
    absl::StatusCode code;
    const char* text;
  } kCases[] = {
      {{"", "m", 10}, absl::StatusCode::kInvalidArgument, "name has 0 bytes"},
      {{std::string(501, 'n'), "m", 10}, absl::StatusCode::kInvalidArgument, "name has 501 bytes"},
      {{"a", "", 10}, absl::StatusCode::kInvalidArgument, "model has 0 bytes"},
      {{"a", std::string(501, 'm'), 10}, absl::StatusCode::kInvalidArgument, "model has 501"},
      {{"a", "m", 0}, absl::StatusCode::kInvalidArgument, "at least one byte"},
      {{"b", "m", 101}, absl::StatusCode::kResourceExhausted, "larger than all may be"},
      {{"b", "m", ~uint64_t{0}}, absl::StatusCode::kResourceExhausted, "larger than all may be"},
      {{"b", "m", 91}, absl::StatusCode::kResourceExhausted, "are in use"},
      {{"a", "m", 11}, absl::StatusCode::kFailedPrecondition, "held with 10 bytes"},
      {{"a", "other", 10}, absl::StatusCode::kFailedPrecondition, "for the model m"},
  };
  ASSERT_TRUE(Open(1, "a").fill);
  for (const auto& c : kCases) {
    const BlobAnswer answer = One(shelf_.Open(2, 1, c.name));
    EXPECT_EQ(answer.status.code(), c.code) << c.text;
    EXPECT_THAT(std::string(answer.status.message()), HasSubstr(c.text));
  }
  EXPECT_EQ(Open(1, "b").status.code(), absl::StatusCode::kFailedPrecondition);  // it has one
  EXPECT_EQ(One(shelf_.Publish(2, 1)).status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(One(shelf_.Publish(1, 2)).status.ok());
  EXPECT_EQ(One(shelf_.Publish(1, 3)).status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(shelf_.End(77), IsEmpty());
}

TEST_F(BlobShelfTest, AnotherModelsUnusedBlobsMakeRoomAndUsedOnesStay) {
  Finished("a", 10, "old");
  ASSERT_TRUE(Open(1, "b", 10, "old").fill);
  ASSERT_TRUE(One(shelf_.Publish(1, 2)).status.ok());
  Finished("c", 10, "new");
  EXPECT_EQ(shelf_.count(), 2u);
  EXPECT_EQ(shelf_.bytes(), 20u);
  EXPECT_TRUE(Held("b", 10, "old"));
  EXPECT_TRUE(Held("c", 10, "new"));
}

TEST_F(BlobShelfTest, LimitsDropTheLongestUnusedAndThenRefuse) {
  for (const char* name : {"a", "b", "c", "d"}) Finished(name, 20);
  EXPECT_TRUE(Held("a", 20));  // used again: now b is the longest unused
  Finished("e", 20);
  EXPECT_EQ(shelf_.count(), 4u);
  EXPECT_TRUE(Held("a", 20));
  Finished("f", 60);
  EXPECT_LE(shelf_.bytes(), 100u);
  EXPECT_TRUE(Held("f", 60));
}

TEST_F(BlobShelfTest, WhenMemoryIsShortUnusedBlobsGoFirst) {
  Finished("a");
  Finished("b");
  refusals_ = 1;
  EXPECT_TRUE(Open(1, "c").fill);
  EXPECT_EQ(shelf_.count(), 2u);
  refusals_ = 9;
  EXPECT_TRUE(absl::IsResourceExhausted(Open(2, "d").status));
  EXPECT_EQ(shelf_.count(), 1u);
}

TEST_F(BlobShelfTest, AnOfferIsTakenUnlessTheNameIsHeld) {
  const auto memory = std::make_shared<FakeMemory>(50);
  EXPECT_TRUE(One(shelf_.Offer(1, 1, {"a", "m", 10}, memory)).status.ok());
  EXPECT_EQ(Open(2, "a").memory, memory);
  EXPECT_TRUE(absl::IsAlreadyExists(One(shelf_.Offer(3, 1, {"a", "m", 10}, memory)).status));
  Open(4, "b");
  EXPECT_TRUE(absl::IsAlreadyExists(One(shelf_.Offer(5, 1, {"b", "m", 10}, memory)).status));
  EXPECT_TRUE(absl::IsResourceExhausted(One(shelf_.Offer(6, 1, {"c", "m", 99}, memory)).status));
}

// Against what must hold whatever happens: one filler a name, nobody forgotten, nobody answered
// twice, only sealed memory shared, and the sums right.
TEST_F(BlobShelfTest, WhateverTheOrderEveryOpenIsAnsweredOnce) {
  for (uint64_t seed = 0; seed < 300; ++seed) {
    int made = 0;
    std::map<BlobMemory*, bool> sealed;
    uint64_t draw = 0;
    const auto pick = [&](uint32_t n) { return Philox4x32(seed, draw++)[0] % n; };
    BlobShelf shelf({.blobs = 3, .bytes = 100},
                    [&](const std::string&, uint64_t) -> absl::StatusOr<BlobMemoryRef> {
                      if (pick(10) == 0) return absl::ResourceExhaustedError("none");
                      return std::make_shared<FakeMemory>(++made);
                    });
    enum class State { kWaiting, kFilling, kUsing };
    std::map<ClientId, State> sessions;
    std::map<ClientId, std::string> names;
    std::map<ClientId, BlobMemoryRef> memories;
    const auto take = [&](const std::vector<BlobAnswer>& answers) {
      for (const BlobAnswer& answer : answers) {
        const auto it = sessions.find(answer.session);
        if (it == sessions.end()) continue;  // a refusal of one that had none
        if (!answer.status.ok()) {
          EXPECT_NE(it->second, State::kUsing);
          sessions.erase(it);
          continue;
        }
        if (answer.memory == nullptr) {
          EXPECT_EQ(it->second, State::kFilling);
          it->second = State::kUsing;
          continue;
        }
        EXPECT_EQ(it->second, State::kWaiting);
        it->second = answer.fill ? State::kFilling : State::kUsing;
        memories[answer.session] = answer.memory;
        EXPECT_EQ(static_cast<FakeMemory&>(*answer.memory).sealed, !answer.fill);
      }
    };
    for (int step = 0; step < 200; ++step) {
      const ClientId session = 1 + pick(8);
      const auto it = sessions.find(session);
      if (it == sessions.end()) {
        const std::string name(1, static_cast<char>('a' + pick(4)));
        sessions[session] = State::kWaiting;
        names[session] = name;
        take(shelf.Open(session, 1, {name, name < "c" ? "m" : "n", 30}));
      } else if (it->second == State::kFilling && pick(2) == 0) {
        static_cast<FakeMemory&>(*memories[session]).mapped = pick(4) == 0;
        take(shelf.Publish(session, 2));
      } else if (pick(3) == 0) {
        sessions.erase(it);
        take(shelf.End(session));
      }
      std::map<std::string, int> fillers, waiters;
      std::map<std::string, std::set<BlobMemory*>> used;
      for (const auto& [id, state] : sessions) {
        fillers[names[id]] += state == State::kFilling ? 1 : 0;
        waiters[names[id]] += state == State::kWaiting ? 1 : 0;
        if (state == State::kUsing) used[names[id]].insert(memories[id].get());
      }
      for (const auto& [name, count] : fillers) {
        ASSERT_LE(count, 1) << seed;
        ASSERT_TRUE(waiters[name] == 0 || count == 1) << seed << ": nobody fills " << name;
      }
      for (const auto& [name, all] : used) ASSERT_EQ(all.size(), all.empty() ? 0 : 1) << seed;
      ASSERT_LE(shelf.count(), 3u);
      ASSERT_EQ(shelf.bytes(), 30 * shelf.count());
    }
  }
}

}  // namespace
}  // namespace antiphon::kvstore
