// A store's host side: pool, StoreNode, and its place in the simulated network.
#ifndef ANTIPHON_TESTS_SIM_STORE_PROCESS_H_
#define ANTIPHON_TESTS_SIM_STORE_PROCESS_H_

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/metrics.h"
#include "kvstore/lease.h"
#include "kvstore/node.h"
#include "tests/sim/cluster.h"
#include "transfer/transport.h"

namespace antiphon::sim {

using Memory = std::shared_ptr<std::vector<std::byte>>;

// Pulls out of other stores' pools; slices are copied one by one, late and in any order.
class SimTransport final : public transfer::Transport {
 public:
  SimTransport(Cluster* cluster, Process* self, std::string address)
      : cluster_(cluster), self_(self), address_(std::move(address)) {}
  absl::Status Export(transfer::RegionId, const std::byte*, size_t) override {
    return absl::OkStatus();
  }
  void Unexport(transfer::RegionId) override {}
  transfer::PullId Pull(transfer::PullRequest request, transfer::PullDone done) override;
  void Cancel(transfer::PullId id) override;
  std::string address() const override { return address_; }

 private:
  struct Running {
    transfer::PullRequest request;
    transfer::PullDone done;
    size_t left = 0;  // slices not copied
    absl::Status status;
    bool lost = false, flip = false, torn = false;
  };
  void CopySlice(transfer::PullId id, size_t index);
  void End(transfer::PullId id, absl::Status status);

  Cluster* cluster_;
  Process* self_;
  std::string address_;
  transfer::PullId next_ = 1;
  std::map<transfer::PullId, Running> running_;
};

class SimLeases final : public kvstore::LeaseClient {
 public:
  SimLeases(Cluster* cluster, Process* self, Identity identity)
      : cluster_(cluster), self_(self), identity_(std::move(identity)) {}
  LeaseId Open(kvstore::LeaseQuery query, Granted granted) override;
  void Close(LeaseId id) override;

 private:
  struct Lease {
    Granted granted;
    std::shared_ptr<Pipe> pipe;
  };
  void Answer(LeaseId id, absl::StatusOr<wire::LeaseReply> reply);

  Cluster* cluster_;
  Process* self_;
  Identity identity_;
  LeaseId next_ = 1;
  std::map<LeaseId, Lease> leases_;
};

class StoreProcess final : public Process {
 public:
  StoreProcess(Cluster* cluster, uint32_t host);

  kvstore::StoreNode& node() { return *node_; }
  const kvstore::StoreNode& node() const { return *node_; }
  const Memory& memory() const { return memory_; }
  uint64_t incarnation() const { return identity_.incarnation; }

  static std::string RpcAddress(uint32_t host);
  static std::string DataAddress(uint32_t host);

  // A worker's connection: `pipe`'s side 1 is this store.
  kvstore::StoreNode::SessionId Accept(std::shared_ptr<Pipe> pipe,
                                       std::function<void(const wire::StoreReply&)> deliver);

 private:
  void Join();
  void Report();
  void SendEvents(bool snapshot);

  Cluster* cluster_;
  uint32_t host_;
  Identity identity_;
  Memory memory_;
  Registry registry_{{{"daemon", "kvstore"}}};
  SimTransport transport_;
  SimLeases leases_;
  std::unique_ptr<kvstore::StoreNode> node_;
  std::shared_ptr<Pipe> control_;
  bool accepted_ = false;
};

}  // namespace antiphon::sim

#endif  // ANTIPHON_TESTS_SIM_STORE_PROCESS_H_
