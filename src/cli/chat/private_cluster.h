// The cluster that `antiphon chat` starts for itself when none runs.
#ifndef ANTIPHON_CLI_CHAT_PRIVATE_CLUSTER_H_
#define ANTIPHON_CLI_CHAT_PRIVATE_CLUSTER_H_

#include <sys/types.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace antiphon::cli {

// Ends with the object, and with this process. Not thread-safe.
class PrivateCluster {
 public:
  // Runs `antiphon up` with an automatic port and waits until it serves; its progress goes to
  // standard error. UNAVAILABLE when it ends before that (it has said why).
  static absl::StatusOr<std::unique_ptr<PrivateCluster>> Start(const std::string& model);
  ~PrivateCluster();
  const std::string& http() const { return http_; }

 private:
  PrivateCluster() = default;
  pid_t pid_ = 0;
  int output_fd_ = -1;
  std::string http_;
};

}  // namespace antiphon::cli

#endif  // ANTIPHON_CLI_CHAT_PRIVATE_CLUSTER_H_
