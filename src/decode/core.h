// Decides what a decode worker does: admits sequences, hands their prompts to prefill, takes the KV
// over (in place on the same host, through its own store from another), runs the continuous batch,
// grows by block, preempts, stops.
//
// Sans-IO: events and `now` go in, actions come out of TakeActions in the order in which they are
// to be done. No threads, clocks or sockets; the same events give the same actions. The daemon and
// the simulator drive it alike:
//
//   core.OnStoreAttached(...);
//   loop: deliver events; core.Plan(...) -> submit the rows; core.OnStepDone(...); Tick(now).
//   after every call: perform TakeActions().
//
// Store calls carry the core's own request ids (unique, ascending), and FetchExtend and FetchClose
// name a fetch by the core's id of its FetchOpen; whoever performs them renumbers as its connection
// needs, and hands replies and progress back under the core's ids. Calls must reach the store in
// order. Replies to Commit and Release may be left out.
//
// Each Start that is not a duplicate gets exactly one SequenceUpdate with an end, unless its
// gateway's stream broke. Tokens of one TakeActions travel as one TokenBatch per gateway.
//
// Slots are released when their sequence is over, no running step touches them, and the store has
// confirmed that it no longer writes into them (FetchClose).
//
// Not thread-safe.
#ifndef ANTIPHON_DECODE_CORE_H_
#define ANTIPHON_DECODE_CORE_H_

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

namespace antiphon::decode {

namespace wire = ::antiphon::internal::v1;

struct Sequence;

// Predicted seconds of a step (CostModel).
struct StepCost {
  double base = 0;
  double per_row = 0;
  double per_context = 0;
};

struct CoreOptions {
  NodeId self;  // failed_node when this worker cannot go on
  KvLayout layout;
  uint32_t vocab = 0;
  uint32_t context = 0;                               // tokens
  uint32_t sequences_max = 64;                        // rows of a step, and sequences admitted
  bool engine_makes_checksums = false;                // else they are computed here
  absl::Duration tbt_max = absl::InfiniteDuration();  // admission refuses a predicted step above
  absl::Duration fetch_stall_max =
      absl::Seconds(2);  // announced KV that does not arrive for so long
};

// The store that this worker is attached to.
struct AttachedStore {
  uint64_t incarnation = 0;
  std::function<std::byte*(uint32_t slot)> payload;  // first payload byte in this process
};

struct StoreCall {
  wire::StoreRequest request;
};
struct SendTokens {
  uint64_t gateway = 0;
  wire::TokenBatch batch;
};
// Opens Prefill at placement's worker. `prefill` names the stream in what follows.
struct OpenPrefill {
  uint64_t prefill = 0;
  std::string address;
  wire::PrefillOpen open;
};
struct HalfClosePrefill {
  uint64_t prefill = 0;
};
// No event of this stream is wanted any more.
struct CancelPrefill {
  uint64_t prefill = 0;
};
using Action = std::variant<StoreCall, SendTokens, OpenPrefill, HalfClosePrefill, CancelPrefill>;

struct Load {
  uint32_t running = 0;         // in the batch
  uint32_t prefilling = 0;      // admitted, not in the batch yet
  uint64_t context_tokens = 0;  // of the running
};

// Monotone.
struct Counters {
  uint64_t started = 0;
  uint64_t refused = 0;
  uint64_t preempted = 0;
  uint64_t output_tokens = 0;
  uint64_t fetch_failures = 0;  // verification or transfer of a prompt's KV
};

class DecodeCore {
 public:
  explicit DecodeCore(CoreOptions options);
  ~DecodeCore();

  void OnStoreAttached(AttachedStore store);
  // Ends every sequence UNAVAILABLE. Slots of the lost store are forgotten, never released
  // elsewhere. The pool must stay mapped until the running step is done.
  void OnStoreLost(const absl::Status& why, absl::Time now);
  // Replies, and FetchProgress (id 0).
  void OnStoreReply(const wire::StoreReply& reply, absl::Time now);

  // `gateway` is the caller's name of the stream that it came on. Refusals are updates with an
  // error: INVALID_ARGUMENT naming the field, ABORTED for a stale epoch, RESOURCE_EXHAUSTED when
  // sequences, slots or TBT run out, UNAVAILABLE without a store or while draining. A duplicate of
  // an epoch already seen is ignored.
  void OnStart(uint64_t gateway, const wire::Start& start, absl::Time now);
  void OnCancel(uint64_t gateway, const wire::Cancel& cancel);
  // Cancels all that the stream carried, without updates.
  void OnGatewayBroken(uint64_t gateway);

