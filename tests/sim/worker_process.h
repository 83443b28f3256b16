// A worker: the prefill or the decode core, its step loop over HashRunner, its store and its
// conductor. A step takes simulated time layer by layer; memory is touched as each layer runs.
#ifndef ANTIPHON_TESTS_SIM_WORKER_PROCESS_H_
#define ANTIPHON_TESTS_SIM_WORKER_PROCESS_H_

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "antiphon/v1/control.pb.h"
#include "decode/core.h"
#include "prefill/core.h"
#include "tests/fakes/hash_runner.h"
#include "tests/sim/cluster.h"
#include "tests/sim/store_process.h"

namespace antiphon::sim {

class WorkerProcess final : public Process {
 public:
  enum class Role { kPrefill, kDecode };
  WorkerProcess(Cluster* cluster, Role role, uint32_t index, uint32_t host);

  static std::string Address(Role role, uint32_t index);

  // A gateway's stream; `pipe`'s side 1 is this worker, side 0 gets batches by `deliver`.
  void AcceptGateway(std::shared_ptr<Pipe> pipe,
                     std::function<void(const wire::TokenBatch&)> deliver);
  void Down(const Pipe* pipe, const wire::GenerateDown& down);

  // Empty when nothing is left.
  std::string Leaks() const;

 private:
  struct Gateway {
    std::shared_ptr<Pipe> pipe;
    std::function<void(const wire::TokenBatch&)> deliver;
  };

  void AttachStore();
  void OnStoreReply(const wire::StoreReply& reply);
  void SendStore(const wire::StoreRequest& request);
  void JoinConductor();
  void Report();
  void Tick();

  // After every call into a core.
  void Perform();
  void PerformPrefill();
  void PerformDecode();
  void OpenPrefill(const decode::OpenPrefill& open);
  // Side 1 of a prefill call arrived here.
  void AcceptPrefill(std::shared_ptr<Pipe> pipe, uint64_t stream, const wire::PrefillOpen& open,
                     std::function<void(const wire::PrefillUp&)> up,
                     std::function<void(const absl::Status&)> end);
  void SeeEpoch(const std::string& id, uint32_t epoch);
  // A violation when a higher epoch of the generation has come here.
  void CheckEpoch(const std::string& id, uint32_t epoch, const char* work);
  void MaybeStep();
  void RunLayer();
  absl::Duration LayerTime();

  Cluster* cluster_;
  const Role role_;
  const uint32_t index_;
  const uint32_t host_;
  Identity identity_;
  std::unique_ptr<prefill::PrefillCore> prefill_;
  std::unique_ptr<decode::DecodeCore> decode_;
  fakes::HashRunner runner_;
  bool stepping_ = false;
  size_t step_tokens_ = 0;
  std::vector<Memory> mapped_;  // pools that a step may still touch

  std::shared_ptr<Pipe> store_pipe_;
  kvstore::StoreNode::SessionId session_ = 0;
  StoreProcess* store_ = nullptr;
  Memory store_memory_;
  uint64_t store_incarnation_ = 0;
  bool attached_ = false;

  std::shared_ptr<Pipe> control_;
  bool accepted_ = false;

  uint64_t next_stream_ = 1;
  std::map<uint64_t, Gateway> gateways_;
  std::map<const Pipe*, uint64_t> gateway_of_;
  std::map<uint64_t, std::shared_ptr<Pipe>> prefills_;  // decode's calls, by its handle
  struct Incoming {
    std::shared_ptr<Pipe> pipe;
    std::function<void(const wire::PrefillUp&)> up;
    std::function<void(const absl::Status&)> end;
    std::string id;
    uint32_t epoch = 0;
  };
  std::map<uint64_t, Incoming> incoming_;   // prefill's streams
  std::map<std::string, uint32_t> epochs_;  // the highest that came, by generation
};

}  // namespace antiphon::sim

#endif  // ANTIPHON_TESTS_SIM_WORKER_PROCESS_H_
