// Times the matrix products of the kernel tables on one thread, without a model. Hold the figures
// against those of limits.cc.
//
//   kernels_bench [TABLE]      scalar, avx2, ...; without it, all that this machine grants
//
// Prints one line a table and weight format, separated by tabs: table, format, bits a packed weight
// takes; then, each as median (lowest-highest) of the rounds: GB/s of weights read for one row,
// GOP/s for one row, GOP/s for 128 rows; of the integer formats also GB/s for one row at 16 bits
// and GOP/s for 64. For one row there are more weights than caches hold, for many rows they stay
// there.
//
// Then a line for attention over a bf16 cache, of three query heads of 64 dims a kv head: table,
// "attention", GB/s of keys and values for one row over 512 tokens, GOP/s for one, GOP/s for 32
// rows that see the same. The cache stays in the core's own.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "engine/cpu/isa.h"
#include "engine/cpu/kernels.h"
#include "engine/cpu/weights.h"

namespace antiphon::engine::cpu {
namespace {

constexpr int kRounds = 9;
constexpr double kRoundSeconds = 0.05;
constexpr size_t kColumns = 4096;
constexpr size_t kManyRows = 128;                   // of activations, as forward.cc batches them
constexpr size_t kManyFineRows = kManyRows / 2;     // at 16 bits, likewise
constexpr size_t kWeightsRead = size_t{256} << 20;  // for one row
constexpr size_t kGroupsKept = 16;                  // for many
constexpr const char* kNames[kPackedTypes] = {"F32",  "F16",  "BF16", "Q8_0", "Q4_0", "Q4_1",
                                              "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"};

template <typename Work>
double SecondsOf(const Work& work, int repeats) {
  const auto started = std::chrono::steady_clock::now();
  for (int i = 0; i < repeats; ++i) work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
}

// Seconds that `work` takes in each round, ascending.
template <typename Work>
std::vector<double> Rounds(const Work& work) {
  int repeats = 1;
  while (SecondsOf(work, repeats) < kRoundSeconds) repeats *= 2;
  std::vector<double> seconds;
  for (int i = 0; i < kRounds; ++i) seconds.push_back(SecondsOf(work, repeats) / repeats);
  std::sort(seconds.begin(), seconds.end());
  return seconds;
}

void Print(const std::vector<double>& seconds, double units) {
  std::printf("\t%.1f (%.1f-%.1f)", units / 1e9 / seconds[kRounds / 2],
              units / 1e9 / seconds[kRounds - 1], units / 1e9 / seconds[0]);
}

void Time(const Kernels& kernels, PackedType type) {
  // The scalar table is there to be right.
  const bool slow = &kernels == &ScalarKernels();
  const size_t group_bytes = PackedGroupBytes(type, kColumns);
  const size_t groups = (slow ? kWeightsRead / 64 : kWeightsRead) / group_bytes;
  absl::StatusOr<Arena> weights = Arena::Create(groups * group_bytes);
  if (!weights.ok()) {
    std::fprintf(stderr, "kernels_bench: %s\n", weights.status().ToString().c_str());
    std::exit(1);
  }
  // Any number will do that is not denormal, as a float of whatever size.
  std::memset(weights->data(), 0x2c, groups * group_bytes);
  std::vector<float> x(kManyRows * kColumns);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 31) - 15;
  std::vector<std::byte> one(QuantTileBytes(2, kColumns)),
      many(QuantTileBytes(kManyRows, kColumns));
  std::vector<float> out(std::max(groups, kGroupsKept * kManyRows) * kGroupRows);
  MatMul m;
  m.weights = weights->data();
  m.columns = kColumns;
  m.x = x.data();
  m.x_stride = kColumns;
  m.out = out.data();
  const auto multiply = [&] { kernels.matmul[static_cast<int>(type)](m); };
  const auto alone = [&] {
    m.x_quant = one.data();
    m.rows = 1;
    m.groups = static_cast<int>(groups);
    m.out_stride = groups * kGroupRows;
    return Rounds(multiply);
  };
  const auto together = [&](size_t rows) {
    m.x_quant = many.data();
    m.rows = static_cast<int>(rows);
    m.groups = kGroupsKept;
    m.out_stride = kGroupsKept * kGroupRows;
    return Rounds(multiply);
  };
  const double bytes = static_cast<double>(groups * group_bytes);
  const double operations_a_row = 2.0 * kGroupRows * kColumns;