  void OnPrefillUp(uint64_t prefill, const wire::PrefillUp& up, absl::Time now);
  // The stream is over, with the status that it ended with.
  void OnPrefillEnd(uint64_t prefill, const absl::Status& status, absl::Time now);

  // Appends one chunk of one token for each row that can run. What the chunks point at stays until
  // OnStepDone. One step at a time.
  void Plan(absl::Time now, std::vector<engine::SequenceChunk>& chunks);
  // The step that held the planned rows is over; `results` are theirs, in order.
  void OnStepDone(const absl::StatusOr<absl::Span<const engine::ChunkResult>>& results,
                  absl::Time now);

  // Ends what is past its deadline.
  void Tick(absl::Time now);
  // When Tick has something to do, as things are.
  absl::Time next_deadline() const;
  void SetDraining() { draining_ = true; }
  void SetStepCost(const StepCost& cost) { cost_ = cost; }
  void EndAll(const absl::Status& status);

  std::vector<Action> TakeActions();
  Load load() const;
  const Counters& counters() const { return counters_; }
  bool idle() const { return sequences_.empty() && calls_.empty(); }

 private:
  enum class CallKind { kPin, kReserve, kReserveRemote, kPinSlots, kFetchOpen, kFetchClose, kGrow };
  struct Call {
    CallKind kind;
    uint64_t sequence;
    std::vector<SlotId> slots;     // kPinSlots
    std::vector<uint32_t> blocks;  // kPinSlots: their indexes
  };

  // core.cc
  Sequence* Find(uint64_t handle);
  absl::Status Validate(const wire::Start& start) const;
  absl::Status Admit(uint32_t tokens) const;
  uint64_t CallStore(wire::StoreRequest request, Call call);
  void Fire(wire::StoreRequest request);
  void ReleaseSlots(const std::vector<SlotId>& slots);
  wire::SequenceUpdate& UpdateFor(uint64_t gateway, const std::string& id, uint32_t epoch);
  void Refuse(uint64_t gateway, const wire::Start& start, const absl::Status& status);
  void Fail(Sequence& s, const absl::Status& status, const std::string& failed_node);
  void Drop(Sequence& s);
  // When its fetch counts as stalled.
  absl::Time StallAt(const Sequence& s) const;
  void Clean(Sequence& s);

  // handoff.cc
  void PinPrefix(Sequence& s);
  void ReserveFirst(Sequence& s);
  void OpenPrefillFor(Sequence& s, absl::Time now);
  void OnReady(Sequence& s, const wire::Ready& ready, absl::Time now);
  bool ReadyIsSane(const Sequence& s, const wire::Ready& ready) const;
  void ReserveRemote(Sequence& s, absl::Time now);
  void AssignSlots(Sequence& s, std::vector<SlotId> slots, absl::Time now);
  void TakeBlocks(Sequence& s, absl::Time now);
  void PinAnnounced(Sequence& s);
  void PinnedSlots(Sequence& s, const Call& call);
  void ExtendFetch(Sequence& s, absl::Time now);
  void OnProgress(const wire::StoreReply::FetchProgress& progress, absl::Time now);
  void BlockIsReady(Sequence& s, uint32_t index);
  void JoinWhenComplete(Sequence& s, absl::Time now);
  void FailPrefill(Sequence& s, const absl::Status& status);

  // batch.cc
  bool EmitToken(Sequence& s, wire::SequenceUpdate& update, uint32_t id,
                 const wire::TokenLogprobs* logprobs);
  void CommitBlock(Sequence& s, uint32_t index, std::vector<uint64_t> checksums);
  bool HasSlotForNext(Sequence& s);
  void Grow(Sequence& s);
  void PreemptYoungest();

  CoreOptions options_;
  AttachedStore store_;
  bool attached_ = false;
  bool draining_ = false;
  StepCost cost_;
  EpochFence fence_;
  std::map<uint64_t, std::unique_ptr<Sequence>> sequences_;  // ended ones too while held
  std::map<RequestId, uint64_t> by_id_;                      // of the live ones
  std::map<uint64_t, Call> calls_;
  std::map<uint64_t, uint64_t> fetches_;          // open fetch -> sequence
  std::map<uint64_t, wire::TokenBatch> batches_;  // by gateway, not sent yet
  std::vector<uint64_t> planned_;
  uint64_t next_handle_ = 1;
  uint64_t next_call_ = 1;
  std::vector<Action> actions_;
  Counters counters_;
};

}  // namespace antiphon::decode

#endif  // ANTIPHON_DECODE_CORE_H_
