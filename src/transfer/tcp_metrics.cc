#include "transfer/tcp_metrics.h"

namespace antiphon::transfer {
namespace {

Counter& Bytes(Registry& r, const char* direction) {
  return r.AddCounter("antiphon_transfer_bytes_total", "Payload moved between hosts.",
                      {{"direction", direction}, {"transport", "tcp"}});
}

Counter& Failure(Registry& r, const char* reason) {
  return r.AddCounter("antiphon_transfer_failures_total",
                      "Pulls that did not end well, and frames that made no sense.",
                      {{"reason", reason}});
}

}  // namespace

TcpMetrics::TcpMetrics(Registry& r)
    : bytes_in(Bytes(r, "in")),
      bytes_out(Bytes(r, "out")),
      inflight_bytes(r.AddGauge("antiphon_transfer_inflight_bytes", "Asked for, not yet here.")),
      seconds(r.AddHistogram("antiphon_transfer_duration_seconds", "Of pulls that ended well.",
                             TransferSecondsBuckets())),
      retries(r.AddCounter("antiphon_transfer_retries_total",
                           "Pulls tried again over a new connection.", {{"nic", "any"}})),
      malformed(Failure(r, "malformed")),
      unavailable(Failure(r, "unavailable")),
      deadline(Failure(r, "deadline")),
      cancelled(Failure(r, "cancelled")),
      not_found(Failure(r, "no_region")),
      out_of_range(Failure(r, "out_of_range")),
      refused(Failure(r, "refused")) {}

void TcpMetrics::CountEnd(const absl::Status& status, double took) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      seconds.Observe(took);
      break;
    case absl::StatusCode::kDeadlineExceeded:
      deadline.Add();
      break;
    case absl::StatusCode::kCancelled:
      cancelled.Add();
      break;
    case absl::StatusCode::kNotFound:
      not_found.Add();
      break;
    case absl::StatusCode::kOutOfRange:
      out_of_range.Add();
      break;
    case absl::StatusCode::kResourceExhausted:
      refused.Add();
      break;
    default:
      unavailable.Add();
      break;
  }
}

}  // namespace antiphon::transfer
