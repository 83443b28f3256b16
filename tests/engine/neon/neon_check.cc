// Compares every entry of the granted tables of AArch64 with the scalar table bit for bit. Of the
// standard library alone, so that a cross compiler builds it and qemu-user runs it:
//   neon_check NAME
// NAME is the table that must be the best one granted.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "engine/cpu/detect.h"
#include "tests/engine/quantise_rows.h"
#include "tests/engine/random.h"

namespace antiphon::engine::cpu {
namespace {

constexpr const char* kTypeNames[kPackedTypes] = {"f32",  "f16",  "bf16", "q8_0", "q4_0", "q4_1",
                                                  "q5_0", "q5_1", "q4_k", "q5_k", "q6_k"};

struct Tally {
  int compared = 0;
  int differ = 0;
};

// Of a table against the scalar one.
class Check {
 public:
  Check(const Kernels& kernels, Tally* tally) : kernels_(kernels), tally_(*tally) {}

  void Products();
  void Extremes();
  void Quantisation();
  void FloatRoutines();
  void Bf16();
  void SamplerRoutines();
  void Attentions();

 private:
  template <typename T>
  void Same(const std::vector<T>& got, const std::vector<T>& want, const std::string& what) {
    ++tally_.compared;
    if (std::memcmp(got.data(), want.data(), want.size() * sizeof(T)) == 0) return;
    size_t at = 0;
    while (std::memcmp(&got[at], &want[at], sizeof(T)) == 0) ++at;
    if (++tally_.differ <= 20) {
      std::printf("%s: %s: element %zu of %zu: %.9g, scalar %.9g\n", kernels_.name, what.c_str(),
                  at, want.size(), static_cast<double>(got[at]), static_cast<double>(want[at]));
    }
  }
  void Product(PackedType type, const std::vector<uint8_t>& weights, const std::vector<float>& x,
               size_t rows, size_t columns, int groups, const std::string& what);
  void Product(PackedType type, const std::vector<uint8_t>& weights, const std::vector<float>& x,
               size_t rows, size_t columns, int groups, bool fine, const std::string& what);
  void Quantise(const std::vector<float>& x, size_t columns, const std::string& what);

