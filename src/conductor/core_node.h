// One registered process, and the model that all workers serve. Private to Core.
#ifndef ANTIPHON_CONDUCTOR_CORE_NODE_H_
#define ANTIPHON_CONDUCTOR_CORE_NODE_H_

#include <string>

#include "antiphon/v1/control.pb.h"
#include "conductor/core.h"

namespace antiphon::conductor {

struct Core::Node {
  NodeId id;
  wire::NodeKind kind = wire::NODE_KIND_UNSPECIFIED;
  uint64_t incarnation = 0;
  SessionId session = 0;  // 0: its stream ended
  std::string rpc_address, ops_address, version;
  bool draining = false;
  bool silent = false;  // no report for node_timeout; the next one heals it
  absl::Time reported_at;
  absl::Time lost_at = absl::InfiniteFuture();
  NodeState state = NodeState::kReady;

  int store = -1;  // stores: the place in View::stores
  // The place in the stream of events.
  bool synced = false;
  uint64_t next_seq = 0;
  absl::Time snapshot_asked_at = absl::InfinitePast();
};

// The first worker to register defines it; it stays until no worker of it is left.
struct Core::ModelClass {
  wire::ModelCard card;
  wire::Fingerprint fingerprint;
};

}  // namespace antiphon::conductor

#endif  // ANTIPHON_CONDUCTOR_CORE_NODE_H_
