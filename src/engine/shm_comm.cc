#include "engine/shm_comm.h"

#include <linux/futex.h>
#include <poll.h>
#include <spdlog/fmt/fmt.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <new>
#include <string>
#include <utility>

#include "common/clock.h"
#include "common/status_macros.h"
#include "engine/pause.h"

namespace antiphon::engine {
namespace {

constexpr uint64_t kMagic = 0x414e5449434f4d31;  // ANTICOM1
// Some ten microseconds: longer than balanced ranks are apart, shorter than a scheduler's slice.
constexpr int kSpins = 200;
constexpr absl::Duration kSleepMin = absl::Milliseconds(2);
constexpr absl::Duration kSleepMax = absl::Milliseconds(100);
// Up to here every rank adds all of a sum itself, which waits once; larger ones are shared out.
constexpr size_t kShownBytesMax = 32 << 10;
constexpr size_t kShareFloats = 16;  // a share begins on a cache line
constexpr size_t kPieceBytesMin = 64;
constexpr size_t kPieceBytesMax = size_t{64} << 20;
// Counting starts just below its wrap, so that a wrap is what every test sees.
constexpr uint32_t kFirstStage = uint32_t{0} - 1000;

enum Kind : uint32_t { kBarrier, kReduceShown, kReduceShared, kBroadcast, kGather };
constexpr std::string_view kKindNames[] = {"barrier", "sum", "shared sum", "broadcast", "gather"};

std::string_view NameOf(uint32_t kind) {
  return kind < std::size(kKindNames) ? kKindNames[kind] : "unknown operation";
}

// Between processes, so not the private variant that std::atomic::wait uses.
void FutexWait(const std::atomic<uint32_t>& word, uint32_t seen, absl::Duration timeout) {
  const timespec t = absl::ToTimespec(timeout);
  syscall(SYS_futex, reinterpret_cast<const uint32_t*>(&word), FUTEX_WAIT, seen, &t, nullptr, 0);
}

void FutexWake(const std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<const uint32_t*>(&word), FUTEX_WAKE, INT32_MAX, nullptr,
          nullptr, 0);
}

bool Reached(uint32_t stage, uint32_t wanted) { return static_cast<int32_t>(stage - wanted) >= 0; }

size_t RoundUp(size_t n, size_t to) { return (n + to - 1) / to * to; }

void Add(const float* x, size_t count, float* sum) {
  for (size_t i = 0; i < count; ++i) sum[i] += x[i];
}

}  // namespace

struct ShmComm::Rank {
  alignas(64) std::atomic<uint32_t> stage{kFirstStage};  // the futex that others sleep on
  std::atomic<uint32_t> sleepers{0};
  alignas(64) std::atomic<int32_t> pid{0};  // 0: not come yet
  std::atomic<uint32_t> left{0};
  Operation operations[2] = {};  // by the stage's parity, as the halves
  char why[256] = {};            // of the rank that broke the group
};

struct ShmComm::Group {
  uint64_t magic;
  uint32_t size;
  uint64_t half_bytes;
  std::atomic<uint32_t> broken{0};  // 1 + the rank that broke it
  Rank ranks[kShmRanksMax];

  static size_t HeaderBytes() { return RoundUp(sizeof(Group), 4096); }
  static size_t TotalBytes(uint32_t size, uint64_t half_bytes) {
    return HeaderBytes() + 2 * size * half_bytes;
  }
};

static_assert(std::atomic<uint32_t>::is_always_lock_free);
static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t));

absl::StatusOr<SharedMemory> ShmComm::MakeGroup(const ShmGroupOptions& options) {
  if (options.size < 1 || options.size > kShmRanksMax) {
    return absl::InvalidArgumentError(
        fmt::format("a group's size is 1 to {}, not {}", kShmRanksMax, options.size));
  }
  if (options.piece_bytes < kPieceBytesMin || options.piece_bytes > kPieceBytesMax) {
    return absl::InvalidArgumentError(fmt::format("a group's piece_bytes is {} to {}, not {}",
                                                  kPieceBytesMin, kPieceBytesMax,
                                                  options.piece_bytes));
  }
  const uint32_t size = static_cast<uint32_t>(options.size);
  const size_t half = RoundUp(options.piece_bytes, 64);
  ASSIGN_OR_RETURN(SharedMemory memory,
                   SharedMemory::Create("antiphon-comm", Group::TotalBytes(size, half)));
  Group* group = new (memory.data()) Group;
  group->magic = kMagic;
  group->size = size;
  group->half_bytes = half;
  return memory;
}

