// Runs the children of `antiphon up` until a signal or a hopeless child ends them.
#ifndef ANTIPHON_CLI_UP_SUPERVISOR_H_
#define ANTIPHON_CLI_UP_SUPERVISOR_H_

#include <memory>
#include <string>
#include <vector>

#include "cli/cluster_file.h"
#include "cli/up/plan.h"

namespace antiphon::cli {

struct SupervisorOptions {
  std::vector<ChildSpec> children;  // the conductor first
  std::string program_folder;       // where antiphon-gateway and the others lie
  std::string runtime_folder;
  std::string log_folder;
  ClusterFile cluster;     // name, model
  bool terminal = false;   // standard error is one
  bool with_keys = false;  // the curl line needs a key
};

// Blocks. One thread: poll over signals, pipes and deadlines. Starts the conductor, then, when its
// address is known, the others; prints progress, `ready http://HOST:PORT` and a curl when the
// gateway is ready; restarts the dead. SIGTERM, SIGINT and SIGHUP drain: the gateway first, which
// needs the others to finish its requests, then the rest. Returns the exit code of `antiphon up`.
int Supervise(SupervisorOptions options);

}  // namespace antiphon::cli

#endif  // ANTIPHON_CLI_UP_SUPERVISOR_H_
