#include "cli/cluster_client.h"

#include <grpc/support/log.h>
#include <spdlog/fmt/fmt.h>

#include "antiphon/v1/control.grpc.pb.h"
#include "common/clock.h"
#include "common/rpc.h"

namespace antiphon::cli {

absl::Status GetClusterView(const std::string& address, absl::Duration deadline,
                            internal::v1::ClusterView& view) {
  gpr_set_log_verbosity(GPR_LOG_SEVERITY_ERROR);
  const auto stub = internal::v1::Conductor::NewStub(MakeChannel(address));
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(Clock::Real().WallNow() + deadline));
  const grpc::Status status = stub->GetView(&context, internal::v1::GetViewRequest(), &view);
  if (status.ok()) return absl::OkStatus();
  if (status.error_code() == grpc::StatusCode::UNIMPLEMENTED) {
    return absl::UnavailableError(fmt::format("what listens on {} is no conductor", address));
  }
  return absl::UnavailableError(
      fmt::format("the conductor at {} cannot be reached: {}", address, status.error_message()));
}

}  // namespace antiphon::cli
