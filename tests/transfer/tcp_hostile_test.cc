// Peers of the `tcp` transport that break its protocol: each costs its own connection, nothing
// else.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstring>
#include <deque>
#include <random>
#include <string>
#include <vector>

#include "common/metrics.h"
#include "tests/transfer/raw_peer.h"
#include "tests/transfer/transport_fixture.h"
#include "transfer/tcp_server.h"
#include "transfer/tcp_transport.h"

namespace antiphon::transfer {
namespace {

using ::testing::Each;
using ::testing::HasSubstr;

constexpr RegionId kRegion = 99;
constexpr std::byte kGuard{0x5A};

double Malformed(Registry& registry) {
  return registry
      .AddCounter("antiphon_transfer_failures_total",
                  "Pulls that did not end well, and frames that made no sense.",
                  {{"reason", "malformed"}})
      .value();
}

Bytes Spoiled(Bytes frame, size_t at, size_t bytes, uint64_t value) {
  std::memcpy(frame.data() + at, &value, bytes);
  return frame;
}

struct BadFrame {
  const char* what;
  Bytes bytes;
};

// ---- Hostile pullers

class HostilePullerTest : public TransferTest {
 protected:
  HostilePullerTest() : memory_(Pattern(1 << 20, 1)), owner_(Make({.registry = &registry_})) {
    EXPECT_TRUE(owner_->Export(kRegion, memory_.data(), memory_.size()).ok());
  }

  RawConnection Greeted() {
    RawConnection c = RawConnection::To(owner_->address());
    EXPECT_TRUE(c.GreetOwner());
    return c;
  }
  void ExpectServes(RawConnection& c, uint64_t id) {
    ASSERT_TRUE(
        c.Send(Encoded(RequestFrame{.id = id, .region = kRegion, .offset = id, .bytes = 100})));
    const ReplyFrame reply = c.NextReply();
    EXPECT_EQ(reply.id, id);
    ASSERT_EQ(reply.bytes, 100u);
    EXPECT_TRUE(c.Receive(100) == Bytes(memory_.begin() + id, memory_.begin() + id + 100));
  }

