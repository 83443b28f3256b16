// The life of one generation: admission, placement, tokens, failures, end.
//
// Sans-IO: events and `now` go in, actions come out of TakeActions in the order in which they are
// to be done. No threads, clocks or sockets; the same events give the same actions. The daemon and
// the simulator drive it alike:
//
//   generation.Begin(now);
//   loop: deliver events, and OnTimer(now) once next_timer() has passed.
//   after every call: perform TakeActions().
//
// This class counts the epochs. It holds the emitted tokens, so whatever dies, it raises the epoch,
// excludes what died and asks for another placement with prompt and emitted tokens; what the old
// epoch still says is dropped. Failures allow `replacements_max` new placements; so do refusals by
// decode before the first token. Once there are tokens, a refusal (preemption) is waited out. When
// there is no place at all, it waits up to `patience` for one; a node is excluded for
// `exclusion_min` and no longer, because one that restarts keeps its name.
//
// Exactly one End action is given, whatever comes in and however often, and it is the last action;
// what releases the cluster's resources comes before it.
//
// Not thread-safe.
#ifndef ANTIPHON_GATEWAY_GENERATION_H_
#define ANTIPHON_GATEWAY_GENERATION_H_

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "antiphon/v1/control.pb.h"
#include "antiphon/v1/worker.pb.h"
#include "common/ids.h"
#include "gateway/api_error.h"
#include "gateway/stop_text.h"
#include "model/tokenizer.h"

namespace antiphon::gateway {

namespace wire = ::antiphon::internal::v1;

struct GenerationSpec {
  RequestId id;
  std::string label;  // for logs and workers
  std::string tenant;
  std::string model;
  std::string request_class;
  std::shared_ptr<const std::vector<uint32_t>> prompt;
  BlockKey root;
  uint32_t block_tokens = 0;
  wire::Sampling sampling;
  wire::StopRule stop;
  std::vector<std::string> stop_strings;
  bool include_stop_string = false;
  bool skip_special_tokens = true;
  absl::Time deadline = absl::InfiniteFuture();
  std::shared_ptr<const model::Tokenizer> tokenizer;
};

struct GenerationLimits {
  int replacements_max = 3;
  int overload_status = 429;
  // How long a generation that was placed once waits for the cluster to have a place again.
  absl::Duration patience = absl::Seconds(10);
  absl::Duration retry_delay = absl::Milliseconds(100);  // doubles up to a second
  absl::Duration exclusion_min = absl::Seconds(1);
  // A running stream without a token for this long, and for 20 of its mean intervals, is given up.
  absl::Duration stall_min = absl::Seconds(10);
  double jitter = 0.5;  // of Retry-After, [0, 1)
};

// One token that the client is to have. `shown`: (part of) its text is in the answer.
struct OutputToken {
  uint32_t id = 0;
  bool shown = true;
  wire::TokenLogprobs logprobs;  // empty unless asked for
};
struct Delta {
  std::string text;  // valid UTF-8
  std::vector<OutputToken> tokens;
};

enum class EndReason { kStop, kLength, kError, kCancelled };
struct Ending {
  EndReason reason = EndReason::kStop;
  ApiError error;                      // kError
  std::string stop_string;             // that matched; else empty
  std::optional<uint32_t> stop_token;  // of stop_token_ids; not set for end-of-generation tokens
};

// What there is to do.
struct Admit {
  wire::AdmitRequest request;
};
struct AbandonAdmit {
  uint32_t epoch = 0;  // its answer is not wanted
};
struct StartOn {
  std::string node;
  std::string address;
  wire::Start start;
};
struct CancelOn {
  std::string address;
  uint32_t epoch = 0;
};
struct Report {
  wire::FinishReport report;
};
struct Deliver {
  Delta delta;
};
struct End {
  Ending ending;
};
using Action = std::variant<Admit, AbandonAdmit, StartOn, CancelOn, Report, Deliver, End>;

// What is known of a generation, for usage, metrics and the access line. Monotone.
struct GenerationStats {
  uint32_t output_tokens = 0;                       // counted as usage does
  std::optional<wire::PromptSource> prompt_source;  // of the first placement; sums to the prompt
  uint32_t replacements = 0;                        // after failures
  uint32_t refusals = 0;                            // by decode, preemption included
  uint32_t divergences = 0;                         // a token that was sent again and was another
  uint64_t recomputed_tokens = 0;
  wire::Timings timings;  // of the first placement
  double predicted_ttft_s = 0;
  std::string prefill_node;  // latest
  std::string decode_node;
  absl::Time began = absl::InfinitePast();
  absl::Time first_token = absl::InfinitePast();
  absl::Time ended = absl::InfinitePast();
  std::vector<float> intervals_s;  // between tokens as they came; not yet taken by the caller
};

class Generation {
 public:
  Generation(GenerationSpec spec, const GenerationLimits& limits);