  const Kernels& kernels_;
  Tally& tally_;
};

uint16_t RandomHalf(TestRandom& random) {  // of either sign, finite, some of them subnormal
  const uint32_t sign_and_mantissa = random.Bits() & 0x83ff;
  return static_cast<uint16_t>(sign_and_mantissa | random.Below(24) << 10);
}

void PutHalves(TestRandom& random, size_t bytes, uint8_t* out) {
  for (size_t i = 0; i < bytes; i += 2) {
    const uint16_t half = RandomHalf(random);
    std::memcpy(out + i, &half, 2);
  }
}

// Packed weights of any values that a file can hold.
std::vector<uint8_t> RandomWeights(PackedType type, size_t columns, int groups,
                                   TestRandom& random) {
  const size_t group_bytes = PackedGroupBytes(type, columns);
  std::vector<uint8_t> weights(static_cast<size_t>(groups) * group_bytes);
  if (type == PackedType::kF32) {
    const std::vector<float> values = random.Normals(weights.size() / 4);
    std::memcpy(weights.data(), values.data(), weights.size());
    return weights;
  }
  if (!UsesQuantisedActivations(type)) {
    PutHalves(random, weights.size(), weights.data());
    return weights;
  }
  const QuantFormat format = FormatOf(type);
  for (uint8_t& byte : weights) byte = static_cast<uint8_t>(random.Below(256));
  const size_t block_bytes = BlockBytes(format);
  uint8_t* at = weights.data();
  for (size_t block = 0; at < weights.data() + weights.size(); ++block, at += block_bytes) {
    if (format.super_bytes == 0) {
      PutHalves(random, format.head_bytes, at);
      continue;
    }
    if (block % (kSuperBlock / kQuantBlock) == 0) {
      PutHalves(random, format.super_bytes, at);
      at += format.super_bytes;
    }
    if (!format.minima) continue;  // kQ6_K's scales are any int8
    for (size_t i = 0; i < format.head_bytes; ++i) at[i] &= 63;
  }
  return weights;
}

// Numbers 1, minima 1/2, and the same byte everywhere else.
std::vector<uint8_t> FilledWeights(PackedType type, size_t columns, uint8_t fill,
                                   uint8_t sub_scale) {
  const QuantFormat format = FormatOf(type);
  std::vector<uint8_t> weights(PackedGroupBytes(type, columns), fill);
  const auto put = [](uint8_t* at, uint16_t half) {
    for (int lane = 0; lane < 16; ++lane) std::memcpy(at + 2 * lane, &half, 2);
  };
  const size_t head = format.super_bytes == 0 ? format.head_bytes : format.super_bytes;
  uint8_t* at = weights.data();
  for (size_t block = 0; block < columns / kQuantBlock; ++block, at += BlockBytes(format)) {
    if (format.super_bytes == 0 || block % (kSuperBlock / kQuantBlock) == 0) {
      put(at, 0x3c00);
      if (head == 64) put(at + 32, 0x3800);
      at += format.super_bytes;
    }
    if (format.super_bytes == 0) continue;
    std::memset(at, format.minima ? sub_scale & 63 : sub_scale, format.head_bytes);
  }
  return weights;
}

void Check::Product(PackedType type, const std::vector<uint8_t>& weights,
                    const std::vector<float>& x, size_t rows, size_t columns, int groups,
                    const std::string& what) {
  Product(type, weights, x, rows, columns, groups, false, what);
  if (!UsesQuantisedActivations(type)) return;
  Product(type, weights, x, rows, columns, groups, true, what + ", at 16 bits");
}

void Check::Product(PackedType type, const std::vector<uint8_t>& weights,
                    const std::vector<float>& x, size_t rows, size_t columns, int groups, bool fine,
                    const std::string& what) {
  const size_t stride = static_cast<size_t>(groups) * 16 + 3;
  const auto quantise = fine ? QuantiseFine : QuantiseAll;
  const std::vector<std::byte> tiles = UsesQuantisedActivations(type)
                                           ? quantise(ScalarKernels(), x, rows, columns)
                                           : std::vector<std::byte>();
  for (bool add : {false, true}) {
    std::vector<float> out[2];
    const Kernels* tables[2] = {&kernels_, &ScalarKernels()};
    for (int i = 0; i < 2; ++i) {
      out[i].assign(rows * stride, 2.0f);
      MatMul m;
      m.weights = reinterpret_cast<const std::byte*>(weights.data());
      m.columns = columns;
      m.groups = groups;
      m.x = x.data();
      m.x_stride = columns;
      m.x_quant = tiles.data();
      m.rows = static_cast<int>(rows);
      m.out = out[i].data();
      m.out_stride = stride;
      m.add = add;
      m.fine = fine;
      tables[i]->matmul[static_cast<int>(type)](m);
    }
    Same(out[0], out[1], what + (add ? ", added" : ""));
  }
}

void Check::Products() {
  TestRandom random(1);
  for (int t = 0; t < kPackedTypes; ++t) {
    const PackedType type = static_cast<PackedType>(t);
    const bool super = FormatOf(type).super_bytes > 0;
    for (size_t rows = 1; rows <= 33; ++rows) {
      const size_t columns = super ? 256 + 256 * (rows % 2) : 32 + 32 * (rows % 4);
      const int groups = rows <= 5 ? static_cast<int>(rows) : 1 + static_cast<int>(rows % 3);
      const std::vector<uint8_t> weights = RandomWeights(type, columns, groups, random);
      const std::vector<float> x = random.Normals(rows * columns);
      Product(type, weights, x, rows, columns, groups,
              std::string(kTypeNames[t]) + ", " + std::to_string(rows) + " rows, " +
                  std::to_string(columns) + " columns, " + std::to_string(groups) + " groups");
    }
  }
}

// Where sums of 16 bits would overflow.
void Check::Extremes() {
  for (int t = 0; t < kPackedTypes; ++t) {
    const PackedType type = static_cast<PackedType>(t);
    if (!UsesQuantisedActivations(type)) continue;
    const size_t columns = FormatOf(type).super_bytes > 0 ? 256 : 64;
    for (int fill : {0x00, 0xff, 0x80, 0x7f}) {
      for (int sub_scale : {0x80, 0x7f, 0xff}) {
        const std::vector<uint8_t> weights = FilledWeights(
            type, columns, static_cast<uint8_t>(fill), static_cast<uint8_t>(sub_scale));
        for (int signs = 0; signs < 8; ++signs) {
          std::vector<float> x(4 * columns);  // the signs of the halves and of every second column
          for (size_t c = 0; c < x.size(); ++c) {
            const bool negative = (signs & (c % 32 < 16 ? 1 : 2)) != 0;
            x[c] = negative != ((signs & 4) != 0 && c % 2 == 1) ? -1000.0f : 1000.0f;
          }
          const std::string what = std::string(kTypeNames[t]) + ", bytes " + std::to_string(fill) +
                                   ", signs " + std::to_string(signs);
          Product(type, weights, x, 1, columns, 1, what);
          Product(type, weights, x, 4, columns, 1, what + ", 4 rows");
        }
      }
    }
  }
}

void Check::Quantise(const std::vector<float>& x, size_t columns, const std::string& what) {
  const size_t rows = x.size() / columns;
  Same(QuantiseAll(kernels_, x, rows, columns), QuantiseAll(ScalarKernels(), x, rows, columns),
       "quantize_row, " + what);
  Same(QuantiseFine(kernels_, x, rows, columns), QuantiseFine(ScalarKernels(), x, rows, columns),
       "quantize_row_fine, " + what);
}

void Check::Quantisation() {
  TestRandom random(2);
  for (float scale : {1.0f, 3.0f, 1e-30f, 1e30f}) {
    std::vector<float> x = random.Normals(19 * 96, scale);
    std::fill(x.begin(), x.begin() + 32, 0.0f);
    Quantise(x, 96, "normals of " + std::to_string(std::log10(scale)));
  }
  std::vector<float> halfway(64);  // peak 127: the scale is 1 and the others lie between integers
  for (size_t i = 0; i < 64; ++i) halfway[i] = static_cast<float>(i) - 31.5f;
  halfway[5] = 127.0f;
  halfway[40] = -127.0f;
  Quantise(halfway, 64, "numbers between integers");
}

void Check::FloatRoutines() {
  TestRandom random(3);
  for (size_t n : {16, 48, 208, 576}) {
    const std::string size = ", " + std::to_string(n);
    for (float scale : {1.0f, 5.0f, 60.0f}) {
      const std::vector<float> x = random.Normals(n, scale), w = random.Normals(n);
      std::vector<float> got(n), want(n);
      kernels_.rms_norm(x.data(), w.data(), n, n - 3, 1e-5f, got.data());
      ScalarKernels().rms_norm(x.data(), w.data(), n, n - 3, 1e-5f, want.data());
      Same(got, want, "rms_norm" + size);
      kernels_.silu_mul(x.data(), w.data(), n, got.data());
      ScalarKernels().silu_mul(x.data(), w.data(), n, want.data());
      Same(got, want, "silu_mul" + size);
      got = want = x;
      kernels_.add(got.data(), w.data(), n);
      ScalarKernels().add(want.data(), w.data(), n);
      Same(got, want, "add" + size);
    }
  }
  for (size_t half : {1, 8, 16, 20, 32, 52, 64}) {
    const std::vector<float> x = random.Normals(2 * half, 3.0f);
    std::vector<float> cos(half), sin(half), got(2 * half), want(2 * half);
    for (size_t i = 0; i < half; ++i) {
      cos[i] = static_cast<float>(std::cos(0.7 * static_cast<double>(i)));
      sin[i] = static_cast<float>(std::sin(0.7 * static_cast<double>(i)));
    }
    kernels_.rope(x.data(), cos.data(), sin.data(), half, got.data());
    ScalarKernels().rope(x.data(), cos.data(), sin.data(), half, want.data());
    Same(got, want, "rope, half " + std::to_string(half));
    got = x;
    kernels_.rope(got.data(), cos.data(), sin.data(), half, got.data());
    Same(got, want, "rope in place, half " + std::to_string(half));
  }
}

void Check::Bf16() {
  TestRandom random(4);
  for (size_t n = 1; n <= 50; ++n) {
    std::vector<float> x(n);
    for (float& value : x) {
      // Any sign and exponent; the bits that are rounded away are often just half.
      const uint32_t bits = random.Below(2) ? random.Bits() : (random.Bits() & 0xffff0000) | 0x8000;
      std::memcpy(&value, &bits, 4);
    }
    std::vector<uint16_t> got(n + 1, 7), want(n + 1, 7);
    kernels_.to_bf16(x.data(), n, got.data());
    ScalarKernels().to_bf16(x.data(), n, want.data());
    Same(got, want, "to_bf16, " + std::to_string(n));
  }
}

void Check::SamplerRoutines() {
  TestRandom random(5);
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const auto argmax = [&](const std::vector<float>& x, const char* what) {
    const std::vector<size_t> got = {kernels_.argmax(x.data(), x.size())};
    const std::vector<size_t> want = {ScalarKernels().argmax(x.data(), x.size())};
    Same(got, want, std::string("argmax, ") + what + ", " + std::to_string(x.size()));
  };
  for (size_t n : {1, 2, 15, 16, 17, 31, 32, 33, 48, 1000, 1023, 1025, 4097}) {
    std::vector<float> x = random.Normals(n, 4.0f);
    argmax(x, "normals");
    for (float shift : {30.0f, 0.0f, 5.0f}) {
      const std::vector<double> got = {kernels_.sum_exp(x.data(), n, shift)};
      const std::vector<double> want = {ScalarKernels().sum_exp(x.data(), n, shift)};
      Same(got, want, "sum_exp, " + std::to_string(n));
      std::vector<float> a(n), b(n);
      kernels_.shift_scale(x.data(), n, shift, 0.7f, a.data());
      ScalarKernels().shift_scale(x.data(), n, shift, 0.7f, b.data());
      Same(a, b, "shift_scale, " + std::to_string(n));
      a.assign((n + kMaximaBlock - 1) / kMaximaBlock, 0);
      b = a;
      kernels_.block_maxima(x.data(), n, a.data());
      ScalarKernels().block_maxima(x.data(), n, b.data());
      Same(a, b, "block_maxima, " + std::to_string(n));
    }
    for (int trial = 0; trial < 20; ++trial) {
      std::vector<float> y = x;
      for (int i = 0; i < 3; ++i) y[random.Below(static_cast<uint32_t>(n))] = 30.0f;
      argmax(y, "ties");
      for (int i = 0; i < 3; ++i) y[random.Below(static_cast<uint32_t>(n))] = kNan;
      argmax(y, "NaN");
    }
    x[n / 3] = -kInf;
    argmax(x, "-infinity");
    Same(std::vector<double>{kernels_.sum_exp(x.data(), n, 30.0f)},
         std::vector<double>{ScalarKernels().sum_exp(x.data(), n, 30.0f)}, "sum_exp of -infinity");
    std::fill(x.begin(), x.end(), kNan);
    argmax(x, "only NaN");
    std::fill(x.begin(), x.end(), -0.0f);
    x[n - 1] = 0.0f;
    argmax(x, "zeros");
    std::fill(x.begin(), x.end(), -kInf);
    argmax(x, "only -infinity");
  }
}

struct AttentionShape {
  bool f32;
  int head_dim;
  uint32_t block_tokens;
  std::vector<uint32_t> limits;
};

// A cache of one head of two and its queries.
class AttentionCase {
 public:
  AttentionCase(AttentionShape shape, TestRandom& random)
      : shape_(std::move(shape)), padded_((static_cast<size_t>(shape_.head_dim) + 15) / 16 * 16) {
    const size_t d = static_cast<size_t>(shape_.head_dim), element = shape_.f32 ? 4 : 2;
    token_bytes_ = 2 * d * element;
    const size_t blocks = (shape_.limits.back() + shape_.block_tokens - 1) / shape_.block_tokens;
    const size_t block_bytes = 2 * token_bytes_ * shape_.block_tokens;
    const std::vector<float> values = random.Normals(blocks * block_bytes / element);
    memory_.resize(blocks * block_bytes);
    for (size_t i = 0; i < values.size(); ++i) {  // bf16: the upper bytes of a float
      const std::byte* bytes = reinterpret_cast<const std::byte*>(&values[i]);
      std::memcpy(&memory_[i * element], bytes + 4 - element, element);
    }
    for (size_t b = 0; b < blocks; ++b) blocks_.push_back(memory_.data() + b * block_bytes);
    queries_.resize(shape_.limits.size() * padded_);
    for (size_t q = 0; q < shape_.limits.size(); ++q) {
      const std::vector<float> x = random.Normals(d, 0.5f);
      std::copy(x.begin(), x.end(), &queries_[q * padded_]);
    }
  }
  // In one go, or in pieces of `piece` tiles.
  std::vector<float> Run(const Kernels& kernels, uint32_t piece) const {
    const size_t count = shape_.limits.size();
    std::vector<float> out(count * padded_), scratch(AttentionScratchFloats(count, padded_), NAN);
    Attention a;
    a.queries = queries_.data();
    a.count = static_cast<int>(count);
    a.limits = shape_.limits.data();
    a.out = out.data();
    a.head_dim = shape_.head_dim;
    a.padded_dim = static_cast<int>(padded_);
    a.blocks = blocks_.data();
    a.block_tokens = shape_.block_tokens;
    a.token_bytes = token_bytes_;
    a.key_offset = token_bytes_ / 2;
    a.value_offset = token_bytes_ * shape_.block_tokens + token_bytes_ / 2;
    a.f32_cache = shape_.f32;
    a.scratch = scratch.data();
    if (piece == 0) {
      kernels.attention(a);
      return out;
    }
    const uint32_t tiles = (shape_.limits.back() + kAttentionTile - 1) / kAttentionTile;
    std::vector<float> partials(tiles * count * AttentionPartialFloats(padded_), NAN);
    a.partials = partials.data();
    for (uint32_t end = tiles; end > 0; end = a.first_tile) {
      a.end_tile = end;
      a.first_tile = end > piece ? end - piece : 0;
      kernels.attention(a);
    }
    kernels.merge_attention(a);
    return out;
  }

