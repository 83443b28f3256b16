// Real stores and their workers, for tests: a child process each, in a temporary folder.
#ifndef ANTIPHON_TESTS_KVSTORE_STORE_PROCESS_H_
#define ANTIPHON_TESTS_KVSTORE_STORE_PROCESS_H_

#include <sys/types.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "antiphon/v1/model.pb.h"
#include "antiphon/v1/store.pb.h"
#include "common/executor.h"
#include "common/kv_layout.h"
#include "kvstore/client/store_client.h"

namespace antiphon::kvstore {

class StoreProcess {
 public:
  // Starts antiphon-kvstore and waits until it is ready; ends it (SIGKILL) when destroyed.
  explicit StoreProcess(std::vector<std::string> flags = {});
  ~StoreProcess();
  void Kill(int signal);
  int Wait();  // exit status as of waitpid
  bool ready() const { return ready_; }
  pid_t pid() const { return pid_; }
  std::string socket_path() const { return dir_ + "/kvstore.sock"; }
  const std::string& dir() const { return dir_; }
  // "kvstore.rpc", "kvstore.data", "kvstore.ops"
  const std::string& address(const std::string& listener) const { return addresses_.at(listener); }
  // The value of a line of /metrics that starts with `name`; -1 when absent.
  double Metric(const std::string& name) const;
  // Polls until the metric has the value; false after 10 s.
  bool AwaitMetric(const std::string& name, double value) const;

 private:
  std::string dir_;
  pid_t pid_ = -1;
  int announce_ = -1;
  bool ready_ = false;
  std::map<std::string, std::string> addresses_;
};

inline constexpr KvLayout kTestLayout{
    .block_tokens = 16, .layers = 4, .kv_heads = 2, .head_dim = 64};

// A worker with synchronous calls.
class TestWorker {
 public:
  static absl::StatusOr<std::unique_ptr<TestWorker>> Attach(const std::string& socket_path,
                                                            KvLayout layout = kTestLayout,
                                                            std::string weights = "w");
  ~TestWorker();

  wire::StoreReply Call(wire::StoreRequest request, uint64_t* id = nullptr);
  std::vector<SlotId> Reserve(uint32_t count);
  std::vector<SlotId> PinPrefix(const std::vector<BlockKey>& keys);
  void Release(const std::vector<SlotId>& slots);
  // Fills `slot` with bytes of `seed` and commits it as block `position` of `tokens`.
  wire::StoreReply Commit(SlotId slot, const BlockKey& parent, uint32_t position,
                          const std::vector<uint32_t>& tokens, uint64_t seed);
  void Fill(SlotId slot, uint64_t seed);
  bool Holds(SlotId slot, uint64_t seed) const;
  std::vector<uint64_t> Checksums(SlotId slot, uint32_t tokens) const;
  // The newest progress of a fetch once its done_tag reaches `tag` or it failed; 10 s at most.
  wire::StoreReply::FetchProgress AwaitProgress(uint64_t fetch, uint64_t tag);
  bool AwaitLost();
  // The first refusal of what was told; 10 s at most, then an empty one.
  wire::StoreReply AwaitRefusal();
  StoreClient& client() { return *client_; }

 private:
  explicit TestWorker(KvLayout layout) : layout_(layout) {}
  const KvLayout layout_;
  SerialExecutor executor_{"test-worker"};
  absl::Mutex mu_;
  std::map<uint64_t, wire::StoreReply::FetchProgress> progress_;
  std::vector<wire::StoreReply> refusals_;
  bool lost_ = false;
  std::unique_ptr<StoreClient> client_;
};

// A chain of `n` blocks of 16 tokens that starts at a root made of `name`.
struct TestChain {
  TestChain(const std::string& name, uint32_t n);
  BlockKey root;
  std::vector<std::vector<uint32_t>> tokens;
  std::vector<BlockKey> keys;
  const BlockKey& parent(uint32_t i) const { return i == 0 ? root : keys[i - 1]; }
};

}  // namespace antiphon::kvstore

#endif  // ANTIPHON_TESTS_KVSTORE_STORE_PROCESS_H_
