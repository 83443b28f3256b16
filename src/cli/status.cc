#include <cstdio>

#include "antiphon/v1/config.pb.h"
#include "antiphon/v1/control.pb.h"
#include "cli/arguments.h"
#include "cli/cluster_client.h"
#include "cli/cluster_file.h"
#include "cli/commands.h"
#include "cli/status_view.h"
#include "common/config.h"
#include "common/daemon.h"
#include "common/logging.h"
#include "common/net.h"
#include "common/status_macros.h"

namespace antiphon::cli {
namespace {

constexpr absl::Duration kDeadline = absl::Seconds(5);

constexpr const char* kHelp =
    "usage: antiphon status [-o text|json] [--target NAME|HOST:PORT]\n\n"
    "--target is the name of a cluster that antiphon up runs here, or the RPC address of a\n"
    "conductor. Without it: the cluster that runs here, else the conductors of\n"
    "/etc/antiphon/antiphon.yaml. Exit codes: 0 ok, 1 down, 2 degraded, 69 unreachable.\n";

// The conductor to ask; `cluster` gets what else is known.
absl::StatusOr<std::string> ConductorOf(const std::string& target, ClusterFile& cluster) {
  if (target.find(':') != std::string::npos) {
    RETURN_IF_ERROR(ParseHostPort(target).status());
    return target;
  }
  auto found = FindCluster(target);
  if (found.ok()) {
    cluster = *std::move(found);
    if (cluster.conductor.empty()) {
      return absl::UnavailableError(fmt::format("{} has just begun to start", cluster.name));
    }
    return cluster.conductor;
  }
  if (!target.empty()) return found.status();
  const auto config = LoadConfig({});
  // Without a configuration of this host there is nothing but what `up` runs.
  if (!config.ok() || config->origins().at("cluster.conductors") == "default") {
    return found.status();
  }
  cluster.name = (*config)->cluster().name();
  return (*config)->cluster().conductors(0);
}

}  // namespace

int RunStatus(const CommandArguments& arguments) {
  const auto parsed =
      ParseArguments(arguments, {.values = {"target", "output"}, .switches = {"help"}});
  if (!parsed.ok()) return UsageError("status", parsed.status());
  if (parsed->switches.count("help") > 0) {
    fmt::print("{}", kHelp);
    return 0;
  }
  const std::string output = parsed->Get("output", "text");
  if (output != "text" && output != "json") {
    return UsageError("status", absl::InvalidArgumentError("-o must be text or json"));
  }
  ClusterFile cluster;
  const auto address = ConductorOf(parsed->Get("target"), cluster);
  if (!address.ok()) {
    return absl::IsInvalidArgument(address.status()) ? UsageError("status", address.status())
                                                     : Failure("status", address.status());
  }
  internal::v1::ClusterView view;
  const absl::Status status = GetClusterView(*address, kDeadline, view);
  if (!status.ok()) return Failure("status", status);
  fmt::print("{}", output == "json" ? StatusJson(view, cluster.name, cluster.http)
                                    : StatusText(view, cluster.name, cluster.http));
  std::string reason;
  switch (StateOf(view, reason)) {
    case ClusterState::kOk:
      return 0;
    case ClusterState::kDegraded:
      return 2;
    default:
      return 1;
  }
}

}  // namespace antiphon::cli
