// Two real stores and their workers on one machine: what one host does, what two do over TCP, and
// what happens when somebody dies or talks nonsense.
#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>

#include "common/clock.h"
#include "common/net.h"
#include "common/thread.h"
#include "kvstore/client/blob_lease.h"
#include "kvstore/client/connection.h"
#include "kvstore/client/framing.h"
#include "tests/kvstore/store_process.h"

namespace antiphon::kvstore {
namespace {

using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr char kPinned[] = "antiphon_kv_leases{state=\"pinned\"}";
constexpr char kReserved[] = "antiphon_kv_leases{state=\"reserved\"}";

std::unique_ptr<TestWorker> Attached(const StoreProcess& store) {
  auto worker = TestWorker::Attach(store.socket_path());
  EXPECT_TRUE(worker.ok()) << worker.status();
  return *std::move(worker);
}

// Commits the whole chain with the bytes of seed + index; keeps the pins.
std::vector<SlotId> PutChain(TestWorker& worker, const TestChain& chain, uint64_t seed) {
  const auto slots = worker.Reserve(static_cast<uint32_t>(chain.keys.size()));
  EXPECT_THAT(slots, SizeIs(chain.keys.size()));
  for (uint32_t i = 0; i < slots.size(); ++i) {
    EXPECT_EQ(
        worker.Commit(slots[i], chain.parent(i), i, chain.tokens[i], seed + i).status().code(), 0);
  }
  return slots;
}

TEST(KvStoreDaemonTest, WorkersOfOneHostShareCommittedBlocksInPlace) {
  StoreProcess store;
  ASSERT_TRUE(store.ready());
  auto prefill = Attached(store), decode = Attached(store);
  const TestChain chain("a", 3);
  const auto slots = PutChain(*prefill, chain, 50);
  EXPECT_EQ(decode->PinPrefix(chain.keys), slots);
  for (uint32_t i = 0; i < 3; ++i) EXPECT_TRUE(decode->Holds(slots[i], 50 + i));
  EXPECT_TRUE(store.AwaitMetric(kPinned, 6));
  prefill->Release(slots);
  decode->Release(slots);
  EXPECT_TRUE(store.AwaitMetric(kPinned, 0));
  EXPECT_EQ(store.Metric("antiphon_kvstore_objects{tier=\"dram\"}"), 3);
}

// More than the store takes from a connection at once.
TEST(KvStoreDaemonTest, CorkedCallsGoOutTogetherAndAreAnsweredInOrder) {
  constexpr uint64_t kCalls = 600;
  StoreProcess store;
  ASSERT_TRUE(store.ready());
  auto worker = Attached(store);
  absl::Mutex mu;
  std::vector<uint64_t> called, answered;
  const auto all = [&] {
    mu.AssertHeld();
    return answered.size() == kCalls;
  };
  worker->client().Cork();
  for (uint64_t i = 0; i < kCalls; ++i) {
    wire::StoreRequest request;
    request.mutable_pin_prefix()->add_keys(std::string(16, 'k'));
    called.push_back(worker->client().Call(request, [&](const wire::StoreReply& reply) {
      absl::MutexLock lock(&mu);
      EXPECT_EQ(reply.status().code(), 0) << reply.status().message();
      answered.push_back(reply.id());
    }));
  }
  absl::SleepFor(absl::Milliseconds(50));
  {
    absl::MutexLock lock(&mu);
    EXPECT_THAT(answered, IsEmpty());
  }
  worker->client().Uncork();
  {
    absl::MutexLock lock(&mu);
    EXPECT_TRUE(mu.AwaitWithTimeout(absl::Condition(&all), absl::Seconds(30)));
    EXPECT_EQ(answered, called);
  }
  EXPECT_THAT(worker->Reserve(1), SizeIs(1));  // and goes on
}

TEST(KvStoreDaemonTest, ARefusalOfWhatWasToldComesBack) {
  StoreProcess store;
  ASSERT_TRUE(store.ready());
  auto worker = Attached(store);
  const auto slots = worker->Reserve(1);
  ASSERT_THAT(slots, SizeIs(1));
  wire::StoreRequest release;
  *release.mutable_release()->add_slots() = SlotToProto(slots[0]);
  worker->client().Tell(release);
  EXPECT_TRUE(store.AwaitMetric(kReserved, 0));
  worker->client().Tell(release);  // not held any more
  EXPECT_NE(worker->AwaitRefusal().status().code(), 0);
  store.Kill(SIGKILL);
  EXPECT_TRUE(worker->AwaitLost());
  worker->client().Tell(release);  // nobody is there; nothing breaks
}

// By the bytes on the socket: an answer that says nothing would wake the worker for nothing.
TEST(KvStoreDaemonTest, QuietRequestsAreAnsweredOnlyWhenRefused) {
  StoreProcess store;
  ASSERT_TRUE(store.ready());
  const absl::Time deadline = Clock::Real().Now() + absl::Seconds(30);
  auto socket = ConnectToStore(store.socket_path());
  ASSERT_TRUE(socket.ok()) << socket.status();
  FrameCutter cutter;
  std::vector<int> fds;
  const auto next = [&] {
    auto reply = AwaitReply(socket->get(), cutter, deadline, fds);
    EXPECT_TRUE(reply.ok()) << reply.status();
    return reply.ok() ? *reply : wire::StoreReply();
  };
  const auto send = [&](const std::string& frames) {
    EXPECT_TRUE(SendAll(socket->get(), frames, -1, deadline).ok());
  };
  wire::StoreRequest attach, reserve, release;
  attach.set_id(1);
  *attach.mutable_attach()->mutable_hello() =
      MakeHello({.cluster = "antiphon", .node = NodeId("raw"), .incarnation = 1});
  *attach.mutable_attach()->mutable_layout() = LayoutToProto(kTestLayout);
  attach.mutable_attach()->mutable_fingerprint()->set_layout(kTestLayout.Text());
  reserve.set_id(2);
  reserve.mutable_reserve()->set_count(1);
  send(EncodeFrame(attach) + EncodeFrame(reserve));
  EXPECT_EQ(next().id(), 1u);
  for (int fd : fds) close(fd);
  fds.clear();
  const wire::StoreReply reserved = next();
  EXPECT_EQ(reserved.id(), 2u);
  ASSERT_EQ(reserved.slots().slots_size(), 1);

  release.set_quiet(true);
  *release.mutable_release()->add_slots() = reserved.slots().slots(0);
  std::string frames;
  for (uint64_t id : {3, 4}) {  // the second gives back what is not held
    release.set_id(id);
    frames += EncodeFrame(release);
  }
  reserve.set_id(5);
  reserve.set_quiet(true);  // says nothing here
  send(frames + EncodeFrame(reserve));
  const wire::StoreReply refused = next();
  EXPECT_EQ(refused.id(), 4u);
  EXPECT_NE(refused.status().code(), 0);
  const wire::StoreReply again = next();
  EXPECT_EQ(again.id(), 5u);
  EXPECT_EQ(again.slots().slots_size(), 1);
}

TEST(KvStoreDaemonTest, FullPoolEvictsWhatNobodyPinsAndElseRefuses) {
  StoreProcess store;
  ASSERT_TRUE(store.ready());
  auto worker = Attached(store);
  const uint32_t all = worker->client().slot_count();
  ASSERT_GT(all, 4u);
  const TestChain chain("a", 2);
  const auto pinned = PutChain(*worker, chain, 1);
  EXPECT_THAT(worker->Reserve(all), IsEmpty());
  EXPECT_THAT(worker->Reserve(all - 2), SizeIs(all - 2));
  EXPECT_THAT(worker->Reserve(1), IsEmpty());
  worker->Release(pinned);
  EXPECT_THAT(worker->Reserve(1), SizeIs(1));
  EXPECT_THAT(worker->PinPrefix(chain.keys), SizeIs(1));  // the leaf went first
}

TEST(KvStoreDaemonTest, PinsAPrefixAndReservesTheRestOrHoldsNothing) {
  StoreProcess store;
  ASSERT_TRUE(store.ready());
  auto worker = Attached(store);
  const uint32_t all = worker->client().slot_count();
  const TestChain chain("a", 2);
  const auto blocks = PutChain(*worker, chain, 1);
  worker->Release(blocks);
  const auto ask = [&](uint32_t reserve_to) {
    wire::StoreRequest request;
    for (const BlockKey& key : chain.keys) request.mutable_pin_prefix()->add_keys(key.ToBytes());
    request.mutable_pin_prefix()->set_reserve_to(reserve_to);
    return worker->Call(request);
  };
  EXPECT_EQ(ask(all + 1).status().code(), static_cast<int>(absl::StatusCode::kResourceExhausted));
  EXPECT_TRUE(store.AwaitMetric(kPinned, 0));
  EXPECT_EQ(ask(2).slots().reserved(), 0u);  // both are there
  worker->Release(blocks);
  const wire::StoreReply reply = ask(all);  // the pinned are not evicted for the others
  ASSERT_EQ(reply.slots().slots_size(), static_cast<int>(all));
  EXPECT_EQ(reply.slots().reserved(), all - 2);
  for (int i = 0; i < 2; ++i) EXPECT_EQ(SlotFromProto(reply.slots().slots(i)), blocks[i]);
  EXPECT_THAT(worker->Reserve(1), IsEmpty());
}

TEST(KvStoreDaemonTest, AWorkerThatEndsOrDetachesLeavesNothingHeld) {
  StoreProcess store;
  ASSERT_TRUE(store.ready());
  {
    auto worker = Attached(store);
    PutChain(*worker, TestChain("a", 2), 1);
    worker->Reserve(3);
    EXPECT_TRUE(store.AwaitMetric(kReserved, 3));
  }
  EXPECT_TRUE(store.AwaitMetric(kReserved, 0));
  EXPECT_TRUE(store.AwaitMetric(kPinned, 0));

  // Another process, killed while it holds.
  int pipe_fds[2];
  ASSERT_EQ(pipe(pipe_fds), 0);
  const pid_t child = fork();
  if (child == 0) {
    auto worker = TestWorker::Attach(store.socket_path());
    const bool ok = worker.ok() && (*worker)->Reserve(4).size() == 4;
    (void)!write(pipe_fds[1], ok ? "y" : "n", 1);
    pause();
    _exit(0);
  }
  char answer = 0;
  ASSERT_EQ(read(pipe_fds[0], &answer, 1), 1);
  EXPECT_EQ(answer, 'y');
  EXPECT_TRUE(store.AwaitMetric(kReserved, 4));
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  EXPECT_TRUE(store.AwaitMetric(kReserved, 0));
}

TEST(KvStoreDaemonTest, RefusesAnotherLayoutWithBothTexts) {
  StoreProcess store;
  ASSERT_TRUE(store.ready());
  auto worker = Attached(store);
  KvLayout other = kTestLayout;
  other.layers = 5;
  const auto refused = TestWorker::Attach(store.socket_path(), other);
  ASSERT_EQ(refused.status().code(), absl::StatusCode::kFailedPrecondition);
  const std::string text(refused.status().message());
  EXPECT_THAT(text, HasSubstr(kTestLayout.Text()));
  EXPECT_THAT(text, HasSubstr(other.Text()));
}

TEST(KvStoreDaemonTest, WhenTheStoreDiesItsWorkersAreTold) {
  StoreProcess store;
  ASSERT_TRUE(store.ready());
  auto worker = Attached(store);
  const auto slots = worker->Reserve(1);
  store.Kill(SIGKILL);
  EXPECT_TRUE(worker->AwaitLost());
  wire::StoreRequest request;
  request.mutable_reserve()->set_count(1);
  EXPECT_EQ(worker->Call(request).status().code(),
            static_cast<int>(absl::StatusCode::kUnavailable));
  worker->Fill(slots[0], 1);  // still mapped
}

TEST(KvStoreDaemonTest, GarbageOnTheSocketEndsOnlyItsConnection) {
  StoreProcess store;
  ASSERT_TRUE(store.ready());
  auto worker = Attached(store);
  for (const std::string& garbage :
       {std::string(64, '\xFF'), std::string(4, '\0'), std::string("\x08\0\0\0garbage!", 12),
        std::string("\x02\0\0\0\x08\x01", 6)}) {
    const int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    sockaddr_un to{};
    to.sun_family = AF_UNIX;
    std::strncpy(to.sun_path, store.socket_path().c_str(), sizeof(to.sun_path) - 1);
    ASSERT_EQ(connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof(to)), 0);
    ASSERT_EQ(write(fd, garbage.data(), garbage.size()), static_cast<ssize_t>(garbage.size()));
    shutdown(fd, SHUT_WR);
    char buffer[512];
    while (read(fd, buffer, sizeof(buffer)) > 0) {
    }
    close(fd);
    EXPECT_THAT(worker->Reserve(1), SizeIs(1));
  }
}

BlobOptions Named(const StoreProcess& store, const std::string& name, uint64_t bytes = 5 << 20) {
  return {.socket_path = store.socket_path(),
          .self = {.cluster = "antiphon", .node = NodeId("test"), .incarnation = 1},
          .name = name,
          .model = "m",
          .bytes = bytes};
}

std::byte* MapToWrite(const BlobLease& lease, size_t bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, lease.fd(), 0);
  EXPECT_NE(data, MAP_FAILED);
  return static_cast<std::byte*>(data);
}

