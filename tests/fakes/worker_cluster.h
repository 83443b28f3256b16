// Prefill and decode cores, stores and a gateway in one thread: every message waits in a queue, and
// a seeded draw decides which queue moves next, so one seed is one interleaving. Faults are
// injected between moves.
#ifndef ANTIPHON_TESTS_FAKES_WORKER_CLUSTER_H_
#define ANTIPHON_TESTS_FAKES_WORKER_CLUSTER_H_

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "decode/core.h"
#include "prefill/core.h"
#include "tests/fakes/fake_store.h"
#include "tests/fakes/hash_runner.h"

namespace antiphon::fakes {

struct ClusterOptions {
  uint32_t hosts = 1;
  uint32_t slots = 64;         // of each store
  uint32_t chunk_tokens = 16;  // prefill tokens a step
  uint32_t sequences_max = 8;
  // Which worker runs where: the host of each prefill and decode worker.
  std::vector<uint32_t> prefill_hosts = {0};
  std::vector<uint32_t> decode_hosts = {0};
  uint64_t seed = 1;
  bool engines_make_checksums = false;
};

// What the gateway knows of one request.
struct Request {
  std::string id;
  std::vector<uint32_t> prompt;
  internal::v1::Sampling sampling;
  uint32_t max_tokens = 8;
  uint32_t min_tokens = 0;
  std::vector<uint32_t> stop_ids;
  uint32_t prefill = 0;
  uint32_t decode = 0;
  std::vector<internal::v1::BlockSource> sources;
  int placements_max = 1;  // with more, UNAVAILABLE and RESOURCE_EXHAUSTED are placed again

  uint32_t epoch = 0;
  int placements = 0;
  std::vector<uint32_t> emitted;
  std::optional<internal::v1::PromptSource> source;  // of the last placement
  std::map<uint32_t, int> ends;                      // by epoch
  std::optional<internal::v1::FinishReason> finish;
  absl::Status error;
  std::string failed_node;
  bool over = false;
};

class WorkerCluster {
 public:
  explicit WorkerCluster(ClusterOptions options);
  ~WorkerCluster();

  // Places it; returns its index.
  size_t Start(Request request);
  void Cancel(size_t request);
  // One move of one queue, or of one runner; false when nothing is left to do.
  bool Move();
  // Moves until nothing is left. Fails the test after too many moves.
  void Run();
  void Advance(absl::Duration d);

  // The prefill stream with a live sequence breaks on both sides, if there is one.
  void BreakPrefillStream();
  void BreakGateway(uint32_t decode);
  // The store dies and a new incarnation takes its place.
  void RestartStore(uint32_t host);
  // The worker dies with all that it held and comes back empty.
  void RestartPrefill(uint32_t index);

  Request& request(size_t index) { return *requests_[index]; }
  decode::DecodeCore& decode(uint32_t index) { return *decodes_[index]->core; }
  prefill::PrefillCore& prefill(uint32_t index) { return *prefills_[index]->core; }
  HashRunner& decode_runner(uint32_t index) { return *decodes_[index]->runner; }
  HashRunner& prefill_runner(uint32_t index) { return *prefills_[index]->runner; }
  FakeStore& store(uint32_t host) { return *stores_[host]; }
  absl::Time now() const { return now_; }
  uint64_t Random(uint64_t below) { return rng_() % below; }
  // Nothing held, nothing pending anywhere, no store saw a broken client. Empty when so.
  std::string Leaks() const;
  // Tokens of the request as one undisturbed worker would have drawn them.
  std::vector<uint32_t> Reference(size_t index) const;

 private:
  struct Worker {
    uint32_t host = 0;
    uint64_t client = 0;  // its name at the store
    std::deque<internal::v1::StoreRequest> to_store;
    std::deque<internal::v1::StoreReply> from_store;
    std::unique_ptr<HashRunner> runner;
    bool stepping = false;
    size_t chunks = 0;
  };
  struct PrefillWorker : Worker {
    std::unique_ptr<prefill::PrefillCore> core;
  };
  struct DecodeWorker : Worker {
    std::unique_ptr<decode::DecodeCore> core;
    std::deque<internal::v1::GenerateDown> down;
    std::deque<internal::v1::TokenBatch> up;
    uint64_t gateway = 0;  // the stream that its requests come on
  };
  // One Prefill call. Each direction keeps its order.
  struct Call {
    uint32_t decode = 0;
    uint64_t decode_handle = 0;
    uint32_t prefill = 0;
    uint64_t prefill_handle = 0;
    std::deque<std::function<void()>> down;
    std::deque<std::function<void()>> up;
    bool opened = false;       // prefill saw it
    bool down_closed = false;  // nothing is delivered to prefill any more
    bool up_closed = false;    // nothing is delivered to decode any more
  };

  std::unique_ptr<HashRunner> MakeRunner() const;
  void Place(Request& request);
  void Attach(PrefillWorker& worker);
  void Attach(DecodeWorker& worker);
  void Perform(PrefillWorker& worker);
  void Perform(DecodeWorker& worker, uint32_t index);
  // One layer, the end of a step, or the start of one; false when there is nothing to run.
  bool Step(PrefillWorker& worker);
  bool Step(DecodeWorker& worker, uint32_t index);
  void Break(Call& call);
  void OnTokens(const internal::v1::TokenBatch& batch);
  void RouteReplies();
  void Collect(std::vector<std::function<void()>>& moves);

  ClusterOptions options_;
  std::mt19937_64 rng_;
  absl::Time now_ = absl::UnixEpoch();
  StoreNet net_;
  std::vector<std::unique_ptr<FakeStore>> stores_;
  std::vector<std::unique_ptr<FakeStore>> dead_stores_;  // still mapped by running steps
  std::vector<std::unique_ptr<PrefillWorker>> prefills_;
  std::vector<std::unique_ptr<DecodeWorker>> decodes_;
  std::vector<std::unique_ptr<Call>> calls_;
  std::vector<std::unique_ptr<Request>> requests_;
  uint64_t next_client_ = 1;
  uint64_t next_stream_ = 1;
  uint64_t next_incarnation_ = 100;
};

}  // namespace antiphon::fakes

#endif  // ANTIPHON_TESTS_FAKES_WORKER_CLUSTER_H_
