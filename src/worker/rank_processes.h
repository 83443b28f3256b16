// The processes of a worker that shares its model out over several (worker.tensor_parallel).
//
// The worker itself is rank 0. It starts the other ranks from its own program and gives each, over
// a socket, its configuration, the group's shared memory and later the pools. A rank ends with its
// leader: the kernel kills it (PR_SET_PDEATHSIG), its socket closes, and its group breaks.
#ifndef ANTIPHON_WORKER_RANK_PROCESSES_H_
#define ANTIPHON_WORKER_RANK_PROCESSES_H_

#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "common/shared_memory.h"
#include "common/thread.h"

namespace antiphon::config::v1 {
class Config;
}

namespace antiphon::worker {

// What the program is started with as a rank: this and its number.
inline constexpr char kRankFlag[] = "--tensor-rank";

// Thread-safe, but for construction and destruction.
class RankProcesses {
 public:
  // Ranks 1 .. worker.tensor_parallel - 1; they load the model at once. To be called on the
  // program's main thread, whose end is what the kernel kills them at. `on_death`: once, on a
  // thread of its own, when a rank ended before its time and all were killed. RESOURCE_EXHAUSTED:
  // they cannot be started.
  static absl::StatusOr<std::unique_ptr<RankProcesses>> Start(
      const config::v1::Config& config, bool prefill_role,
      absl::AnyInvocable<void(absl::Status)> on_death);
  // Gives them a moment to end by themselves, then kills them.
  ~RankProcesses();

  int group_fd() const { return group_.fd(); }
  // One for each rank; they stay this object's.
  std::vector<int> sockets() const;
  // Returns when no rank lives any more.
  void Kill();
  // From now on ranks may end; on_death does not run any more. Before the runner ends, which ends
  // them. Not thread-safe.
  void StopWatching();

 private:
  struct Process {
    int rank = 0;
    pid_t pid = 0;
    int pidfd = -1;
    int socket = -1;
    bool reaped = false;
  };

  RankProcesses(SharedMemory group, absl::AnyInvocable<void(absl::Status)> on_death);
  absl::Status Spawn(int rank, const std::string& message);
  void Watch();
  // How the process ended; waits for it.
  std::string Reap(Process& process) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const SharedMemory group_;
  const int stop_;  // eventfd
  absl::AnyInvocable<void(absl::Status)> on_death_;
  mutable absl::Mutex mu_;
  std::vector<Process> processes_ ABSL_GUARDED_BY(mu_);
  Thread watcher_;
};

// The program of a rank: takes its leader's word on descriptor 3, and returns main's code when the
// leader ended or its own part failed.
int RunRank(const std::string& rank);

}  // namespace antiphon::worker

#endif  // ANTIPHON_WORKER_RANK_PROCESSES_H_
