// The store's instruments. antiphon_kv_leases is the leak detector: pins and reservations now, 0
// when nobody holds anything.
#ifndef ANTIPHON_KVSTORE_NODE_METRICS_H_
#define ANTIPHON_KVSTORE_NODE_METRICS_H_

#include <array>

#include "antiphon/v1/store.pb.h"
#include "common/metrics.h"
#include "kvstore/node.h"

namespace antiphon::kvstore {

struct StoreNode::Metrics {
  explicit Metrics(Registry& registry);
  void CountRequest(const wire::StoreRequest& request, const absl::Status& status);
  void Set(const CoreStats& stats, size_t slot_bytes, size_t fetches);

  struct Outcomes {
    Counter* ok = nullptr;
    Counter* refused = nullptr;  // RESOURCE_EXHAUSTED, UNAVAILABLE, NOT_FOUND
    Counter* error = nullptr;    // the worker's mistake
  };
  std::array<Outcomes, 11> requests;  // by StoreRequest's op, attach first
  Gauge& capacity;
  Gauge& used;
  Gauge& objects;
  Gauge& reserved;
  Gauge& pins;
  Gauge& retired;
  Gauge& fetches;
  Counter& evictions;
  Counter& hits;
  Counter& misses;
  Counter& checksum_failures;
  Counter& fetched_blocks;
  uint64_t evictions_seen = 0;
};

}  // namespace antiphon::kvstore

#endif  // ANTIPHON_KVSTORE_NODE_METRICS_H_