  void Begin(absl::Time now);
  // The answer to Admit of `epoch`.
  void OnAdmitReply(uint32_t epoch, const absl::StatusOr<wire::AdmitReply>& reply, absl::Time now);
  void OnUpdate(const wire::SequenceUpdate& update, absl::Time now);
  // The stream to the decode worker at `address` ended; all that it carried is cancelled.
  void OnDecodeBroken(const std::string& address, const absl::Status& why, absl::Time now);
  // The client is gone, or another part of its request failed.
  void OnCancel(absl::Time now);
  // Ends with `error` (drain).
  void OnAbort(const ApiError& error, absl::Time now);
  void OnTimer(absl::Time now);

  absl::Time next_timer() const;
  std::vector<Action> TakeActions() { return std::exchange(actions_, {}); }
  bool ended() const { return state_ == State::kEnded; }
  bool first_token_seen() const { return stats_.first_token != absl::InfinitePast(); }
  const GenerationSpec& spec() const { return spec_; }
  const std::vector<uint32_t>& emitted() const { return emitted_; }
  uint32_t epoch() const { return epoch_; }
  GenerationStats& stats() { return stats_; }
  const GenerationStats& stats() const { return stats_; }

 private:
  enum class State {
    kNew,
    kAdmitting,  // Admit is out
    kWaiting,    // until retry_at_, then Admit again
    kRunning,    // Start is out
    kEnded,
  };

  void AskForPlacement(absl::Time now);
  void WaitAndAsk(absl::Time now);
  void OnRejected(const wire::Rejected& rejected, absl::Time now);
  // Gives up the placement: raises the epoch, then asks again or ends with `error`.
  void PlaceAgain(const std::string& failed_node, ApiError error, absl::Time now);
  void PlaceAgainAfterRefusal(const std::string& message, absl::Time now);
  void LeavePlacement();
  void TakePromptSource(const wire::SequenceUpdate& update);
  bool TokensFit(const wire::SequenceUpdate& update);
  void Accept(uint32_t id, const wire::TokenLogprobs* logprobs, bool is_stop, absl::Time now);
  void NoteArrival(absl::Time now);
  void OnError(const wire::SequenceUpdate& update, absl::Time now);
  void FinishByDecode(bool by_stop, absl::Time now);
  void Send(const StopText::Result& result, bool everything);
  void Finish(Ending ending, absl::Time now);
  bool IsEndOfGeneration(uint32_t id) const;
  uint32_t DeadlineMs(absl::Time now) const;
  double LongestTenthMean() const;

  GenerationSpec spec_;
  GenerationLimits limits_;
  State state_ = State::kNew;
  uint32_t epoch_ = 0;
  bool admitted_once_ = false;
  std::vector<uint32_t> emitted_;
  std::map<std::string, absl::Time> excluded_;  // node -> since when
  wire::Placement placement_;
  uint32_t progress_start_ = 0;  // emitted tokens when this epoch began
  int failures_ = 0;
  int refusals_ = 0;      // without progress between them
  absl::Duration delay_;  // of the next wait
  absl::Time retry_at_ = absl::InfiniteFuture();
  absl::Time patience_ends_ = absl::InfiniteFuture();
  absl::Time last_token_ = absl::InfinitePast();
  double interval_mean_s_ = 0;
  std::vector<float> intervals_;  // for the report

  // Text: what the detokeniser gave, minus what the stop strings hold back.
  model::Detokenizer detokenizer_;
  StopText stop_text_;
  struct Held {
    OutputToken token;
    uint64_t begin = 0;  // offsets in the whole text
    uint64_t end = 0;
  };
  std::deque<Held> held_;
  uint64_t text_end_ = 0;   // bytes that the detokeniser gave
  uint64_t text_sent_ = 0;  // bytes delivered

  GenerationStats stats_;
  std::vector<Action> actions_;
};

}  // namespace antiphon::gateway

#endif  // ANTIPHON_GATEWAY_GENERATION_H_
