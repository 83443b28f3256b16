#include "cli/status_view.h"

#include <algorithm>
#include <boost/json/serialize.hpp>
#include <vector>

#include "antiphon/v1/control.pb.h"
#include "common/logging.h"

namespace antiphon::cli {
namespace {

namespace wire = internal::v1;

std::string KindOf(const wire::NodeView& node) {
  switch (node.kind()) {
    case wire::NODE_KIND_STORE:
      return "store";
    case wire::NODE_KIND_GATEWAY:
      return "gateway";
    case wire::NODE_KIND_WORKER:
      return node.role() == wire::ROLE_PREFILL ? "prefill" : "decode";
    default:
      return "unknown";
  }
}

// What a node does right now, in words.
std::string WorkOf(const wire::NodeView& node) {
  if (node.kind() == wire::NODE_KIND_STORE) {
    return fmt::format("{} slots free, {} cached, {} pinned", node.store_load().slots_free(),
                       node.store_load().slots_cached(), node.store_load().slots_pinned());
  }
  if (node.kind() != wire::NODE_KIND_WORKER) return "";
  if (node.role() == wire::ROLE_PREFILL) {
    return fmt::format("{} waiting, {} tokens, queue {:.2f} s", node.load().waiting(),
                       node.load().waiting_tokens(), node.load().queue_s());
  }
  return fmt::format("{} running, {} tokens of context", node.load().running(),
                     node.load().context_tokens());
}

const char* StateName(ClusterState state) {
  return state == ClusterState::kOk ? "ok" : state == ClusterState::kDegraded ? "degraded" : "down";
}

std::vector<const wire::NodeView*> Sorted(const wire::ClusterView& view) {
  std::vector<const wire::NodeView*> nodes;
  for (const auto& node : view.nodes()) nodes.push_back(&node);
  std::sort(nodes.begin(), nodes.end(), [](const auto* a, const auto* b) {
    return std::pair(KindOf(*a), a->node()) < std::pair(KindOf(*b), b->node());
  });
  return nodes;
}

}  // namespace

ClusterState StateOf(const wire::ClusterView& view, std::string& reason) {
  int prefill = 0, decode = 0, stores = 0;
  std::string impaired;
  for (const auto& node : view.nodes()) {
    if (node.state() != "ready") {
      impaired +=
          fmt::format("{}{} is {}", impaired.empty() ? "" : ", ", node.node(), node.state());
      continue;
    }
    const std::string kind = KindOf(node);
    prefill += kind == "prefill";
    decode += kind == "decode";
    stores += kind == "store";
  }
  if (prefill == 0 || decode == 0 || stores == 0) {
    reason = fmt::format("no {} is ready", prefill == 0  ? "prefill worker"
                                           : decode == 0 ? "decode worker"
                                                         : "store");
    return ClusterState::kDown;
  }
  reason = impaired;
  return impaired.empty() ? ClusterState::kOk : ClusterState::kDegraded;
}

std::string StatusText(const wire::ClusterView& view, const std::string& cluster,
                       const std::string& http) {
  std::string reason;
  const ClusterState state = StateOf(view, reason);
  const auto safe = [](const std::string& text) { return EscapeForLog(text, false); };
  std::string out = fmt::format("{}{}{}{}\n", cluster.empty() ? "" : safe(cluster) + ": ",
                                StateName(state), reason.empty() ? "" : ", " + safe(reason),
                                http.empty() ? "" : ", http://" + safe(http));
  out += fmt::format("{} admitted, {} rejected, {} blocks indexed\n\n", view.admitted(),
                     view.rejected(), view.indexed_blocks());
  size_t width = 4;
  for (const auto& node : view.nodes()) width = std::max(width, node.node().size());
  width = std::min<size_t>(width, 48);
  out += fmt::format("{:<{}}  {:<8} {:<9} {:<22} {}\n", "NODE", width, "ROLE", "STATE", "ADDRESS",
                     "WORK");
  for (const auto* node : Sorted(view)) {
    out += fmt::format("{:<{}}  {:<8} {:<9} {:<22} {}\n", safe(node->node()), width, KindOf(*node),
                       safe(node->state()), safe(node->rpc_address()), WorkOf(*node));
  }
  return out;
}

std::string StatusJson(const wire::ClusterView& view, const std::string& cluster,
                       const std::string& http) {
  std::string reason;
  const ClusterState state = StateOf(view, reason);
  boost::json::array nodes;
  for (const auto* node : Sorted(view)) {
    boost::json::object object = {{"node", node->node()},
                                  {"role", KindOf(*node)},
                                  {"state", node->state()},
                                  {"rpc_address", node->rpc_address()},
                                  {"ops_address", node->ops_address()},
                                  {"version", node->version()}};
    if (node->kind() == wire::NODE_KIND_WORKER) {
      object["model"] = node->model();
      object["running"] = node->load().running();
      object["waiting"] = node->load().waiting();
      object["waiting_tokens"] = node->load().waiting_tokens();
      object["context_tokens"] = node->load().context_tokens();
      object["queue_s"] = node->load().queue_s();
      object["steps"] = node->load().steps();
    } else if (node->kind() == wire::NODE_KIND_STORE) {
      object["slots_free"] = node->store_load().slots_free();
      object["slots_cached"] = node->store_load().slots_cached();
      object["slots_pinned"] = node->store_load().slots_pinned();
    }
    nodes.push_back(std::move(object));
  }
  const boost::json::object root = {{"cluster", cluster},
                                    {"state", StateName(state)},
                                    {"reason", reason},
                                    {"http", http},
                                    {"admitted", view.admitted()},
                                    {"rejected", view.rejected()},
                                    {"indexed_blocks", view.indexed_blocks()},
                                    {"nodes", std::move(nodes)}};
  return boost::json::serialize(root) + "\n";
}

}  // namespace antiphon::cli