absl::StatusOr<std::unique_ptr<ShmComm>> ShmComm::Join(int fd, int rank, absl::Duration timeout) {
  ASSIGN_OR_RETURN(SharedMemory memory, SharedMemory::Map(fd, Group::HeaderBytes()));
  auto* group = reinterpret_cast<Group*>(memory.data());
  if (group->magic != kMagic || group->size < 1 || group->size > kShmRanksMax ||
      group->half_bytes > kPieceBytesMax ||
      memory.bytes() < Group::TotalBytes(group->size, group->half_bytes)) {
    return absl::InvalidArgumentError("the shared memory is not a group of ranks");
  }
  if (rank < 0 || rank >= static_cast<int>(group->size)) {
    return absl::InvalidArgumentError(
        fmt::format("there is no rank {} in a group of {}", rank, group->size));
  }
  int32_t nobody = 0;
  if (!group->ranks[rank].pid.compare_exchange_strong(nobody, getpid())) {
    return absl::AlreadyExistsError(
        fmt::format("rank {} is taken by process {} already", rank, nobody));
  }
  std::unique_ptr<ShmComm> comm(new ShmComm(std::move(memory), rank));
  RETURN_IF_ERROR(comm->Barrier(timeout));
  return comm;
}

ShmComm::ShmComm(SharedMemory memory, int rank)
    : memory_(std::move(memory)),
      group_(reinterpret_cast<Group*>(memory_.data())),
      rank_(rank),
      size_(static_cast<int>(group_->size)),
      half_bytes_(group_->half_bytes),
      stage_(kFirstStage),
      pidfds_(static_cast<size_t>(size_), -1) {}

ShmComm::~ShmComm() {
  Rank& mine = group_->ranks[rank_];
  mine.left.store(1, std::memory_order_release);
  FutexWake(mine.stage);
  for (int fd : pidfds_) {
    if (fd >= 0) close(fd);
  }
}

std::byte* ShmComm::Half(int rank, uint32_t stage) const {
  return memory_.data() + Group::HeaderBytes() +
         (2 * static_cast<size_t>(rank) + stage % 2) * half_bytes_;
}

absl::Status ShmComm::AllReduceSum(absl::Span<float> values, absl::Duration timeout) {
  const absl::Time deadline = Clock::Real().Now() + timeout;
  const size_t piece = half_bytes_ / sizeof(float);
  for (size_t at = 0; at < values.size(); at += piece) {
    const absl::Span<float> part = values.subspan(at, piece);
    RETURN_IF_ERROR(part.size() * sizeof(float) <= kShownBytesMax ? ReduceShown(part, deadline)
                                                                  : ReduceShared(part, deadline));
  }
  return absl::OkStatus();
}

absl::Status ShmComm::ReduceShown(absl::Span<float> values, absl::Time deadline) {
  const size_t bytes = values.size() * sizeof(float);
  const Operation operation{kReduceShown, 0, bytes};
  RETURN_IF_ERROR(Begin(operation, deadline));
  std::memcpy(Half(rank_, stage_), values.data(), bytes);
  Publish();
  for (int r = 0; r < size_; ++r) {
    RETURN_IF_ERROR(AwaitData(r, operation, deadline));
    const auto* x = reinterpret_cast<const float*>(Half(r, stage_));
    if (r == 0) {
      std::memcpy(values.data(), x, bytes);
    } else {
      Add(x, values.size(), values.data());
    }
  }
  return absl::OkStatus();
}

absl::Status ShmComm::ReduceShared(absl::Span<float> values, absl::Time deadline) {
  const size_t bytes = values.size() * sizeof(float);
  const size_t share = RoundUp(
      (values.size() + static_cast<size_t>(size_) - 1) / static_cast<size_t>(size_), kShareFloats);
  const auto begin_of = [&](int r) {
    return std::min(static_cast<size_t>(r) * share, values.size());
  };
  const Operation operation{kReduceShared, 0, bytes};
  RETURN_IF_ERROR(Begin(operation, deadline));
  const uint32_t shown = stage_;
  std::memcpy(Half(rank_, shown), values.data(), bytes);
  Publish();
  // This rank's share of the sum.
  const size_t begin = begin_of(rank_), count = begin_of(rank_ + 1) - begin;
  for (int r = 0; r < size_; ++r) {
    RETURN_IF_ERROR(AwaitData(r, operation, deadline));
    const float* x = reinterpret_cast<const float*>(Half(r, shown)) + begin;
    if (r == 0) {
      std::copy_n(x, count, values.data() + begin);
    } else {
      Add(x, count, values.data() + begin);
    }
  }
  RETURN_IF_ERROR(Begin(operation, deadline));
  std::memcpy(Half(rank_, stage_), values.data() + begin, count * sizeof(float));
  Publish();
  for (int r = 0; r < size_; ++r) {
    RETURN_IF_ERROR(AwaitData(r, operation, deadline));
    std::memcpy(values.data() + begin_of(r), Half(r, stage_),
                (begin_of(r + 1) - begin_of(r)) * sizeof(float));
  }
  return absl::OkStatus();
}