  Registry registry_{{}};
  const Bytes memory_;
  std::unique_ptr<Transport> owner_;
};

TEST_F(HostilePullerTest, ABadHelloEndsTheConnectionWithoutAnAnswer) {
  const Bytes good = Encoded(HelloFrame{});
  const BadFrame frames[] = {
      {"no magic", Bytes(kHelloBytes)},
      {"HTTP", Bytes(kHelloBytes, std::byte{'G'})},
      {"other magic", Spoiled(good, 7, 1, '2')},
      {"version 0", Spoiled(good, 8, 2, 0)},
      {"versions backwards", Spoiled(good, 8, 4, 0x00010002)},
      {"newer versions only", Encoded(HelloFrame{2, 9})},
      {"a request first", Encoded(RequestFrame{.id = 1, .region = kRegion, .bytes = 1})},
  };
  RawConnection beside = Greeted();
  double malformed = 0;
  for (const BadFrame& frame : frames) {
    SCOPED_TRACE(frame.what);
    RawConnection c = RawConnection::To(owner_->address());
    ASSERT_TRUE(c.Send(frame.bytes));
    EXPECT_TRUE(c.Ended());
    EXPECT_EQ(Malformed(registry_), ++malformed);
    ExpectServes(beside, static_cast<uint64_t>(malformed));
  }
}

TEST_F(HostilePullerTest, ABadRequestEndsTheConnectionAndNoOther) {
  const Bytes good = Encoded(RequestFrame{.id = 1, .region = kRegion, .offset = 64, .bytes = 64});
  const BadFrame frames[] = {
      {"no magic", Bytes(kRequestBytes)},
      {"a reply's magic", Spoiled(good, 0, 4, 0x50525450)},
      {"a second hello",
       [&] {
         Bytes b = Encoded(HelloFrame{});
         b.resize(kRequestBytes);
         return b;
       }()},
      {"0 bytes", Spoiled(good, 4, 4, 0)},
      {"a byte too many", Spoiled(good, 4, 4, kPullBytesMax + 1)},
      {"4 GiB", Spoiled(good, 4, 4, UINT32_MAX)},
      {"offset wraps", Spoiled(good, 24, 8, UINT64_MAX - 63)},
      {"reserved", Spoiled(good, 39, 1, 1)},
  };
  RawConnection beside = Greeted();
  const auto puller = Make();
  double malformed = 0;
  for (const BadFrame& frame : frames) {
    SCOPED_TRACE(frame.what);
    RawConnection c = Greeted();
    ExpectServes(c, 1);
    ASSERT_TRUE(c.Send(frame.bytes));
    EXPECT_TRUE(c.Ended());
    EXPECT_EQ(Malformed(registry_), ++malformed);
    ExpectServes(beside, static_cast<uint64_t>(malformed));
    Bytes local(1000);
    EXPECT_TRUE(PullNow(*puller, OneSlice(owner_->address(), kRegion, 5, local)).ok());
  }
}

// Asking for what is not there is no offence: an answer, and the connection goes on.
TEST_F(HostilePullerTest, WhatIsNotThereIsAnsweredAndTheConnectionGoesOn) {
  RawConnection c = Greeted();
  const auto ask = [&](RequestFrame request) {
    EXPECT_TRUE(c.Send(Encoded(request)));
    const ReplyFrame reply = c.NextReply();
    EXPECT_EQ(reply.id, request.id);
    EXPECT_EQ(reply.bytes, 0u);
    return reply.code;
  };
  const uint64_t end = memory_.size();
  EXPECT_EQ(ask({.id = 1, .region = kRegion + 1, .offset = 0, .bytes = 1}), ReplyCode::kNoRegion);
  EXPECT_EQ(ask({.id = 1, .region = 0, .offset = 0, .bytes = 1}), ReplyCode::kNoRegion);
  EXPECT_EQ(ask({.id = 2, .region = kRegion, .offset = end, .bytes = 1}), ReplyCode::kOutOfRange);
  EXPECT_EQ(ask({.id = 3, .region = kRegion, .offset = end - 1, .bytes = 2}),
            ReplyCode::kOutOfRange);
  EXPECT_EQ(ask({.id = 4, .region = kRegion, .offset = 0, .bytes = kPullBytesMax}),
            ReplyCode::kOutOfRange);
  EXPECT_EQ(ask({.id = UINT64_MAX, .region = kRegion, .offset = UINT64_MAX - 64, .bytes = 64}),
            ReplyCode::kOutOfRange);
  ExpectServes(c, 5);
  EXPECT_EQ(Malformed(registry_), 0);
}

TEST_F(HostilePullerTest, FramesMayComeByteByByte) {
  RawConnection c = RawConnection::To(owner_->address());
  Bytes stream = Encoded(HelloFrame{});
  for (uint64_t id = 1; id <= 2; ++id) {
    const Bytes request =
        Encoded(RequestFrame{.id = id, .region = kRegion, .offset = id, .bytes = 10});
    stream.insert(stream.end(), request.begin(), request.end());
  }
  for (const std::byte& b : stream) ASSERT_TRUE(c.Send({&b, 1}));
  EXPECT_EQ(c.Receive(kHelloBytes).size(), kHelloBytes);
  for (uint64_t id = 1; id <= 2; ++id) {
    EXPECT_EQ(c.NextReply().id, id);
    EXPECT_TRUE(c.Receive(10) == Bytes(memory_.begin() + id, memory_.begin() + id + 10));
  }
}

// More requests in one go than a connection keeps: it is read no further, and all are answered in
// their order in the end.
TEST_F(HostilePullerTest, ManyMoreRequestsThanFitAreAnsweredInOrder) {
  constexpr uint64_t kRequests = 40 * TcpServer::kRequestsQueuedMax;
  RawConnection c = RawConnection::To(owner_->address());
  Bytes stream = Encoded(HelloFrame{});
  for (uint64_t id = 0; id < kRequests; ++id) {
    const Bytes request = Encoded(RequestFrame{.id = id,
                                               .region = id % 5 == 0 ? 1 : kRegion,
                                               .offset = id,
                                               .bytes = static_cast<uint32_t>(1 + id % 3000)});
    stream.insert(stream.end(), request.begin(), request.end());
  }
  ASSERT_TRUE(c.Send(stream));  // without reading anything
  EXPECT_EQ(c.Receive(kHelloBytes).size(), kHelloBytes);
  for (uint64_t id = 0; id < kRequests; ++id) {
    const ReplyFrame reply = c.NextReply();
    ASSERT_EQ(reply.id, id);
    ASSERT_EQ(reply.code, id % 5 == 0 ? ReplyCode::kNoRegion : ReplyCode::kOk);
    ASSERT_EQ(reply.bytes, id % 5 == 0 ? 0 : 1 + id % 3000);
    const Bytes payload = c.Receive(reply.bytes);
    ASSERT_TRUE(std::equal(payload.begin(), payload.end(), memory_.begin() + id));
  }
}

TEST_F(HostilePullerTest, PullersThatGoAwayInTheMiddleLeaveNothing) {
  const size_t before = OpenDescriptors();
  for (int i = 0; i < 200; ++i) {
    RawConnection c = i % 4 == 0 ? RawConnection::To(owner_->address()) : Greeted();
    const Bytes request =
        Encoded(RequestFrame{.id = 1, .region = kRegion, .offset = 0, .bytes = 1u << 20});
    if (i % 4 == 1) c.Send(absl::MakeConstSpan(request).first(i % kRequestBytes));
    if (i % 4 >= 2) c.Send(request);
    i % 8 < 4 ? c.Close() : c.Reset();
  }
  // Round by round the owner sees their ends; then only the two ends of `last` are more.
  RawConnection last = Greeted();
  for (uint64_t round = 0; OpenDescriptors() != before + 2 && round < 10'000; ++round) {
    ExpectServes(last, round);
  }
  EXPECT_EQ(OpenDescriptors(), before + 2);
}

// Bytes of no sense, in pieces of any size; some begin well.
TEST_F(HostilePullerTest, SurvivesNoise) {
  std::mt19937_64 random(20'240'501);
  RawConnection beside = Greeted();
  for (uint64_t i = 0; i < 300; ++i) {
    RawConnection c = i % 2 == 0 ? RawConnection::To(owner_->address()) : Greeted();
    Bytes noise(1 + random() % 400);
    for (std::byte& b : noise) b = static_cast<std::byte>(random());
    if (i % 4 == 1) {
      // A good frame with some bits flipped.
      noise = Encoded(RequestFrame{.id = i, .region = kRegion, .offset = i, .bytes = 50});
      for (uint64_t flips = random() % 4; flips > 0; --flips) {
        noise[random() % noise.size()] ^= std::byte{1} << (random() % 8);
      }
    }
    absl::Span<const std::byte> left = noise;
    while (!left.empty()) {
      const size_t piece = std::min<size_t>(left.size(), 1 + random() % 64);
      if (!c.Send(left.first(piece))) break;  // ended already
      left.remove_prefix(piece);
    }
    if (i % 10 == 0) ExpectServes(beside, i);
  }
  ExpectServes(beside, 7);
}

// ---- Bounds of the owner

class PatienceTest : public TransferTest {
 protected:
  // Lets the serving loop of `owner` see the time.
  static void Wake(Transport& owner) { EXPECT_TRUE(RawConnection::To(owner.address()).open()); }
};

TEST_F(PatienceTest, APullerThatDoesNotGreetIsSentAway) {
  TestClock clock;
  const auto owner = Make({.clock = &clock});
  RawConnection silent = RawConnection::To(owner->address());
  RawConnection half = RawConnection::To(owner->address());
  ASSERT_TRUE(half.Send(absl::MakeConstSpan(Encoded(HelloFrame{})).first(kHelloBytes - 1)));
  RawConnection idle = RawConnection::To(owner->address());
  ASSERT_TRUE(idle.GreetOwner());  // accepted after the others
  clock.Advance(absl::Seconds(11));
  Wake(*owner);
  EXPECT_TRUE(silent.Ended());
  EXPECT_TRUE(half.Ended());
  ASSERT_TRUE(idle.Send(Encoded(RequestFrame{.id = 1, .region = 1, .bytes = 1})));
  EXPECT_EQ(idle.NextReply().code, ReplyCode::kNoRegion);
}

TEST_F(PatienceTest, APullerThatDoesNotReadIsSentAway) {
  TestClock clock;
  const Bytes memory(kPullBytesMax);
  const auto owner = Make({.clock = &clock});
  ASSERT_TRUE(owner->Export(kRegion, memory.data(), memory.size()).ok());
  RawConnection slow = RawConnection::To(owner->address());
  ASSERT_TRUE(slow.GreetOwner());
  for (uint64_t id = 1; id <= 4; ++id) {
    ASSERT_TRUE(
        slow.Send(Encoded(RequestFrame{.id = id, .region = kRegion, .bytes = kPullBytesMax})));
  }
  EXPECT_EQ(slow.NextReply().id, 1u);  // and no more
  RawConnection idle = RawConnection::To(owner->address());
  ASSERT_TRUE(idle.GreetOwner());
  clock.Advance(absl::Seconds(20));
  Wake(*owner);
  clock.Advance(absl::Seconds(32));
  Wake(*owner);
  // What lies in the sockets' buffers, and then the end.
  EXPECT_LT(slow.Receive(size_t{4} * kPullBytesMax).size(), size_t{4} * kPullBytesMax);
  ASSERT_TRUE(idle.Send(Encoded(RequestFrame{.id = 1, .region = 1, .bytes = 1})));
  EXPECT_EQ(idle.NextReply().code, ReplyCode::kNoRegion);
}

// The connection that was idle for longest makes room; those that are owed bytes never do.
TEST_F(PatienceTest, AtTheBoundIdleConnectionsMakeRoomAndBusyOnesDoNot) {
  TestClock clock;
  const Bytes memory(kPullBytesMax);
  const auto owner = Make({.clock = &clock, .connections_max = 3});
  ASSERT_TRUE(owner->Export(kRegion, memory.data(), memory.size()).ok());
  const auto greet = [&] {
    clock.Advance(absl::Seconds(1));
    RawConnection c = RawConnection::To(owner->address());
    EXPECT_TRUE(c.GreetOwner());
    return c;
  };
  const auto keep_busy = [](RawConnection& c) {
    for (uint64_t id = 1; id <= 2; ++id) {
      ASSERT_TRUE(
          c.Send(Encoded(RequestFrame{.id = id, .region = kRegion, .bytes = kPullBytesMax})));
    }
    EXPECT_EQ(c.NextReply().id, 1u);
  };
  RawConnection a = greet(), b = greet(), c = greet();
  clock.Advance(absl::Seconds(1));
  ASSERT_TRUE(a.Send(Encoded(RequestFrame{.id = 1, .region = 1, .bytes = 1})));
  EXPECT_EQ(a.NextReply().code, ReplyCode::kNoRegion);  // so `b` is the idlest

  RawConnection d = greet();
  EXPECT_TRUE(b.Ended());
  keep_busy(c);
  RawConnection e = greet();
  EXPECT_TRUE(a.Ended());
  keep_busy(d);
  keep_busy(e);
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(RawConnection::To(owner->address()).Ended());
  c.Close();
  RawConnection next;
  do {  // until the owner has seen the end of `c`
    next = RawConnection::To(owner->address());
  } while (!next.GreetOwner());
}

// Out of descriptors, the owner stops accepting for a while instead of trying all the time.
TEST_F(PatienceTest, WithoutDescriptorsItWaitsAndThenGoesOn) {
  TestClock clock;
  const auto owner = Make({.clock = &clock});
  const Bytes memory = Pattern(1000, 3);
  const auto other = Make(), puller = Make();
  ASSERT_TRUE(other->Export(kRegion, memory.data(), memory.size()).ok());
  Bytes local(1000);
  ASSERT_TRUE(PullNow(*puller, OneSlice(other->address(), kRegion, 0, local)).ok());
  RawConnection held = RawConnection::To(owner->address());
  ASSERT_TRUE(held.GreetOwner());
  RawConnection late = RawConnection::Unconnected();

  rlimit limit{};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &limit), 0);
  const int lowest_free = dup(0);
  close(lowest_free);
  const rlimit none{static_cast<rlim_t>(lowest_free), limit.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
  uint64_t calls = clock.calls();
  const bool connected = late.ConnectTo(owner->address());
  const bool seen = clock.WaitForCalls(calls + 1);
  calls = clock.calls();
  // Time for thousands of rounds of an owner that spins.
  int pulled = 0;
  for (int i = 0; i < 200; ++i) {
    pulled += PullNow(*puller, OneSlice(other->address(), kRegion, 0, local)).ok();
  }
  const uint64_t spent = clock.calls() - calls;
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &limit), 0);
  EXPECT_TRUE(connected);  // in the kernel's queue
  EXPECT_TRUE(seen);
  EXPECT_EQ(pulled, 200);
  EXPECT_LE(spent, 20u);

  clock.Advance(absl::Seconds(2));
  ASSERT_TRUE(held.Send(Encoded(RequestFrame{.id = 1, .region = 1, .bytes = 1})));
  EXPECT_EQ(held.NextReply().code, ReplyCode::kNoRegion);
  EXPECT_TRUE(late.GreetOwner());
}

