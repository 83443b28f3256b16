// Calls of a cluster's conductor.
#ifndef ANTIPHON_CLI_CLUSTER_CLIENT_H_
#define ANTIPHON_CLI_CLUSTER_CLIENT_H_

#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace antiphon::internal::v1 {
class ClusterView;
}

namespace antiphon::cli {

// UNAVAILABLE when nobody answers at `address` within `deadline`.
absl::Status GetClusterView(const std::string& address, absl::Duration deadline,
                            internal::v1::ClusterView& view);

}  // namespace antiphon::cli

#endif  // ANTIPHON_CLI_CLUSTER_CLIENT_H_
