// What `antiphon up` starts: one entry for each child, with all its flags. Pure.
#ifndef ANTIPHON_CLI_UP_PLAN_H_
#define ANTIPHON_CLI_UP_PLAN_H_

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"

namespace antiphon::cli {

struct UpOptions {
  std::string name;         // of the cluster
  std::string model;        // path
  std::string config_file;  // empty: none was named
  std::string listen;       // host:port of the gateway's HTTP
  std::string grpc_listen;
  std::string api_key_file;
  int prefill = 1;
  int decode = 1;
  std::string runtime_folder;
  uint64_t pool_bytes = 0;                                // 0: leave the default
  std::vector<std::pair<std::string, std::string>> keys;  // the user's, which win
};

struct ChildSpec {
  std::string name;     // "prefill-0"; names its log file
  std::string program;  // "antiphon-prefill"
  std::string node;     // "prefill-0@HOST"
  std::vector<std::string> flags;
  // Listeners ("gateway.http") whose port a successor takes over, because others know it.
  std::vector<std::string> kept_listeners;
};

// The conductor is first: the others need its address.
std::vector<ChildSpec> PlanCluster(const UpOptions& options, const std::string& host);

// The command line of a child. `kept` maps a kept listener to the address that it had, `conductor`
// is the conductor's RPC address once it is known.
std::vector<std::string> CommandLine(const ChildSpec& child, const std::string& conductor,
                                     const std::map<std::string, std::string>& kept,
                                     int announce_fd);

// The gateway's gRPC address: 8001 beside the default 8000 when it is free, else automatic.
std::string GrpcListenFor(const std::string& listen, bool default_port_is_free);

}  // namespace antiphon::cli

#endif  // ANTIPHON_CLI_UP_PLAN_H_