// ---- Hostile owners

class HostileOwnerTest : public TransferTest {};

TEST_F(HostileOwnerTest, ABadHelloMakesThePeerUnavailable) {
  const Bytes good = Encoded(HelloFrame{});
  struct {
    const char* what;
    Bytes bytes;
    const char* says;
  } const frames[] = {
      {"no magic", Bytes(kHelloBytes), "hello magic"},
      {"SSH", Bytes(kHelloBytes, std::byte{'S'}), "hello magic"},
      {"version 0", Spoiled(good, 8, 2, 0), "versions"},
      {"versions backwards", Spoiled(good, 8, 4, 0x00010002), "versions"},
      {"another version", Encoded(HelloFrame{2, 2}), "no pull version in common"},
  };
  for (const auto& frame : frames) {
    SCOPED_TRACE(frame.what);
    RawListener owner;
    const auto puller = Make();
    Bytes local(100, kGuard);
    PullEnd end;
    puller->Pull(OneSlice(owner.address(), kRegion, 0, local), end.Done());
    RawConnection lane = owner.Accept();
    ASSERT_EQ(lane.Receive(kHelloBytes).size(), kHelloBytes);
    ASSERT_TRUE(lane.Send(frame.bytes));
    EXPECT_EQ(end.Wait().code(), absl::StatusCode::kUnavailable);
    EXPECT_THAT(std::string(end.Wait().message()), HasSubstr(frame.says));
    EXPECT_TRUE(lane.Ended());
  }
}

