// One client request: its choices' generations and what the client gets of them, in order.
//
// The choices of one prompt share its prefix: the first begins at once, the others when it has its
// first token, so that they find the prefix computed. The failure of one choice ends the request.
//
// Sans-IO like Generation: events in, TakeOutputs out. Exactly one RequestEnd, and it is the last
// output. Not thread-safe.
#ifndef ANTIPHON_GATEWAY_EXCHANGE_H_
#define ANTIPHON_GATEWAY_EXCHANGE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "gateway/generation.h"
#include "gateway/prepare.h"

namespace antiphon::gateway {

struct Usage {
  uint32_t prompt_tokens = 0;      // each prompt once
  uint32_t completion_tokens = 0;  // of all choices
  uint32_t cached_tokens = 0;      // of the prompts, as the first placements found them
};

// For the cluster: an action of choice's generation (never Deliver or End).
struct ToCluster {
  uint32_t choice = 0;
  Action action;
};
struct ChoiceDelta {
  uint32_t choice = 0;
  bool first = false;  // of this choice
  Delta delta;
  Usage usage;  // so far
};
struct ChoiceEnd {
  uint32_t choice = 0;
  Ending ending;  // kStop or kLength
  Usage usage;
};
struct RequestEnd {
  MaybeError error;
  bool cancelled = false;  // by the client: nobody reads this
  Usage usage;
};
using Output = std::variant<ToCluster, ChoiceDelta, ChoiceEnd, RequestEnd>;

class Exchange {
 public:
  // `ids` has one id for each choice.
  Exchange(PreparedRequest request, const std::vector<RequestId>& ids,
           const GenerationLimits& limits);

  void Begin(absl::Time now);
  // Delivers an event to one choice: `event` calls a method of Generation.
  void Deliver(uint32_t choice, absl::Time now, const std::function<void(Generation&)>& event);
  void OnDecodeBroken(const std::string& address, const absl::Status& why, absl::Time now);
  void OnCancel(absl::Time now);
  void OnAbort(const ApiError& error, absl::Time now);
  void OnTimer(absl::Time now);

  absl::Time next_timer() const;
  std::vector<Output> TakeOutputs() { return std::exchange(outputs_, {}); }
  bool ended() const { return ended_; }
  bool first_token_seen() const;
  Usage usage() const;
  // Sums to usage().prompt_tokens.
  wire::PromptSource prompt_source() const;
  const std::vector<std::unique_ptr<Generation>>& choices() const { return choices_; }
  std::vector<std::unique_ptr<Generation>>& choices() { return choices_; }
  const ServedModelPtr& model() const { return model_; }
  uint32_t n() const { return n_; }

 private:
  void Collect(uint32_t choice, absl::Time now);
  void End(MaybeError error, bool cancelled, absl::Time now);

  ServedModelPtr model_;
  uint32_t n_ = 1;
  uint32_t prompt_tokens_ = 0;
  std::vector<std::unique_ptr<Generation>> choices_;
  std::vector<bool> started_;  // the client has had a delta of it
  uint32_t open_ = 0;          // choices that have not ended
  bool begun_ = false;
  bool ended_ = false;
  std::vector<Output> outputs_;
};

}  // namespace antiphon::gateway

#endif  // ANTIPHON_GATEWAY_EXCHANGE_H_
