#include "gateway/generation.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "tests/gateway/model_fixture.h"

namespace antiphon::gateway {
namespace {

constexpr absl::Time kStart = absl::UnixEpoch();

GenerationSpec Spec(uint32_t max_tokens = 100) {
  GenerationSpec spec;
  spec.id = RequestId({1, 2, 3});
  spec.label = "label";
  spec.model = "tiny";
  spec.prompt = std::make_shared<const std::vector<uint32_t>>(std::vector<uint32_t>(40, 'p'));
  spec.block_tokens = 16;
  spec.tokenizer = TestModel()->tokenizer;
  spec.stop.set_max_tokens(max_tokens);
  spec.stop.add_stop_ids(kTestEos);
  return spec;
}

template <typename T>
std::vector<T> Only(const std::vector<Action>& actions) {
  std::vector<T> out;
  for (const Action& a : actions) {
    if (const T* t = std::get_if<T>(&a)) out.push_back(*t);
  }
  return out;
}

// A generation with a hand on its events.
struct Driver {
  explicit Driver(GenerationSpec spec = Spec(), GenerationLimits limits = {})
      : generation(std::move(spec), limits) {
    generation.Begin(now);
    Take();
  }
  void Take() {
    for (Action& a : generation.TakeActions()) {
      EXPECT_TRUE(Only<End>(all).empty()) << "an action after the end";
      if (auto* d = std::get_if<Deliver>(&a)) {
        text += d->delta.text;
        for (const auto& t : d->delta.tokens) ids.push_back(t.id);
      }
      all.push_back(a);
      last.push_back(std::move(a));
    }
  }
  void Place(const std::string& decode = "d1", const std::string& prefill = "p1") {
    wire::AdmitReply reply;
    auto& p = *reply.mutable_placement();
    p.set_decode_node(decode);
    p.set_decode_address("addr-" + decode);
    p.set_prefill_node(prefill);
    last.clear();
    generation.OnAdmitReply(generation.epoch(), reply, now);
    Take();
  }
  void Reject(wire::Rejected::Reason reason) {
    wire::AdmitReply reply;
    reply.mutable_rejected()->set_reason(reason);
    reply.mutable_rejected()->set_retry_after_s(10);
    last.clear();
    generation.OnAdmitReply(generation.epoch(), reply, now);
    Take();
  }
  wire::SequenceUpdate Update(uint32_t first, const std::string& tokens) {
    wire::SequenceUpdate u;
    u.set_id(generation.spec().id.ToBytes());
    u.set_epoch(generation.epoch());
    u.set_first_index(first);
    for (const char c : tokens) u.add_ids(static_cast<uint8_t>(c));
    return u;
  }
  void Send(const wire::SequenceUpdate& u) {
    last.clear();
    generation.OnUpdate(u, now);
    Take();
  }
  void Tokens(const std::string& tokens) {
    Send(Update(static_cast<uint32_t>(generation.emitted().size()), tokens));
  }
  void Error(absl::StatusCode code, const std::string& node = "") {
    wire::SequenceUpdate u = Update(static_cast<uint32_t>(generation.emitted().size()), "");
    u.mutable_error()->set_code(static_cast<int>(code));
    u.set_failed_node(node);
    Send(u);
  }
  void Finish(wire::FinishReason reason, std::vector<uint32_t> more = {}) {
    wire::SequenceUpdate u = Update(static_cast<uint32_t>(generation.emitted().size()), "");
    for (uint32_t id : more) u.add_ids(id);
    u.set_finish(reason);
    Send(u);
  }
  void Pass(absl::Duration d) {
    now += d;
    last.clear();
    generation.OnTimer(now);
    Take();
  }
  Ending ending() const {
    const auto ends = Only<End>(all);
    EXPECT_EQ(ends.size(), 1u);
    return ends.empty() ? Ending{} : ends[0].ending;
  }

