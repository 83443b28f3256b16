#include "engine/cuda/arithmetic.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace antiphon::engine::cuda {
namespace {

TEST(ArithmeticTest, Bf16RoundsToNearestTiesToEven) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float exact = FromBf16(static_cast<uint16_t>(bits));
    if (std::isnan(exact)) {
      EXPECT_TRUE(std::isnan(FromBf16(ToBf16(exact))));
      continue;
    }
    ASSERT_EQ(ToBf16(exact), bits);
    if (std::isinf(exact) || (bits & 0x7fff) >= 0x7f7f) continue;
    if ((bits & 0x7fff) >= 0x7f00) continue;  // the sum of two such would overflow
    const float above = FromBf16(static_cast<uint16_t>(bits + 1));
    const float half = (exact + above) / 2;
    ASSERT_EQ(ToBf16(half), bits % 2 == 0 ? bits : bits + 1);
    ASSERT_EQ(ToBf16(std::nextafter(half, exact)), bits);
    ASSERT_EQ(ToBf16(std::nextafter(half, above)), bits + 1);
  }
  EXPECT_TRUE(std::isinf(FromBf16(ToBf16(std::numeric_limits<float>::max()))));
}

TEST(ArithmeticTest, RmsScaleSiluAndRotationMatchDouble) {
  EXPECT_NEAR(RmsScale(576.0f * 4, 576, 1e-5f), 1 / std::sqrt(4 + 1e-5), 1e-6);
  for (float x : {-90.0f, -3.0f, 0.0f, 0.5f, 20.0f, 88.0f}) {
    const double want = double{x} / (1 + std::exp(-double{x})) * 1.5;
    EXPECT_NEAR(SiluMul(x, 1.5f), want, 1e-5 + 1e-5 * std::abs(want));
  }
  const Pair turned = Rotate({3, 4}, std::cos(0.7f), std::sin(0.7f));
  EXPECT_NEAR(turned.a, 3 * std::cos(0.7) - 4 * std::sin(0.7), 1e-5);
  EXPECT_NEAR(turned.b, 4 * std::cos(0.7) + 3 * std::sin(0.7), 1e-5);
}

TEST(ArithmeticTest, BetterPrefersTheLowerIdAndNeverNaN) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(Better({1, 5}, {1, 3}).id, 3u);
  EXPECT_EQ(Better({1, 3}, {1, 5}).id, 3u);
  EXPECT_EQ(Better({2, 5}, {1, 3}).id, 5u);
  EXPECT_EQ(Better({-INFINITY, 0xffffffffu}, {nan, 3}).id, 0xffffffffu);
  EXPECT_EQ(Better({-INFINITY, 0xffffffffu}, {-INFINITY, 3}).id, 3u);
}

TEST(ArithmeticTest, RandomNumbersFillTheirRange) {
  double sum = 0, squares = 0;
  for (uint64_t i = 0; i < 100000; ++i) {
    const double x = double{RandomUnit(3, i)};
    ASSERT_GE(x, -1);
    ASSERT_LT(x, 1);
    sum += x;
    squares += x * x;
  }
  EXPECT_NEAR(sum / 100000, 0, 0.01);
  EXPECT_NEAR(squares / 100000, 1.0 / 3, 0.01);
}

}  // namespace
}  // namespace antiphon::engine::cuda
