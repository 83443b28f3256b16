// A Comm between processes of one host, or threads of one process, over shared memory.
//
// One process makes the group's memory and hands its descriptor to the others (inheritance,
// SCM_RIGHTS); each then joins under its own rank:
//
//   ASSIGN_OR_RETURN(SharedMemory group, ShmComm::MakeGroup({.size = 4}));
//   ... in every process:
//   ASSIGN_OR_RETURN(auto comm, ShmComm::Join(group.fd(), rank, absl::Seconds(30)));
#ifndef ANTIPHON_ENGINE_SHM_COMM_H_
#define ANTIPHON_ENGINE_SHM_COMM_H_

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "common/shared_memory.h"
#include "engine/comm.h"

namespace antiphon::engine {

inline constexpr int kShmRanksMax = 64;

struct ShmGroupOptions {
  int size = 0;                          // ranks, 1 to kShmRanksMax
  size_t piece_bytes = size_t{1} << 20;  // what a rank shows at a time; larger spans go in pieces
};

// An operation is one or more stages. In a stage a rank writes into its half of the memory that
// has the stage's parity, counts its stage up and waits for those whose data it needs. A rank
// begins stage n only when all have come to stage n - 1, that is, have read all of stage n - 2,
// whose halves it reuses.
//
// Waiting spins for some microseconds and then sleeps on a futex, so that more ranks than cores
// make progress. Sleepers look about at least every 100 ms: a rank's death (pidfd), departure or
// Abort ends every wait.
class ShmComm final : public Comm {
 public:
  // INVALID_ARGUMENT naming the option.
  static absl::StatusOr<SharedMemory> MakeGroup(const ShmGroupOptions& options);
  // Returns when all ranks have joined. `fd` stays the caller's. INVALID_ARGUMENT: no memory of
  // MakeGroup, or no rank of it; ALREADY_EXISTS: the rank is taken; else as operations.
  static absl::StatusOr<std::unique_ptr<ShmComm>> Join(int fd, int rank, absl::Duration timeout);
  // Whoever waits for this rank then gets UNAVAILABLE.
  ~ShmComm() override;

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  absl::Status AllReduceSum(absl::Span<float> values, absl::Duration timeout) override;
  absl::Status Broadcast(absl::Span<std::byte> bytes, int root, absl::Duration timeout) override;
  absl::Status Gather(absl::Span<const std::byte> mine, absl::Span<std::byte> all, int root,
                      absl::Duration timeout) override;
  absl::Status Barrier(absl::Duration timeout) override;
  void Abort(const absl::Status& why) override;

 private:
  struct Group;
  struct Rank;
  // What a rank does in a stage; unequal ones are a bug that is found rather than computed with.
  struct Operation {
    uint32_t kind;
    uint32_t root;
    uint64_t bytes;
    friend bool operator==(const Operation&, const Operation&) = default;
  };

  ShmComm(SharedMemory memory, int rank);

  std::byte* Half(int rank, uint32_t stage) const;
  // Opens the next stage: waits until its half may be written.
  absl::Status Begin(const Operation& operation, absl::Time deadline);
  // Counts this rank's stage up: what it wrote may be read.
  void Publish();
  // Until `rank` has published the current stage, and in the same operation.
  absl::Status AwaitData(int rank, const Operation& operation, absl::Time deadline);
  absl::Status AwaitAll(const Operation& operation, absl::Time deadline);
  absl::Status AwaitStage(int rank, uint32_t stage, std::string_view what, absl::Time deadline);
  absl::Status Sleep(int rank, uint32_t stage, std::string_view what, absl::Time deadline);
  // A rank that will never come to `stage`, as an error.
  absl::Status Missing(uint32_t stage);
  bool Dead(int rank);
  absl::Status Break(absl::Status why) ABSL_LOCKS_EXCLUDED(mu_);
  absl::Status Broken() ABSL_LOCKS_EXCLUDED(mu_);

  absl::Status ReduceShown(absl::Span<float> values, absl::Time deadline);
  absl::Status ReduceShared(absl::Span<float> values, absl::Time deadline);

  const SharedMemory memory_;
  Group* const group_;
  const int rank_;
  const int size_;
  const size_t half_bytes_;
  uint32_t stage_ = 0;
  std::vector<int> pidfds_;  // -1: not opened yet, or the kernel has none
  absl::Mutex mu_;
  absl::Status broken_ ABSL_GUARDED_BY(mu_);
};

}  // namespace antiphon::engine

#endif  // ANTIPHON_ENGINE_SHM_COMM_H_
