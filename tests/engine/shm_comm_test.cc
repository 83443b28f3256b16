#include "engine/shm_comm.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <csignal>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "common/clock.h"
#include "common/status_macros.h"
#include "tests/engine/random.h"
#include "tests/engine/ranks.h"

namespace antiphon::engine {
namespace {

// For operations that are to end: far more than they take.
constexpr absl::Duration kLong = absl::Seconds(60);
// Within this a rank's death must be known.
constexpr absl::Duration kSoon = absl::Seconds(10);

SharedMemory Group(int size, size_t piece_bytes = size_t{1} << 20) {
  auto group = ShmComm::MakeGroup({.size = size, .piece_bytes = piece_bytes});
  EXPECT_TRUE(group.ok()) << group.status().ToString();
  return *std::move(group);
}

std::unique_ptr<ShmComm> Joined(const SharedMemory& group, int rank) {
  auto comm = ShmComm::Join(group.fd(), rank, kLong);
  EXPECT_TRUE(comm.ok()) << comm.status().ToString();
  return comm.ok() ? *std::move(comm) : nullptr;
}

// Of such different sizes that every order of adding gives other bits.
std::vector<float> ValuesOf(int rank, size_t count, uint64_t seed) {
  TestRandom random(1000 * seed + static_cast<uint64_t>(rank));
  std::vector<float> values(count);
  for (float& x : values)
    x = random.Normal() * std::ldexp(1.0f, static_cast<int>(random.Below(24)));
  return values;
}

std::vector<float> SumOf(int size, size_t count, uint64_t seed) {
  std::vector<float> sum = ValuesOf(0, count, seed);
  for (int r = 1; r < size; ++r) {
    const std::vector<float> values = ValuesOf(r, count, seed);
    for (size_t i = 0; i < count; ++i) sum[i] += values[i];
  }
  return sum;
}

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), 4 * a.size()) == 0);
}

std::vector<std::byte> BytesOf(int rank, size_t count, uint64_t seed) {
  TestRandom random(2000 * seed + static_cast<uint64_t>(rank));
  std::vector<std::byte> bytes(count);
  for (std::byte& b : bytes) b = static_cast<std::byte>(random.Bits());
  return bytes;
}

void ExpectSums(ShmComm& comm, const std::vector<size_t>& lengths) {
  for (size_t length : lengths) {
    std::vector<float> values = ValuesOf(comm.rank(), length, length);
    const absl::Status status = comm.AllReduceSum(absl::MakeSpan(values), kLong);
    ASSERT_TRUE(status.ok()) << status.ToString();
    EXPECT_TRUE(SameBits(values, SumOf(comm.size(), length, length))) << length;
  }
}

void ExpectBytesTravel(ShmComm& comm, const std::vector<size_t>& lengths) {
  for (size_t length : lengths) {
    for (int root = 0; root < comm.size(); ++root) {
      std::vector<std::byte> bytes = BytesOf(comm.rank(), length, length);
      ASSERT_TRUE(comm.Broadcast(absl::MakeSpan(bytes), root, kLong).ok());
      EXPECT_TRUE(bytes == BytesOf(root, length, length)) << length << " from " << root;

      const std::vector<std::byte> mine = BytesOf(comm.rank(), length, length + 1);
      std::vector<std::byte> all;
      if (comm.rank() == root) all.resize(length * static_cast<size_t>(comm.size()));
      ASSERT_TRUE(comm.Gather(mine, absl::MakeSpan(all), root, kLong).ok());
      if (comm.rank() != root) continue;
      for (int r = 0; r < comm.size(); ++r) {
        const auto begin = all.begin() + static_cast<ptrdiff_t>(length) * r;
        EXPECT_TRUE(std::vector<std::byte>(begin, begin + static_cast<ptrdiff_t>(length)) ==
                    BytesOf(r, length, length + 1))
            << length << " of rank " << r;
      }
    }
  }
}

// Below, at and above the line between the two ways to add, and of more than one piece.
const std::vector<size_t> kFloats = {0, 1, 3, 17, 63, 1000, 8192, 8193, 20011};
const std::vector<size_t> kBytes = {0, 1, 7, 4096, 33333, 70001};

TEST(ShmCommTest, ThreadsGetTheSumInTheOrderOfTheRanks) {
  for (int size : {1, 2, 3, 4}) {
    const SharedMemory group = Group(size, 36 << 10);
    RunThreads(size, [&](int rank) { ExpectSums(*Joined(group, rank), kFloats); });
  }
}

TEST(ShmCommTest, ProcessesGetTheSumInTheOrderOfTheRanks) {
  for (int size : {1, 2, 3, 4}) {
    const SharedMemory group = Group(size, 36 << 10);
    RunProcesses(size, [&](int rank) { ExpectSums(*Joined(group, rank), kFloats); });
  }
}

