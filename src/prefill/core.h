// Decides what a prefill worker does: pins and fetches prefixes, orders the queue, cuts chunks,
// announces KV as it appears, commits blocks, samples the first token.
//
// Sans-IO: events and `now` go in, actions come out of TakeActions in the order in which they are
// to be done. No threads, clocks or sockets; the same events give the same actions. The daemon and
// the simulator drive it alike:
//
//   core.OnStoreAttached(...);
//   loop: deliver events; core.Plan(...) -> submit the chunks; core.OnProgress(...) while the step
//         runs (consumers on other hosts pull layer by layer); core.OnStepDone(...),
//         core.CommitStep(); Tick(now).
//   after every call: perform TakeActions().
//
// Store calls carry the core's own request ids (unique, ascending); whoever performs them renumbers
// as its connection needs, and hands replies back under the core's ids. Calls must reach the store
// in order, and their replies must come back, in any order relative to other events. Replies to
// Commit and Release may be left out.
//
// A stream lives from OnOpen to the End action, exactly one of which is issued for each stream that
// did not break. Slots are released when the stream is over and no running step touches them.
//
// Not thread-safe.
#ifndef ANTIPHON_PREFILL_CORE_H_
#define ANTIPHON_PREFILL_CORE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "antiphon/v1/store.pb.h"
#include "antiphon/v1/worker.pb.h"
#include "common/epoch_fence.h"
#include "common/ids.h"
#include "common/kv_layout.h"
#include "engine/model_runner.h"

namespace antiphon::prefill {

namespace wire = ::antiphon::internal::v1;

struct Stream;

struct CoreOptions {
  KvLayout layout;
  uint32_t vocab = 0;
  uint32_t context = 0;                 // tokens
  uint32_t streams_max = 1024;          // more are refused RESOURCE_EXHAUSTED
  uint32_t publish_layers = 0;          // announce at least so many layers at a time; 0: an eighth
  double seconds_per_token = 0;         // predicted; orders the queue by slack
  bool engine_makes_checksums = false;  // else they are computed here, of the blocks' bytes
  absl::Duration deadline_default = absl::Seconds(600);  // of a request that names none
};

// The store that this worker is attached to.
struct AttachedStore {
  uint64_t incarnation = 0;
  std::string data_address;
  std::function<std::byte*(uint32_t slot)> payload;  // first payload byte in this process
};

struct StoreCall {
  wire::StoreRequest request;
};
// A message for the stream's consumer (hello is the sender's to add).
struct Send {
  uint64_t stream = 0;
  wire::PrefillUp message;
};
// The stream is over; its handle is forgotten.
struct End {
  uint64_t stream = 0;
  absl::Status status;
};
using Action = std::variant<StoreCall, Send, End>;

struct Load {
  uint32_t waiting = 0;         // streams whose prompt is not computed yet
  uint64_t waiting_tokens = 0;  // not yet computed
  uint32_t serving = 0;         // computed, held for their consumers
};

// Monotone.
struct Counters {
  uint64_t computed_tokens = 0;
  uint64_t dram_tokens = 0;        // found in this host's pool
  uint64_t remote_tokens = 0;      // fetched from other stores
  uint64_t recomputed_tokens = 0;  // computed for an epoch past the first
  uint64_t refused = 0;
};

class PrefillCore {
 public:
  explicit PrefillCore(CoreOptions options);
  ~PrefillCore();

  void OnStoreAttached(AttachedStore store);
  // Ends every stream UNAVAILABLE. Slots of the lost store are forgotten, never released elsewhere.
  // The pool must stay mapped until the running step is done.
  void OnStoreLost(const absl::Status& why, absl::Time now);
  void OnStoreReply(const wire::StoreReply& reply, absl::Time now);