TEST_F(HostileOwnerTest, ABadReplyMakesThePeerUnavailableAndOthersAreUnharmed) {
  struct {
    const char* what;
    size_t at, bytes;
    uint64_t value;
    const char* says;
  } const spoils[] = {
      {"no magic", 0, 4, 0, "reply magic"},
      {"a request's magic", 0, 4, 0x51525450, "reply magic"},
      {"an unknown code", 4, 4, 3, "code"},
      {"no region, yet bytes", 4, 4, 1, "bytes for this code"},
      {"another's id", 8, 8, UINT64_MAX, "not asked"},
      {"no bytes", 16, 4, 0, "bytes for this code"},
      {"fewer bytes", 16, 4, 99, "another size"},
      {"more bytes", 16, 4, 101, "another size"},
      {"far too many bytes", 16, 4, UINT32_MAX, "bytes"},
      {"reserved", 20, 4, 1, "reserved"},
  };
  const Bytes memory = Pattern(1000, 3);
  const auto good = Make();
  ASSERT_TRUE(good->Export(kRegion, memory.data(), memory.size()).ok());
  for (const auto& spoil : spoils) {
    SCOPED_TRACE(spoil.what);
    RawListener owner;
    Registry registry({});
    const auto puller = Make({.registry = &registry, .lanes = 1});
    Bytes local(100, kGuard);
    PullEnd end;
    puller->Pull(OneSlice(owner.address(), kRegion, 0, local), end.Done());
    for (int attempt = 1; attempt <= 2; ++attempt) {
      RawConnection lane = owner.AcceptPuller();
      const RequestFrame asked = lane.NextRequest();
      ASSERT_TRUE(lane.Send(
          Spoiled(Encoded(ReplyFrame{.id = asked.id, .code = ReplyCode::kOk, .bytes = asked.bytes}),
                  spoil.at, spoil.bytes, spoil.value)));
      lane.Send(Bytes(101));
      EXPECT_TRUE(lane.Ended());
      Bytes beside(1000);
      EXPECT_TRUE(PullNow(*puller, OneSlice(good->address(), kRegion, 0, beside)).ok());
      EXPECT_TRUE(beside == memory);
      EXPECT_EQ(Malformed(registry), attempt);
    }
    EXPECT_EQ(end.Wait().code(), absl::StatusCode::kUnavailable);
    EXPECT_THAT(std::string(end.Wait().message()), HasSubstr(spoil.says));
    EXPECT_THAT(local, Each(kGuard));
  }
}