constexpr char kBlobBytes[] = "antiphon_kvstore_blob_bytes";

TEST(KvStoreDaemonTest, ABlobIsFilledOnceAndOutlivesItsWorkers) {
  StoreProcess store;
  ASSERT_TRUE(store.ready());
  {
    auto filler = BlobLease::Open(Named(store, "image"));
    ASSERT_TRUE(filler.ok()) << filler.status();
    ASSERT_TRUE(filler->fill());
    absl::StatusOr<BlobLease> other = absl::UnknownError("");
    Thread waiter("waiter", [&] { other = BlobLease::Open(Named(store, "image")); });
    std::byte* data = MapToWrite(*filler, 5 << 20);
    EXPECT_EQ(data[77], std::byte{0});
    data[77] = std::byte{42};
    munmap(data, 5 << 20);
    EXPECT_TRUE(filler->Publish().ok());
    waiter.Join();
    ASSERT_TRUE(other.ok()) << other.status();
    EXPECT_FALSE(other->fill());
  }
  EXPECT_TRUE(store.AwaitMetric(kBlobBytes, 5 << 20));
  auto later = BlobLease::Open(Named(store, "image"));
  ASSERT_TRUE(later.ok()) << later.status();
  EXPECT_FALSE(later->fill());
  char byte = 0;
  EXPECT_EQ(pread(later->fd(), &byte, 1, 77), 1);
  EXPECT_EQ(byte, 42);
  // Nobody can write to it.
  EXPECT_EQ(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, later->fd(), 0), MAP_FAILED);
  EXPECT_EQ(pwrite(later->fd(), &byte, 1, 77), -1);
}