  absl::Time now = kStart;
  Generation generation;
  std::vector<Action> all, last;
  std::string text;
  std::vector<uint32_t> ids;
};

TEST(GenerationTest, GoesFromAdmissionToTheEnd) {
  Driver d;
  ASSERT_EQ(Only<Admit>(d.all).size(), 1u);
  const wire::AdmitRequest admit = Only<Admit>(d.all)[0].request;
  EXPECT_EQ(admit.epoch(), 1u);
  EXPECT_EQ(admit.prompt_count(), 40u);
  EXPECT_EQ(admit.block_keys_size(), 2);
  d.Place();
  ASSERT_EQ(Only<StartOn>(d.last).size(), 1u);
  EXPECT_EQ(Only<StartOn>(d.last)[0].start.prompt_ids_size(), 40);
  d.Tokens("he");
  d.Tokens("llo");
  d.Finish(wire::FINISH_REASON_STOP, {kTestEos});
  EXPECT_EQ(d.text, "hello");
  EXPECT_EQ(d.ending().reason, EndReason::kStop);
  EXPECT_EQ(d.generation.stats().output_tokens, 6u);
  EXPECT_TRUE(Only<CancelOn>(d.all).empty());
  const auto reports = Only<Report>(d.all);
  ASSERT_EQ(reports.size(), 2u);
  EXPECT_TRUE(reports[0].report.first_token_seen() && !reports[0].report.finished());
  EXPECT_TRUE(reports[1].report.finished());
}

TEST(GenerationTest, EndsByLengthAndFlushesWhatItHeld) {
  GenerationSpec spec = Spec(3);
  spec.stop_strings = {"lmn"};
  Driver d(std::move(spec));
  d.Place();
  d.Tokens("kl");
  EXPECT_EQ(d.text, "k");
  d.Finish(wire::FINISH_REASON_LENGTH, {'m'});
  EXPECT_EQ(d.text, "klm");
  EXPECT_EQ(d.ending().reason, EndReason::kLength);
}

TEST(GenerationTest, CancelsDecodeWhenAStopStringMatchesAndCountsWhatWasReceived) {
  GenerationSpec spec = Spec();
  spec.stop_strings = {"END"};
  Driver d(std::move(spec));
  d.Place();
  d.Tokens("aE");
  d.Tokens("NDxyz");
  EXPECT_EQ(d.text, "a");
  EXPECT_EQ(d.ending().reason, EndReason::kStop);
  EXPECT_EQ(d.ending().stop_string, "END");
  EXPECT_EQ(d.generation.stats().output_tokens, 4u);
  ASSERT_EQ(Only<CancelOn>(d.last).size(), 1u);
  EXPECT_EQ(Only<CancelOn>(d.last)[0].epoch, 1u);
}

TEST(GenerationTest, DoesNotMatchStopStringsBeforeMinTokens) {
  GenerationSpec spec = Spec();
  spec.stop_strings = {"a"};
  spec.stop.set_min_tokens(3);
  Driver d(std::move(spec));
  d.Place();
  d.Tokens("aab");
  EXPECT_FALSE(d.generation.ended());
  d.Tokens("a");
  EXPECT_EQ(d.text, "aab");
  EXPECT_EQ(d.ending().reason, EndReason::kStop);
}

TEST(GenerationTest, NeverSendsHalfACharacter) {
  Driver d;
  d.Place();
  d.Tokens("\xe2");
  EXPECT_EQ(d.text, "");
  EXPECT_EQ(Only<Deliver>(d.last).size(), 1u);  // the first token opens the answer all the same
  d.Tokens("\x82");
  d.Tokens("\xac");
  EXPECT_EQ(d.text, "€");
  d.Finish(wire::FINISH_REASON_LENGTH, {0xe2});
  EXPECT_EQ(d.text, "€\xef\xbf\xbd");
}

TEST(GenerationTest, IsPlacedAgainWithItsTokensWhenDecodeBreaks) {
  Driver d;
  d.Place("d1");
  d.Tokens("abc");
  d.last.clear();
  d.generation.OnDecodeBroken("addr-d1", absl::UnavailableError("gone"), d.now);
  d.Take();
  ASSERT_EQ(Only<Admit>(d.last).size(), 1u);
  const wire::AdmitRequest again = Only<Admit>(d.last)[0].request;
  EXPECT_EQ(again.epoch(), 2u);
  EXPECT_EQ(again.emitted_count(), 3u);
  ASSERT_EQ(again.excluded_size(), 1);
  EXPECT_EQ(again.excluded(0), "d1");
  d.Place("d2");
  EXPECT_EQ(Only<StartOn>(d.last)[0].start.emitted_ids_size(), 3);
  // A late token of the dead worker.
  wire::SequenceUpdate late = d.Update(3, "X");
  late.set_epoch(1);
  d.Send(late);
  d.Tokens("de");
  EXPECT_EQ(d.text, "abcde");
}

TEST(GenerationTest, IgnoresABreakOfAnotherWorker) {
  Driver d;
  d.Place("d1");
  d.generation.OnDecodeBroken("addr-d2", absl::UnavailableError("gone"), d.now);
  d.Take();
  EXPECT_EQ(d.generation.epoch(), 1u);
}

TEST(GenerationTest, DropsDuplicatesThatAreEqualAndRefusesOthers) {
  Driver d;
  d.Place("d1");
  d.Tokens("abc");
  d.Send(d.Update(1, "bcd"));
  EXPECT_EQ(d.text, "abcd");
  d.Send(d.Update(2, "X"));
  EXPECT_EQ(d.text, "abcd");
  EXPECT_EQ(d.generation.stats().divergences, 1u);
  EXPECT_EQ(d.generation.epoch(), 2u);
  ASSERT_EQ(Only<CancelOn>(d.last).size(), 1u);
}

TEST(GenerationTest, IsPlacedAgainAfterAGap) {
  Driver d;
  d.Place();
  d.Tokens("ab");
  d.Send(d.Update(5, "c"));
  EXPECT_EQ(d.generation.epoch(), 2u);
  EXPECT_EQ(d.text, "ab");
}

TEST(GenerationTest, IsPlacedAgainWhenLogprobsOrIdsAreImpossible) {
  GenerationSpec spec = Spec();
  spec.sampling.set_logprobs(true);
  Driver d(std::move(spec));
  d.Place();
  d.Tokens("a");
  EXPECT_EQ(d.generation.epoch(), 2u);
  Driver other;
  other.Place();
  wire::SequenceUpdate u = other.Update(0, "");
  u.add_ids(kTestVocab);
  other.Send(u);
  EXPECT_EQ(other.generation.epoch(), 2u);
}

TEST(GenerationTest, GivesUpAfterThreeReplacements) {
  Driver d;
  for (int i = 0; i < 4; ++i) {
    EXPECT_FALSE(d.generation.ended());
    d.Place("d" + std::to_string(i));
    d.Tokens("a");
    d.Error(absl::StatusCode::kUnavailable, "p" + std::to_string(i));
  }
  EXPECT_EQ(d.ending().reason, EndReason::kError);
  EXPECT_EQ(d.ending().error.status, 502);
  EXPECT_EQ(d.text, "aaaa");
}

TEST(GenerationTest, ExcludesTheNodeThatDecodeNames) {
  Driver d;
  d.Place("d1", "p1");
  d.Error(absl::StatusCode::kUnavailable, "p1");
  EXPECT_EQ(Only<Admit>(d.last)[0].request.excluded(0), "p1");
}

TEST(GenerationTest, AsksForAnotherPlacementAtMostThreeTimesWhenDecodeRefuses) {
  Driver d;
  for (int i = 0; i < 4; ++i) {
    d.Place("d" + std::to_string(i));
    d.Error(absl::StatusCode::kResourceExhausted);
  }
  EXPECT_EQ(d.ending().error.status, 429);
  EXPECT_EQ(d.ending().error.rejected_reason, "no-kv-space");
}

TEST(GenerationTest, WaitsOutPreemptionHoweverOften) {
  Driver d;
  d.Place();
  for (int i = 0; i < 20; ++i) {
    d.Tokens("a");
    d.Error(absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(Only<Admit>(d.last).size(), 1u);
    d.Reject(wire::Rejected::NO_KV_SPACE);
    ASSERT_FALSE(d.generation.ended());
    d.Pass(absl::Seconds(2));
    d.Place();
    // Refused without progress: later.
    d.Error(absl::StatusCode::kResourceExhausted);
    ASSERT_FALSE(d.generation.ended());
    d.Pass(absl::Seconds(2));
    d.Place();
  }
  d.Tokens("b");
  EXPECT_EQ(d.text, std::string(20, 'a') + "b");
}

TEST(GenerationTest, WaitsForAWorkerToComeBackUnderItsName) {
  Driver d;
  d.Place("d1");
  d.Tokens("a");
  d.generation.OnDecodeBroken("addr-d1", absl::UnavailableError("gone"), d.now);
  d.Take();
  for (int i = 0; i < 3; ++i) {
    d.Reject(wire::Rejected::NO_WORKERS);
    ASSERT_FALSE(d.generation.ended());
    d.Pass(absl::Seconds(1.1));
    ASSERT_EQ(Only<Admit>(d.last).size(), 1u);
  }
  EXPECT_EQ(Only<Admit>(d.last)[0].request.excluded_size(), 0);
  d.Place("d1");
  d.Tokens("b");
  EXPECT_EQ(d.text, "ab");
}

TEST(GenerationTest, EndsWhenNoWorkerComesBackInTime) {
  Driver d;
  d.Place();
  d.Tokens("a");
  d.Error(absl::StatusCode::kUnavailable);
  for (int i = 0; i < 100 && !d.generation.ended(); ++i) {
    d.Reject(wire::Rejected::NO_WORKERS);
    if (!d.generation.ended()) d.Pass(absl::Seconds(1.1));
  }
  EXPECT_EQ(d.ending().error.code, "no_workers");
  EXPECT_LE(d.now - kStart, absl::Seconds(15));
}

TEST(GenerationTest, AnswersARejectionAtOnce) {
  Driver d;
  d.Reject(wire::Rejected::PREDICTED_TTFT);
  EXPECT_EQ(d.ending().error.status, 429);
  EXPECT_EQ(d.ending().error.code, "overloaded");
  EXPECT_NEAR(d.ending().error.retry_after_s, 10, 2);
  EXPECT_TRUE(Only<Report>(d.all).empty());
}

TEST(GenerationTest, ReleasesEverythingOnCancel) {
  Driver admitting;
  admitting.last.clear();
  admitting.generation.OnCancel(kStart);
  admitting.Take();
  EXPECT_EQ(Only<AbandonAdmit>(admitting.last).size(), 1u);
  EXPECT_EQ(Only<Report>(admitting.last).size(), 1u);
  Driver running;
  running.Place();
  running.Tokens("a");
  running.last.clear();
  running.generation.OnCancel(kStart);
  running.Take();
  EXPECT_EQ(Only<CancelOn>(running.last).size(), 1u);
  EXPECT_EQ(running.ending().reason, EndReason::kCancelled);
}

TEST(GenerationTest, EndsAtItsDeadline) {
  GenerationSpec spec = Spec();
  spec.deadline = kStart + absl::Seconds(5);
  Driver d(std::move(spec));
  EXPECT_EQ(Only<Admit>(d.all)[0].request.deadline_ms(), 5000u);
  d.Place();
  d.Tokens("a");
  d.Pass(absl::Seconds(5));
  EXPECT_EQ(d.ending().error.status, 504);
  EXPECT_EQ(Only<CancelOn>(d.last).size(), 1u);
}

TEST(GenerationTest, GivesUpAStalledWorkerButNotAQueuedOne) {
  Driver d;
  d.Place();
  EXPECT_EQ(d.generation.next_timer(), absl::InfiniteFuture());
  d.Tokens("a");
  d.Pass(absl::Seconds(9));
  EXPECT_EQ(d.generation.epoch(), 1u);
  d.Pass(absl::Seconds(2));
  EXPECT_EQ(d.generation.epoch(), 2u);
  EXPECT_EQ(Only<CancelOn>(d.last).size(), 1u);
}

TEST(GenerationTest, MakesPromptSourcesSumToThePrompt) {
  Driver d;
  d.Place();
  wire::SequenceUpdate u = d.Update(0, "a");
  u.mutable_prompt_source()->set_dram(32);
  u.mutable_prompt_source()->set_remote(1000);
  d.Send(u);
  const auto source = *d.generation.stats().prompt_source;
  EXPECT_EQ(source.dram(), 32u);
  EXPECT_EQ(source.remote(), 8u);
  EXPECT_EQ(source.computed(), 0u);
}

TEST(GenerationTest, HidesTheTokensOfAStopStringFromLogprobs) {
  GenerationSpec spec = Spec();
  spec.stop_strings = {"bc"};
  Driver d(std::move(spec));
  d.Place();
  d.Tokens("abc");
  std::string shown;
  for (const auto& deliver : Only<Deliver>(d.all)) {
    for (const auto& t : deliver.delta.tokens) {
      if (t.shown) shown += static_cast<char>(t.id);
    }
  }
  EXPECT_EQ(shown, "a");
  EXPECT_EQ(d.ids, (std::vector<uint32_t>{'a', 'b', 'c'}));
}

// Random events in random order, with a truth to compare to.
class Chaos {
 public:
  explicit Chaos(uint32_t seed) : random_(seed) {}

  void Run() {
    const uint32_t length = 1 + random_() % 30;
    GenerationSpec spec = Spec(length);
    spec.deadline = kStart + absl::Seconds(600);
    std::string truth;
    for (uint32_t i = 0; i < length; ++i) truth += static_cast<char>('a' + random_() % 3);
    if (random_() % 2 == 0) spec.stop_strings = {"abc", "cc"};
    spec.include_stop_string = random_() % 2 == 0;
    StopText stop(spec.stop_strings, spec.include_stop_string);
    const StopText::Result expected = stop.Push(truth);
    const std::string expected_text = expected.text + stop.Finish();

    Driver d(std::move(spec));
    uint32_t last_start_epoch = 0;
    size_t seen = 0;
    bool faulty = false;
    for (int step = 0; step < 400 && !d.generation.ended(); ++step) {
      Step(d, truth, length, faulty);
      for (; seen < d.all.size(); ++seen) {
        if (const auto* s = std::get_if<StartOn>(&d.all[seen])) {
          ASSERT_GT(s->start.epoch(), last_start_epoch);
          last_start_epoch = s->start.epoch();
          const std::string emitted(s->start.emitted_ids().begin(), s->start.emitted_ids().end());
          ASSERT_EQ(emitted, truth.substr(0, emitted.size()));
        }
      }
      ASSERT_EQ(d.text, expected_text.substr(0, d.text.size()));
      ASSERT_LE(Only<End>(d.all).size(), 1u);
    }
    if (!d.generation.ended()) d.generation.OnCancel(d.now);
    d.Take();
    ASSERT_TRUE(std::holds_alternative<End>(d.all.back()));
    const Ending ending = d.ending();
    if (ending.reason == EndReason::kStop || ending.reason == EndReason::kLength) {
      ASSERT_EQ(d.text, expected_text);
      ASSERT_EQ(ending.stop_string, expected.match.value_or(""));
    }
    ++endings_[static_cast<int>(ending.reason)];
    // Late events of every kind change nothing.
    const size_t actions = d.all.size();
    d.Place();
    d.Tokens("a");
    d.Error(absl::StatusCode::kUnavailable);
    d.Pass(absl::Seconds(1000));
    d.generation.OnCancel(d.now);
    d.Take();
    ASSERT_EQ(d.all.size(), actions);
  }

  int endings_[4] = {};

 private:
  void Step(Driver& d, const std::string& truth, uint32_t length, bool& faulty) {
    const auto emitted = static_cast<uint32_t>(d.generation.emitted().size());
    switch (random_() % 24) {
      case 0:
        d.Reject(wire::Rejected::NO_WORKERS);
        break;
      case 1:
        d.Error(absl::StatusCode::kUnavailable, "x");
        break;
      case 2:
        d.Error(absl::StatusCode::kResourceExhausted);
        break;
      case 3:
        d.generation.OnDecodeBroken("addr-d1", absl::UnavailableError("x"), d.now);
        d.Take();
        break;
      case 4: {  // of an older epoch, and wrong
        wire::SequenceUpdate u = d.Update(emitted, "zzz");
        u.set_epoch(d.generation.epoch() - 1);
        d.Send(u);
        break;
      }
      case 5:
        d.Send(d.Update(emitted + 1, "q"));
        break;  // gap
      case 6:
        d.Pass(absl::Milliseconds(random_() % 3000));
        break;
      case 7:
        if (emitted > 0) d.Send(d.Update(0, truth.substr(0, emitted)));  // again, equal
        break;
      case 8:
        if (emitted > 0) d.Send(d.Update(0, "z"));  // again, different
        break;
      case 9: {
        d.generation.OnAdmitReply(d.generation.epoch(), absl::UnavailableError("conductor"), d.now);
        d.Take();
        break;
      }
      case 10:
      case 11:
      case 12:
      case 13:
        d.Place("d1");
        break;
      default: {
        const uint32_t n = std::min<uint32_t>(1 + random_() % 3, length - emitted);
        wire::SequenceUpdate u = d.Update(emitted, truth.substr(emitted, n));
        if (emitted + n == length) u.set_finish(wire::FINISH_REASON_LENGTH);
        d.Send(u);
      }
    }
  }
  std::mt19937 random_;
};

TEST(GenerationTest, KeepsItsPromisesForRandomEvents) {
  int endings[4] = {};
  for (uint32_t seed = 0; seed < 5000; ++seed) {
    SCOPED_TRACE(seed);
    Chaos chaos(seed);
    chaos.Run();
    if (HasFatalFailure()) return;
    for (int i = 0; i < 4; ++i) endings[i] += chaos.endings_[i];
  }
  // Every kind of end is reached, so the events are not one-sided.
  EXPECT_GT(endings[static_cast<int>(EndReason::kStop)], 100);
  EXPECT_GT(endings[static_cast<int>(EndReason::kLength)], 100);
  EXPECT_GT(endings[static_cast<int>(EndReason::kError)], 100);
}

}  // namespace
}  // namespace antiphon::gateway
