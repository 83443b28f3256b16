#include "common/philox.h"

#include <gtest/gtest.h>

namespace antiphon {
namespace {

using Words = std::array<uint32_t, 4>;

// Known answers of Random123's kat_vectors for philox4x32, 10 rounds.
TEST(PhiloxTest, GivesTheKnownAnswersOfRandom123) {
  EXPECT_EQ(Philox4x32(0, 0, 0), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(Philox4x32(~0ull, ~0ull, ~0ull),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(Philox4x32(0x299f31d0a4093822, 0x85a308d3243f6a88, 0x0370734413198a2e),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(PhiloxTest, UniformStaysBelowOneAndIsCentred) {
  double sum = 0;
  for (uint64_t i = 0; i < 100'000; ++i) {
    const double u = PhiloxUniform(42, i);
    ASSERT_GE(u, 0.0);
    ASSERT_LT(u, 1.0);
    sum += u;
  }
  EXPECT_NEAR(sum / 100'000, 0.5, 0.005);
}

TEST(PhiloxTest, AValueDependsOnKeyAndPositionAlone) {
  EXPECT_EQ(PhiloxUniform(1, 5), PhiloxUniform(1, 5));
  EXPECT_NE(PhiloxUniform(1, 5), PhiloxUniform(1, 6));
  EXPECT_NE(PhiloxUniform(1, 5), PhiloxUniform(2, 5));
}

}  // namespace
}  // namespace antiphon