TEST(KvStoreDaemonTest, WhoWaitsForAFillerThatIsKilledFillsInItsPlace) {
  StoreProcess store;
  ASSERT_TRUE(store.ready());
  int pipe_fds[2];
  ASSERT_EQ(pipe(pipe_fds), 0);
  const pid_t child = fork();
  if (child == 0) {
    const auto lease = BlobLease::Open(Named(store, "image"));
    std::byte* data = lease.ok() && lease->fill() ? MapToWrite(*lease, 4096) : nullptr;
    if (data != nullptr) data[0] = std::byte{1};
    (void)!write(pipe_fds[1], data != nullptr ? "y" : "n", 1);
    pause();
    _exit(0);
  }
  char answer = 0;
  ASSERT_EQ(read(pipe_fds[0], &answer, 1), 1);
  EXPECT_EQ(answer, 'y');
  absl::StatusOr<BlobLease> other = absl::UnknownError("");
  Thread waiter("waiter", [&] { other = BlobLease::Open(Named(store, "image")); });
  EXPECT_TRUE(
      store.AwaitMetric("antiphon_kvstore_requests_total{op=\"open_blob\",result=\"ok\"}", 2));
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  waiter.Join();
  ASSERT_TRUE(other.ok()) << other.status();
  EXPECT_TRUE(other->fill());
  char byte = 1;
  EXPECT_EQ(pread(other->fd(), &byte, 1, 0), 1);
  EXPECT_EQ(byte, 0);
  EXPECT_TRUE(other->Publish().ok());
}