TEST(ShmCommTest, BytesGoFromOneToAllAndFromAllToOne) {
  for (int size : {1, 2, 3, 4}) {
    const SharedMemory group = Group(size, 32 << 10);
    RunThreads(size, [&](int rank) { ExpectBytesTravel(*Joined(group, rank), kBytes); });
    const SharedMemory processes = Group(size, 32 << 10);
    RunProcesses(size, [&](int rank) { ExpectBytesTravel(*Joined(processes, rank), kBytes); });
  }
}

// More ranks than a small machine has cores, every operation behind every other, sizes at random;
// the stage counter wraps on the way.
TEST(ShmCommTest, ThousandsOfMixedOperationsStayInStep) {
  const SharedMemory group = Group(4, 4096);
  RunProcesses(4, [&](int rank) {
    const auto comm = Joined(group, rank);
    TestRandom random(5);  // the same on all ranks
    for (uint64_t round = 0; round < 4000; ++round) {
      const size_t length = 1 + random.Below(600);
      const int root = static_cast<int>(random.Below(4));
      switch (random.Below(4)) {
        case 0: {
          std::vector<float> values = ValuesOf(rank, length, round);
          ASSERT_TRUE(comm->AllReduceSum(absl::MakeSpan(values), kLong).ok());
          ASSERT_TRUE(SameBits(values, SumOf(4, length, round))) << round;
          break;
        }
        case 1: {
          std::vector<std::byte> bytes = BytesOf(rank, length, round);
          ASSERT_TRUE(comm->Broadcast(absl::MakeSpan(bytes), root, kLong).ok());
          ASSERT_TRUE(bytes == BytesOf(root, length, round)) << round;
          break;
        }
        case 2: {
          const std::vector<std::byte> mine = BytesOf(rank, length, round);
          std::vector<std::byte> all(rank == root ? 4 * length : 0);
          ASSERT_TRUE(comm->Gather(mine, absl::MakeSpan(all), root, kLong).ok());
          for (int r = 0; rank == root && r < 4; ++r) {
            ASSERT_EQ(std::memcmp(all.data() + static_cast<size_t>(r) * length,
                                  BytesOf(r, length, round).data(), length),
                      0)
                << round;
          }
          break;
        }
        default:
          ASSERT_TRUE(comm->Barrier(kLong).ok());
      }
    }
  });
}

TEST(ShmCommTest, ABarrierHoldsUntilTheLastHasCome) {
  const SharedMemory group = Group(3);
  std::atomic<int> came{0};
  RunThreads(3, [&](int rank) {
    const auto comm = Joined(group, rank);
    for (int round = 1; round <= 300; ++round) {
      came.fetch_add(1);
      ASSERT_TRUE(comm->Barrier(kLong).ok());
      EXPECT_GE(came.load(), 3 * round);
      ASSERT_TRUE(comm->Barrier(kLong).ok());
    }
  });
}

// Sums until they fail, and then says how.
absl::Status SumUntilItFails(ShmComm& comm, size_t length) {
  std::vector<float> values(length, 1.0f);
  while (true) RETURN_IF_ERROR(comm.AllReduceSum(absl::MakeSpan(values), absl::InfiniteDuration()));
}

TEST(ShmCommTest, AKilledRankEndsTheOthersWaits) {
  for (size_t length : {size_t{100}, size_t{100000}}) {  // both ways to add
    const SharedMemory group = Group(4);
    std::vector<pid_t> ranks;
    for (int rank = 1; rank < 4; ++rank) {
      ranks.push_back(ForkRank([&, rank] {
        const absl::Status status = SumUntilItFails(*Joined(group, rank), length);
        EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status.ToString();
      }));
    }
    const auto comm = Joined(group, 0);
    std::vector<float> values(length, 1.0f);
    for (int i = 0; i < 50; ++i) {
      ASSERT_TRUE(comm->AllReduceSum(absl::MakeSpan(values), kLong).ok());
    }
    ASSERT_EQ(kill(ranks[1], SIGKILL), 0);
    const absl::Time begin = Clock::Real().Now();
    const absl::Status status = SumUntilItFails(*comm, length);
    EXPECT_LT(Clock::Real().Now() - begin, kSoon);
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
    EXPECT_NE(std::string(status.message()).find("rank 2"), std::string::npos) << status.ToString();
    EXPECT_EQ(comm->Barrier(kLong), status) << "a broken group stays broken";
    EXPECT_EQ(WaitForRank(ranks[0]), 0);
    EXPECT_EQ(WaitForRank(ranks[1]), 128 + SIGKILL);
    EXPECT_EQ(WaitForRank(ranks[2]), 0);
  }
}

TEST(ShmCommTest, ARankThatNeverComesIsNamedAtTheDeadline) {
  const SharedMemory group = Group(3);
  RunThreads(2, [&](int rank) {
    const absl::Time begin = Clock::Real().Now();
    const auto comm = ShmComm::Join(group.fd(), rank, absl::Milliseconds(100));
    const absl::Duration took = Clock::Real().Now() - begin;
    EXPECT_LT(took, kSoon);
    ASSERT_FALSE(comm.ok());
    if (absl::IsUnavailable(comm.status())) return;  // the other one gave up first
    EXPECT_GE(took, absl::Milliseconds(100));
    EXPECT_EQ(comm.status().code(), absl::StatusCode::kDeadlineExceeded);
    EXPECT_EQ(comm.status().message(), "rank 2 of 3 did not join in time");
  });
}

