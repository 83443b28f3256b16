// Each granted table against a plain double-precision computation, and bit for bit against the
// scalar table.
#include "engine/cpu/kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "engine/cpu/dequantize.h"
#include "engine/cpu/isa.h"
#include "engine/cpu/pack.h"
#include "tests/engine/quantise_rows.h"
#include "tests/engine/random.h"
#include "tests/engine/tile_model.h"
#include "tests/engine/tiny_model.h"

namespace antiphon::engine::cpu {
namespace {

using model::TensorType;

const TensorType kTypes[] = {TensorType::kF32,  TensorType::kF16,  TensorType::kBF16,
                             TensorType::kQ8_0, TensorType::kQ4_0, TensorType::kQ4_1,
                             TensorType::kQ5_0, TensorType::kQ5_1, TensorType::kQ4_K,
                             TensorType::kQ5_K, TensorType::kQ6_K};

// All that this machine grants and, of the others', the products of "amx".
std::vector<const Kernels*> TestedKernels() {
  std::vector<const Kernels*> tested = GrantedKernels();
#ifdef __x86_64__
  if (KernelsNamed("avx512-bf16").ok()) tested.push_back(&ModelledTileKernels());
#endif
  return tested;
}

size_t BlockOf(TensorType type) { return model::TraitsOf(type).block_elements; }

// At least `n` columns, in whole blocks.
size_t ColumnsOf(TensorType type, size_t n) {
  return (n + BlockOf(type) - 1) / BlockOf(type) * BlockOf(type);
}

std::vector<TensorType> QuantisedTypes() {
  std::vector<TensorType> types;
  for (TensorType type : kTypes) {
    if (BlockOf(type) > 1) types.push_back(type);
  }
  return types;
}

// A packed matrix of `rows` x `columns` and its values.
struct PackedMatrix {
  PackedMatrix(TensorType tensor_type, size_t rows_out, size_t columns_in, TestRandom& random)
      : PackedMatrix(tensor_type, rows_out, columns_in,
                     RandomTensor(tensor_type, rows_out * columns_in, 0.1f, random)) {}
  PackedMatrix(TensorType tensor_type, size_t rows_out, size_t columns_in, const std::string& bytes)
      : type(PackedTypeOf(tensor_type).value()),
        rows(rows_out),
        columns(columns_in),
        groups(static_cast<int>((rows + 15) / 16)) {
    const std::byte* data = reinterpret_cast<const std::byte*>(bytes.data());
    const size_t row_bytes = bytes.size() / rows;
    values.resize(rows * columns);
    Dequantize(tensor_type, data, values.size(), values.data());
    packed.resize(PackedGroupBytes(type, columns) * static_cast<size_t>(groups));
    for (size_t g = 0; g < static_cast<size_t>(groups); ++g) {
      const std::byte* sources[16];
      for (size_t lane = 0; lane < 16; ++lane) {
        const size_t row = 16 * g + lane;
        sources[lane] = row < rows ? data + row * row_bytes : nullptr;
      }
      PackGroup(type, sources, columns, packed.data() + g * PackedGroupBytes(type, columns));
    }
  }
  PackedType type;
  size_t rows, columns;
  int groups;
  std::vector<std::byte> packed;
  std::vector<float> values;
};

// What the quantised tiles stand for.
std::vector<float> DequantiseAll(const std::vector<std::byte>& tiles, size_t rows, size_t columns) {
  std::vector<float> x(rows * columns);
  for (size_t row = 0; row < rows; ++row) {
    const size_t tile = row / kRowTile, within = row % kRowTile;
    const size_t tile_rows = std::min<size_t>(kRowTile, rows - tile * kRowTile);
    for (size_t c = 0; c < columns; ++c) {
      const std::byte* block = tiles.data() + tile * QuantTileBytes(kRowTile, columns) +
                               c / 32 * tile_rows * kQuantRowBlockBytes;
      QuantNumbers numbers;
      std::memcpy(&numbers, block + tile_rows * 32 + within * sizeof(numbers), sizeof(numbers));
      x[row * columns + c] =
          numbers.scale * static_cast<float>(static_cast<int8_t>(block[within * 32 + c % 32]));
    }
  }
  return x;
}

std::vector<float> Multiply(const Kernels& kernels, const PackedMatrix& w,
                            const std::vector<float>& x, const std::vector<std::byte>& tiles,
                            size_t rows, bool add, bool fine = false) {
  const size_t stride = static_cast<size_t>(w.groups) * 16;
  std::vector<float> out(rows * stride, add ? 2.0f : -1.0f);
  MatMul m;
  m.weights = w.packed.data();
  m.columns = w.columns;
  m.groups = w.groups;
  m.x = x.data();
  m.x_stride = w.columns;
  m.x_quant = tiles.data();
  m.rows = static_cast<int>(rows);
  m.out = out.data();
  m.out_stride = stride;
  m.add = add;
  m.fine = fine;
  kernels.matmul[static_cast<int>(w.type)](m);
  return out;
}

std::vector<float> Multiply(const Kernels& kernels, const PackedMatrix& w,
                            const std::vector<float>& x, size_t rows, bool add) {
  return Multiply(kernels, w, x, QuantiseAll(kernels, x, rows, w.columns), rows, add);
}

// The same with activations at 16 bits.
std::vector<float> MultiplyFine(const Kernels& kernels, const PackedMatrix& w,
                                const std::vector<float>& x, size_t rows, bool add) {
  return Multiply(kernels, w, x, QuantiseFine(kernels, x, rows, w.columns), rows, add, true);
}

// The same in double precision, without padding: [row][w.rows].
std::vector<double> MultiplyExactly(const PackedMatrix& w, const std::vector<float>& x,
                                    size_t rows) {
  std::vector<double> out(rows * w.rows);
  for (size_t r = 0; r < rows; ++r) {
    for (size_t o = 0; o < w.rows; ++o) {
      for (size_t c = 0; c < w.columns; ++c) {
        out[r * w.rows + o] += double{x[r * w.columns + c]} * double{w.values[o * w.columns + c]};
      }
    }
  }
  return out;
}

// Root mean square of the difference over that of `exact`.
double RelativeError(const PackedMatrix& w, const std::vector<float>& got,
                     const std::vector<double>& exact) {
  const size_t stride = static_cast<size_t>(w.groups) * 16;
  double error = 0, size = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double difference = double{got[i / w.rows * stride + i % w.rows]} - exact[i];
    error += difference * difference;
    size += exact[i] * exact[i];
  }
  return std::sqrt(error / size);
}

TEST(KernelsTest, EveryFormatIsPackedAndHardlyGrows) {
  for (TensorType type : kTypes) {
    SCOPED_TRACE(model::TensorTypeName(type));
    const auto packed = PackedTypeOf(type);
    ASSERT_TRUE(packed.has_value());
    const model::TypeTraits traits = model::TraitsOf(type);
    const double in_file = 16.0 * 1024 / static_cast<double>(traits.block_elements) *
                           static_cast<double>(traits.block_bytes);
    EXPECT_LE(static_cast<double>(PackedGroupBytes(*packed, 1024)), 1.03 * in_file);
  }
}

TEST(KernelsTest, ProductsAreCloseToDoubleAndEqualOnEveryInstructionSet) {
  TestRandom random(1);
  for (TensorType type : kTypes) {
    SCOPED_TRACE(model::TensorTypeName(type));
    const PackedMatrix w(type, 70, ColumnsOf(type, 160), random);
    for (size_t rows = 1; rows <= 33; ++rows) {
      SCOPED_TRACE(rows);
      const std::vector<float> x = random.Normals(rows * w.columns);
      const std::vector<float> want = Multiply(ScalarKernels(), w, x, rows, false);
      const double tolerance = UsesQuantisedActivations(w.type) ? 0.01 : 2e-6;
      EXPECT_LE(RelativeError(w, want, MultiplyExactly(w, x, rows)), tolerance);
      for (size_t r = 0; r < rows; ++r) {
        for (size_t o = 70; o < 80; ++o) EXPECT_EQ(want[r * 80 + o], 0) << "padding";
      }
      const std::vector<float> added = Multiply(ScalarKernels(), w, x, rows, true);
      for (const Kernels* kernels : TestedKernels()) {
        EXPECT_EQ(Multiply(*kernels, w, x, rows, false), want) << kernels->name;
        EXPECT_EQ(Multiply(*kernels, w, x, rows, true), added) << kernels->name;
      }
    }
  }
}

// Past the columns that are unpacked at once and the rows that share them, where a table does so.
TEST(KernelsTest, LargeProductsAreEqualOnEveryInstructionSet) {
  TestRandom random(10);
  for (TensorType type : QuantisedTypes()) {
    SCOPED_TRACE(model::TensorTypeName(type));
    const PackedMatrix w(type, 32, ColumnsOf(type, 2048 + 96), random);
    for (size_t rows : {19, 275}) {
      const std::vector<float> x = random.Normals(rows * w.columns);
      const std::vector<std::byte> tiles = QuantiseAll(ScalarKernels(), x, rows, w.columns);
      for (const bool add : {false, true}) {
        const std::vector<float> want = Multiply(ScalarKernels(), w, x, tiles, rows, add);
        for (const Kernels* kernels : TestedKernels()) {
          EXPECT_TRUE(Multiply(*kernels, w, x, tiles, rows, add) == want)
              << kernels->name << ", " << rows << " rows";
        }
      }
    }
  }
}

// Of the integer formats, only the rounding of the activations is not float rounding.
TEST(KernelsTest, IntegerProductsAreThoseOfTheDequantisedNumbers) {
  TestRandom random(8);
  for (TensorType type : QuantisedTypes()) {
    for (size_t blocks : {1, 2, 5}) {
      for (size_t rows_out : {1, 17, 32}) {
        const size_t rows = rows_out == 1 ? 33 : 3;
        const PackedMatrix w(type, rows_out, blocks * BlockOf(type), random);
        const std::vector<float> x = random.Normals(rows * w.columns);
        const std::vector<std::byte> tiles = QuantiseAll(ScalarKernels(), x, rows, w.columns);
        const std::vector<float> rounded = DequantiseAll(tiles, rows, w.columns);
        EXPECT_LE(RelativeError(w, Multiply(ScalarKernels(), w, x, tiles, rows, false),
                                MultiplyExactly(w, rounded, rows)),
                  1e-6)
            << model::TensorTypeName(type) << " " << blocks << " blocks, " << rows_out << " rows";
      }
    }
  }
}

TEST(KernelsTest, RowsAtSixteenBitsAreCloseToDoubleAndEqualOnEveryInstructionSet) {
  TestRandom random(9);
  for (TensorType type : QuantisedTypes()) {
    SCOPED_TRACE(model::TensorTypeName(type));
    const PackedMatrix w(type, 70, ColumnsOf(type, 160), random);
    for (size_t rows = 1; rows <= 19; ++rows) {
      SCOPED_TRACE(rows);
      const std::vector<float> x = random.Normals(rows * w.columns);
      const std::vector<float> want = MultiplyFine(ScalarKernels(), w, x, rows, false);
      EXPECT_LE(RelativeError(w, want, MultiplyExactly(w, x, rows)), 1e-4);
      const std::vector<float> added = MultiplyFine(ScalarKernels(), w, x, rows, true);
      for (const Kernels* kernels : TestedKernels()) {
        EXPECT_EQ(MultiplyFine(*kernels, w, x, rows, false), want) << kernels->name;
        EXPECT_EQ(MultiplyFine(*kernels, w, x, rows, true), added) << kernels->name;
      }
      for (size_t row = 0; row < rows; ++row) {
        const std::vector<float> one(x.begin() + static_cast<ptrdiff_t>(row * w.columns),
                                     x.begin() + static_cast<ptrdiff_t>((row + 1) * w.columns));
        const std::vector<float> alone = MultiplyFine(ScalarKernels(), w, one, 1, false);
        EXPECT_TRUE(std::equal(alone.begin(), alone.end(), &want[row * 80])) << "neighbours";
      }
    }
  }
}

// Past the columns that are unpacked at once and the rows that share them, where a table does so.
TEST(KernelsTest, LargeProductsAtSixteenBitsAreEqualOnEveryInstructionSet) {
  TestRandom random(11);
  for (TensorType type : QuantisedTypes()) {
    SCOPED_TRACE(model::TensorTypeName(type));
    const PackedMatrix w(type, 32, ColumnsOf(type, 2048 + 96), random);
    const size_t rows = 139;
    const std::vector<float> x = random.Normals(rows * w.columns);
    const std::vector<float> want = MultiplyFine(ScalarKernels(), w, x, rows, true);
    for (const Kernels* kernels : TestedKernels()) {
      EXPECT_TRUE(MultiplyFine(*kernels, w, x, rows, true) == want) << kernels->name;
    }
  }
}

TEST(KernelsTest, ARowsProductDoesNotDependOnItsNeighbours) {
  TestRandom random(2);
  constexpr size_t kRows = 21;
  for (TensorType type : kTypes) {
    SCOPED_TRACE(model::TensorTypeName(type));
    const PackedMatrix w(type, 64, ColumnsOf(type, 96), random);
    const std::vector<float> x = random.Normals(kRows * w.columns);
    for (const Kernels* kernels : TestedKernels()) {
      const std::vector<float> all = Multiply(*kernels, w, x, kRows, false);
      for (size_t row = 0; row < kRows; ++row) {
        const std::vector<float> one(x.begin() + static_cast<ptrdiff_t>(row * w.columns),
                                     x.begin() + static_cast<ptrdiff_t>((row + 1) * w.columns));
        const std::vector<float> alone = Multiply(*kernels, w, one, 1, false);
        EXPECT_TRUE(std::equal(alone.begin(), alone.end(), &all[row * 64])) << kernels->name;
      }
    }
  }
}

// Sixteen rows of one block each, whose bytes are all `fill` but for the f16 numbers and, of Q6_K,
// the scales of its sixteenths.
std::string FilledTensor(TensorType type, uint8_t fill, uint8_t sub_scale) {
  const model::TypeTraits traits = model::TraitsOf(type);
  std::string bytes(16 * traits.block_bytes, static_cast<char>(fill));
  const bool minima = type == TensorType::kQ4_1 || type == TensorType::kQ5_1 ||
                      type == TensorType::kQ4_K || type == TensorType::kQ5_K;
  const auto put = [&](size_t at, uint16_t half) { std::memcpy(&bytes[at], &half, 2); };
  for (size_t row = 0; row < 16; ++row) {
    const size_t at = row * traits.block_bytes;
    put(type == TensorType::kQ6_K ? at + 208 : at, 0x3c00);  // 1
    if (minima) put(at + 2, 0x3800);                         // 0.5
    if (type != TensorType::kQ6_K) continue;
    std::fill_n(bytes.begin() + static_cast<ptrdiff_t>(at) + 192, 16, static_cast<char>(sub_scale));
  }
  return bytes;
}

TEST(KernelsTest, ExtremeQuantisedValuesDoNotOverflow) {
  // The lowest and the highest weights against full-scale activations of either sign, or of one in
  // each half of a block, in every lane.
  for (TensorType type : QuantisedTypes()) {
    for (int fill : {0x00, 0xff, 0x80, 0x7f}) {
      for (int sub_scale : {0x80, 0x7f}) {
        const PackedMatrix w(
            type, 16, BlockOf(type),
            FilledTensor(type, static_cast<uint8_t>(fill), static_cast<uint8_t>(sub_scale)));
        for (float first : {1000.0f, -1000.0f}) {
          for (float second : {1000.0f, -1000.0f}) {
            SCOPED_TRACE(std::string(model::TensorTypeName(type)) + " " + std::to_string(fill) +
                         " " + std::to_string(sub_scale) + " " + std::to_string(first) + " " +
                         std::to_string(second));
            std::vector<float> x(w.columns);
            for (size_t c = 0; c < w.columns; ++c) x[c] = c % 32 < 16 ? first : second;
            const std::vector<float> want = Multiply(ScalarKernels(), w, x, 1, false);
            const std::vector<double> exact = MultiplyExactly(w, x, 1);
            for (size_t o = 0; o < 16; ++o) {
              EXPECT_NEAR(want[o], exact[o], std::abs(exact[o]) * 1e-6 + 0.5);
            }
            std::vector<float> rows, wanted;  // a full tile's
            for (int i = 0; i < kRowTile; ++i) {
              rows.insert(rows.end(), x.begin(), x.end());
              wanted.insert(wanted.end(), want.begin(), want.end());
            }
            const std::vector<float> fine = MultiplyFine(ScalarKernels(), w, x, 1, false);
            for (size_t o = 0; o < 16; ++o) {
              EXPECT_NEAR(fine[o], exact[o], std::abs(exact[o]) * 5e-5 + 0.5);
            }
            for (const Kernels* kernels : TestedKernels()) {
              EXPECT_EQ(Multiply(*kernels, w, x, 1, false), want) << kernels->name;
              EXPECT_EQ(Multiply(*kernels, w, rows, kRowTile, false), wanted) << kernels->name;
              EXPECT_EQ(MultiplyFine(*kernels, w, x, 1, false), fine) << kernels->name;
            }
          }
        }
      }
    }
  }
}

TEST(KernelsDeathTest, RowsOfTheKFormatsAreWholeSuperBlocks) {
  const std::byte* rows[16] = {};
  std::vector<std::byte> out(16 * 1024);
  EXPECT_DEATH(PackGroup(PackedTypeOf(TensorType::kQ4_K).value(), rows, 160, out.data()),
               "columns % kSuperBlock == 0");
}

TEST(KernelsTest, QuantisedTilesAreEqualOnEveryInstructionSet) {
  TestRandom random(4);
  std::vector<float> x = random.Normals(19 * 64, 3.0f);
  std::fill(x.begin(), x.begin() + 32, 0.0f);  // a block of zeros has scale 0
  const std::vector<std::byte> want = QuantiseAll(ScalarKernels(), x, 19, 64);
  for (const Kernels* kernels : GrantedKernels()) {
    EXPECT_EQ(QuantiseAll(*kernels, x, 19, 64), want) << kernels->name;
  }
}

TEST(KernelsTest, TwoPlacesHoldSixteenBits) {
  TestRandom random(5);
  const std::vector<float> x = random.Normals(64);
  const std::vector<std::byte> tile = QuantiseFine(ScalarKernels(), x, 1, 64);
  for (size_t block = 0; block < 2; ++block) {
    const std::byte* base = tile.data() + block * 2 * kQuantRowBlockBytes;
    QuantNumbers numbers[2];
    std::memcpy(numbers, base + 64, sizeof(numbers));
    float sum = 0;
    int half = 0;
    for (size_t i = 0; i < 32; ++i) {
      const int value = 256 * static_cast<int8_t>(base[i]) + static_cast<int8_t>(base[32 + i]);
      EXPECT_NEAR(numbers[0].scale * static_cast<float>(value), x[block * 32 + i],
                  numbers[0].scale * 1.3f);
      sum += static_cast<float>(value);
      if (i < 16) half += value;
    }
    EXPECT_EQ(numbers[0].sum, sum * numbers[0].scale);
    EXPECT_EQ(numbers[0].offset, -128 * static_cast<int>(sum));
    EXPECT_EQ(numbers[0].half, -32 * half);
    EXPECT_TRUE(numbers[1].scale == 0 && numbers[1].sum == 0 && numbers[1].offset == 0 &&
                numbers[1].half == 0);
  }
}

TEST(KernelsTest, FloatRoutinesAreCloseToDoubleAndEqualOnEveryInstructionSet) {
  TestRandom random(6);
  constexpr size_t kSize = 208;
  const std::vector<float> x = random.Normals(kSize, 5.0f), w = random.Normals(kSize);
  std::vector<float> want(kSize), got(kSize);
  ScalarKernels().rms_norm(x.data(), w.data(), kSize, kSize, 1e-5f, want.data());
  double squares = 0;
  for (float v : x) squares += double{v} * double{v};
  for (size_t i = 0; i < kSize; ++i) {
    EXPECT_NEAR(want[i], double{x[i]} / std::sqrt(squares / kSize + 1e-5) * double{w[i]}, 1e-5);
  }
  std::vector<float> silu(kSize), rotated(kSize);
  ScalarKernels().silu_mul(x.data(), w.data(), kSize, silu.data());
  for (size_t i = 0; i < kSize; ++i) {
    EXPECT_NEAR(silu[i], double{x[i]} / (1 + std::exp(-double{x[i]})) * double{w[i]}, 1e-5);
  }
  std::vector<float> cos(52), sin(52);
  for (size_t i = 0; i < 52; ++i) {
    cos[i] = static_cast<float>(std::cos(0.1 * static_cast<double>(i)));
    sin[i] = static_cast<float>(std::sin(0.1 * static_cast<double>(i)));
  }
  ScalarKernels().rope(x.data(), cos.data(), sin.data(), 52, rotated.data());
  for (size_t i = 0; i < 52; ++i) {
    EXPECT_NEAR(rotated[i], x[i] * cos[i] - x[52 + i] * sin[i], 1e-5);
    EXPECT_NEAR(rotated[52 + i], x[52 + i] * cos[i] + x[i] * sin[i], 1e-5);
  }
  std::vector<uint16_t> rounded(kSize - 3), other(kSize - 3);
  ScalarKernels().to_bf16(x.data(), rounded.size(), rounded.data());
  for (size_t i = 0; i < rounded.size(); ++i) {
    const uint32_t bits = static_cast<uint32_t>(rounded[i]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    EXPECT_NEAR(value, x[i], std::abs(x[i]) / 256);
  }
  for (const Kernels* kernels : GrantedKernels()) {
    SCOPED_TRACE(kernels->name);
    kernels->rms_norm(x.data(), w.data(), kSize, kSize, 1e-5f, got.data());
    EXPECT_EQ(got, want);
    kernels->silu_mul(x.data(), w.data(), kSize, got.data());
    EXPECT_EQ(got, silu);
    std::vector<float> turned(kSize);
    kernels->rope(x.data(), cos.data(), sin.data(), 52, turned.data());
    EXPECT_EQ(turned, rotated);
    kernels->to_bf16(x.data(), other.size(), other.data());
    EXPECT_EQ(other, rounded);
  }
}

TEST(KernelsTest, ArgmaxIsTheLowestIndexOfTheMaximumAndSumExpIsExact) {
  TestRandom random(7);
  for (size_t n : {1, 15, 16, 17, 1000, 4097}) {
    std::vector<float> x = random.Normals(n, 4.0f);
    x[n / 2] = x[n - 1] = 30.0f;
    double want = 0;
    for (float v : x) want += std::exp(double{v} - 30);
    const double scalar = ScalarKernels().sum_exp(x.data(), n, 30.0f);
    EXPECT_NEAR(scalar, want, want * 1e-6);
    for (const Kernels* kernels : GrantedKernels()) {
      EXPECT_EQ(kernels->argmax(x.data(), n), n / 2) << kernels->name;
      EXPECT_EQ(kernels->sum_exp(x.data(), n, 30.0f), scalar) << kernels->name;
    }
    x[0] = -INFINITY;
    for (const Kernels* kernels : GrantedKernels()) {
      EXPECT_EQ(kernels->sum_exp(x.data(), n, 30.0f), ScalarKernels().sum_exp(x.data(), n, 30.0f));
    }
  }
}

TEST(KernelsTest, BlockMaximaAndShiftScaleAreExact) {
  TestRandom random(8);
  for (size_t n : {1, 15, 31, 32, 33, 64, 1000, 4097}) {
    const std::vector<float> x = random.Normals(n, 4.0f);
    std::vector<float> maxima, scaled;
    for (size_t i = 0; i < n; ++i) {
      if (i % kMaximaBlock == 0) maxima.push_back(x[i]);
      maxima.back() = std::max(maxima.back(), x[i]);
      const float shifted = x[i] - 3.0f;
      scaled.push_back(shifted * 1.7f);
    }
    for (const Kernels* kernels : GrantedKernels()) {
      SCOPED_TRACE(kernels->name);
      std::vector<float> got(maxima.size() + 1, -1.0f);
      kernels->block_maxima(x.data(), n, got.data());
      EXPECT_EQ(got.back(), -1.0f);
      got.pop_back();
      EXPECT_EQ(got, maxima);
      got.assign(n, 0);
      kernels->shift_scale(x.data(), n, 3.0f, 1.7f, got.data());
      EXPECT_EQ(got, scaled);
    }
  }
}

// A cache of one kv head out of two, its queries, and the naive result.
struct AttentionCase {
  AttentionCase(bool f32_cache, int dim, uint32_t block_size, std::vector<uint32_t> seen,
                uint64_t seed)
      : f32(f32_cache), head_dim(dim), block_tokens(block_size), limits(std::move(seen)) {
    TestRandom random(seed);
    const uint32_t tokens = limits.back();
    const size_t element = f32 ? 4 : 2, d = static_cast<size_t>(dim);
    token_bytes = 2 * d * element;
    half = token_bytes * block_tokens;
    padded = (d + 15) / 16 * 16;
    memory.assign((tokens + block_tokens - 1) / block_tokens * 2 * half, std::byte{0xff});
    std::vector<float> k = random.Normals(tokens * d), v = random.Normals(tokens * d);
    for (uint32_t t = 0; t < tokens; ++t) {
      for (size_t i = 0; i < d; ++i) {
        Put(t, i, k[t * d + i], 0);
        Put(t, i, v[t * d + i], half);
      }
    }
    for (size_t b = 0; b < memory.size(); b += 2 * half) blocks.push_back(memory.data() + b);
    queries.resize(limits.size() * padded);
    for (size_t q = 0; q < limits.size(); ++q) {
      std::vector<float> x = random.Normals(d, 0.5f);
      std::copy(x.begin(), x.end(), &queries[q * padded]);
      if (!f32) {
        std::vector<uint16_t> rounded(d);
        ScalarKernels().to_bf16(x.data(), d, rounded.data());
        for (size_t i = 0; i < d; ++i) {
          const uint32_t bits = static_cast<uint32_t>(rounded[i]) << 16;
          std::memcpy(&x[i], &bits, 4);
        }
      }
      double total = 0;
      std::vector<double> mixed(d);
      for (uint32_t t = 0; t < limits[q]; ++t) {
        double score = 0;
        for (size_t i = 0; i < d; ++i) score += double{x[i]} * double{k[t * d + i]};
        const double weight = std::exp(score);
        total += weight;
        for (size_t i = 0; i < d; ++i) mixed[i] += weight * double{v[t * d + i]};
      }
      for (size_t i = 0; i < d; ++i) want.push_back(mixed[i] / total);
    }
  }
  void Put(uint32_t token, size_t i, float& x, size_t half_offset) {
    std::byte* at = memory.data() + token / block_tokens * 2 * half + half_offset +
                    token % block_tokens * token_bytes + token_bytes / 2;
    if (f32) {
      std::memcpy(at + 4 * i, &x, 4);
      return;
    }
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits &= 0xffff0000;
    std::memcpy(&x, &bits, 4);
    const uint16_t high = static_cast<uint16_t>(bits >> 16);
    std::memcpy(at + 2 * i, &high, 2);
  }
  // Queries [first, first + count); the tiles in pieces of `piece`, the last piece first, or in one
  // go.
  std::vector<float> Run(const Kernels& kernels, size_t first, size_t count,
                         uint32_t piece = 0) const {
    std::vector<float> out(count * padded), scratch(AttentionScratchFloats(count, padded), NAN);
    Attention a;
    a.queries = &queries[first * padded];
    a.count = static_cast<int>(count);
    a.limits = &limits[first];
    a.out = out.data();
    a.head_dim = head_dim;
    a.padded_dim = static_cast<int>(padded);
    a.blocks = blocks.data();
    a.block_tokens = block_tokens;
    a.token_bytes = token_bytes;
    a.key_offset = token_bytes / 2;
    a.value_offset = half + token_bytes / 2;
    a.f32_cache = f32;
    a.scratch = scratch.data();
    if (piece == 0) {
      kernels.attention(a);
      return out;
    }
    const uint32_t tiles = (limits[first + count - 1] + kAttentionTile - 1) / kAttentionTile;
    std::vector<float> partials(tiles * count * AttentionPartialFloats(padded), NAN);
    a.partials = partials.data();
    for (uint32_t end = tiles; end > 0; end = a.first_tile) {
      a.end_tile = end;
      a.first_tile = end > piece ? end - piece : 0;
      kernels.attention(a);
    }
    kernels.merge_attention(a);
    return out;
  }
  bool f32;
  int head_dim;
  uint32_t block_tokens;
  std::vector<uint32_t> limits;
  size_t token_bytes = 0, half = 0, padded = 0;
  std::vector<std::byte> memory;
  std::vector<const std::byte*> blocks;
  std::vector<float> queries;
  std::vector<double> want;
};

TEST(KernelsTest, AttentionIsCloseToNaiveAndEqualHoweverTheQueriesAreGrouped) {
  std::vector<uint32_t> limits;
  for (uint32_t t = 120; t < 135; ++t) limits.insert(limits.end(), 3, t);
  for (bool f32 : {false, true}) {
    for (int dim : {64, 20, 80, 128}) {
      for (uint32_t block : {16u, 64u, 5u}) {
        SCOPED_TRACE(dim);
        const AttentionCase c(f32, dim, block, limits, 9);
        const std::vector<float> all = c.Run(ScalarKernels(), 0, limits.size());
        for (size_t q = 0; q < limits.size(); ++q) {
          for (size_t i = 0; i < static_cast<size_t>(dim); ++i) {
            // The weights of a bf16 cache are rounded to bf16: by 2^-9 of themselves at most.
            ASSERT_NEAR(all[q * c.padded + i], c.want[q * static_cast<size_t>(dim) + i],
                        f32 ? 1e-5 : 4e-3);
          }
        }
        for (const Kernels* kernels : GrantedKernels()) {
          EXPECT_EQ(c.Run(*kernels, 0, limits.size()), all) << kernels->name;
          for (uint32_t piece : {1, 2}) {
            EXPECT_EQ(c.Run(*kernels, 0, limits.size(), piece), all) << kernels->name;
          }
          for (size_t q = 0; q < limits.size(); q += 3) {
            const std::vector<float> row = c.Run(*kernels, q, 3);
            EXPECT_TRUE(std::equal(row.begin(), row.end(), &all[q * c.padded]))
                << kernels->name << " query " << q;
          }
        }
      }
    }
  }
}

// Whatever the number of tokens, whichever of them a query is the last to see, alone or beside
// others, and whatever lies behind the last one.
TEST(KernelsTest, AttentionOverEveryNumberOfTokensIsEqualOnEveryInstructionSet) {
  std::vector<uint32_t> limits(70);
  std::iota(limits.begin(), limits.end(), 1);
  for (int dim : {64, 36, 33}) {
    const AttentionCase c(false, dim, 16, limits, 11);
    const std::vector<float> all = c.Run(ScalarKernels(), 0, limits.size());
    for (size_t q = 0; q < limits.size(); ++q) {
      for (size_t i = 0; i < static_cast<size_t>(dim); ++i) {
        ASSERT_NEAR(all[q * c.padded + i], c.want[q * static_cast<size_t>(dim) + i], 1.5e-2);
      }
    }
    for (const Kernels* kernels : GrantedKernels()) {
      SCOPED_TRACE(kernels->name);
      EXPECT_EQ(c.Run(*kernels, 0, limits.size()), all);
      for (size_t q = 0; q < limits.size(); ++q) {
        const std::vector<float> row = c.Run(*kernels, q, 1);
        ASSERT_TRUE(std::equal(row.begin(), row.end(), &all[q * c.padded])) << "query " << q;
      }
    }
  }
}

// Of the ranges ahead, as many lines leave as are read of the cache.
TEST(KernelsTest, AttentionFetchesWhatIsAheadAndNothingElseChanges) {
  TestRandom random(12);
  constexpr uint32_t kTokens = 128, kDim = 64;
  constexpr size_t kTokenBytes = kDim * sizeof(uint16_t), kHalf = kTokens * kTokenBytes;
  std::vector<uint16_t> cache(2 * kTokens * kDim);
  const std::vector<float> numbers = random.Normals(cache.size());
  ScalarKernels().to_bf16(numbers.data(), numbers.size(), cache.data());
  const std::byte* block = reinterpret_cast<const std::byte*>(cache.data());
  const std::vector<float> queries = random.Normals(size_t{3} * kDim);
  const std::vector<uint32_t> limits(3, kTokens);
  const std::vector<std::byte> next(size_t{1} << 20);
  for (const Kernels* kernels : GrantedKernels()) {
    std::vector<float> want;
    for (size_t times : {0, 1, 2}) {
      SCOPED_TRACE(std::string(kernels->name) + ", " + std::to_string(times) + " times");
      std::vector<float> out(queries.size()), scratch(AttentionScratchFloats(3, kDim));
      MemoryRange ranges[] = {{next.data(), next.data()},
                              {next.data(), next.data() + 3 * 64},
                              {next.data() + 8192, next.data() + next.size()}};
      Attention a;
      a.queries = queries.data();
      a.count = 3;
      a.limits = limits.data();
      a.out = out.data();
      a.head_dim = a.padded_dim = kDim;
      a.blocks = &block;
      a.block_tokens = kTokens;
      a.token_bytes = kTokenBytes;
      a.value_offset = kHalf;
      a.scratch = scratch.data();
      a.ahead = ranges;
      a.ahead_count = times == 0 ? 0 : 3;
      a.ahead_twice = times == 2;
      kernels->attention(a);
      if (times == 0) want = out;
      EXPECT_EQ(out, want);
      const std::byte* begins[] = {next.data(), next.data() + 3 * 64, next.data() + 8192};
      size_t fetched = 0;
      for (int i = 1; i < 3; ++i) {
        if (times == 0) break;
        fetched += static_cast<size_t>(ranges[i].begin - begins[i == 1 ? 0 : 2]);
      }
      EXPECT_EQ(ranges[0].begin, next.data());
      const bool fetches = times > 0 && kernels != &ScalarKernels();
      // Two lines at once may go past the end of a range.
      EXPECT_NEAR(fetched, fetches ? times * 2 * kHalf : 0, times == 2 ? 64 : 0);
    }
  }
}

TEST(KernelsTest, AttentionOfTheFirstTokenIsItsValue) {
  const AttentionCase c(true, 32, 16, {1}, 3);
  for (const Kernels* kernels : GrantedKernels()) {
    const std::vector<float> out = c.Run(*kernels, 0, 1);
    for (size_t i = 0; i < 32; ++i) {
      EXPECT_NEAR(out[i], c.want[i], 1e-7) << kernels->name;
    }
  }
}

TEST(KernelsTest, AnOldProcessorIsToldOf) {
  EXPECT_NE(SlowKernelsNotice(ScalarKernels()).find("neither AVX2"), std::string::npos);
  for (const Kernels* kernels : GrantedKernels()) {
    if (kernels == &ScalarKernels()) continue;
    EXPECT_EQ(SlowKernelsNotice(*kernels), "") << kernels->name;
  }
}

TEST(KernelsTest, UnknownAndUngrantedInstructionSetsAreRefusedByName) {
  EXPECT_EQ(KernelsNamed("mmx").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(KernelsNamed("scalar").ok());
  EXPECT_EQ(*KernelsNamed("auto"), GrantedKernels().front());
  const auto amx = KernelsNamed("amx");
  if (!amx.ok()) {
    EXPECT_EQ(amx.status().code(), absl::StatusCode::kFailedPrecondition);
  }
}

}  // namespace
}  // namespace antiphon::engine::cpu
