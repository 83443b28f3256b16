// A whole cluster in one thread: the gateways', conductor's, stores' and workers' cores, joined by
// the simulated network. The shells here do what the daemons' shells do, over Pipes.
//
// The model is HashRunner: its next token is a hash of the KV bytes that it read, so a wrong, stale
// or missing byte anywhere is a wrong token.
#ifndef ANTIPHON_TESTS_SIM_CLUSTER_H_
#define ANTIPHON_TESTS_SIM_CLUSTER_H_

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "tests/sim/world.h"

namespace antiphon::sim {

class StoreProcess;
class WorkerProcess;
class ConductorProcess;
class GatewayProcess;

struct ClusterShape {
  uint32_t hosts = 1;
  uint32_t slots = 64;  // of each store
  std::vector<uint32_t> prefill_hosts = {0};
  std::vector<uint32_t> decode_hosts = {0};
  uint32_t chunk_tokens = 16;
  uint32_t sequences_max = 8;
};

struct Ask {
  std::vector<uint32_t> prompt;
  uint32_t max_tokens = 8;
  uint32_t min_tokens = 0;
  std::vector<uint32_t> stop_ids;
  double temperature = 0;
  uint64_t seed = 0;
};

// What the client of one request saw.
struct Outcome {
  Ask ask;
  int ends = 0;
  bool cancelled = false;
  bool finished = false;  // ended as it should
  std::string error;      // the terminal error
  std::vector<uint32_t> tokens;
  uint32_t cached = 0;
  uint32_t replacements = 0;
};

class Cluster {
 public:
  Cluster(World* world, ClusterShape shape);
  ~Cluster();

  // Returns the request's index.
  size_t Start(Ask ask);
  void Cancel(size_t request);
  const std::vector<std::unique_ptr<Outcome>>& outcomes() const { return outcomes_; }
  bool all_ended() const;

  // Any process but the gateway, by index; dead ones come back after `down`.
  size_t process_count() const { return slots_.size(); }
  void Kill(size_t process, absl::Duration down);
  void Pause(size_t process, absl::Duration d);
  void BreakSomeStream();
  // What went through this prefill call finds its decode worker asleep and, when that wakes up, its
  // prefill worker dead and the slots in other hands.
  void SpoilHandoff(const Pipe& call);
  // Everything that is down or paused comes back.
  void Heal();

  // Pins, reservations, streams, sequences and flights that are left; broken invariants. Empty when
  // there are none and nothing runs.
  std::string Leaks() const;
  void CheckInvariants();

  // For the processes.
  World& world() { return *world_; }
  std::shared_ptr<Pipe> Connect(Process& from, Process& to);
  WorkerProcess* WorkerAt(const std::string& address);
  StoreProcess* StoreAt(const std::string& address);  // RPC or data address
  StoreProcess* StoreOf(uint32_t host);
  ConductorProcess* conductor();
  GatewayProcess& gateway() { return *gateway_; }
  const ClusterShape& shape() const { return shape_; }
  uint64_t NextIncarnation() { return next_incarnation_++; }
  // Half-closes of prefill calls, from decode's side to prefill's.
  void OnHalfClose(const Pipe* pipe, std::function<void()> hear) {
    half_closes_[pipe] = std::move(hear);
  }
  void HalfClosed(const Pipe* pipe);

 private:
  // A place where a process runs, dies and is started again.
  struct Slot {
    std::string name;
    std::function<std::unique_ptr<Process>()> make;
    std::unique_ptr<Process> process;  // null while it is down
    bool restarting = false;
  };
  void StartSlot(Slot& slot);

  World* world_;
  ClusterShape shape_;
  uint64_t next_incarnation_ = 1000;
  std::vector<std::weak_ptr<Pipe>> pipes_;
  std::map<const Pipe*, std::function<void()>> half_closes_;
  std::vector<std::unique_ptr<Slot>> slots_;
  std::map<std::string, Slot*> by_address_;
  std::vector<Slot*> stores_;
  Slot* conductor_ = nullptr;
  std::unique_ptr<GatewayProcess> gateway_;
  std::vector<std::unique_ptr<Outcome>> outcomes_;
};

}  // namespace antiphon::sim

#endif  // ANTIPHON_TESTS_SIM_CLUSTER_H_
