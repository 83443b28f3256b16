// How rank 0 of a tensor-parallel group leads the others: it tells them each step, and where the
// pool is that its blocks lie in. Every process maps the pool somewhere else, so blocks travel as
// offsets.
#ifndef ANTIPHON_ENGINE_TENSOR_GROUP_H_
#define ANTIPHON_ENGINE_TENSOR_GROUP_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/kv_layout.h"
#include "common/shared_memory.h"
#include "engine/comm.h"
#include "engine/model_runner.h"

namespace antiphon::engine {

// One rank's place in a group. A runner without a `comm` is alone.
struct TensorGroup {
  Comm* comm = nullptr;  // outlives the runner
  // Unix sockets over which rank 0 passes descriptors of pools. Rank 0: one to each of the ranks
  // 1, 2, ...; the others: theirs. Not owned.
  std::vector<int> sockets;
  // How long a rank may be behind the others in a step. Loading, and waiting for the next step,
  // take as long as they take.
  absl::Duration timeout = absl::Seconds(30);
  // Rank 0, once, when the group broke and before a step is said to have failed: returns when no
  // other rank can write to the pool any more. May be empty where ranks share a process.
  std::function<void()> fence;
};

// Of rank 0. Used by one thread at a time.
class GroupLeader {
 public:
  GroupLeader(const TensorGroup& group, const KvLayout& layout);

  // Waits for all ranks to have loaded. FAILED_PRECONDITION on a rank whose `model` is another.
  absl::Status Begin(const std::string& model);
  absl::Status UsePool(const PoolMemory& pool);
  // Makes the message of a step. INVALID_ARGUMENT: a block lies outside of the pool.
  absl::Status Encode(const Step& step);
  // Tells the others the step encoded last.
  absl::Status Send();
  // The ranks end.
  void End();

 private:
  absl::Status Tell(uint32_t kind, absl::Span<std::byte> message);

  const TensorGroup group_;
  const KvLayout layout_;
  PoolMemory pool_;
  std::vector<std::byte> message_;
};

// Of the other ranks. Used by one thread.
class GroupMember {
 public:
  // `on_pool`: the pool was mapped, or (nullptr) is about to be unmapped. May be empty.
  GroupMember(const TensorGroup& group, const KvLayout& layout,
              std::function<void(std::byte* base, size_t bytes)> on_pool = {});
  ~GroupMember();

  absl::Status Begin(const std::string& model);
  // Waits for rank 0, for as long as it lives. The step, whose spans stay until the next call;
  // nullopt: rank 0 ended.
  absl::StatusOr<std::optional<Step>> Next();

 private:
  absl::Status MapPool(uint64_t bytes);
  void UnmapPool();
  absl::StatusOr<Step> Decode(absl::Span<const std::byte> message);

  const TensorGroup group_;
  const KvLayout layout_;
  const std::function<void(std::byte*, size_t)> on_pool_;
  SharedMemory pool_;
  std::vector<std::byte> message_;
  std::vector<uint32_t> tokens_;
  std::vector<std::byte*> blocks_;
};

}  // namespace antiphon::engine

#endif  // ANTIPHON_ENGINE_TENSOR_GROUP_H_