 private:
  AttentionShape shape_;
  size_t padded_, token_bytes_ = 0;
  std::vector<std::byte> memory_;
  std::vector<const std::byte*> blocks_;
  std::vector<float> queries_;
};

void Check::Attentions() {
  TestRandom random(6);
  const std::vector<uint32_t> lengths = {1, 2, 15, 16, 17, 63, 64, 65, 79, 80, 127, 128, 129, 200};
  int round = 0;
  for (bool f32 : {false, true}) {
    for (int dim : {16, 20, 64, 80, 128}) {
      for (uint32_t length : lengths) {
        // Query heads of a kv head for one token, and for several tokens of a chunk.
        const size_t heads = 1 + static_cast<size_t>(round) % 9;
        const uint32_t tokens = std::min<uint32_t>(length, 1 + static_cast<uint32_t>(round) % 4);
        AttentionShape shape{f32, dim, std::vector<uint32_t>{16, 64, 5}[round++ % 3], {}};
        for (uint32_t t = length - tokens + 1; t <= length; ++t) {
          shape.limits.insert(shape.limits.end(), heads, t);
        }
        const std::string what = std::string(f32 ? "f32" : "bf16") + " attention, dim " +
                                 std::to_string(dim) + ", length " + std::to_string(length) +
                                 ", heads " + std::to_string(heads);
        const AttentionCase c(std::move(shape), random);
        const std::vector<float> want = c.Run(ScalarKernels(), 0);
        Same(c.Run(kernels_, 0), want, what);
        Same(c.Run(kernels_, 1), want, what + ", merged");
      }
    }
  }
}

int Run(const std::string& best) {
  const std::vector<const Kernels*> granted = DetectKernels();
  if (granted.front()->name != best) {
    std::printf("granted first is %s, not %s\n", granted.front()->name, best.c_str());
    return 1;
  }
  Tally tally;
  for (const Kernels* kernels : granted) {
    if (kernels == &ScalarKernels()) continue;
    Check check(*kernels, &tally);
    check.Products();
    check.Extremes();
    check.Quantisation();
    check.FloatRoutines();
    check.Bf16();
    check.SamplerRoutines();
    check.Attentions();
    std::printf("%s: %d compared, %d differ so far\n", kernels->name, tally.compared, tally.differ);
  }
  return tally.differ == 0 && tally.compared > 0 ? 0 : 1;
}

}  // namespace
}  // namespace antiphon::engine::cpu

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  return antiphon::engine::cpu::Run(argv[1]);
}
