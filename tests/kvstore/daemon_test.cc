// Two real stores and their workers on one machine: what one host does, what two do over TCP, and
// what happens when somebody dies or talks nonsense.
#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>

#include "common/net.h"
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
