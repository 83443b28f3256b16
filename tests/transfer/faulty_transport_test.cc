#include "transfer/faulty_transport.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "common/executor.h"
#include "tests/transfer/transport_fixture.h"

namespace antiphon::transfer {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr RegionId kRegion = 7;
constexpr std::byte kGuard{0x5A};

// Pulls from its own regions, at once and on the caller's thread.
class MemoryTransport final : public Transport {
 public:
  struct Log {
    std::vector<PullRequest> pulls;
    std::vector<PullId> cancelled;
    std::vector<RegionId> unexported;
    bool destroyed = false;
  };
  explicit MemoryTransport(Log& log) : log_(log) {}
  ~MemoryTransport() override { log_.destroyed = true; }

  absl::Status Export(RegionId id, const std::byte* base, size_t bytes) override {
    if (bytes == 0) return absl::InvalidArgumentError("empty");
    regions_[id] = {base, bytes};
    return absl::OkStatus();
  }
  void Unexport(RegionId id) override { log_.unexported.push_back(id); }
  PullId Pull(PullRequest request, PullDone done) override {
    log_.pulls.push_back(request);
    const auto region = regions_.find(request.region);
    if (region == regions_.end()) {
      done(absl::NotFoundError("no region"));
    } else {
      for (const Slice& s : request.slices) {
        std::copy_n(region->second.first + s.remote_offset, s.bytes, s.local);
      }
      done(absl::OkStatus());
    }
    return log_.pulls.size();
  }
  void Cancel(PullId id) override { log_.cancelled.push_back(id); }
  std::string address() const override { return "here:1"; }

 private:
  Log& log_;
  std::map<RegionId, std::pair<const std::byte*, size_t>> regions_;
};

// Runs nothing until told.
class StillExecutor final : public Executor {
 public:
  void Post(Closure closure) override { PostAfter(absl::ZeroDuration(), std::move(closure)); }
  TimerId PostAfter(absl::Duration delay, Closure closure) override {
    delays.push_back(delay);
    closures.push_back(std::move(closure));
    return delays.size();
  }
  void CancelTimer(TimerId id) override {
    closures[id - 1] = [] {};
  }
  void RunAll() {
    for (Closure& closure : std::exchange(closures, {})) closure();
  }

  std::vector<absl::Duration> delays;
  std::vector<Closure> closures;
};

class FaultyTransportTest : public TransferTest {
 protected:
  static constexpr uint32_t kBytes = 1001;

  std::unique_ptr<Transport> MakeFaulty(FaultRates rates, uint64_t seed = 1) {
    auto t = MakeFaultyTransport(std::make_unique<MemoryTransport>(log_), rates, seed, &executor_);
    EXPECT_TRUE(t->Export(kRegion, memory_.data(), memory_.size()).ok());
    return t;
  }
  // Two slices with an odd number of bytes and a gap in between.
  PullRequest Request() {
    local_.assign(kBytes + 10, kGuard);
    return {.peer = "p:1",
            .region = kRegion,
            .slices = {{100, local_.data(), 401}, {700, local_.data() + 411, 600}}};
  }
  // What an honest pull would leave.
  Bytes Expected() const {
    Bytes out(kBytes + 10, kGuard);
    std::copy_n(memory_.begin() + 100, 401, out.begin());
    std::copy_n(memory_.begin() + 700, 600, out.begin() + 411);
    return out;
  }
  std::vector<size_t> Differences() const {
    const Bytes expected = Expected();
    std::vector<size_t> at;
    for (size_t i = 0; i < expected.size(); ++i) {
      if (local_[i] != expected[i]) at.push_back(i);
    }
    return at;
  }

