// What all processes of the simulated cluster agree on.
#ifndef ANTIPHON_TESTS_SIM_IDENTITY_H_
#define ANTIPHON_TESTS_SIM_IDENTITY_H_

#include <string>

#include "antiphon/v1/control.pb.h"
#include "antiphon/v1/model.pb.h"
#include "common/wire.h"
#include "tests/fakes/hash_runner.h"

namespace antiphon::sim {

inline constexpr uint32_t kVocab = 1000;
inline constexpr uint32_t kContext = 4096;
inline constexpr char kModel[] = "hash";

inline Identity IdentityOf(const std::string& name, uint64_t incarnation) {
  return {.cluster = "sim", .node = NodeId(name), .incarnation = incarnation};
}

inline wire::Fingerprint SimFingerprint() {
  wire::Fingerprint f;
  f.set_weights_digest(std::string(64, 'a'));
  f.set_kv_dtype("bf16");
  f.set_rope("hash");
  f.set_layout(fakes::SmallLayout().Text());
  f.set_tp_degree(1);
  f.set_kernel_class("hash");
  return f;
}

inline wire::ModelCard SimCard() {
  wire::ModelCard card;
  card.set_name(kModel);
  card.set_architecture("hash");
  card.set_weights_digest(std::string(64, 'a'));
  card.set_context_length(kContext);
  card.set_vocab_size(kVocab);
  card.set_block_tokens(fakes::SmallLayout().block_tokens);
  return card;
}

inline wire::CostModel SimCost() {
  wire::CostModel cost;
  cost.set_prefill_base(0.001);
  cost.set_prefill_per_token(0.0002);
  cost.set_prefill_per_pair(1e-9);
  cost.set_step_base(0.001);
  cost.set_step_per_row(0.0001);
  cost.set_step_per_context(1e-7);
  cost.set_bytes_per_token(96);
  cost.set_transfer_bytes_per_s(1e8);
  return cost;
}

}  // namespace antiphon::sim

#endif  // ANTIPHON_TESTS_SIM_IDENTITY_H_
