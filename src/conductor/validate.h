// The wire's messages into the conductor's own terms. Everything that a peer may get wrong is
// caught here: INVALID_ARGUMENT naming the field.
#ifndef ANTIPHON_CONDUCTOR_VALIDATE_H_
#define ANTIPHON_CONDUCTOR_VALIDATE_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/wire.h"
#include "conductor/decide.h"

namespace antiphon::internal::v1 {
class AdmitRequest;
class FinishReport;
class NodeHello;
class StoreEvents;
class WorkerLoad;
}  // namespace antiphon::internal::v1

namespace antiphon::conductor {

// A name, address or label as peers may send it: at most `max` printable bytes.
absl::Status CheckText(std::string_view field, std::string_view text, size_t max,
                       bool may_be_empty);

absl::Status CheckHello(const wire::NodeHello& hello);
absl::Status CheckLoad(const wire::WorkerLoad& load);
absl::Status CheckEvents(const wire::StoreEvents& events);
absl::StatusOr<Request> RequestFromProto(const wire::AdmitRequest& proto);

// What a gateway tells about a generation that was placed.
struct Finish {
  RequestId id;
  uint32_t epoch = 0;
  double ttft_s = 0;
  double tbt_s = 0;
  uint32_t output_tokens = 0;
  bool first_token_seen = false;
  bool finished = false;
};
absl::StatusOr<Finish> FinishFromProto(const wire::FinishReport& proto);

}  // namespace antiphon::conductor

#endif  // ANTIPHON_CONDUCTOR_VALIDATE_H_