  // `stream` is the caller's, unique over the core's life. Refusals come as End: INVALID_ARGUMENT
  // naming the field, ABORTED for an epoch that is not the highest, RESOURCE_EXHAUSTED when streams
  // or slots run out, UNAVAILABLE without a store or while draining.
  void OnOpen(uint64_t stream, const wire::PrefillOpen& open, absl::Time now);
  // The consumer has all it needs: ends the stream OK. Before the last Ready it is a cancel.
  void OnHalfClose(uint64_t stream, absl::Time now);
  // The stream broke or was cancelled; no End follows.
  void OnBroken(uint64_t stream);

  // Appends chunks of at most `tokens` in all, none when nothing can run. What the chunks point at
  // stays until OnStepDone. One step at a time.
  void Plan(uint32_t tokens, absl::Time now, std::vector<engine::SequenceChunk>& chunks);
  // Whether a consumer of a planned chunk waits for layers: on the same host it waits for all.
  bool WatchesLayers() const;
  // K and V of the planned chunks are in the blocks for layers [0, layers_done), and
  // with them the checksums that the engine makes.
  void OnProgress(uint32_t layers_done);
  // The step that held the planned chunks is over; `results` are theirs, in order.
  void OnStepDone(const absl::StatusOr<absl::Span<const engine::ChunkResult>>& results,
                  absl::Time now);
  // Tells the store of the blocks that the step filled. After OnStepDone, whose messages are better
  // on their way: the checksums that no consumer waited for and no engine made are computed here.
  void CommitStep();

  // Ends what is past its deadline.
  void Tick(absl::Time now);
  // When Tick has something to do, as things are.
  absl::Time next_deadline() const;
  void SetDraining() { draining_ = true; }
  void SetSecondsPerToken(double seconds) { options_.seconds_per_token = seconds; }
  void EndAll(const absl::Status& status);

  std::vector<Action> TakeActions();
  Load load() const;
  const Counters& counters() const { return counters_; }
  bool idle() const { return streams_.empty() && calls_.empty(); }

 private:
  enum class CallKind { kPin, kFetch, kReserve };
  struct Call {
    CallKind kind;
    uint64_t stream;
  };

  absl::Status Validate(const wire::PrefillOpen& open) const;
  Stream* Find(uint64_t handle);
  void CallStore(wire::StoreRequest request, CallKind kind, uint64_t stream);
  void Fire(wire::StoreRequest request);
  void ReleaseSlots(const std::vector<SlotId>& slots);
  uint32_t ReusableBlocks(const Stream& s) const;
  void AddSlots(Stream& s, const wire::StoreReply& reply);
  const wire::BlockSource* BestSource(const Stream& s) const;
  void FetchOrReserve(Stream& s, absl::Time now);
  void Reserve(Stream& s);
  void RefuseSlots(Stream& s, const absl::Status& status);
  void StartWithAllSlots(Stream& s);
  void StartComputing(Stream& s);
  void Finish(Stream& s, const absl::Status& status);  // End, and Drop
  void Drop(Stream& s);
  void Clean(Stream& s);

  // announce.cc
  void ChecksumLayers(Stream& s, uint32_t to_layer);
  void AnnouncePrefix(Stream& s);
  void AnnounceLayers(Stream& s, uint32_t to_layer);
  void AnnounceChunk(Stream& s, const engine::ChunkResult* last, absl::Time now);
  void CommitChunk(const Stream& s);
  void SendReady(Stream& s, wire::Ready ready);

  CoreOptions options_;
  AttachedStore store_;
  bool attached_ = false;
  bool draining_ = false;
  EpochFence fence_;
  std::map<uint64_t, std::unique_ptr<Stream>> streams_;  // ended ones too while a step holds them
  std::map<RequestId, uint64_t> by_id_;                  // of the live ones
  std::map<uint64_t, Call> calls_;
  std::vector<uint64_t> planned_;
  std::vector<uint64_t> uncommitted_;  // streams, between OnStepDone and CommitStep
  uint64_t next_call_ = 1;
  std::vector<Action> actions_;
  Counters counters_;
};

}  // namespace antiphon::prefill

#endif  // ANTIPHON_PREFILL_CORE_H_
