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
#include "tests/engine/random.h"
#include "tests/engine/tiny_model.h"

namespace antiphon::engine::cpu {
namespace {

using model::TensorType;

const TensorType kTypes[] = {TensorType::kF32,  TensorType::kF16,  TensorType::kBF16,
                             TensorType::kQ8_0, TensorType::kQ4_0, TensorType::kQ4_1};

// A packed matrix of `rows` x `columns` and its values.
struct PackedMatrix {
  PackedMatrix(TensorType tensor_type, size_t rows, size_t columns, TestRandom& random)
      : type(*PackedTypeOf(tensor_type)), groups(static_cast<int>((rows + 15) / 16)) {
    const std::string bytes = RandomTensor(tensor_type, rows * columns, 0.1f, random);
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
  int groups;
  std::vector<std::byte> packed;
  std::vector<float> values;
};

std::vector<std::byte> QuantiseAll(const Kernels& kernels, const std::vector<float>& x, size_t rows,
                                   size_t columns) {
  std::vector<std::byte> tiles(QuantTileBytes(rows, columns));
  for (size_t row = 0; row < rows; ++row) {
    const size_t tile = row / kRowTile;
    kernels.quantize_row(&x[row * columns], columns, static_cast<int>(row % kRowTile),
                         static_cast<int>(std::min<size_t>(kRowTile, rows - tile * kRowTile)),
                         tiles.data() + tile * QuantTileBytes(kRowTile, columns));
  }
  return tiles;
}

std::vector<float> Multiply(const Kernels& kernels, const PackedMatrix& w,
                            const std::vector<float>& x, size_t rows, size_t columns, bool add) {
  const std::vector<std::byte> tiles = QuantiseAll(kernels, x, rows, columns);
  const size_t stride = static_cast<size_t>(w.groups) * 16;
  std::vector<float> out(rows * stride, add ? 2.0f : -1.0f);
  MatMul m;
  m.weights = w.packed.data();
  m.columns = columns;
  m.groups = w.groups;
  m.x = x.data();
  m.x_stride = columns;
  m.x_quant = tiles.data();
  m.rows = static_cast<int>(rows);
  m.out = out.data();
  m.out_stride = stride;
  m.add = add;
  kernels.matmul[static_cast<int>(w.type)](m);
  return out;
}

TEST(KernelsTest, ProductsAreCloseToDoubleAndEqualOnEveryInstructionSet) {
  TestRandom random(1);
  constexpr size_t kColumns = 160, kRowsOut = 70;
  for (TensorType type : kTypes) {
    SCOPED_TRACE(model::TensorTypeName(type));
    const PackedMatrix w(type, kRowsOut, kColumns, random);
    for (size_t rows : {1, 2, 3, 5, 16, 17, 37}) {
      SCOPED_TRACE(rows);
      const std::vector<float> x = random.Normals(rows * kColumns);
      const std::vector<float> want = Multiply(ScalarKernels(), w, x, rows, kColumns, false);
      const double tolerance = UsesQuantisedActivations(w.type) ? 0.03 : 2e-6;
      double error = 0, size = 0;
      for (size_t r = 0; r < rows; ++r) {
        for (size_t o = 0; o < kRowsOut; ++o) {
          double sum = 0;
          for (size_t c = 0; c < kColumns; ++c) {
            sum += double{x[r * kColumns + c]} * double{w.values[o * kColumns + c]};
          }
          const double difference = double{want[r * 80 + o]} - sum;
          error += difference * difference;
          size += sum * sum;
        }
        for (size_t o = kRowsOut; o < 80; ++o) EXPECT_EQ(want[r * 80 + o], 0) << "padding";
      }
      EXPECT_LE(std::sqrt(error / size), tolerance);
      for (const Kernels* kernels : GrantedKernels()) {
        EXPECT_EQ(Multiply(*kernels, w, x, rows, kColumns, false), want) << kernels->name;
        EXPECT_EQ(Multiply(*kernels, w, x, rows, kColumns, true),
                  Multiply(ScalarKernels(), w, x, rows, kColumns, true))
            << kernels->name;
      }
    }
  }
}

TEST(KernelsTest, ARowsProductDoesNotDependOnItsNeighbours) {
  TestRandom random(2);
  constexpr size_t kColumns = 96, kRows = 21;
  const std::vector<float> x = random.Normals(kRows * kColumns);
  for (TensorType type : kTypes) {
    const PackedMatrix w(type, 64, kColumns, random);
    for (const Kernels* kernels : GrantedKernels()) {
      const std::vector<float> all = Multiply(*kernels, w, x, kRows, kColumns, false);
      for (size_t row = 0; row < kRows; ++row) {
        const std::vector<float> one(x.begin() + static_cast<ptrdiff_t>(row * kColumns),
                                     x.begin() + static_cast<ptrdiff_t>((row + 1) * kColumns));
        const std::vector<float> alone = Multiply(*kernels, w, one, 1, kColumns, false);
        EXPECT_TRUE(std::equal(alone.begin(), alone.end(), &all[row * 64])) << kernels->name;
      }
    }
  }
}

TEST(KernelsTest, ExtremeQuantisedValuesDoNotOverflow) {
  // The lowest weight against full-scale activations of either sign, in every lane.
  constexpr size_t kColumns = 32;
  for (float sign : {1.0f, -1.0f}) {
    const std::vector<float> x(kColumns, sign * 1000.0f);
    for (TensorType type : {TensorType::kQ8_0, TensorType::kQ4_0, TensorType::kQ4_1}) {
      TestRandom random(3);
      PackedMatrix w(type, 16, kColumns, random);
      const size_t head = type == TensorType::kQ4_1 ? 64 : 32;
      for (int fill : {0x00, 0xff}) {
        std::fill(w.packed.begin() + static_cast<ptrdiff_t>(head), w.packed.end(),
                  static_cast<std::byte>(fill));
        const std::vector<float> want = Multiply(ScalarKernels(), w, x, 1, kColumns, false);
        for (const Kernels* kernels : GrantedKernels()) {
          EXPECT_EQ(Multiply(*kernels, w, x, 1, kColumns, false), want)
              << kernels->name << " " << model::TensorTypeName(type) << " " << fill;
        }
      }
    }
  }
}

TEST(KernelsTest, QuantisedTilesAreEqualOnEveryInstructionSet) {
  TestRandom random(4);
  std::vector<float> x = random.Normals(19 * 64, 3.0f);
  std::fill(x.begin(), x.begin() + 32, 0.0f);  // a block of zeros has scale 0
  const std::vector<std::byte> want = QuantiseAll(ScalarKernels(), x, 19, 64);
  std::vector<std::byte> fine(QuantTileBytes(2, 64));
  ScalarKernels().quantize_row_fine(&x[64], 64, 0, 2, fine.data());
  for (const Kernels* kernels : GrantedKernels()) {
    EXPECT_EQ(QuantiseAll(*kernels, x, 19, 64), want) << kernels->name;
    std::vector<std::byte> got(fine.size());
    kernels->quantize_row_fine(&x[64], 64, 0, 2, got.data());
    EXPECT_EQ(got, fine) << kernels->name;
  }
}

TEST(KernelsTest, TwoQuantisedRowsHoldSixteenBits) {
  TestRandom random(5);
  const std::vector<float> x = random.Normals(64);
  std::vector<std::byte> tile(QuantTileBytes(2, 64));
  ScalarKernels().quantize_row_fine(x.data(), 64, 0, 2, tile.data());
  for (size_t block = 0; block < 2; ++block) {
    const std::byte* base = tile.data() + block * 2 * kQuantRowBlockBytes;
    float scales[2];
    std::memcpy(scales, base + 64, 8);
    for (size_t i = 0; i < 32; ++i) {
      const float value = scales[0] * static_cast<float>(static_cast<int8_t>(base[i])) +
                          scales[1] * static_cast<float>(static_cast<int8_t>(base[32 + i]));
      EXPECT_NEAR(value, x[block * 32 + i], scales[0] / 200);
    }
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
      const std::vector<float> x = random.Normals(d, 0.5f);
      std::copy(x.begin(), x.end(), &queries[q * padded]);
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
            ASSERT_NEAR(all[q * c.padded + i], c.want[q * static_cast<size_t>(dim) + i], 1e-5);
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