TEST(KvStoreDaemonTest, PatienceWithAFillerThatHangsEnds) {
  StoreProcess store;
  ASSERT_TRUE(store.ready());
  const auto filler = BlobLease::Open(Named(store, "image"));
  BlobOptions options = Named(store, "image");
  options.fill_patience = absl::Seconds(-4.9);  // of the five that a store gets to answer
  EXPECT_TRUE(absl::IsUnavailable(BlobLease::Open(options).status()));
}

TEST(KvStoreDaemonTest, BlobsOfHostileWorkersAreRefusedWithTheReason) {
  StoreProcess store;
  ASSERT_TRUE(store.ready());
  const auto refused = [&](BlobOptions options, const char* text) {
    const absl::Status status = BlobLease::Open(options).status();
    EXPECT_FALSE(status.ok());
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
  };
  auto held = BlobLease::Open(Named(store, "held", 100));
  ASSERT_TRUE(held.ok());
  ASSERT_TRUE(held->Publish().ok());
  EXPECT_THAT(std::string(held->Publish().message()), HasSubstr("fills no blob"));
  refused(Named(store, "held", 101), "held with 100 bytes");
  refused(Named(store, std::string(501, 'x')), "501 bytes");
  refused(Named(store, ""), "0 bytes");
  refused(Named(store, "large", ~uint64_t{0}), "larger than all may be");
  BlobOptions stranger = Named(store, "a");
  stranger.self.cluster = "another";
  refused(stranger, "another");

  auto mapped = BlobLease::Open(Named(store, "mapped", 4096));
  ASSERT_TRUE(mapped.ok());
  std::byte* data = MapToWrite(*mapped, 4096);
  EXPECT_THAT(std::string(mapped->Publish().message()), HasSubstr("still mapped for writing"));
  // The same of a worker that does not look itself.
  const auto fd = ConnectToStore(store.socket_path());
  ASSERT_TRUE(fd.ok());
  FrameCutter cutter;
  const auto ask = [&](const wire::StoreRequest& request, int passed, std::vector<int>& came) {
    const absl::Time deadline = Clock::Real().Now() + absl::Seconds(10);
    EXPECT_TRUE(SendAll(fd->get(), EncodeFrame(request), passed, deadline).ok());
    const auto reply = AwaitReply(fd->get(), cutter, deadline, came);
    EXPECT_TRUE(reply.ok()) << reply.status();
    return reply.ok() ? StatusOf(*reply) : reply.status();
  };
  std::vector<int> came;
  wire::StoreRequest request;
  request.set_id(1);
  request.mutable_publish_blob();
  EXPECT_THAT(std::string(ask(request, -1, came).message()), HasSubstr("fills no blob"));
  const Identity self{.cluster = "antiphon", .node = NodeId("raw"), .incarnation = 1};
  auto* open = request.mutable_open_blob();
  *open->mutable_hello() = MakeHello(self);
  open->set_name("raw");
  open->set_model("m");
  open->set_bytes(4096);
  EXPECT_TRUE(ask(request, -1, came).ok());
  ASSERT_THAT(came, SizeIs(1));
  void* raw = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, came[0], 0);
  request.mutable_publish_blob();
  EXPECT_THAT(std::string(ask(request, -1, came).message()), HasSubstr("still mapped for writing"));
  auto* offer = request.mutable_offer_blob();
  *offer->mutable_hello() = MakeHello(self);
  offer->set_name("offered");
  offer->set_model("m");
  offer->set_bytes(4096);
  EXPECT_THAT(std::string(ask(request, -1, came).message()), HasSubstr("no sealed memory"));
  EXPECT_THAT(std::string(ask(request, came[0], came).message()), HasSubstr("no sealed memory"));
  EXPECT_THAT(std::string(ask(request, fd->get(), came).message()), HasSubstr("no sealed memory"));
  munmap(raw, 4096);
  munmap(data, 4096);
  for (int passed : came) close(passed);
  EXPECT_THAT(Attached(store)->Reserve(1), SizeIs(1));
}

