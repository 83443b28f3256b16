#include "gateway/conductor_client.h"

#include <gtest/gtest.h>

#include "absl/time/clock.h"
#include "common/executor.h"

namespace antiphon::gateway {
namespace {

TEST(ConductorClientTest, EndsWhileItsWatchBeginsOrEnds) {
  SerialExecutor executor("test");
  for (int i = 0; i < 200; ++i) {
    const std::unique_ptr<ConductorClient> client =
        ConductorClient::Start({.conductors = {"127.0.0.1:1"},
                                .self = {.cluster = "antiphon", .node = NodeId("gateway")},
                                .executor = &executor,
                                .on_catalog = [](const CatalogPtr&) {}});
    absl::SleepFor(absl::Microseconds(50 * (i % 40)));
  }
}

}  // namespace
}  // namespace antiphon::gateway
