#include "worker/cost_model.h"

#include <gtest/gtest.h>

#include "tests/fakes/hash_runner.h"

namespace antiphon::worker {
namespace {

TEST(CostModelTest, FitFindsTheCoefficientsOfExactObservations) {
  std::vector<Observation> observations;
  for (const double n : {1.0, 8.0, 64.0, 500.0}) {
    for (const double pairs : {0.0, 1000.0, 50'000.0}) {
      observations.push_back({{1, n, pairs}, 2e-3 + 4e-4 * n + 3e-8 * pairs});
    }
  }
  const auto x = FitPositive(observations, {1e-9, 1e-9, 1e-12});
  EXPECT_NEAR(x[0], 2e-3, 1e-8);
  EXPECT_NEAR(x[1], 4e-4, 1e-9);
  EXPECT_NEAR(x[2], 3e-8, 1e-12);
}

TEST(CostModelTest, FitKeepsEveryCoefficientAtItsFloorOrAbove) {
  // Falling with the second term, which no machine does: noise.
  const std::vector<Observation> observations = {
      {{1, 1, 0}, 5e-3}, {{1, 8, 0}, 4e-3}, {{1, 16, 10}, 3e-3}};
  const auto x = FitPositive(observations, {1e-9, 1e-9, 1e-12});
  EXPECT_GE(x[0], 1e-9);
  EXPECT_GE(x[1], 1e-9);
  EXPECT_GE(x[2], 1e-12);
  EXPECT_NEAR(x[0], 4e-3, 1e-3);
}

TEST(CostModelTest, MeasuringALittleRunnerGivesPositiveSeconds) {
  fakes::HashRunner runner(fakes::SmallLayout(),
                           {.vocab = 10, .context = 40, .step_tokens_max = 12});
  const auto cost = MeasureCost(runner, Clock::Real());
  ASSERT_TRUE(cost.ok()) << cost.status();
  EXPECT_GT(PrefillSeconds(*cost, 10, 0), 0);
  EXPECT_GT(StepSeconds(*cost, 1, 10), 0);
  EXPECT_EQ(cost->bytes_per_token(), 3 * 2 * 16);
}

TEST(CostModelTest, RefinementFollowsASlowerMachine) {
  internal::v1::CostModel measured;
  measured.set_step_base(1e-3);
  measured.set_step_per_row(1e-4);
  measured.set_prefill_base(1e-3);
  CostRefiner refiner(measured);
  for (int i = 0; i < 200; ++i) refiner.OnRows(10, 0, 4e-3);
  EXPECT_NEAR(StepSeconds(refiner.Current(), 10, 0), 4e-3, 1e-4);
  EXPECT_NEAR(PrefillSeconds(refiner.Current(), 0, 0), 1e-3, 1e-9);
}

}  // namespace
}  // namespace antiphon::worker
