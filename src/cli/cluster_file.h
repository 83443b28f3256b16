// Where a cluster that `antiphon up` runs is found: cluster.json in its runtime folder.
#ifndef ANTIPHON_CLI_CLUSTER_FILE_H_
#define ANTIPHON_CLI_CLUSTER_FILE_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace antiphon::cli {

inline constexpr char kDefaultCluster[] = "local";

struct ClusterFile {
  std::string name;
  int pid = 0;       // of `antiphon up`
  std::string http;  // gateway, host:port
  std::string grpc;
  std::string conductor;  // RPC, host:port
  std::string model;      // name
  std::string log_folder;
  bool ready = false;
  struct Child {
    std::string name;    // "prefill-0"
    std::string daemon;  // "prefill"
    std::string ops;     // operations HTTP, host:port
  };
  std::vector<Child> children;  // those that listen
};

// $XDG_RUNTIME_DIR/antiphon, or /tmp/antiphon-UID.
std::string RuntimeRoot();
// $XDG_STATE_HOME/antiphon/NAME, by default ~/.local/state/antiphon/NAME.
std::string StateFolder(const std::string& name);
// $XDG_DATA_HOME/antiphon/models/SmolLM2-135M-Instruct.Q4_1.gguf: where quickstart puts its model.
std::string DefaultModelPath();

// Makes `path` and what lies above it, private to this user. PERMISSION_DENIED when somebody else
// owns it: a folder in /tmp may have been put there by another user.
absl::Status MakePrivateFolder(const std::string& path);

absl::Status WriteClusterFile(const std::string& runtime_folder, const ClusterFile& cluster);
void RemoveClusterFile(const std::string& runtime_folder);
// Clusters whose `antiphon up` is alive, by name.
std::vector<ClusterFile> RunningClusters();
// The cluster named `name`; with an empty name the only one that runs, else the default one.
// UNAVAILABLE says what runs instead.
absl::StatusOr<ClusterFile> FindCluster(const std::string& name);

}  // namespace antiphon::cli

#endif  // ANTIPHON_CLI_CLUSTER_FILE_H_
