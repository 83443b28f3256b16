#include "cli/status_view.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <boost/json/parse.hpp>

#include "antiphon/v1/control.pb.h"

namespace antiphon::cli {
namespace {

namespace wire = internal::v1;
using ::testing::HasSubstr;

void Add(wire::ClusterView& view, const std::string& name, wire::NodeKind kind, wire::Role role,
         const std::string& state = "ready") {
  auto* node = view.add_nodes();
  node->set_node(name);
  node->set_kind(kind);
  node->set_role(role);
  node->set_state(state);
  node->set_rpc_address("127.0.0.1:1");
}

wire::ClusterView Healthy() {
  wire::ClusterView view;
  Add(view, "p", wire::NODE_KIND_WORKER, wire::ROLE_PREFILL);
  Add(view, "d", wire::NODE_KIND_WORKER, wire::ROLE_DECODE);
  Add(view, "s", wire::NODE_KIND_STORE, wire::ROLE_UNSPECIFIED);
  return view;
}

TEST(StatusViewTest, OneReadyNodeOfEachKindIsOk) {
  std::string reason;
  EXPECT_EQ(StateOf(Healthy(), reason), ClusterState::kOk);
  EXPECT_EQ(reason, "");
}

TEST(StatusViewTest, ALostNodeBesideAReadyOneIsDegraded) {
  wire::ClusterView view = Healthy();
  Add(view, "d2", wire::NODE_KIND_WORKER, wire::ROLE_DECODE, "lost");
  std::string reason;
  EXPECT_EQ(StateOf(view, reason), ClusterState::kDegraded);
  EXPECT_EQ(reason, "d2 is lost");
}

TEST(StatusViewTest, WithoutAWorkerOfARoleItIsDown) {
  for (int i = 0; i < 3; ++i) {
    wire::ClusterView view = Healthy();
    view.mutable_nodes(i)->set_state("lost");
    std::string reason;
    EXPECT_EQ(StateOf(view, reason), ClusterState::kDown);
    EXPECT_THAT(reason, HasSubstr(i == 0 ? "prefill" : i == 1 ? "decode" : "store"));
  }
}

TEST(StatusViewTest, TextListsNodesAndEscapesTheirNames) {
  wire::ClusterView view = Healthy();
  view.mutable_nodes(0)->set_node("p\x1b[2J");
  view.mutable_nodes(2)->mutable_store_load()->set_slots_free(42);
  const std::string text = StatusText(view, "c", "127.0.0.1:8000");
  EXPECT_THAT(text, HasSubstr("c: ok, http://127.0.0.1:8000\n"));
  EXPECT_THAT(text, HasSubstr("p\\u001b[2J"));
  EXPECT_THAT(text, HasSubstr("42 slots free"));
}

TEST(StatusViewTest, JsonIsStable) {
  const auto json = boost::json::parse(StatusJson(Healthy(), "c", "h:1"));
  EXPECT_EQ(json.at("state"), "ok");
  EXPECT_EQ(json.at("cluster"), "c");
  ASSERT_EQ(json.at("nodes").as_array().size(), 3u);
  EXPECT_EQ(json.at("nodes").at(0).at("role"), "decode");
  EXPECT_EQ(json.at("nodes").at(2).at("slots_free"), 0);
}

}  // namespace
}  // namespace antiphon::cli