  kernels.quantize_row(x.data(), kColumns, 0, 1, one.data());
  for (size_t row = 0; row < kManyRows; ++row) {
    kernels.quantize_row(&x[row * kColumns], kColumns, static_cast<int>(row % kRowTile), kRowTile,
                         &many[row / kRowTile * QuantTileBytes(kRowTile, kColumns)]);
  }
  std::printf("%s	%s	%.4f", kernels.name, kNames[static_cast<int>(type)],
              8.0 * static_cast<double>(group_bytes) / (kGroupRows * kColumns));
  const std::vector<double> one_row = alone();
  Print(one_row, bytes);
  Print(one_row, operations_a_row * static_cast<double>(groups));
  const size_t many_rows = slow ? kRowTile : kManyRows;
  Print(together(many_rows), operations_a_row * static_cast<double>(many_rows * kGroupsKept));
  if (UsesQuantisedActivations(type)) {
    m.fine = true;
    kernels.quantize_row_fine(x.data(), kColumns, 0, 2, one.data());
    for (size_t row = 0; row < kManyFineRows; ++row) {
      const size_t place = 2 * row;
      kernels.quantize_row_fine(&x[row * kColumns], kColumns, static_cast<int>(place % kRowTile),
                                kRowTile,
                                &many[place / kRowTile * QuantTileBytes(kRowTile, kColumns)]);
    }
    Print(alone(), bytes);
    Print(together(many_rows / 2),
          operations_a_row * static_cast<double>(many_rows / 2 * kGroupsKept));
  }
  std::printf("\n");
  std::fflush(stdout);
}

void TimeAttention(const Kernels& kernels) {
  constexpr uint32_t kTokens = 512;
  constexpr int kHeads = 3, kDim = 64,
                kRows = 32;  // kv heads and query heads each; the first's are timed
  constexpr uint32_t kBlockTokens = 16;
  constexpr size_t kTokenBytes = kHeads * kDim * sizeof(uint16_t);
  constexpr size_t kHalfBytes = kBlockTokens * kTokenBytes;
  std::vector<float> numbers(kTokens *
                             kTokenBytes);  // two bf16 numbers to each byte of a token's K
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<float>(i % 61) / 61 - 0.5f;
  std::vector<uint16_t> cache(numbers.size());
  kernels.to_bf16(numbers.data(), numbers.size(), cache.data());
  std::vector<const std::byte*> blocks;
  for (size_t at = 0; at < kTokens / kBlockTokens; ++at) {
    blocks.push_back(reinterpret_cast<const std::byte*>(cache.data()) + at * 2 * kHalfBytes);
  }
  std::vector<float> queries(kRows * kHeads * kDim), out(queries.size());
  for (size_t i = 0; i < queries.size(); ++i) queries[i] = static_cast<float>(i % 53) / 53 - 0.5f;
  std::vector<float> scratch(AttentionScratchFloats(kRows * kHeads, kDim));
  std::vector<uint32_t> limits(kRows * kHeads, kTokens);
  Attention a;
  a.queries = queries.data();
  a.limits = limits.data();
  a.out = out.data();
  a.head_dim = a.padded_dim = kDim;
  a.blocks = blocks.data();
  a.block_tokens = kBlockTokens;
  a.token_bytes = kTokenBytes;
  a.value_offset = kHalfBytes;
  a.scratch = scratch.data();
  const auto rounds = [&](int rows) {
    a.count = rows * kHeads;
    return Rounds([&] { kernels.attention(a); });
  };
  const double operations = 4.0 * kTokens * kHeads * kDim;
  std::printf("%s\tattention", kernels.name);
  const std::vector<double> alone = rounds(1);
  Print(alone, 2.0 * kTokens * kDim * sizeof(uint16_t));
  Print(alone, operations);
  Print(rounds(kRows), operations * kRows);
  std::printf("\n");
  std::fflush(stdout);
}

int Main(int argc, char** argv) {
  std::vector<const Kernels*> tables = GrantedKernels();
  if (argc == 2) {
    const absl::StatusOr<const Kernels*> named = KernelsNamed(argv[1]);
    if (!named.ok()) {
      std::fprintf(stderr, "kernels_bench: %s\n", named.status().ToString().c_str());
      return 1;
    }
    tables = {*named};
  }
  if (argc > 2) {
    std::fprintf(stderr, "usage: kernels_bench [TABLE]\n");
    return 2;
  }
  for (const Kernels* kernels : tables) {
    for (int type = 0; type < kPackedTypes; ++type) Time(*kernels, static_cast<PackedType>(type));
    TimeAttention(*kernels);
  }
  return 0;
}

}  // namespace
}  // namespace antiphon::engine::cpu

int main(int argc, char** argv) { return antiphon::engine::cpu::Main(argc, argv); }
