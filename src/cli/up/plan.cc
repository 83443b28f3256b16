#include "cli/up/plan.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>

#include "common/net.h"

namespace antiphon::cli {
namespace {

// A scalar of YAML that is this text whatever it holds.
std::string Quoted(const std::string& text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + "\"";
}

}  // namespace

std::vector<ChildSpec> PlanCluster(const UpOptions& options, const std::string& host) {
  std::vector<std::string> common;
  const auto flag = [](std::string_view key, std::string_view value) {
    return fmt::format("--{}={}", key, value);
  };
  if (!options.config_file.empty()) common.push_back(flag("config", options.config_file));
  common.push_back(flag("cluster.name", options.name));
  common.push_back(flag("cluster.runtime_dir", options.runtime_folder));
  common.push_back(flag("models", fmt::format("[{{path: {}}}]", Quoted(options.model))));
  for (const char* section : {"gateway", "conductor", "kvstore", "worker"}) {
    common.push_back(flag(fmt::format("{}.drain.delay", section), "0s"));
    common.push_back(flag(fmt::format("{}.drain.deadline", section), "10s"));
  }
  const auto child = [&](const std::string& name, const std::string& daemon,
                         const std::vector<std::string>& automatic) {
    ChildSpec spec;
    spec.name = name;
    spec.program = "antiphon-" + daemon;
    spec.node = fmt::format("{}@{}", name, host);
    spec.flags = common;
    for (const std::string& listener : automatic) {
      spec.flags.push_back(flag(listener + ".listen", "127.0.0.1:0"));
    }
    return spec;
  };
  std::vector<ChildSpec> children;
  children.push_back(child("conductor", "conductor", {"conductor.rpc", "conductor.ops"}));
  children.back().kept_listeners = {"conductor.rpc"};
  children.push_back(child("kvstore", "kvstore", {"kvstore.rpc", "kvstore.data", "kvstore.ops"}));
  if (options.pool_bytes > 0) {
    children.back().flags.push_back(flag("kvstore.pool", fmt::format("{}B", options.pool_bytes)));
  }
  // Either role may be taken by any worker, so each has both pairs of listeners.
  const std::vector<std::string> worker = {"worker.prefill", "worker.decode", "worker.prefill_ops",
                                           "worker.decode_ops"};
  // All workers are on the same GPU, where there is one.
  const int workers = std::max(1, options.prefill + options.decode);
  common.push_back(flag("worker.gpu_memory_fraction", fmt::format("{:.3f}", 0.9 / workers)));
  for (int i = 0; i < options.prefill; ++i) {
    children.push_back(child(fmt::format("prefill-{}", i), "prefill", worker));
  }
  for (int i = 0; i < options.decode; ++i) {
    children.push_back(child(fmt::format("decode-{}", i), "decode", worker));
  }
  children.push_back(child("gateway", "gateway", {"gateway.ops"}));
  ChildSpec& gateway = children.back();
  gateway.flags.push_back(flag("gateway.http.listen", options.listen));
  gateway.flags.push_back(flag("gateway.grpc.listen", options.grpc_listen));
  if (!options.api_key_file.empty()) {
    gateway.flags.push_back(flag("gateway.auth.keys_file", options.api_key_file));
  }
  gateway.kept_listeners = {"gateway.http", "gateway.grpc"};
  for (ChildSpec& spec : children) {
    for (const auto& [key, value] : options.keys) spec.flags.push_back(flag(key, value));
  }
  return children;
}

std::vector<std::string> CommandLine(const ChildSpec& child, const std::string& conductor,
                                     const std::map<std::string, std::string>& kept,
                                     int announce_fd) {
  std::vector<std::string> line = {child.program, "--node=" + child.node,
                                   fmt::format("--announce-fd={}", announce_fd)};
  line.insert(line.end(), child.flags.begin(), child.flags.end());
  if (!conductor.empty()) line.push_back("--cluster.conductors=" + conductor);
  for (const std::string& listener : child.kept_listeners) {
    const auto it = kept.find(listener);
    if (it != kept.end()) line.push_back(fmt::format("--{}.listen={}", listener, it->second));
  }
  return line;
}

std::string GrpcListenFor(const std::string& listen, bool default_port_is_free) {
  const auto address = ParseHostPort(listen);
  if (!address.ok()) return "127.0.0.1:0";
  const bool default_pair = address->port == 8000 && default_port_is_free;
  return HostPort{address->host, static_cast<uint16_t>(default_pair ? 8001 : 0)}.Text();
}

}  // namespace antiphon::cli
