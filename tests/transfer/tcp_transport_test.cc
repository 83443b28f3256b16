#include "transfer/tcp_transport.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <deque>
#include <list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/metrics.h"
#include "common/net.h"
#include "common/thread.h"
#include "tests/transfer/raw_peer.h"
#include "tests/transfer/transport_fixture.h"

namespace antiphon::transfer {
namespace {

using ::testing::AnyOf;
using ::testing::Each;
using ::testing::HasSubstr;

constexpr RegionId kRegion = 0x0123456789ABCDEF;
constexpr std::byte kGuard{0x5A};

class TcpTransportTest : public TransferTest {};

std::string Message(const absl::Status& status) { return std::string(status.message()); }

// ---- Bytes

TEST_F(TcpTransportTest, BringsSlicesOfEverySize) {
  const Bytes memory = Pattern((48 << 20) + 12345, 1);
  const auto owner = Make(), puller = Make();
  ASSERT_TRUE(owner->Export(kRegion, memory.data(), memory.size()).ok());
  for (const size_t bytes : {size_t{1}, size_t{2}, size_t{23}, size_t{24}, size_t{25}, size_t{4095},
                             size_t{4096}, size_t{65'537}, size_t{(1 << 20) - 1}, size_t{1 << 20},
                             size_t{(1 << 20) + 1}, size_t{33 << 20}, memory.size()}) {
    const size_t offset = (memory.size() - bytes) / 2;
    Bytes local(bytes + 2, kGuard);
    ASSERT_TRUE(
        PullNow(*puller, {.peer = owner->address(),
                          .region = kRegion,
                          .slices = {{offset, local.data() + 1, static_cast<uint32_t>(bytes)}}})
            .ok())
        << bytes;
    EXPECT_TRUE(std::equal(local.begin() + 1, local.end() - 1, memory.begin() + offset)) << bytes;
    EXPECT_EQ(local.front(), kGuard);
    EXPECT_EQ(local.back(), kGuard);
  }
}

// Scattered slices, backwards, with gaps between their destinations and empty ones among them.
TEST_F(TcpTransportTest, BringsManySlicesToTheirPlaces) {
  const Bytes memory = Pattern(8 << 20, 2);
  const auto owner = Make();
  for (const uint32_t request_bytes : {7u, 4096u, 1u << 20}) {
    const auto puller = Make({.lanes = 3, .request_bytes_max = request_bytes});
    const RegionId region = request_bytes;
    ASSERT_TRUE(owner->Export(region, memory.data(), memory.size()).ok());
    PullRequest request{.peer = owner->address(), .region = region};
    const uint32_t longest = request_bytes == 7 ? 200 : 40'000;
    Bytes local, expected;
    std::vector<std::pair<size_t, uint32_t>> places;  // in local
    for (uint32_t i = 0; i < 500; ++i) {
      const uint32_t bytes = i % 10 == 0 ? 0 : (i * 7919) % longest;
      places.emplace_back(expected.size(), bytes);
      const size_t from = memory.size() - longest - i * 9973 % 4'000'000;
      expected.insert(expected.end(), memory.begin() + from, memory.begin() + from + bytes);
      expected.insert(expected.end(), i % 3, kGuard);
      request.slices.push_back({from, nullptr, bytes});
    }
    local.assign(expected.size(), kGuard);
    for (size_t i = 0; i < places.size(); ++i) {
      request.slices[i].local = local.data() + places[i].first;
    }
    std::reverse(request.slices.begin(), request.slices.end());
    ASSERT_TRUE(PullNow(*puller, std::move(request)).ok());
    EXPECT_TRUE(local == expected) << "requests of " << request_bytes;
  }
}

TEST_F(TcpTransportTest, APullOfNothingEndsWellWithoutAPeer) {
  const auto puller = Make();
  RawListener nobody;
  Bytes none;
  EXPECT_TRUE(PullNow(*puller, {.peer = nobody.address(), .region = 1}).ok());
  EXPECT_TRUE(PullNow(*puller, {.peer = nobody.address(),
                                .region = 1,
                                .slices = {{5, none.data(), 0}, {UINT64_MAX, none.data(), 0}}})
                  .ok());
}

TEST_F(TcpTransportTest, ManyPullsOfManyPeersRunAtOnce) {
  constexpr size_t kPulls = 300;
  struct Host {
    Bytes memory;
    std::unique_ptr<Transport> transport;
  };
  std::vector<Host> hosts(3);
  for (size_t h = 0; h < hosts.size(); ++h) {
    hosts[h].memory = Pattern(4 << 20, 10 + h);
    hosts[h].transport = Make({.peer_bytes_max = 1 << 20});
    ASSERT_TRUE(hosts[h]
                    .transport->Export(kRegion + h, hosts[h].memory.data(), hosts[h].memory.size())
                    .ok());
  }
  // Every host pulls from every host, itself too.
  std::vector<Bytes> locals(kPulls);
  std::vector<PullEnd> ends(kPulls);
  const auto from = [](size_t i) { return std::pair(i % 3, (i * 104'729) % (3 << 20)); };
  for (size_t i = 0; i < kPulls; ++i) {
    const auto [h, offset] = from(i);
    locals[i].resize(1 + (i * 31'337) % (1 << 18));
    hosts[i / 3 % 3].transport->Pull(
        OneSlice(hosts[h].transport->address(), kRegion + h, offset, locals[i]), ends[i].Done());
  }
  for (size_t i = 0; i < kPulls; ++i) {
    const auto [h, offset] = from(i);
    ASSERT_TRUE(ends[i].Wait().ok()) << ends[i].Wait();
    EXPECT_TRUE(std::equal(locals[i].begin(), locals[i].end(), hosts[h].memory.begin() + offset));
  }
  for (const PullEnd& end : ends) EXPECT_EQ(end.times(), 1);
}

TEST_F(TcpTransportTest, NamesAndIpv6AreReached) {
  const Bytes memory = Pattern(1000, 3);
  const auto owner = Make();
  ASSERT_TRUE(owner->Export(kRegion, memory.data(), memory.size()).ok());
  const auto puller = Make();
  Bytes local(memory.size());
  const std::string name = "localhost" + owner->address().substr(owner->address().rfind(':'));
  EXPECT_TRUE(PullNow(*puller, OneSlice(name, kRegion, 0, local)).ok());
  EXPECT_TRUE(local == memory);

  auto six = MakeTcpTransport({.listen = "[::1]:0"});
  if (!six.ok()) return;  // no IPv6 here
  ASSERT_TRUE((*six)->Export(kRegion, memory.data(), memory.size()).ok());
  local.assign(memory.size(), kGuard);
  EXPECT_TRUE(PullNow(*puller, OneSlice((*six)->address(), kRegion, 0, local)).ok());
  EXPECT_TRUE(local == memory);
}

TEST_F(TcpTransportTest, ListensWhereToldAndAdvertisesWhatItIsTold) {
  const auto first = Make();
  EXPECT_THAT(first->address(), ::testing::StartsWith("127.0.0.1:"));
  EXPECT_NE(ParseHostPort(first->address())->port, 0);
  const auto second = MakeTcpTransport({.listen = first->address()});
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(MakeTcpTransport({.listen = "nonsense"}).status().code(),
            absl::StatusCode::kInvalidArgument);
  const auto named =
      Make({.advertise = [](uint16_t port) { return "node-1:" + std::to_string(port); }});
  EXPECT_THAT(named->address(), ::testing::MatchesRegex("node-1:[1-9][0-9]*"));
}

// ---- Regions

TEST_F(TcpTransportTest, RefusesRegionsThatAreEmptyOrTaken) {
  const Bytes memory = Pattern(100, 4);
  const auto owner = Make();
  EXPECT_EQ(owner->Export(1, nullptr, 5).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(owner->Export(1, memory.data(), 0).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(owner->Export(1, memory.data(), 50).ok());
  EXPECT_EQ(owner->Export(1, memory.data(), 50).code(), absl::StatusCode::kInvalidArgument);
  owner->Unexport(2);
}

// A region is named after an incarnation: a pull meant for the one before finds nothing.
TEST_F(TcpTransportTest, APullForADeadIncarnationIsNotFound) {
  const Bytes before = Pattern(4096, 5), after = Pattern(4096, 6);
  const auto owner = Make(), puller = Make();
  ASSERT_TRUE(owner->Export(41, before.data(), before.size()).ok());
  Bytes local(4096, kGuard);
  EXPECT_TRUE(PullNow(*puller, OneSlice(owner->address(), 41, 0, local)).ok());
  owner->Unexport(41);
  ASSERT_TRUE(owner->Export(42, after.data(), after.size()).ok());
  local.assign(local.size(), kGuard);
  const absl::Status stale = PullNow(*puller, OneSlice(owner->address(), 41, 0, local));
  EXPECT_EQ(stale.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(Message(stale), HasSubstr("no region 41"));
  EXPECT_THAT(local, Each(kGuard));
  EXPECT_TRUE(PullNow(*puller, OneSlice(owner->address(), 42, 0, local)).ok());
  EXPECT_TRUE(local == after);
}

TEST_F(TcpTransportTest, ASliceBeyondTheRegionIsOutOfRangeAndOthersAreUnharmed) {
  const Bytes memory = Pattern(10'000, 7);
  const auto owner = Make(), puller = Make({.lanes = 1, .request_bytes_max = 1000});
  ASSERT_TRUE(owner->Export(kRegion, memory.data(), memory.size()).ok());
  struct Case {
    uint64_t offset;
    uint32_t bytes;
    absl::StatusCode code;
  };
  const Case cases[] = {
      {0, 10'000, absl::StatusCode::kOk},
      {9'999, 1, absl::StatusCode::kOk},
      {0, 10'001, absl::StatusCode::kOutOfRange},
      {10'000, 1, absl::StatusCode::kOutOfRange},
      {9'999, 2, absl::StatusCode::kOutOfRange},
      {10'001, 1, absl::StatusCode::kOutOfRange},
      {uint64_t{1} << 63, 1, absl::StatusCode::kOutOfRange},
      {UINT64_MAX - 1, 1, absl::StatusCode::kOutOfRange},
      {UINT64_MAX, 1, absl::StatusCode::kOutOfRange},
      {UINT64_MAX - 9'999, 10'000, absl::StatusCode::kOutOfRange},
  };
  // All of them at once on one connection, each beside a pull that must not notice.
  std::list<std::pair<Bytes, PullEnd>> bad, good;
  for (const Case& c : cases) {
    auto& [local, end] = bad.emplace_back(Bytes(c.bytes), PullEnd());
    puller->Pull(OneSlice(owner->address(), kRegion, c.offset, local), end.Done());
    auto& [beside, beside_end] = good.emplace_back(Bytes(memory.size()), PullEnd());
    puller->Pull(OneSlice(owner->address(), kRegion, 0, beside), beside_end.Done());
  }
  auto it = bad.begin();
  for (const Case& c : cases) {
    EXPECT_EQ((it++)->second.Wait().code(), c.code) << c.offset << "+" << c.bytes;
  }
  for (auto& [local, end] : good) {
    EXPECT_TRUE(end.Wait().ok()) << end.Wait();
    EXPECT_TRUE(local == memory);
  }
}

TEST_F(TcpTransportTest, OneBadSliceEndsItsPull) {
  const Bytes memory = Pattern(10'000, 8);
  const auto owner = Make(), puller = Make();
  ASSERT_TRUE(owner->Export(kRegion, memory.data(), memory.size()).ok());
  Bytes local(300);
  PullEnd end;
  puller->Pull({.peer = owner->address(),
                .region = kRegion,
                .slices = {{0, local.data(), 100},
                           {9'950, local.data() + 100, 100},
                           {5, local.data() + 200, 100}}},
               end.Done());
  EXPECT_EQ(end.Wait().code(), absl::StatusCode::kOutOfRange);
  EXPECT_TRUE(PullNow(*puller, OneSlice(owner->address(), kRegion, 0, local)).ok());
  EXPECT_EQ(end.times(), 1);
}

// Unexport comes back when nobody reads: what the owner writes then never shows in what was sent.
TEST_F(TcpTransportTest, AWithdrawnRegionIsReadNoMore) {
  const Bytes memory = Pattern(kPullBytesMax, 9);
  Bytes region = memory;
  const auto owner = Make();
  ASSERT_TRUE(owner->Export(kRegion, region.data(), region.size()).ok());
  RawConnection puller = RawConnection::To(owner->address());
  ASSERT_TRUE(puller.GreetOwner());
  for (uint64_t id = 1; id <= 2; ++id) {
    ASSERT_TRUE(puller.Send(
        Encoded(RequestFrame{.id = id, .region = kRegion, .offset = 0, .bytes = kPullBytesMax})));
  }
  // The answer is under way, and more than any socket buffer holds is still to come.
  const ReplyFrame reply = puller.NextReply();
  ASSERT_EQ(reply.code, ReplyCode::kOk);
  ASSERT_EQ(reply.bytes, kPullBytesMax);
  Bytes got = puller.Receive(100'000);
  owner->Unexport(kRegion);
  std::fill(region.begin(), region.end(), kGuard);
  const Bytes rest = puller.Receive(kPullBytesMax);
  EXPECT_LT(got.size() + rest.size(), kPullBytesMax);  // broke off
  got.insert(got.end(), rest.begin(), rest.end());
  EXPECT_TRUE(std::equal(got.begin(), got.end(), memory.begin()));
  EXPECT_TRUE(puller.Ended());
}

TEST_F(TcpTransportTest, APullWhoseRegionGoesAwayIsNotFound) {
  RawListener owner;
  const auto puller = Make({.lanes = 1});
  Bytes local(1000);
  PullEnd end;
  puller->Pull(OneSlice(owner.address(), kRegion, 0, local), end.Done());
  RawConnection first = owner.AcceptPuller();
  first.Reply(first.NextRequest(), Pattern(500, 1));
  first.Close();  // as an owner does that has withdrawn the region meanwhile
  RawConnection second = owner.AcceptPuller();
  second.Send(Encoded(ReplyFrame{.id = second.NextRequest().id, .code = ReplyCode::kNoRegion}));
  EXPECT_EQ(end.Wait().code(), absl::StatusCode::kNotFound);
}

// ---- Deadlines

TEST_F(TcpTransportTest, ADeadlineThatHasPassedAsksNobody) {
  RawListener owner;
  TestClock clock;
  const auto puller = Make({.clock = &clock});
  Bytes local(10);
  PullRequest request = OneSlice(owner.address(), kRegion, 0, local);
  request.deadline = clock.Now();
  EXPECT_EQ(PullNow(*puller, request).code(), absl::StatusCode::kDeadlineExceeded);
  request.deadline = absl::InfinitePast();
  EXPECT_EQ(PullNow(*puller, request).code(), absl::StatusCode::kDeadlineExceeded);
}

// Moves the clock past the deadline of `puller` and lets its loop see that.
void PassDeadline(Transport& puller, TestClock& clock) {
  clock.Advance(absl::Seconds(2));
  puller.Cancel(0);  // of nobody; wakes the loop
}

TEST_F(TcpTransportTest, TheDeadlinePassesBeforeThePeerGreets) {
  RawListener owner;
  TestClock clock;
  const auto puller = Make({.clock = &clock});
  Bytes local(10, kGuard);
  PullRequest request = OneSlice(owner.address(), kRegion, 0, local);
  request.deadline = clock.Now() + absl::Seconds(1);
  PullEnd end;
  puller->Pull(std::move(request), end.Done());
  RawConnection silent = owner.Accept();
  EXPECT_EQ(silent.Receive(kHelloBytes).size(), kHelloBytes);
  PassDeadline(*puller, clock);
  EXPECT_EQ(end.Wait().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(local, Each(kGuard));
}

// And what comes late goes nowhere, while the connection serves the next pull.
TEST_F(TcpTransportTest, AfterTheDeadlineLateBytesAreNotWritten) {
  for (const size_t before : {size_t{0}, size_t{1}, size_t{40'000}, size_t{299'999}}) {
    RawListener owner;
    TestClock clock;
    const auto puller = Make({.clock = &clock, .lanes = 1});
    Bytes local(300'000, kGuard);
    PullRequest request = OneSlice(owner.address(), kRegion, 0, local);
    request.deadline = clock.Now() + absl::Seconds(1);
    PullEnd late;
    puller->Pull(std::move(request), late.Done());
    RawConnection lane = owner.AcceptPuller();
    const RequestFrame asked = lane.NextRequest();
    const Bytes payload = Pattern(local.size(), 12);
    ASSERT_TRUE(lane.Reply(asked, absl::MakeConstSpan(payload).first(before)));
    PassDeadline(*puller, clock);
    EXPECT_EQ(late.Wait().code(), absl::StatusCode::kDeadlineExceeded);

    const Bytes then = local;  // a part of the payload at most; it stays like this
    ASSERT_TRUE(lane.Send(absl::MakeConstSpan(payload).subspan(before)));
    Bytes next(1000);
    PullEnd end;
    puller->Pull(OneSlice(owner.address(), kRegion, 7, next), end.Done());
    const RequestFrame second = lane.NextRequest();
    EXPECT_EQ(second.offset, 7u);
    ASSERT_TRUE(lane.Reply(second, Pattern(1000, 13)));
    EXPECT_TRUE(end.Wait().ok()) << end.Wait();
    EXPECT_TRUE(next == Pattern(1000, 13));
    EXPECT_TRUE(local == then);
    EXPECT_EQ(late.times(), 1);
  }
}

TEST_F(TcpTransportTest, ADeadlineEndsOnlyItsOwnPull) {
  RawListener owner;
  TestClock clock;
  const auto puller = Make({.clock = &clock, .lanes = 1});
  Bytes one(100), other(100);
  PullRequest request = OneSlice(owner.address(), kRegion, 0, one);
  request.deadline = clock.Now() + absl::Seconds(1);
  PullEnd late, unhurried;
  puller->Pull(std::move(request), late.Done());
  puller->Pull(OneSlice(owner.address(), kRegion, 100, other), unhurried.Done());
  RawConnection lane = owner.AcceptPuller();
  const RequestFrame first = lane.NextRequest(), second = lane.NextRequest();
  PassDeadline(*puller, clock);
  EXPECT_EQ(late.Wait().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_FALSE(unhurried.ended());
  ASSERT_TRUE(lane.Reply(first, Pattern(100, 1)));
  ASSERT_TRUE(lane.Reply(second, Pattern(100, 2)));
  EXPECT_TRUE(unhurried.Wait().ok());
  EXPECT_TRUE(other == Pattern(100, 2));
}

TEST_F(TcpTransportTest, DeadlinesAtTheEndOfTimeAreFine) {
  const Bytes memory = Pattern(1000, 3);
  const auto owner = Make(), puller = Make();
  ASSERT_TRUE(owner->Export(kRegion, memory.data(), memory.size()).ok());
  for (const absl::Time deadline :
       {absl::InfiniteFuture(), absl::FromUnixSeconds(INT64_MAX), absl::FromUnixSeconds(1LL << 54),
        absl::FromUnixMillis(INT64_MAX)}) {
    Bytes local(memory.size());
    PullRequest request = OneSlice(owner->address(), kRegion, 0, local);
    request.deadline = deadline;
    EXPECT_TRUE(PullNow(*puller, std::move(request)).ok());
    EXPECT_TRUE(local == memory);
  }
  // Patience without an end, too.
  const auto patient = Make({.stall = absl::InfiniteDuration()});
  Bytes local(memory.size());
  EXPECT_TRUE(PullNow(*patient, OneSlice(owner->address(), kRegion, 0, local)).ok());
}

// ---- Cancellation

TEST_F(TcpTransportTest, CancelsBeforeAnythingIsAsked) {
  RawListener owner;
  const auto puller = Make();
  Bytes local(10, kGuard);
  PullEnd end;
  const PullId id = puller->Pull(OneSlice(owner.address(), kRegion, 0, local), end.Done());
  EXPECT_NE(id, 0u);
  puller->Cancel(id);
  puller->Cancel(id);
  EXPECT_EQ(end.Wait().code(), absl::StatusCode::kCancelled);
  EXPECT_THAT(local, Each(kGuard));
  EXPECT_EQ(end.times(), 1);
}

TEST_F(TcpTransportTest, CancelsInTheMiddleOfThePayload) {
  RawListener owner;
  Registry registry({});
  const auto puller = Make({.registry = &registry, .lanes = 1, .request_bytes_max = 100'000});
  Bytes local(300'000, kGuard);
  PullEnd cancelled, next;
  const PullId id = puller->Pull(OneSlice(owner.address(), kRegion, 0, local), cancelled.Done());
  RawConnection lane = owner.AcceptPuller();
  std::array<RequestFrame, 3> asked;
  for (RequestFrame& request : asked) request = lane.NextRequest();
  ASSERT_TRUE(lane.Reply(asked[0], Pattern(50'000, 1)));
  puller->Cancel(id);
  EXPECT_EQ(cancelled.Wait().code(), absl::StatusCode::kCancelled);
  const Bytes then = local;
  // The peer answers what it was asked; nothing of it arrives, and the connection lives on.
  ASSERT_TRUE(lane.Send(Pattern(50'000, 2)));
  ASSERT_TRUE(lane.Reply(asked[1], Pattern(100'000, 3)));
  ASSERT_TRUE(lane.Send(Encoded(ReplyFrame{.id = asked[2].id, .code = ReplyCode::kOutOfRange})));
  Bytes after(10);
  puller->Pull(OneSlice(owner.address(), kRegion, 5, after), next.Done());
  ASSERT_TRUE(lane.Reply(lane.NextRequest(), Pattern(10, 4)));
  EXPECT_TRUE(next.Wait().ok());
  EXPECT_TRUE(local == then);
  EXPECT_EQ(cancelled.times(), 1);
  EXPECT_EQ(
      registry.AddGauge("antiphon_transfer_inflight_bytes", "Asked for, not yet here.").value(), 0);
}

TEST_F(TcpTransportTest, CancelsWhatIsStillQueuedWithoutAskingForIt) {
  RawListener owner;
  // One request at a time.
  const auto puller = Make({.lanes = 1, .request_bytes_max = 1000, .peer_bytes_max = 1000});
  Bytes first(1000), second(5000, kGuard), third(1000);
  PullEnd ends[3];
  puller->Pull(OneSlice(owner.address(), 1, 0, first), ends[0].Done());
  const PullId id = puller->Pull(OneSlice(owner.address(), 2, 0, second), ends[1].Done());
  puller->Pull(OneSlice(owner.address(), 3, 0, third), ends[2].Done());
  RawConnection lane = owner.AcceptPuller();
  const RequestFrame asked = lane.NextRequest();
  EXPECT_EQ(asked.region, 1u);
  puller->Cancel(id);
  EXPECT_EQ(ends[1].Wait().code(), absl::StatusCode::kCancelled);
  lane.Reply(asked, Pattern(1000, 1));
  const RequestFrame next = lane.NextRequest();
  EXPECT_EQ(next.region, 3u);
  lane.Reply(next, Pattern(1000, 3));
  EXPECT_TRUE(ends[0].Wait().ok());
  EXPECT_TRUE(ends[2].Wait().ok());
  EXPECT_THAT(second, Each(kGuard));
}

TEST_F(TcpTransportTest, CancelAfterTheEndChangesNothing) {
  const Bytes memory = Pattern(1000, 3);
  const auto owner = Make(), puller = Make();
  ASSERT_TRUE(owner->Export(kRegion, memory.data(), memory.size()).ok());
  Bytes local(1000);
  PullEnd end;
  const PullId id = puller->Pull(OneSlice(owner->address(), kRegion, 0, local), end.Done());
  EXPECT_TRUE(end.Wait().ok());
  puller->Cancel(id);
  puller->Cancel(id + 1000);
  puller->Cancel(0);
  EXPECT_TRUE(PullNow(*puller, OneSlice(owner->address(), kRegion, 0, local)).ok());
  EXPECT_EQ(end.times(), 1);
}

TEST_F(TcpTransportTest, TheEndOfTheTransportCancelsAllPulls) {
  RawListener owner;
  std::deque<PullEnd> ends(50);
  std::deque<Bytes> locals(50, Bytes(5000, kGuard));
  RawConnection lane;
  {
    const auto puller = Make({.lanes = 1, .peer_bytes_max = 20'000});
    for (size_t i = 0; i < ends.size(); ++i) {
      puller->Pull(OneSlice(owner.address(), kRegion, 0, locals[i]), ends[i].Done());
    }
    lane = owner.AcceptPuller();
    lane.Reply(lane.NextRequest(), Pattern(2500, 1));
  }
  for (const PullEnd& end : ends) {
    ASSERT_EQ(end.times(), 1);  // all before the destructor came back
    EXPECT_EQ(end.Wait().code(), absl::StatusCode::kCancelled);
  }
  EXPECT_THAT(locals.back(), Each(kGuard));
}

TEST_F(TcpTransportTest, PullsAndCancelsComeFromTheEndsOfOthers) {
  const Bytes memory = Pattern(1000, 3);
  const auto owner = Make(), puller = Make();
  ASSERT_TRUE(owner->Export(kRegion, memory.data(), memory.size()).ok());
  RawListener silent;
  Bytes never(10), first(1000), second(1000);
  PullEnd cancelled, chained;
  const PullId id = puller->Pull(OneSlice(silent.address(), 1, 0, never), cancelled.Done());
  puller->Pull(OneSlice(owner->address(), kRegion, 0, first), [&](absl::Status status) {
    puller->Cancel(id);
    puller->Pull(OneSlice(owner->address(), kRegion, 0, second), chained.Done());
  });
  EXPECT_TRUE(chained.Wait().ok());
  EXPECT_TRUE(second == memory);
  EXPECT_EQ(cancelled.Wait().code(), absl::StatusCode::kCancelled);
}

// A chain of pulls whose links start from the ends of others while the transport is destroyed.
TEST_F(TcpTransportTest, PullsStartedDuringTheEndAreCancelledToo) {
  RawListener silent;
  Bytes local(10);
  PullEnd last;
  {
    const auto puller = Make();
    puller->Pull(OneSlice(silent.address(), 1, 0, local), [&, t = puller.get()](absl::Status) {
      t->Pull(OneSlice(silent.address(), 1, 0, local), [&, t](absl::Status) {
        t->Pull(OneSlice(silent.address(), 1, 0, local), last.Done());
      });
    });
  }
  ASSERT_EQ(last.times(), 1);
  EXPECT_EQ(last.Wait().code(), absl::StatusCode::kCancelled);
}

// ---- Peers that die, hang and come back

// Where the scripted owner ends its connection, in bytes after its hello.
class CloseTest : public TransferTest,
                  public ::testing::WithParamInterface<std::pair<int, bool>> {};

TEST_P(CloseTest, APullIsTriedOnceMoreWhenThePeerClosesInTheMiddle) {
  const auto [after, reset] = GetParam();
  RawListener owner;
  const auto puller = Make({.lanes = 1});
  const Bytes payload = Pattern(1000, 1);
  Bytes local(1000, kGuard);
  PullEnd end;
  puller->Pull(OneSlice(owner.address(), kRegion, 0, local), end.Done());
  const auto answer = [&](RawConnection& lane, size_t bytes) {
    const RequestFrame asked = lane.NextRequest();
    EXPECT_EQ(asked.bytes, 1000u);
    Bytes whole = Encoded(ReplyFrame{.id = asked.id, .code = ReplyCode::kOk, .bytes = 1000});
    whole.insert(whole.end(), payload.begin(), payload.end());
    return lane.Send(absl::MakeConstSpan(whole).first(bytes));
  };
  RawConnection first = owner.AcceptPuller();
  ASSERT_TRUE(answer(first, static_cast<size_t>(after)));
  reset ? first.Reset() : first.Close();
  RawConnection second = owner.AcceptPuller();
  ASSERT_TRUE(answer(second, kReplyBytes + 1000));
  EXPECT_TRUE(end.Wait().ok()) << end.Wait();
  EXPECT_TRUE(local == payload);
}

TEST_P(CloseTest, ThenItEndsUnavailable) {
  const auto [after, reset] = GetParam();
  RawListener owner;
  const auto puller = Make({.lanes = 1});
  Bytes local(1000, kGuard);
  PullEnd end;
  puller->Pull(OneSlice(owner.address(), kRegion, 0, local), end.Done());
  for (int attempt = 0; attempt < 2; ++attempt) {
    RawConnection lane = owner.AcceptPuller();
    const RequestFrame asked = lane.NextRequest();
    Bytes whole = Encoded(ReplyFrame{.id = asked.id, .code = ReplyCode::kOk, .bytes = 1000});
    whole.resize(kReplyBytes + 1000);
    ASSERT_TRUE(lane.Send(absl::MakeConstSpan(whole).first(static_cast<size_t>(after))));
    reset ? lane.Reset() : lane.Close();
  }
  EXPECT_EQ(end.Wait().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(Message(end.Wait()), HasSubstr(owner.address()));
}

INSTANTIATE_TEST_SUITE_P(Places, CloseTest,
                         ::testing::Values(std::pair(0, false), std::pair(1, false),
                                           std::pair(23, false), std::pair(24, false),
                                           std::pair(25, false), std::pair(1023, false),
                                           std::pair(0, true), std::pair(24, true),
                                           std::pair(500, true)));

TEST_F(TcpTransportTest, APeerThatClosesInsteadOfGreetingIsUnavailable) {
  for (const size_t bytes : {size_t{0}, size_t{1}, kHelloBytes - 1}) {
    RawListener owner;
    const auto puller = Make();
    Bytes local(10);
    PullEnd end;
    puller->Pull(OneSlice(owner.address(), kRegion, 0, local), end.Done());
    RawConnection lane = owner.Accept();
    EXPECT_EQ(lane.Receive(kHelloBytes).size(), kHelloBytes);
    ASSERT_TRUE(lane.Send(absl::MakeConstSpan(Encoded(HelloFrame{})).first(bytes)));
    lane.Close();
    EXPECT_EQ(end.Wait().code(), absl::StatusCode::kUnavailable);
  }
}

// The peer closes all that was idle at the very moment at which a pull uses all of it.
TEST_F(TcpTransportTest, APullOverTwoClosingLanesIsTriedOnceMore) {
  RawListener owner;
  const auto puller = Make({.lanes = 2, .request_bytes_max = 1000});
  const Bytes payload = Pattern(2000, 1);
  Bytes local(2000);
  PullEnd warm, end;
  // A first pull opens both lanes.
  puller->Pull(OneSlice(owner.address(), 1, 0, local), warm.Done());
  RawConnection lanes[2];
  lanes[0] = owner.AcceptPuller();
  RequestFrame asked[2];
  asked[0] = lanes[0].NextRequest();
  asked[1] = lanes[0].NextRequest();
  lanes[1] = owner.AcceptPuller();
  for (const RequestFrame& request : asked) lanes[0].Reply(request, Bytes(1000));
  ASSERT_TRUE(warm.Wait().ok());

  puller->Pull(OneSlice(owner.address(), 2, 0, local), end.Done());
  for (RawConnection& lane : lanes) EXPECT_EQ(lane.NextRequest().region, 2u);
  // One after the other: the second goes when what the first owed is on its way again.
  lanes[0].Close();
  RawConnection fresh = owner.AcceptPuller();
  lanes[1].Close();
  for (int i = 0; i < 2; ++i) {
    const RequestFrame request = fresh.NextRequest();
    fresh.Reply(request, absl::MakeConstSpan(payload).subspan(request.offset, 1000));
  }
  EXPECT_TRUE(end.Wait().ok()) << end.Wait();
  EXPECT_TRUE(local == payload);
}

TEST_F(TcpTransportTest, APeerThatOwesBytesAndSendsNoneLosesItsConnection) {
  for (const bool half : {false, true}) {
    RawListener owner;
    TestClock clock;
    const auto puller = Make({.clock = &clock, .lanes = 1, .stall = absl::Seconds(4)});
    Bytes local(1000);
    PullEnd end;
    puller->Pull(OneSlice(owner.address(), kRegion, 0, local), end.Done());
    RawConnection lane = owner.AcceptPuller();
    const RequestFrame asked = lane.NextRequest();
    if (half) lane.Reply(asked, Bytes(500));
    clock.Advance(absl::Seconds(4));
    EXPECT_TRUE(PullNow(*puller, {.peer = owner.address()}).ok());  // the loop has seen the time
    EXPECT_FALSE(end.ended());
    clock.Advance(absl::Seconds(5));
    puller->Cancel(0);
    EXPECT_EQ(end.Wait().code(), absl::StatusCode::kUnavailable);
    EXPECT_THAT(Message(end.Wait()), HasSubstr("sends nothing"));
    EXPECT_TRUE(lane.Ended());
  }
}

TEST_F(TcpTransportTest, AnIdleConnectionIsKept) {
  RawListener owner;
  TestClock clock;
  const auto puller = Make({.clock = &clock, .lanes = 1});
  Bytes local(10);
  RawConnection lane;
  for (int i = 0; i < 3; ++i) {
    PullEnd end;
    puller->Pull(OneSlice(owner.address(), kRegion, 0, local), end.Done());
    if (i == 0) lane = owner.AcceptPuller();
    ASSERT_TRUE(lane.Reply(lane.NextRequest(), Bytes(10)));
    EXPECT_TRUE(end.Wait().ok());
    clock.Advance(absl::Hours(1));
    puller->Cancel(0);
  }
}

TEST_F(TcpTransportTest, APeerThatDoesNotGreetIsUnavailable) {
  RawListener owner;
  TestClock clock;
  const auto puller = Make({.clock = &clock, .connect_timeout = absl::Seconds(3)});
  Bytes local(10);
  PullEnd end;
  puller->Pull(OneSlice(owner.address(), kRegion, 0, local), end.Done());
  RawConnection silent = owner.Accept();
  EXPECT_EQ(silent.Receive(kHelloBytes).size(), kHelloBytes);
  clock.Advance(absl::Seconds(4));
  puller->Cancel(0);
  EXPECT_EQ(end.Wait().code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(silent.Ended());
}

TEST_F(TcpTransportTest, WhoCannotBeReachedIsUnavailable) {
  const auto puller = Make();
  Bytes local(10);
  for (const char* peer : {"", "nonsense", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:99999",
                           "nowhere.invalid:80", "[::1", ":80"}) {
    const absl::Status status = PullNow(*puller, OneSlice(peer, kRegion, 0, local));
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << peer << ": " << status;
    EXPECT_THAT(Message(status), HasSubstr(peer));
  }
}

TEST_F(TcpTransportTest, ARefusedPeerIsAskedAgainAfterABackoff) {
  uint16_t port = 0;
  {
    RawListener gone;
    port = gone.port();
  }
  const std::string peer = HostPort{"127.0.0.1", port}.Text();
  TestClock clock;
  const auto puller =
      Make({.clock = &clock, .backoff_min = absl::Seconds(10), .backoff_max = absl::Seconds(10)});
  Bytes local(10);
  EXPECT_EQ(PullNow(*puller, OneSlice(peer, kRegion, 0, local)).code(),
            absl::StatusCode::kUnavailable);
  // It is back, but nobody knows before the backoff has passed (half of it at least).
  RawListener back(port);
  clock.Advance(absl::Seconds(4));
  const absl::Status early = PullNow(*puller, OneSlice(peer, kRegion, 0, local));
  EXPECT_EQ(early.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(Message(early), HasSubstr("refused"));
  clock.Advance(absl::Seconds(12));
  PullEnd end;
  puller->Pull(OneSlice(peer, kRegion, 0, local), end.Done());
  RawConnection lane = back.AcceptPuller();
  lane.Reply(lane.NextRequest(), Pattern(10, 1));
  EXPECT_TRUE(end.Wait().ok()) << end.Wait();
}

// The second lane never comes up; while the first serves, it is not tried for every request.
TEST_F(TcpTransportTest, ALaneThatDoesNotComeUpWaitsForItsBackoff) {
  RawListener owner;
  TestClock clock;
  const auto puller = Make({.clock = &clock,
                            .lanes = 2,
                            .request_bytes_max = 1000,
                            .peer_bytes_max = 2000,
                            .backoff_min = absl::Seconds(10),
                            .backoff_max = absl::Seconds(10)});
  Bytes local(50'000);
  PullEnd end;
  puller->Pull(OneSlice(owner.address(), kRegion, 0, local), end.Done());
  RawConnection lane = owner.AcceptPuller();
  RequestFrame request = lane.NextRequest();
  owner.Accept().Reset();
  for (size_t served = 1000;; served += 1000) {
    ASSERT_TRUE(lane.Reply(request, Bytes(1000)));
    if (served == local.size()) break;
    request = lane.NextRequest();
  }
  ASSERT_TRUE(end.Wait().ok()) << end.Wait();
  // Nobody else has come: the next in line is this one.
  RawConnection probe = RawConnection::To(owner.address());
  const std::byte mark{0x77};
  ASSERT_TRUE(probe.Send({&mark, 1}));
  RawConnection accepted = owner.Accept();
  EXPECT_THAT(accepted.Receive(1), ::testing::ElementsAre(mark));
}

TEST_F(TcpTransportTest, PullsGoOnWhenTheOwnerIsBackOnItsPort) {
  const Bytes memory = Pattern(32 << 20, 3);
  auto owner = Make();
  ASSERT_TRUE(owner->Export(kRegion, memory.data(), memory.size()).ok());
  const std::string address = owner->address();
  const auto puller = Make();
  Bytes local(memory.size());
  ASSERT_TRUE(PullNow(*puller, OneSlice(address, kRegion, 0, local)).ok());
  PullEnd end;
  puller->Pull(OneSlice(address, kRegion, 0, local), end.Done());
  owner.reset();
  // It may have ended just before; else its peer broke off or refused the second attempt.
  EXPECT_THAT(end.Wait().code(), AnyOf(absl::StatusCode::kOk, absl::StatusCode::kUnavailable));
  Bytes other(10);
  EXPECT_EQ(PullNow(*puller, OneSlice(address, kRegion, 0, other)).code(),
            absl::StatusCode::kUnavailable);

  owner = Make({.listen = address});
  ASSERT_TRUE(owner->Export(kRegion + 1, memory.data(), memory.size()).ok());
  absl::Status status;
  do {  // until the backoff has passed
    status = PullNow(*puller, OneSlice(address, kRegion + 1, 0, local));
  } while (absl::IsUnavailable(status));
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_TRUE(local == memory);
}

// ---- Bounds

TEST_F(TcpTransportTest, AsksForNoMoreThanThePeersShare) {
  RawListener owner;
  Registry registry({});
  const auto puller =
      Make({.registry = &registry, .lanes = 1, .request_bytes_max = 1000, .peer_bytes_max = 4000});
  Bytes local(20'000);
  PullEnd end;
  puller->Pull(OneSlice(owner.address(), kRegion, 0, local), end.Done());
  RawConnection lane = owner.AcceptPuller();
  std::deque<RequestFrame> asked;
  for (int i = 0; i < 4; ++i) asked.push_back(lane.NextRequest());
  Gauge& inflight =
      registry.AddGauge("antiphon_transfer_inflight_bytes", "Asked for, not yet here.");
  const Bytes payload = Pattern(local.size(), 1);
  for (int i = 4; i < 20; ++i) {
    EXPECT_EQ(inflight.value(), 4000);
    lane.Reply(asked.front(), absl::MakeConstSpan(payload).subspan(asked.front().offset, 1000));
    asked.pop_front();
    asked.push_back(lane.NextRequest());  // one for one
  }
  for (const RequestFrame& request : asked) {
    lane.Reply(request, absl::MakeConstSpan(payload).subspan(request.offset, 1000));
  }
  EXPECT_TRUE(end.Wait().ok());
  EXPECT_TRUE(local == payload);
  EXPECT_EQ(inflight.value(), 0);
}

TEST_F(TcpTransportTest, ManyRequestsMoreThanALaneHoldsArrive) {
  const Bytes memory = Pattern(100'000, 3);
  const auto owner = Make();
  const auto puller = Make({.lanes = 1, .request_bytes_max = 1});
  ASSERT_TRUE(owner->Export(kRegion, memory.data(), memory.size()).ok());
  Bytes local(5000);
  ASSERT_TRUE(PullNow(*puller, OneSlice(owner->address(), kRegion, 3, local)).ok());
  EXPECT_TRUE(std::equal(local.begin(), local.end(), memory.begin() + 3));
}

TEST_F(TcpTransportTest, MorePullsThanTheQueueHoldsAreRefused) {
  RawListener silent;
  const auto puller = Make({.queued_pulls_max = 3});
  Bytes local(10);
  std::deque<PullEnd> ends(5);
  std::vector<PullId> ids;
  for (PullEnd& end : ends) {
    ids.push_back(puller->Pull(OneSlice(silent.address(), kRegion, 0, local), end.Done()));
  }
  EXPECT_EQ(ends[3].Wait().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ends[4].Wait().code(), absl::StatusCode::kResourceExhausted);
  puller->Cancel(ids[0]);
  EXPECT_EQ(ends[0].Wait().code(), absl::StatusCode::kCancelled);
  PullEnd fits;
  const PullId id = puller->Pull(OneSlice(silent.address(), kRegion, 0, local), fits.Done());
  puller->Cancel(id);
  EXPECT_EQ(fits.Wait().code(), absl::StatusCode::kCancelled);
}

TEST_F(TcpTransportTest, OutOfDescriptorsThePullerSaysSo) {
  const Bytes memory = Pattern(1000, 3);
  const auto owner = Make(), puller = Make();
  ASSERT_TRUE(owner->Export(kRegion, memory.data(), memory.size()).ok());
  rlimit limit{};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &limit), 0);
  const int lowest_free = dup(0);
  close(lowest_free);
  const rlimit none{static_cast<rlim_t>(lowest_free), limit.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
  Bytes local(1000);
  const absl::Status status = PullNow(*puller, OneSlice(owner->address(), kRegion, 0, local));
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &limit), 0);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(Message(status), HasSubstr("open files"));
  absl::Status then;
  do {  // until the backoff has passed
    then = PullNow(*puller, OneSlice(owner->address(), kRegion, 0, local));
  } while (absl::IsUnavailable(then));
  EXPECT_TRUE(then.ok()) << then;
}

// ---- Metrics and threads

TEST_F(TcpTransportTest, CountsWhatItMoves) {
  const Bytes memory = Pattern(100'000, 3);
  Registry owners({}), pullers({});
  const auto owner = Make({.registry = &owners}), puller = Make({.registry = &pullers});
  ASSERT_TRUE(owner->Export(kRegion, memory.data(), memory.size()).ok());
  Bytes local(60'000);
  ASSERT_TRUE(PullNow(*puller, OneSlice(owner->address(), kRegion, 0, local)).ok());
  ASSERT_TRUE(PullNow(*puller, OneSlice(owner->address(), kRegion, 9, local)).ok());
  ASSERT_TRUE(absl::IsNotFound(PullNow(*puller, OneSlice(owner->address(), 1, 0, local))));
  ASSERT_TRUE(
      absl::IsOutOfRange(PullNow(*puller, OneSlice(owner->address(), kRegion, 50'000, local))));
  const std::string in = pullers.Render(), out = owners.Render();
  EXPECT_THAT(in, HasSubstr("direction=\"in\",transport=\"tcp\"} 120000\n"));
  EXPECT_THAT(in, HasSubstr("reason=\"no_region\"} 1\n"));
  EXPECT_THAT(in, HasSubstr("reason=\"out_of_range\"} 1\n"));
  EXPECT_THAT(in, HasSubstr("antiphon_transfer_duration_seconds_count 2\n"));
  EXPECT_THAT(in, HasSubstr("antiphon_transfer_inflight_bytes 0\n"));
  EXPECT_THAT(out, HasSubstr("direction=\"out\",transport=\"tcp\"} 120000\n"));
}

// Everything at once from several threads. Bytes of a pull that ended well are those of a pattern.
TEST_F(TcpTransportTest, AnyThreadMayCallAtAnyTime) {
  constexpr int kThreads = 4, kRounds = 150;
  const Bytes memory = Pattern(1 << 20, 3);
  const auto owner = Make(), puller = Make();
  ASSERT_TRUE(owner->Export(kRegion, memory.data(), memory.size()).ok());
  {
    std::vector<Thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back("test-" + std::to_string(t), [&, t] {
        for (int i = 0; i < kRounds; ++i) {
          const RegionId own = 1000 + t * kRounds + i;
          EXPECT_TRUE(owner->Export(own, memory.data(), memory.size()).ok());
          Bytes local(1 + (i * 7919) % 300'000), other(local.size());
          PullEnd end, cancelled;
          const uint64_t offset = (i * 104'729) % (1 << 19);
          puller->Pull(OneSlice(owner->address(), i % 2 == 0 ? own : kRegion, offset, local),
                       end.Done());
          const PullId id =
              puller->Pull(OneSlice(owner->address(), kRegion, offset, other), cancelled.Done());
          if (i % 3 == 0) owner->Unexport(own);
          puller->Cancel(id);
          const absl::Status status = end.Wait();
          if (status.ok()) {
            EXPECT_TRUE(std::equal(local.begin(), local.end(), memory.begin() + offset));
          } else {
            // Withdrawn, before or in the middle; the latter ends the connection of others too.
            EXPECT_TRUE(absl::IsNotFound(status) || absl::IsUnavailable(status)) << status;
          }
          EXPECT_FALSE(absl::IsInternal(cancelled.Wait()));
          owner->Unexport(own);
        }
      });
    }
  }
  Bytes local(memory.size());
  EXPECT_TRUE(PullNow(*puller, OneSlice(owner->address(), kRegion, 0, local)).ok());
  EXPECT_TRUE(local == memory);
}

}  // namespace
}  // namespace antiphon::transfer