absl::Status ShmComm::Broadcast(absl::Span<std::byte> bytes, int root, absl::Duration timeout) {
  CHECK(root >= 0 && root < size_);
  const absl::Time deadline = Clock::Real().Now() + timeout;
  for (size_t at = 0; at < bytes.size(); at += half_bytes_) {
    const absl::Span<std::byte> part = bytes.subspan(at, half_bytes_);
    const Operation operation{kBroadcast, static_cast<uint32_t>(root), part.size()};
    RETURN_IF_ERROR(Begin(operation, deadline));
    if (rank_ == root) std::memcpy(Half(rank_, stage_), part.data(), part.size());
    Publish();
    if (rank_ == root) continue;
    RETURN_IF_ERROR(AwaitData(root, operation, deadline));
    std::memcpy(part.data(), Half(root, stage_), part.size());
  }
  return absl::OkStatus();
}

absl::Status ShmComm::Gather(absl::Span<const std::byte> mine, absl::Span<std::byte> all, int root,
                             absl::Duration timeout) {
  CHECK(root >= 0 && root < size_);
  CHECK(rank_ != root || all.size() == mine.size() * static_cast<size_t>(size_));
  const absl::Time deadline = Clock::Real().Now() + timeout;
  for (size_t at = 0; at < mine.size(); at += half_bytes_) {
    const absl::Span<const std::byte> part = mine.subspan(at, half_bytes_);
    const Operation operation{kGather, static_cast<uint32_t>(root), part.size()};
    RETURN_IF_ERROR(Begin(operation, deadline));
    if (rank_ != root) {
      std::memcpy(Half(rank_, stage_), part.data(), part.size());
      Publish();
      continue;
    }
    Publish();
    for (int r = 0; r < size_; ++r) {
      std::byte* out = all.data() + static_cast<size_t>(r) * mine.size() + at;
      if (r != root) RETURN_IF_ERROR(AwaitData(r, operation, deadline));
      std::memcpy(out, r == root ? part.data() : Half(r, stage_), part.size());
    }
  }
  return absl::OkStatus();
}

absl::Status ShmComm::Barrier(absl::Duration timeout) {
  const absl::Time deadline = Clock::Real().Now() + timeout;
  const Operation operation{kBarrier, 0, 0};
  RETURN_IF_ERROR(Begin(operation, deadline));
  Publish();
  return AwaitAll(operation, deadline);
}

void ShmComm::Abort(const absl::Status& why) { (void)Break(why); }

absl::Status ShmComm::Begin(const Operation& operation, absl::Time deadline) {
  if (group_->broken.load(std::memory_order_acquire) != 0) return Broken();
  for (int r = 0; r < size_; ++r) {
    RETURN_IF_ERROR(AwaitStage(r, stage_, NameOf(operation.kind), deadline));
  }
  ++stage_;
  group_->ranks[rank_].operations[stage_ % 2] = operation;
  return absl::OkStatus();
}

void ShmComm::Publish() {
  Rank& mine = group_->ranks[rank_];
  // Ordered before the look at the sleepers, as a sleeper's count is before its last look here.
  mine.stage.store(stage_, std::memory_order_seq_cst);
  if (mine.sleepers.load(std::memory_order_seq_cst) != 0) FutexWake(mine.stage);
}

absl::Status ShmComm::AwaitData(int rank, const Operation& operation, absl::Time deadline) {
  RETURN_IF_ERROR(AwaitStage(rank, stage_, NameOf(operation.kind), deadline));
  const Operation theirs = group_->ranks[rank].operations[stage_ % 2];
  if (theirs == operation) return absl::OkStatus();
  return Break(absl::InternalError(fmt::format(
      "ranks out of step: rank {} is in a {} of {} bytes from {}, rank {} in a {} of {} from {}",
      rank_, NameOf(operation.kind), operation.bytes, operation.root, rank, NameOf(theirs.kind),
      theirs.bytes, theirs.root)));
}

absl::Status ShmComm::AwaitAll(const Operation& operation, absl::Time deadline) {
  for (int r = 0; r < size_; ++r) RETURN_IF_ERROR(AwaitData(r, operation, deadline));
  return absl::OkStatus();
}

