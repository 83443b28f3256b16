#include "kvstore/node_metrics.h"

namespace antiphon::kvstore {
namespace {

constexpr const char* kOps[] = {"attach",      "reserve",      "pin_prefix", "pin_slots",
                                "commit",      "release",      "fetch_open", "fetch_extend",
                                "fetch_close", "fetch_prefix", "unknown"};

constexpr const char kLeasesHelp[] =
    "What clients of the store hold now: reserved slots, counts of pins, slots kept only for their "
    "readers, fetches that run.";

}  // namespace

StoreNode::Metrics::Metrics(Registry& r)
    : capacity(
          r.AddGauge("antiphon_kvstore_capacity_bytes", "Size of the pool.", {{"tier", "dram"}})),
      used(r.AddGauge("antiphon_kvstore_used_bytes", "Bytes of slots that are not free.",
                      {{"tier", "dram"}})),
      objects(r.AddGauge("antiphon_kvstore_objects", "Blocks in the index.", {{"tier", "dram"}})),
      reserved(r.AddGauge("antiphon_kv_leases", kLeasesHelp, {{"state", "reserved"}})),
      pins(r.AddGauge("antiphon_kv_leases", kLeasesHelp, {{"state", "pinned"}})),
      retired(r.AddGauge("antiphon_kv_leases", kLeasesHelp, {{"state", "retired"}})),
      fetches(r.AddGauge("antiphon_kv_leases", kLeasesHelp, {{"state", "fetching"}})),
      evictions(r.AddCounter("antiphon_kvstore_evictions_total", "Blocks evicted.",
                             {{"tier", "dram"}, {"reason", "capacity"}})),
      hits(r.AddCounter("antiphon_kvstore_hits_total", "Blocks asked for by prefix and found.",
                        {{"tier", "dram"}})),
      misses(r.AddCounter("antiphon_kvstore_misses_total",
                          "Blocks asked for by prefix and not found.")),
      checksum_failures(r.AddCounter("antiphon_kvstore_checksum_failures_total",
                                     "Copies that failed verification and became misses.")),
      fetched_blocks(r.AddCounter("antiphon_kvstore_fetched_blocks_total",
                                  "Blocks of other stores that entered the index.")) {
  for (size_t i = 0; i < requests.size(); ++i) {
    const auto counter = [&](const char* result) {
      return &r.AddCounter("antiphon_kvstore_requests_total", "Requests of local workers.",
                           {{"op", kOps[i]}, {"result", result}});
    };
    requests[i] = {counter("ok"), counter("refused"), counter("error")};
  }
}

void StoreNode::Metrics::CountRequest(const wire::StoreRequest& request,
                                      const absl::Status& status) {
  const int op = static_cast<int>(request.op_case()) - wire::StoreRequest::kAttach;
  const size_t unknown = requests.size() - 1;
  Outcomes& outcomes =
      requests[op < 0 || static_cast<size_t>(op) > unknown ? unknown : static_cast<size_t>(op)];
  if (status.ok()) {
    outcomes.ok->Add();
  } else if (absl::IsResourceExhausted(status) || absl::IsUnavailable(status) ||
             absl::IsNotFound(status)) {
    outcomes.refused->Add();
  } else {
    outcomes.error->Add();
  }
}

void StoreNode::Metrics::Set(const CoreStats& stats, size_t slot_bytes, size_t fetches_now) {
  used.Set(static_cast<double>(stats.slots - stats.free) * static_cast<double>(slot_bytes));
  objects.Set(stats.committed);
  reserved.Set(stats.reserved);
  pins.Set(static_cast<double>(stats.pins));
  retired.Set(stats.retired);
  fetches.Set(static_cast<double>(fetches_now));
  evictions.Add(static_cast<double>(stats.evictions - evictions_seen));
  evictions_seen = stats.evictions;
}

}  // namespace antiphon::kvstore