TEST_F(HostileOwnerTest, AReplyThatNobodyAskedForEndsTheConnection) {
  RawListener owner;
  const auto puller = Make({.lanes = 1});
  Bytes local(100);
  PullEnd first, second;
  puller->Pull(OneSlice(owner.address(), kRegion, 0, local), first.Done());
  RawConnection lane = owner.AcceptPuller();
  const RequestFrame asked = lane.NextRequest();
  ASSERT_TRUE(lane.Reply(asked, Pattern(100, 1)));
  EXPECT_TRUE(first.Wait().ok());
  const Bytes before = local;
  lane.Reply(asked, Pattern(100, 2));  // again
  EXPECT_TRUE(lane.Ended());
  EXPECT_TRUE(local == before);
  puller->Pull(OneSlice(owner.address(), kRegion, 0, local), second.Done());
  RawConnection next = owner.AcceptPuller();
  ASSERT_TRUE(next.Reply(next.NextRequest(), Pattern(100, 3)));
  EXPECT_TRUE(second.Wait().ok());
}

TEST_F(HostileOwnerTest, RepliesMayComeByteByByte) {
  RawListener owner;
  const auto puller = Make({.lanes = 1});
  const Bytes payload = Pattern(100, 1);
  Bytes local(100);
  PullEnd end;
  puller->Pull({.peer = owner.address(),
                .region = kRegion,
                .slices = {{0, local.data(), 30}, {30, local.data() + 30, 70}}},
               end.Done());
  RawConnection lane = owner.Accept();
  ASSERT_EQ(lane.Receive(kHelloBytes).size(), kHelloBytes);
  for (const std::byte& b : Encoded(HelloFrame{})) ASSERT_TRUE(lane.Send({&b, 1}));
  for (int i = 0; i < 2; ++i) {
    const RequestFrame asked = lane.NextRequest();
    Bytes reply = Encoded(ReplyFrame{.id = asked.id, .code = ReplyCode::kOk, .bytes = asked.bytes});
    reply.insert(reply.end(), payload.begin() + asked.offset,
                 payload.begin() + asked.offset + asked.bytes);
    for (const std::byte& b : reply) ASSERT_TRUE(lane.Send({&b, 1}));
  }
  EXPECT_TRUE(end.Wait().ok());
  EXPECT_TRUE(local == payload);
}

