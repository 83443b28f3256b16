#include "conductor/cost.h"

#include <spdlog/fmt/fmt.h>

#include <cmath>
#include <limits>

#include "antiphon/v1/control.pb.h"

namespace antiphon::conductor {

double Cost::TransferSeconds(double tokens) const {
  if (tokens <= 0) return 0;
  if (transfer_bytes_per_s <= 0) return std::numeric_limits<double>::infinity();
  return tokens * bytes_per_token / transfer_bytes_per_s;
}

absl::StatusOr<Cost> CostFromProto(const internal::v1::CostModel& proto) {
  // A second a token, or a hundred seconds of fixed cost, is a broken measurement.
  constexpr double kSecondsMax = 1e4;
  const struct {
    const char* name;
    double value;
    double max;
  } fields[] = {
      {"prefill_base", proto.prefill_base(), kSecondsMax},
      {"prefill_per_token", proto.prefill_per_token(), kSecondsMax},
      {"prefill_per_pair", proto.prefill_per_pair(), kSecondsMax},
      {"step_base", proto.step_base(), kSecondsMax},
      {"step_per_row", proto.step_per_row(), kSecondsMax},
      {"step_per_context", proto.step_per_context(), kSecondsMax},
      {"bytes_per_token", proto.bytes_per_token(), 1e12},
      {"transfer_bytes_per_s", proto.transfer_bytes_per_s(), 1e18},
  };
  for (const auto& field : fields) {
    if (!std::isfinite(field.value) || field.value < 0 || field.value > field.max) {
      return absl::InvalidArgumentError(
          fmt::format("cost.{} is {}; it must lie in 0..{}", field.name, field.value, field.max));
    }
  }
  return Cost{.prefill_base = proto.prefill_base(),
              .prefill_per_token = proto.prefill_per_token(),
              .prefill_per_pair = proto.prefill_per_pair(),
              .step_base = proto.step_base(),
              .step_per_row = proto.step_per_row(),
              .step_per_context = proto.step_per_context(),
              .bytes_per_token = proto.bytes_per_token(),
              .transfer_bytes_per_s = proto.transfer_bytes_per_s()};
}

}  // namespace antiphon::conductor
