// Instruments of the `tcp` transport, shared by its two sides.
#ifndef ANTIPHON_TRANSFER_TCP_METRICS_H_
#define ANTIPHON_TRANSFER_TCP_METRICS_H_

#include "absl/status/status.h"
#include "common/metrics.h"

namespace antiphon::transfer {

struct TcpMetrics {
  explicit TcpMetrics(Registry& registry);
  void CountEnd(const absl::Status& status, double seconds);

  Counter& bytes_in;
  Counter& bytes_out;
  Gauge& inflight_bytes;
  Histogram& seconds;
  Counter& retries;
  Counter& malformed;
  Counter& unavailable;
  Counter& deadline;
  Counter& cancelled;
  Counter& not_found;
  Counter& out_of_range;
  Counter& refused;
};

}  // namespace antiphon::transfer

#endif  // ANTIPHON_TRANSFER_TCP_METRICS_H_