// An owner that answers with noise: pulls end, one way or another, and nothing beside their memory
// is written.
TEST_F(HostileOwnerTest, SurvivesNoise) {
  std::mt19937_64 random(20'240'502);
  for (int i = 0; i < 60; ++i) {
    RawListener owner;
    const auto puller = Make({.lanes = 1});
    Bytes local(300, kGuard);
    PullEnd end;
    puller->Pull({.peer = owner.address(),
                  .region = kRegion,
                  .slices = {{0, local.data() + 100, 50}, {0, local.data() + 150, 50}}},
                 end.Done());
    // The first attempt brings one slice at best, the second may bring the other.
    for (int attempt = 0; attempt < 2; ++attempt) {
      RawConnection lane = owner.AcceptPuller();
      const RequestFrame asked = lane.NextRequest();
      Bytes noise = Encoded(ReplyFrame{.id = asked.id, .code = ReplyCode::kOk, .bytes = 50});
      noise.resize(kReplyBytes + 50 + random() % 100);
      for (size_t at = kReplyBytes; at < noise.size(); ++at) noise[at] = std::byte(random());
      if (i % 2 == 0) noise[random() % kReplyBytes] ^= std::byte{1} << (random() % 8);
      lane.Send(noise);
    }
    const absl::Status status = end.Wait();
    EXPECT_TRUE(status.ok() || absl::IsUnavailable(status)) << status;
    EXPECT_THAT(absl::MakeConstSpan(local).first(100), Each(kGuard));
    EXPECT_THAT(absl::MakeConstSpan(local).last(100), Each(kGuard));
  }
}

}  // namespace
}  // namespace antiphon::transfer