  const Bytes memory_ = Pattern(5000, 1);
  Bytes local_;
  MemoryTransport::Log log_;
  StillExecutor executor_;
};

TEST_F(FaultyTransportTest, WithoutRatesItIsHonest) {
  const auto t = MakeFaulty({});
  for (int i = 0; i < 100; ++i) {
    EXPECT_TRUE(PullNow(*t, Request()).ok());
    EXPECT_THAT(Differences(), IsEmpty());
  }
  EXPECT_THAT(executor_.delays, IsEmpty());
}

TEST_F(FaultyTransportTest, PassesOnEverythingElse) {
  auto t = MakeFaulty({});
  EXPECT_EQ(t->address(), "here:1");
  EXPECT_EQ(t->Export(8, nullptr, 0).code(), absl::StatusCode::kInvalidArgument);
  t->Unexport(3);
  t->Cancel(17);
  EXPECT_THAT(log_.unexported, ElementsAre(3));
  EXPECT_THAT(log_.cancelled, ElementsAre(17));
  EXPECT_FALSE(log_.destroyed);
  t.reset();
  EXPECT_TRUE(log_.destroyed);
}

TEST_F(FaultyTransportTest, AFailedPullIsUnavailableAndWritesNothing) {
  const auto t = MakeFaulty({.fail = 1});
  for (int i = 0; i < 20; ++i) {
    PullEnd end;
    EXPECT_NE(t->Pull(Request(), end.Done()), 0u);
    EXPECT_EQ(end.Wait().code(), absl::StatusCode::kUnavailable);
    EXPECT_EQ(end.times(), 1);
    EXPECT_THAT(local_, Each(kGuard));
  }
}

TEST_F(FaultyTransportTest, AWrongByteIsOneByteAndTheStatusIsOk) {
  const auto t = MakeFaulty({.wrong_byte = 1});
  size_t first = SIZE_MAX, last = 0;
  for (int i = 0; i < 200; ++i) {
    EXPECT_TRUE(PullNow(*t, Request()).ok());
    const std::vector<size_t> at = Differences();
    ASSERT_EQ(at.size(), 1u);
    ASSERT_TRUE(at[0] < 401 || at[0] >= 411);  // not in the gap
    first = std::min(first, at[0]);
    last = std::max(last, at[0]);
  }
  // Everywhere, in both slices.
  EXPECT_LT(first, 50u);
  EXPECT_GT(last, 950u);
}

TEST_F(FaultyTransportTest, ATornPullKeepsTheOldSecondHalfAndTheStatusIsOk) {
  const auto t = MakeFaulty({.torn = 1});
  for (int i = 0; i < 20; ++i) {
    EXPECT_TRUE(PullNow(*t, Request()).ok());
    // 1001 bytes: the first 500 are new, 401 of them in the first slice.
    Bytes expected = Expected();
    std::fill(expected.begin() + 411 + 99, expected.end(), kGuard);
    EXPECT_TRUE(local_ == expected);
  }
}

TEST_F(FaultyTransportTest, ALateEndWaitsForItsTimeWithAllBytesThere) {
  const auto t = MakeFaulty({.late = 1, .late_max = absl::Milliseconds(80)});
  std::deque<PullEnd> ends(50);
  for (PullEnd& end : ends) {
    t->Pull(Request(), end.Done());
    EXPECT_FALSE(end.ended());
    EXPECT_THAT(Differences(), IsEmpty());
  }
  EXPECT_THAT(executor_.delays, ::testing::SizeIs(50));
  EXPECT_THAT(executor_.delays, Each(::testing::AllOf(::testing::Ge(absl::ZeroDuration()),
                                                      ::testing::Lt(absl::Milliseconds(80)))));
  EXPECT_GT(*std::max_element(executor_.delays.begin(), executor_.delays.end()),
            absl::Milliseconds(60));
  executor_.RunAll();
  for (const PullEnd& end : ends) {
    EXPECT_TRUE(end.Wait().ok());
    EXPECT_EQ(end.times(), 1);
  }
}

// Pulls that fail on their own fail as they would; there are no bytes to spoil.
TEST_F(FaultyTransportTest, RealFailuresPassThrough) {
  for (const FaultRates rates :
       {FaultRates{.wrong_byte = 1}, FaultRates{.torn = 1}, FaultRates{.late = 1}}) {
    const auto t = MakeFaulty(rates);
    PullRequest request = Request();
    request.region = kRegion + 1;
    PullEnd end;
    t->Pull(std::move(request), end.Done());
    executor_.RunAll();
    EXPECT_EQ(end.Wait().code(), absl::StatusCode::kNotFound);
    EXPECT_THAT(local_, Each(kGuard));
  }
}

TEST_F(FaultyTransportTest, PullsOfNothingSurviveEveryFault) {
  for (const FaultRates rates : {FaultRates{.fail = 1}, FaultRates{.wrong_byte = 1},
                                 FaultRates{.torn = 1}, FaultRates{.late = 1}}) {
    const auto t = MakeFaulty(rates);
    PullEnd end;
    t->Pull({.peer = "p:1", .region = kRegion}, end.Done());
    executor_.RunAll();
    EXPECT_EQ(end.Wait().ok(), rates.fail == 0);
  }
}

// n f w t l: what a pull turned out to be.
char Kind(const absl::Status& status, bool late, size_t differences) {
  if (!status.ok()) return 'f';
  if (late) return 'l';
  return differences == 0 ? 'n' : differences == 1 ? 'w' : 't';
}

TEST_F(FaultyTransportTest, FaultsComeAtTheirRatesAndOneAtATime) {
  constexpr int kPulls = 4000;
  const auto story = [&](uint64_t seed) {
    const auto t = MakeFaulty({.fail = 0.1, .wrong_byte = 0.2, .torn = 0.3, .late = 0.15}, seed);
    std::string kinds;
    for (int i = 0; i < kPulls; ++i) {
      PullEnd end;
      t->Pull(Request(), end.Done());
      const bool late = !end.ended();
      executor_.RunAll();
      kinds += Kind(end.Wait(), late, Differences().size());
      EXPECT_EQ(end.times(), 1);
      EXPECT_TRUE(!late || Differences().empty());
    }
    return kinds;
  };
  const std::string first = story(1);
  const auto share = [&](char kind) {
    return static_cast<double>(std::count(first.begin(), first.end(), kind)) / kPulls;
  };
  EXPECT_NEAR(share('f'), 0.1, 0.03);
  EXPECT_NEAR(share('w'), 0.2, 0.03);
  EXPECT_NEAR(share('t'), 0.3, 0.03);
  EXPECT_NEAR(share('l'), 0.15, 0.03);
  EXPECT_NEAR(share('n'), 0.25, 0.03);
  EXPECT_EQ(story(1), first);  // the same seed, the same faults
  EXPECT_NE(story(2), first);
}

// Its destruction ends all pulls, those too whose end was to come late.
TEST_F(FaultyTransportTest, DestructionDoesNotWaitForLateEndsAndLosesNone) {
  auto t = MakeFaulty({.late = 1});
  std::deque<PullEnd> ends(10);
  for (PullEnd& end : ends) t->Pull(Request(), end.Done());
  t.reset();
  for (const PullEnd& end : ends) EXPECT_EQ(end.times(), 1);
  executor_.RunAll();
  for (const PullEnd& end : ends) {
    ASSERT_EQ(end.times(), 1);
    EXPECT_TRUE(end.Wait().ok());
  }
}

TEST_F(FaultyTransportTest, OverRealSocketsEveryPullEndsOnce) {
  const Bytes memory = Pattern(1 << 20, 5);
  SerialExecutor executor("late");
  const auto owner = Make();
  ASSERT_TRUE(owner->Export(kRegion, memory.data(), memory.size()).ok());
  std::deque<PullEnd> ends(400);
  std::deque<Bytes> locals(ends.size());
  int wrong = 0, failed = 0, cancelled = 0;
  {
    const auto puller = MakeFaultyTransport(Make(),
                                            {.fail = 0.1,
                                             .wrong_byte = 0.1,
                                             .torn = 0.1,
                                             .late = 0.3,
                                             .late_max = absl::Milliseconds(3)},
                                            3, &executor);
    for (size_t i = 0; i < ends.size(); ++i) {
      locals[i].resize(1 + i * 97);
      const PullId id =
          puller->Pull(OneSlice(owner->address(), kRegion, i, locals[i]), ends[i].Done());
      if (i % 10 == 9) puller->Cancel(id);
    }
    for (size_t i = 0; i < ends.size(); ++i) {
      const absl::Status status = ends[i].Wait();
      if (status.ok()) {
        wrong += !std::equal(locals[i].begin(), locals[i].end(), memory.begin() + i);
      } else if (absl::IsUnavailable(status)) {
        ++failed;
      } else {
        EXPECT_TRUE(absl::IsCancelled(status)) << status;
        ++cancelled;
      }
    }
  }
  EXPECT_GT(failed, 0);
  EXPECT_GT(wrong, 0);
  EXPECT_LE(cancelled, 40);
  for (const PullEnd& end : ends) EXPECT_EQ(end.times(), 1);
}

}  // namespace
}  // namespace antiphon::transfer
