// A Core with nodes that are easily made.
#ifndef ANTIPHON_TESTS_CONDUCTOR_HARNESS_H_
#define ANTIPHON_TESTS_CONDUCTOR_HARNESS_H_

#include <map>
#include <string>
#include <vector>

#include "antiphon/v1/control.pb.h"
#include "antiphon/v1/worker.pb.h"
#include "common/block_key.h"
#include "common/status_macros.h"
#include "conductor/core.h"

namespace antiphon::conductor {

inline constexpr uint32_t kBlockTokens = 16;

inline wire::Fingerprint TestFingerprint() {
  wire::Fingerprint f;
  f.set_weights_digest("w1");
  f.set_kv_dtype("bf16");
  f.set_rope("base 10000");
  f.set_layout("l1");
  f.set_tp_degree(1);
  f.set_kernel_class("cpu-int8");
  return f;
}

inline wire::ModelCard TestCard() {
  wire::ModelCard card;
  card.set_name("small");
  card.add_aliases("gpt-small");
  card.set_weights_digest("w1");
  card.set_tokenizer_digest(Sha256Hex("tokenizer"));
  card.set_chat_template_digest(Sha256Hex("template"));
  card.set_context_length(8192);
  card.set_block_tokens(kBlockTokens);
  return card;
}

// 1 ms a token of prefill; 10 ms a step and 1 ms a row; KV moves at 0.1 ms a token.
inline wire::CostModel TestCost() {
  wire::CostModel cost;
  cost.set_prefill_per_token(1e-3);
  cost.set_step_base(10e-3);
  cost.set_step_per_row(1e-3);
  cost.set_bytes_per_token(1000);
  cost.set_transfer_bytes_per_s(1e7);
  return cost;
}

inline wire::Hello TestHello(const std::string& node, uint64_t incarnation) {
  return MakeHello({.cluster = "test", .node = NodeId(node), .incarnation = incarnation});
}

inline wire::NodeReport WorkerHello(const std::string& node, wire::Role role, uint64_t store = 0,
                                    uint64_t incarnation = 1) {
  wire::NodeReport report;
  wire::NodeHello& hello = *report.mutable_hello();
  *hello.mutable_hello() = TestHello(node, incarnation);
  hello.set_kind(wire::NODE_KIND_WORKER);
  hello.set_role(role);
  hello.set_rpc_address("10.0.0.1:" + std::to_string(1000 + std::hash<std::string>{}(node) % 9000));
  *hello.mutable_card() = TestCard();
  *hello.mutable_fingerprint() = TestFingerprint();
  *hello.mutable_cost() = TestCost();
  hello.set_store_incarnation(store);
  hello.set_max_sequences(64);
  return report;
}

inline wire::NodeReport StoreHello(const std::string& node, uint64_t incarnation,
                                   uint32_t slots = 100'000) {
  wire::NodeReport report;
  wire::NodeHello& hello = *report.mutable_hello();
  *hello.mutable_hello() = TestHello(node, incarnation);
  hello.set_kind(wire::NODE_KIND_STORE);
  hello.set_rpc_address("10.0.0.1:7402");
  hello.set_data_address("10.0.0.1:7403");
  hello.set_slot_count(slots);
  return report;
}

inline wire::NodeReport LoadReport(double queue_s, uint32_t waiting = 0, uint32_t running = 0,
                                   uint64_t context = 0) {
  wire::NodeReport report;
  wire::WorkerLoad& load = *report.mutable_load();
  load.set_queue_s(queue_s);
  load.set_waiting(waiting);
  load.set_running(running);
  load.set_context_tokens(context);
  return report;
}

inline wire::NodeReport StoreLoadReport(uint32_t free) {
  wire::NodeReport report;
  report.mutable_store_load()->set_slots_free(free);
  return report;
}

inline BlockKey KeyOf(uint64_t n) {
  BlockKey key;
  const std::string bytes = Sha256Hex(std::to_string(n)).substr(0, 16);
  return *BlockKey::FromBytes(bytes);
}

// Keys of a chain: `family` names it.
inline std::vector<BlockKey> Chain(uint64_t family, size_t blocks) {
  std::vector<BlockKey> keys;
  for (size_t i = 0; i < blocks; ++i) keys.push_back(KeyOf(family * 100'000 + i));
  return keys;
}

inline wire::NodeReport EventsReport(uint64_t seq, const std::vector<BlockKey>& stored,
                                     const std::vector<BlockKey>& removed = {},
                                     bool snapshot = false) {
  wire::NodeReport report;
  wire::StoreEvents& events = *report.mutable_events();
  events.set_seq(seq);
  events.set_snapshot(snapshot);
  const std::string fingerprint = IdOf(TestFingerprint()).ToBytes();
  for (const BlockKey& key : stored) {
    wire::BlockEvent& event = *events.add_events();
    event.set_key(key.ToBytes());
    event.set_fingerprint_id(fingerprint);
  }
  for (const BlockKey& key : removed) {
    wire::BlockEvent& event = *events.add_events();
    event.set_key(key.ToBytes());
    event.set_fingerprint_id(fingerprint);
    event.set_removed(true);
  }
  return report;
}

class Harness {
 public:
  explicit Harness(CoreOptions options = {}) : core(With(std::move(options))) {}

  // The session of `node`, new or known.
  SessionId Join(const std::string& node, const wire::NodeReport& hello) {
    const SessionId session = ++last_session;
    last_status = core.OnReport(session, hello, now, actions);
    if (last_status.ok()) sessions[node] = session;
    return session;
  }
  void Worker(const std::string& node, wire::Role role, uint64_t store = 0) {
    Join(node, WorkerHello(node, role, store));
  }
  void Store(const std::string& node, uint64_t incarnation,
             const std::vector<BlockKey>& blocks = {}) {
    Join(node, StoreHello(node, incarnation));
    Report(node, EventsReport(0, blocks, {}, true));
  }
  const absl::Status& Report(const std::string& node, const wire::NodeReport& report) {
    return last_status = core.OnReport(sessions.at(node), report, now, actions);
  }
  void Lose(const std::string& node) { core.OnSessionEnd(sessions.at(node), now, actions); }
  // Time passes and every session but `silent` reports that nothing changed.
  void Advance(absl::Duration d) { now += d; }
  void Tick() {
    core.Tick(now, actions);
    CHECK(core.next_tick() > now);  // or it left something undone
  }

  Request MakeRequest(uint32_t tokens, std::vector<BlockKey> keys = {}) {
    Request request;
    request.id =
        *RequestId::FromBytes(Sha256Hex("r" + std::to_string(++last_request)).substr(0, 16));
    request.model = "small";
    request.prompt_count = tokens;
    request.max_tokens = 100;
    request.keys = std::move(keys);
    return request;
  }
  Decision Admit(const Request& request) {
    auto decision = core.Admit(request, now);
    last_status = decision.status();
    return decision.ok() ? *decision : Decision();
  }
  Decision Admit(uint32_t tokens, std::vector<BlockKey> keys = {}) {
    return Admit(MakeRequest(tokens, std::move(keys)));
  }

  static CoreOptions With(CoreOptions options) {
    options.self = {.cluster = "test", .node = NodeId("conductor"), .incarnation = 7};
    options.indexed_blocks_max = 1 << 20;
    return options;
  }

  Core core;
  absl::Time now = absl::UnixEpoch() + absl::Hours(1);
  Actions actions;
  absl::Status last_status;
  SessionId last_session = 0;
  uint64_t last_request = 0;
  std::map<std::string, SessionId> sessions;
};

inline std::string PrefillOf(const Decision& d) {
  return d.placed() ? d.prefills.front().node.value() : std::string(NameOf(d.verdict));
}
inline std::string DecodeOf(const Decision& d) {
  return d.placed() ? d.decodes.front().node.value() : std::string(NameOf(d.verdict));
}

}  // namespace antiphon::conductor

#endif  // ANTIPHON_TESTS_CONDUCTOR_HARNESS_H_
