#include "cli/up/plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace antiphon::cli {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::Not;

UpOptions Options() {
  return {.name = "n",
          .model = "/m/a \"b\".gguf",
          .listen = "127.0.0.1:8000",
          .grpc_listen = "127.0.0.1:8001",
          .prefill = 2,
          .decode = 1,
          .runtime_folder = "/run/x"};
}

const ChildSpec& Find(const std::vector<ChildSpec>& children, const std::string& name) {
  for (const auto& child : children) {
    if (child.name == name) return child;
  }
  ADD_FAILURE() << name;
  return children[0];
}

TEST(PlanTest, StartsEveryDaemonWithTheConductorFirstAndTheGatewayLast) {
  const auto children = PlanCluster(Options(), "h");
  std::vector<std::string> names;
  for (const auto& child : children) names.push_back(child.name);
  EXPECT_EQ(names, (std::vector<std::string>{"conductor", "kvstore", "prefill-0", "prefill-1",
                                             "decode-0", "gateway"}));
  EXPECT_EQ(Find(children, "prefill-1").program, "antiphon-prefill");
  EXPECT_EQ(Find(children, "prefill-1").node, "prefill-1@h");
}

TEST(PlanTest, AllPortsButTheGatewaysAreAutomatic) {
  const auto children = PlanCluster(Options(), "h");
  EXPECT_THAT(Find(children, "conductor").flags, Contains("--conductor.rpc.listen=127.0.0.1:0"));
  EXPECT_THAT(Find(children, "kvstore").flags, Contains("--kvstore.data.listen=127.0.0.1:0"));
  EXPECT_THAT(Find(children, "decode-0").flags, Contains("--worker.decode.listen=127.0.0.1:0"));
  EXPECT_THAT(Find(children, "gateway").flags, Contains("--gateway.http.listen=127.0.0.1:8000"));
  EXPECT_THAT(Find(children, "gateway").flags, Contains("--gateway.grpc.listen=127.0.0.1:8001"));
}

TEST(PlanTest, DrainsWithoutDelayAndQuotesThePath) {
  const auto children = PlanCluster(Options(), "h");
  EXPECT_THAT(children[0].flags, Contains("--conductor.drain.delay=0s"));
  EXPECT_THAT(children[0].flags, Contains("--gateway.drain.deadline=10s"));
  EXPECT_THAT(children[0].flags, Contains("--models=[{path: \"/m/a \\\"b\\\".gguf\"}]"));
}

TEST(PlanTest, TheUsersKeysComeLastAndWin) {
  UpOptions options = Options();
  options.keys = {{"worker.drain.delay", "3s"}};
  options.pool_bytes = 64 << 20;
  options.api_key_file = "k";
  const auto children = PlanCluster(options, "h");
  EXPECT_EQ(children[0].flags.back(), "--worker.drain.delay=3s");
  EXPECT_THAT(Find(children, "kvstore").flags, Contains("--kvstore.pool=67108864B"));
  EXPECT_THAT(Find(children, "gateway").flags, Contains("--gateway.auth.keys_file=k"));
}

TEST(PlanTest, ASuccessorTakesOverTheAddressesThatOthersKnow) {
  const auto children = PlanCluster(Options(), "h");
  const auto first = CommandLine(children[0], "", {}, 3);
  EXPECT_EQ(first[0], "antiphon-conductor");
  EXPECT_THAT(first, Contains("--announce-fd=3"));
  EXPECT_THAT(first, Not(Contains(HasSubstr("--cluster.conductors"))));
  const auto second =
      CommandLine(children[0], "127.0.0.1:5", {{"conductor.rpc", "127.0.0.1:5"}}, 3);
  EXPECT_EQ(second.back(), "--conductor.rpc.listen=127.0.0.1:5");
  const auto store = CommandLine(children[1], "127.0.0.1:5", {}, 3);
  EXPECT_THAT(store, Contains("--cluster.conductors=127.0.0.1:5"));
}

TEST(PlanTest, GrpcIs8001OnlyBesideTheDefaultPortAndWhenItIsFree) {
  EXPECT_EQ(GrpcListenFor("127.0.0.1:8000", true), "127.0.0.1:8001");
  EXPECT_EQ(GrpcListenFor("127.0.0.1:8000", false), "127.0.0.1:0");
  EXPECT_EQ(GrpcListenFor("127.0.0.1:9000", true), "127.0.0.1:0");
  EXPECT_EQ(GrpcListenFor(":8000", true), ":8001");
}

}  // namespace
}  // namespace antiphon::cli
