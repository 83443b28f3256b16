#include "engine/cpu/dequantize.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace antiphon::engine::cpu {
namespace {

using model::TensorType;

struct Vector {
  TensorType type;
  size_t elements;
  std::vector<size_t> scales;  // offsets of f16 numbers that are set to 0.1
  std::vector<std::pair<size_t, float>> values;
  double weighted_sum;  // sum of (i + 1) * value[i]
};

// One block of pseudo-random bytes a format; the values are those of gguf-py 0.19 (gguf.quants).
const std::vector<Vector>& Vectors() {
  static const auto* const vectors = new std::vector<Vector>{
      {TensorType::kF16,
       32,
       {},
       {{0, 0.303710938f}, {1, -0.799316406f}, {31, -1.30175781f}},
       -54.0550537},
      {TensorType::kBF16, 32, {}, {{0, 4.09781933e-07f}, {1, -0.000873565674f}}, 6.68371078},
      {TensorType::kQ8_0,
       32,
       {0},
       {{0, 10.0975342f}, {1, -8.59790039f}, {31, 11.4971924f}},
       1563.31824},
      {TensorType::kQ4_0,
       32,
       {0},
       {{0, -0.299926758f}, {15, 0.399902344f}, {16, -0.199951172f}},
       -59.0855713},
      {TensorType::kQ4_1,
       32,
       {0, 2},
       {{0, 1.59960938f}, {15, 0.0999755859f}, {17, 1.09973145f}},
       409.699951},
      {TensorType::kQ5_0,
       32,
       {0},
       {{0, 1.29968262f}, {1, -0.599853516f}, {31, 0.0999755859f}},
       21.7946777},
      {TensorType::kQ5_1,
       32,
       {0, 2},
       {{0, 2.69934082f}, {16, 2.99926758f}, {31, 0.699829102f}},
       872.087036},
      {TensorType::kQ4_K,
       256,
       {0, 2},
       {{0, 25.2938232f}, {33, 23.2943115f}, {191, 55.786377f}},
       483518.725},
      {TensorType::kQ5_K,
       256,
       {0, 2},
       {{0, 62.4847412f}, {97, 44.0892334f}, {255, 7.29821777f}},
       1074177.69},
      {TensorType::kQ6_K,
       256,
       {208},
       {{0, -302.326172f}, {64, -243.540527f}, {255, 27.8931885f}},
       -263847.568},
  };
  return *vectors;
}

std::vector<std::byte> BytesOf(const Vector& v) {
  const model::TypeTraits traits = model::TraitsOf(v.type);
  std::vector<std::byte> bytes(v.elements / traits.block_elements * traits.block_bytes);
  uint32_t state = 12345;
  for (size_t i = 0; i < bytes.size(); ++i) {
    state = (state * 1103515245u + 12345u) & 0x7fffffff;
    uint32_t byte = (state >> 16) & 0xff;
    if (v.scales.empty() && i % 2 == 1) byte = (0x30 + (byte & 0x8f) % 0x10) | (byte & 0x80);
    bytes[i] = static_cast<std::byte>(byte);
  }
  for (size_t at : v.scales) {
    bytes[at] = std::byte{0x66};
    bytes[at + 1] = std::byte{0x2e};
  }
  return bytes;
}

TEST(DequantizeTest, EveryFormatGivesTheValuesOfTheFormatsOwnLibrary) {
  for (const Vector& v : Vectors()) {
    SCOPED_TRACE(model::TensorTypeName(v.type));
    ASSERT_TRUE(CanDequantize(v.type));
    std::vector<float> out(v.elements);
    Dequantize(v.type, BytesOf(v).data(), v.elements, out.data());
    for (const auto& [index, value] : v.values) {
      EXPECT_NEAR(out[index], value, std::abs(value) * 1e-6f) << index;
    }
    double sum = 0;
    for (size_t i = 0; i < out.size(); ++i) sum += static_cast<double>(i + 1) * double{out[i]};
    EXPECT_NEAR(sum, v.weighted_sum, std::abs(v.weighted_sum) * 1e-6);
  }
}

TEST(DequantizeTest, UnknownFormatsAreNotClaimed) {
  EXPECT_FALSE(CanDequantize(TensorType::kQ2_K));
  EXPECT_FALSE(CanDequantize(static_cast<TensorType>(99)));
}

}  // namespace
}  // namespace antiphon::engine::cpu