TEST(ShmCommTest, ARankThatHangsFindsTheGroupBrokenWhenItComesBack) {
  const SharedMemory group = Group(2);
  int wake[2];
  ASSERT_EQ(pipe(wake), 0);
  const pid_t child = ForkRank([&] {
    const auto comm = Joined(group, 1);
    char byte;
    EXPECT_EQ(read(wake[0], &byte, 1), 1);
    const absl::Status status = comm->Barrier(kLong);
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
    EXPECT_NE(std::string(status.message()).find("rank 0 gave up: rank 1"), std::string::npos)
        << status.ToString();
  });
  const auto comm = Joined(group, 0);
  const absl::Status status = comm->Barrier(absl::Milliseconds(50));
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_NE(std::string(status.message()).find("did not come to a barrier"), std::string::npos);
  ASSERT_EQ(write(wake[1], "x", 1), 1);
  EXPECT_EQ(WaitForRank(child), 0);
  close(wake[0]);
  close(wake[1]);
}

TEST(ShmCommTest, AbortEndsAWaitFromAnotherThreadOrRank) {
  const SharedMemory group = Group(3);
  std::atomic<int> waiting{0};
  RunThreads(3, [&](int rank) {
    const auto comm = Joined(group, rank);
    if (rank == 0) {
      while (waiting.load() < 2) sched_yield();
      comm->Abort(absl::CancelledError("the model is gone"));
      return;
    }
    std::byte byte{};
    waiting.fetch_add(1);
    const absl::Status status =
        comm->Broadcast(absl::MakeSpan(&byte, 1), 0, absl::InfiniteDuration());
    EXPECT_EQ(status, absl::UnavailableError("rank 0 gave up: the model is gone"));
  });
  const SharedMemory alone = Group(2);
  std::atomic<bool> aborted{false};
  RunThreads(2, [&](int rank) {
    const auto comm = Joined(alone, rank);
    if (rank == 1) {
      while (!aborted.load()) sched_yield();
      return;
    }
    std::vector<float> values(100, 1.0f);
    Thread aborts("abort", [&] { comm->Abort(absl::CancelledError("enough")); });
    const absl::Status status =
        comm->AllReduceSum(absl::MakeSpan(values), absl::InfiniteDuration());
    EXPECT_EQ(status.message(), "enough");
    aborted.store(true);
  });
}

TEST(ShmCommTest, RanksThatCallDifferentOperationsAreToldSo) {
  const SharedMemory group = Group(2);
  std::atomic<int> told{0};
  RunThreads(2, [&](int rank) {
    const auto comm = Joined(group, rank);
    std::vector<float> values(rank == 0 ? 10u : 11u);
    const absl::Status status = comm->AllReduceSum(absl::MakeSpan(values), kLong);
    EXPECT_FALSE(status.ok());
    if (status.code() == absl::StatusCode::kInternal) told.fetch_add(1);
    EXPECT_NE(std::string(status.message()).find("out of step"), std::string::npos);
  });
  EXPECT_GE(told.load(), 1);
}

TEST(ShmCommTest, ARankThatLeavesIsNotWaitedForButSpoilsNothingItDid) {
  const SharedMemory group = Group(3);
  RunThreads(3, [&](int rank) {
    const auto comm = Joined(group, rank);
    std::vector<float> values(10, 1.0f);
    ASSERT_TRUE(comm->AllReduceSum(absl::MakeSpan(values), kLong).ok());
    if (rank == 2) return;
    EXPECT_EQ(values[9], 3.0f);
    const absl::Status status = comm->AllReduceSum(absl::MakeSpan(values), kLong);
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
    EXPECT_NE(std::string(status.message()).find("has left"), std::string::npos);
  });
}

TEST(ShmCommTest, WrongMemoryAndWrongRanksAreRefused) {
  const SharedMemory group = Group(1);
  const auto refused = [](int fd, int rank) {
    return ShmComm::Join(fd, rank, kLong).status().code();
  };
  EXPECT_EQ(refused(group.fd(), 1), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(refused(group.fd(), -1), absl::StatusCode::kInvalidArgument);
  const auto comm = Joined(group, 0);
  EXPECT_EQ(refused(group.fd(), 0), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(refused(-1, 0), absl::StatusCode::kInvalidArgument);
  auto other = SharedMemory::Create("other", 1 << 20);
  ASSERT_TRUE(other.ok());
  EXPECT_EQ(refused(other->fd(), 0), absl::StatusCode::kInvalidArgument);
  const int unsealed = memfd_create("unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  ASSERT_EQ(ftruncate(unsealed, 1 << 20), 0);
  EXPECT_EQ(refused(unsealed, 0), absl::StatusCode::kInvalidArgument);
  close(unsealed);
  EXPECT_EQ(ShmComm::MakeGroup({.size = 0}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ShmComm::MakeGroup({.size = 1, .piece_bytes = 0}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace antiphon::engine