TEST(KvStoreDaemonTest, ABlobThatOutlivesItsStoreIsTakenByTheNext) {
  auto store = std::make_unique<StoreProcess>();
  ASSERT_TRUE(store->ready());
  auto lease = BlobLease::Open(Named(*store, "image"));
  ASSERT_TRUE(lease.ok());
  const char byte = 42;
  ASSERT_EQ(pwrite(lease->fd(), &byte, 1, 9), 1);
  store->Kill(SIGKILL);
  store->Wait();
  EXPECT_TRUE(absl::IsUnavailable(lease->Publish()));
  store = std::make_unique<StoreProcess>();
  ASSERT_TRUE(store->ready());
  const auto offered = BlobLease::Offer(Named(*store, "image"), lease->fd());
  ASSERT_TRUE(offered.ok()) << offered.status();
  EXPECT_TRUE(
      absl::IsAlreadyExists(BlobLease::Offer(Named(*store, "image"), lease->fd()).status()));
  const auto other = BlobLease::Open(Named(*store, "image"));
  ASSERT_TRUE(other.ok());
  char seen = 0;
  EXPECT_EQ(pread(other->fd(), &seen, 1, 9), 1);
  EXPECT_EQ(seen, 42);
}

TEST(KvStoreDaemonTest, ASecondStoreInOneFolderIsRefused) {
  StoreProcess store;
  ASSERT_TRUE(store.ready());
  StoreProcess second({"--cluster.runtime_dir=" + store.dir()});
  EXPECT_FALSE(second.ready());
  auto worker = Attached(store);
  EXPECT_THAT(worker->Reserve(1), SizeIs(1));
}

TEST(KvStoreDaemonTest, APoolThatDoesNotFitIsRefusedWithBothSizes) {
  StoreProcess store({"--kvstore.pool=64TiB"});
  EXPECT_FALSE(store.ready());
  EXPECT_TRUE(WIFEXITED(store.Wait()));
}

TEST(KvStoreDaemonTest, SigtermEndsItOnceItsWorkersHaveLeft) {
  StoreProcess store;
  ASSERT_TRUE(store.ready());
  {
    auto worker = Attached(store);
    store.Kill(SIGTERM);
    EXPECT_THAT(worker->PinPrefix({}), IsEmpty());  // still served
  }
  const int status = store.Wait();
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

}  // namespace
}  // namespace antiphon::kvstore
