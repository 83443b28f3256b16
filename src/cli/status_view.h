// What `antiphon status` says about a cluster. Pure.
#ifndef ANTIPHON_CLI_STATUS_VIEW_H_
#define ANTIPHON_CLI_STATUS_VIEW_H_

#include <string>

namespace antiphon::internal::v1 {
class ClusterView;
}

namespace antiphon::cli {

enum class ClusterState { kOk, kDegraded, kDown };

// Down: no worker of one role, or no store, is ready. Degraded: it serves, and a node is lost or
// draining. `reason` says which.
ClusterState StateOf(const internal::v1::ClusterView& view, std::string& reason);

std::string StatusText(const internal::v1::ClusterView& view, const std::string& cluster,
                       const std::string& http);
std::string StatusJson(const internal::v1::ClusterView& view, const std::string& cluster,
                       const std::string& http);

}  // namespace antiphon::cli

#endif  // ANTIPHON_CLI_STATUS_VIEW_H_