absl::Status ShmComm::AwaitStage(int rank, uint32_t stage, std::string_view what,
                                 absl::Time deadline) {
  const std::atomic<uint32_t>& theirs = group_->ranks[rank].stage;
  for (int i = 0; i < kSpins; ++i) {
    if (Reached(theirs.load(std::memory_order_acquire), stage)) return absl::OkStatus();
    Pause();
  }
  return Sleep(rank, stage, what, deadline);
}

absl::Status ShmComm::Sleep(int rank, uint32_t stage, std::string_view what, absl::Time deadline) {
  Rank& theirs = group_->ranks[rank];
  absl::Duration slice = kSleepMin;
  while (true) {
    if (group_->broken.load(std::memory_order_acquire) != 0) return Broken();
    const absl::Duration left = deadline - Clock::Real().Now();
    theirs.sleepers.fetch_add(1, std::memory_order_seq_cst);
    const uint32_t seen = theirs.stage.load(std::memory_order_seq_cst);
    if (!Reached(seen, stage) && left > absl::ZeroDuration()) {
      FutexWait(theirs.stage, seen, std::min(slice, left));
    }
    theirs.sleepers.fetch_sub(1, std::memory_order_relaxed);
    if (Reached(theirs.stage.load(std::memory_order_acquire), stage)) return absl::OkStatus();
    if (absl::Status missing = Missing(stage); !missing.ok()) {
      // Whoever broke the group before it left has said why.
      if (group_->broken.load(std::memory_order_acquire) != 0) return Broken();
      return Break(std::move(missing));
    }
    if (left <= absl::ZeroDuration()) {
      return Break(absl::DeadlineExceededError(
          theirs.pid.load() == 0 ? fmt::format("rank {} of {} did not join in time", rank, size_)
                                 : fmt::format("rank {} (process {}) did not come to a {} in time",
                                               rank, theirs.pid.load(), what)));
    }
    slice = std::min(2 * slice, kSleepMax);
  }
}

absl::Status ShmComm::Missing(uint32_t stage) {
  for (int r = 0; r < size_; ++r) {
    const Rank& theirs = group_->ranks[r];
    if (Reached(theirs.stage.load(std::memory_order_acquire), stage)) continue;
    const bool left = theirs.left.load(std::memory_order_acquire) != 0;
    if (!left && !Dead(r)) continue;
    // It may have come between the two looks.
    if (Reached(theirs.stage.load(std::memory_order_acquire), stage)) continue;
    return absl::UnavailableError(
        fmt::format("rank {} (process {}) {}", r, theirs.pid.load(), left ? "has left" : "died"));
  }
  return absl::OkStatus();
}

bool ShmComm::Dead(int rank) {
  const pid_t pid = group_->ranks[rank].pid.load();
  if (pid == 0 || pid == getpid()) return false;
  int& pidfd = pidfds_[static_cast<size_t>(rank)];
  if (pidfd < 0) {
    pidfd = static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
    if (pidfd < 0) return errno == ESRCH || (kill(pid, 0) != 0 && errno == ESRCH);
  }
  pollfd poll_for{.fd = pidfd, .events = POLLIN};
  return poll(&poll_for, 1, 0) == 1;
}

absl::Status ShmComm::Break(absl::Status why) {
  absl::MutexLock lock(&mu_);
  if (!broken_.ok()) return broken_;
  broken_ = std::move(why);
  Rank& mine = group_->ranks[rank_];
  const std::string text(broken_.message());
  std::memcpy(mine.why, text.data(), std::min(text.size(), sizeof(mine.why) - 1));
  uint32_t nobody = 0;
  group_->broken.compare_exchange_strong(nobody, static_cast<uint32_t>(rank_) + 1,
                                         std::memory_order_acq_rel);
  for (int r = 0; r < size_; ++r) FutexWake(group_->ranks[r].stage);
  return broken_;
}

absl::Status ShmComm::Broken() {
  absl::MutexLock lock(&mu_);
  if (!broken_.ok()) return broken_;
  const uint32_t by = group_->broken.load(std::memory_order_acquire) - 1;
  if (by >= static_cast<uint32_t>(size_)) return broken_ = absl::UnavailableError("group broken");
  const char* why = group_->ranks[by].why;
  broken_ = absl::UnavailableError(fmt::format(
      "rank {} gave up: {}", by, std::string_view(why, strnlen(why, sizeof(Rank::why)))));
  return broken_;
}

}  // namespace antiphon::engine
