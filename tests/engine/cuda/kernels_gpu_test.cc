// Each of the module's own kernels, the products and the attention, against plain loops in double
// precision, on random inputs at the shapes of models; outputs are poisoned first.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <ctime>
#include <numeric>
#include <utility>

#include "engine/cuda/attention.h"
#include "engine/cuda/draw.h"
#include "engine/cuda/few_rows.h"
#include "engine/cuda/gemm.h"
#include "engine/cuda/kernels.h"
#include "engine/cuda/memory.h"
#include "tests/engine/cuda/check.h"
#include "tests/engine/cuda/serial_checksum.h"

namespace antiphon::engine::cuda {
namespace {

uint64_t seed = 0;
cudaStream_t stream;

template <typename T>
struct OnDevice {
  explicit OnDevice(const std::vector<T>& values) {
    OK(array.Allocate(std::max<size_t>(values.size(), 1)));
    OK(cudaMemcpy(array.data(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    OK(cudaDeviceSynchronize());
  }
  static OnDevice Poisoned(size_t size) {
    OnDevice out{std::vector<T>(size)};
    OK(cudaMemset(out.array.data(), 0xff, size * sizeof(T)));
    OK(cudaDeviceSynchronize());  // the stream under test does not wait for the default one
    return out;
  }
  std::vector<T> Get() const {
    std::vector<T> out(array.size());
    OK(cudaStreamSynchronize(stream));
    OK(cudaMemcpy(out.data(), array.data(), out.size() * sizeof(T), cudaMemcpyDeviceToHost));
    return out;
  }
  T* data() const { return array.data(); }
  DeviceArray<T> array;
};

std::vector<float> Random(size_t size, float scale = 1) { return Randoms(size, ++seed, scale); }

void TestEmbed() {
  const uint32_t vocab = 1000, size = 576;
  const auto table = ToBf16(Random(size_t{vocab} * size));
  const std::vector<uint32_t> ids = {0, 999, 17, 17};
  OnDevice<uint16_t> table_d(table);
  OnDevice<uint32_t> ids_d(ids);
  auto out = OnDevice<float>::Poisoned(ids.size() * size);
  OK(Embed(table_d.data(), ids_d.data(), 4, size, out.data(), stream));
  std::vector<float> want;
  for (uint32_t id : ids) {
    for (uint32_t i = 0; i < size; ++i) want.push_back(FromBf16(table[size_t{id} * size + i]));
  }
  Expect(out.Get() == want, "embedding rows are copied exactly");
}

void TestRmsNorm(uint32_t size) {
  const uint32_t rows = 5;
  const auto x = Random(rows * size), weight = Random(size);
  const std::vector<uint32_t> index = {4, 0, 2};
  OnDevice<float> x_d(x), weight_d(weight);
  OnDevice<uint32_t> index_d(index);
  const auto want = [&](uint32_t row) {
    double squares = 0;
    for (uint32_t i = 0; i < size; ++i) squares += double(x[row * size + i]) * x[row * size + i];
    std::vector<double> y;
    for (uint32_t i = 0; i < size; ++i) {
      y.push_back(x[row * size + i] / std::sqrt(squares / size + 1e-5) * weight[i]);
    }
    return y;
  };
  auto out = OnDevice<uint16_t>::Poisoned(rows * size);
  OK(RmsNorm(x_d.data(), weight_d.data(), nullptr, rows, size, 1e-5f, out.data(), stream));
  std::vector<double> all;
  for (uint32_t row = 0; row < rows; ++row) {
    for (double v : want(row)) all.push_back(v);
  }
  ExpectClose(Distance(FromBf16(out.Get()), all), 3e-3, "rms norm, " + std::to_string(size));
  auto some = OnDevice<uint16_t>::Poisoned(index.size() * size);
  OK(RmsNorm(x_d.data(), weight_d.data(), index_d.data(), 3, size, 1e-5f, some.data(), stream));
  all.clear();
  for (uint32_t row : index) {
    for (double v : want(row)) all.push_back(v);
  }
  ExpectClose(Distance(FromBf16(some.Get()), all), 3e-3, "rms norm of chosen rows");
}

void TestSilu(uint32_t size) {
  const uint32_t rows = 3;
  const auto x = ToBf16(Random(rows * 2 * size, 4));
  OnDevice<uint16_t> x_d(x);
  auto out = OnDevice<uint16_t>::Poisoned(rows * size);
  OK(SiluMultiply(x_d.data(), rows, size, out.data(), stream));
  std::vector<double> want;
  for (uint32_t row = 0; row < rows; ++row) {
    for (uint32_t i = 0; i < size; ++i) {
      const double g = FromBf16(x[row * 2 * size + i]), u = FromBf16(x[row * 2 * size + size + i]);
      want.push_back(g / (1 + std::exp(-g)) * u);
    }
  }
  ExpectClose(Distance(FromBf16(out.Get()), want), 3e-3, "silu x up, " + std::to_string(size));
}

void TestArgmax() {
  const uint32_t rows = 3, size = 128256, stride = size + 8;
  auto x = Random(rows * stride);
  x[77777] = x[99] = 5;  // the lower id of two equal ones
  x[stride + size - 1] = 6;
  x[stride + 3] = NAN;
  x[2 * stride + size] = 9;  // the padding is not looked at
  x[2 * stride] = 7;
  OnDevice<float> x_d(x);
  auto ids = OnDevice<uint32_t>::Poisoned(rows);
  OK(Argmax(x_d.data(), rows, size, stride, ids.data(), stream));
  Expect(ids.Get() == std::vector<uint32_t>{99, size - 1, 0}, "argmax: ties, NaN, padding");
}

// The sum of exp(x[i]) of up to 1,024 values, rounded as the sampler's.
double MassOf(const float* x, size_t count) {
  float lanes[16] = {};
  for (size_t i = 0; i < count; ++i) lanes[i % 16] += SamplerExp(x[i]);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return double(lanes[0]);
}

// The rules of engine/sampler.h over a sorted vocabulary.
uint32_t PlainDraw(std::vector<float> logits, const Draw& d) {
  for (uint32_t i = 0; i < d.edit_count; ++i) {
    float& logit = logits[d.edits[i].id];
    logit = EditedLogit(logit, d.edits[i], d.repetition_penalty);
  }
  const float peak = *std::max_element(logits.begin(), logits.end());
  std::vector<uint32_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(),
                   [&](uint32_t a, uint32_t b) { return logits[a] > logits[b]; });
  if (d.inverse_temperature == 0 || peak == -INFINITY) return ids[0];
  const size_t n = logits.size();
  for (float& l : logits) l = (l - peak) * d.inverse_temperature;
  const auto scaled = [&](uint32_t id) { return logits[id]; };
  const auto weight = [&](uint32_t id) { return std::exp(double(scaled(id))); };
  double mass = 0;
  for (size_t c = 0; c < n; c += 1024) mass += MassOf(&logits[c], std::min<size_t>(1024, n - c));
  const bool top_k = d.top_k > 0 && d.top_k < n;
  if (!top_k && d.top_p >= 1 && d.least == -INFINITY) {
    double passed = 0;
    uint32_t last = 0;
    for (size_t c = 0; c < n; c += 1024) {
      const size_t end = std::min<size_t>(c + 1024, n);
      const double of_chunk = MassOf(&logits[c], end - c);
      if (end < n && passed + of_chunk <= d.u * mass) {
        passed += of_chunk;
        continue;
      }
      for (size_t i = c; i < end; ++i) {
        if (weight(uint32_t(i)) == 0) continue;
        passed += weight(last = uint32_t(i));
        if (passed > d.u * mass) return last;
      }
    }
    return last;
  }
  if (top_k) {
    ids.resize(d.top_k);
    mass = 0;
    for (uint32_t id : ids) mass += weight(id);
  }
  double held = 0;
  for (size_t i = 0; i < ids.size(); ++i) {
    held += weight(ids[i]);
    if (d.top_p < 1 && held >= double(d.top_p) * mass) ids.resize(i + 1);
  }
  while (scaled(ids.back()) < d.least) ids.pop_back();
  std::sort(ids.begin(), ids.end());
  double total = 0, passed = 0;
  for (uint32_t id : ids) total += weight(id);
  for (uint32_t id : ids) {
    passed += weight(id);
    if (passed > d.u * total) return id;
  }
  return ids.back();
}

void TestDraw(uint32_t size, float spread) {
  const uint32_t rows = 64, stride = size + 5;
  auto x = Random(size_t{rows} * stride, 1);
  for (float& v : x) v *= spread;
  for (uint32_t i = 0; i < size; ++i) x[4 * stride + i] = i % 2 ? -INFINITY : 1.0f;
  std::vector<std::vector<LogitEdit>> edits(rows);
  std::vector<LogitEdit> all_edits;
  std::vector<DrawRow> draws(rows);
  OnDevice<float> x_d(x);
  auto tokens = OnDevice<uint32_t>::Poisoned(rows);
  PinnedArray<float> undecided;
  OK(undecided.Allocate(size_t{rows} * size));
  for (uint32_t r = 0; r < rows; ++r) {
    Draw& d = draws[r].draw;
    const auto of = [&](uint64_t n, uint64_t what) {
      return static_cast<uint32_t>((RandomUnit(1000 + r, what) + 1) / 2 * float(n));
    };
    d.inverse_temperature = r % 8 == 7 ? 0.0f : 0.5f + float(of(20, 0)) / 10;
    d.u = r == 5 ? 0.0 : r == 6 ? 1.0 - 0x1p-53 : (double(RandomUnit(r, 77)) + 1) / 2;
    if (r % 3 == 0) d.top_k = 1 + of(r % 2 ? 60 : 3000, 1);
    if (r % 4 < 2) d.top_p = r % 5 == 0 ? 0.0f : 0.3f + float(of(70, 2)) / 100;
    if (r % 6 > 3) d.least = std::log(float(1 + of(50, 3)) / 1000);
    if (r % 5 > 2) {
      for (uint32_t i = 0; i < 50; ++i) {
        edits[r].push_back({.id = i * (size / 50),
                            .bias = 4 * RandomUnit(r, 100 + i),
                            .penalty = 0.5f * RandomUnit(r, 200 + i),
                            .masked = i % 7 == 0,
                            .repeated = i % 2 == 0});
      }
      d.repetition_penalty = 1.3f;
    }
    if (r == 10) {  // nothing may be drawn
      d.top_k = 0;
      edits[r].clear();
      for (uint32_t i = 0; i < size; ++i) edits[r].push_back({.id = i, .masked = true});
    }
    d.edits = edits[r].data();
    d.edit_count = static_cast<uint32_t>(edits[r].size());
    draws[r].row = rows - 1 - r;
    draws[r].first_edit = static_cast<uint32_t>(all_edits.size());
    draws[r].token = tokens.data() + r;
    draws[r].undecided = undecided.data() + size_t{r} * size;
    all_edits.insert(all_edits.end(), edits[r].begin(), edits[r].end());
  }
  OnDevice<DrawRow> draws_d(draws);
  OnDevice<LogitEdit> edits_d(all_edits);
  auto originals = OnDevice<float>::Poisoned(all_edits.size());
  OK(DrawTokens(draws_d.data(), rows, edits_d.data(), originals.data(), x_d.data(), size, stride,
                stream));
  const auto got = tokens.Get();
  uint32_t left = 0;
  for (uint32_t r = 0; r < rows; ++r) {
    const auto begin = x.begin() + ptrdiff_t(draws[r].row) * stride;
    const std::vector<float> logits(begin, begin + size);
    const std::string name = "draw " + std::to_string(r) + " of " + std::to_string(size) +
                             " tokens, spread " + std::to_string(spread);
    if (got[r] == kUndecided) {
      ++left;
      Expect(std::memcmp(draws[r].undecided, logits.data(), size * sizeof(float)) == 0,
             name + ": an undecided row's logits are the model's");
      continue;
    }
    const uint32_t want = PlainDraw(logits, draws[r].draw);
    Expect(got[r] == want, name + ": " + std::to_string(got[r]) + ", not " + std::to_string(want));
  }
  std::printf("draws of %u tokens, spread %.0f: %u of %u left to the host\n", size, spread, left,
              rows);
  // The largest u there is may pass the last sum.
  Expect((spread == 0 && size > kDrawCandidates) || left <= 1, "all rows are decided");
}

void TestRopeAndAppend(uint32_t dim, uint32_t heads, uint32_t kv_heads, uint32_t rope_dims,
                       bool with_bias) {
  const uint32_t rows = 4, layers = 2, block_tokens = 16, context = 200, page_count = 5;
  const uint32_t width = (heads + 2 * kv_heads) * dim, pairs = rope_dims / 2;
  const size_t half_bytes = size_t{block_tokens} * kv_heads * dim * 2;
  const size_t layer_bytes = (2 * half_bytes + 4095) / 4096 * 4096;
  const auto qkv = ToBf16(Random(rows * width));
  const auto bias = Random(width);
  std::vector<float> cosines(context * pairs), sines(context * pairs);
  for (size_t i = 0; i < cosines.size(); ++i) {
    cosines[i] = std::cos(0.01f * static_cast<float>(i));
    sines[i] = std::sin(0.01f * static_cast<float>(i));
  }
  const std::vector<uint32_t> positions = {0, 17, 17, 199};
  const std::vector<int32_t> row_pages = {4, 0, 2, 3};
  OnDevice<uint16_t> qkv_d(qkv);
  OnDevice<float> bias_d(bias), cosines_d(cosines), sines_d(sines);
  OnDevice<uint32_t> positions_d(positions);
  OnDevice<int32_t> pages_d(row_pages);
  auto kv = OnDevice<std::byte>::Poisoned(page_count * layers * layer_bytes);
  const Pages pages = {.base = kv.data(),
                       .page_bytes = layers * layer_bytes,
                       .layer_bytes = layer_bytes,
                       .block_tokens = block_tokens,
                       .kv_heads = kv_heads,
                       .head_dim = dim};
  const RopeAppend rope = {.qkv = qkv_d.data(),
                           .bias = with_bias ? bias_d.data() : nullptr,
                           .cosines = cosines_d.data(),
                           .sines = sines_d.data(),
                           .positions = positions_d.data(),
                           .pages = pages_d.data(),
                           .rows = rows,
                           .heads = heads,
                           .rope_dims = rope_dims,
                           .layer = 1};
  OK(RopeAndAppend(rope, pages, false, stream));
  const auto out = FromBf16(qkv_d.Get());
  const auto memory = kv.Get();
  std::vector<double> got, want;
  for (uint32_t row = 0; row < rows; ++row) {
    std::vector<double> x(width);
    for (uint32_t i = 0; i < width; ++i) {
      x[i] = FromBf16(qkv[row * width + i]) + (with_bias ? bias[i] : 0);
    }
    for (uint32_t head = 0; head < heads + kv_heads; ++head) {
      for (uint32_t i = 0; i < pairs; ++i) {
        double& a = x[head * dim + i];
        double& b = x[head * dim + i + pairs];
        const double c = cosines[positions[row] * pairs + i], s = sines[positions[row] * pairs + i];
        const double turned = a * c - b * s;
        b = b * c + a * s;
        a = turned;
      }
    }
    for (uint32_t i = 0; i < heads * dim; ++i) {
      got.push_back(out[row * width + i]);
      want.push_back(x[i]);
    }
    const std::byte* k = memory.data() + row_pages[row] * pages.page_bytes + layer_bytes +
                         positions[row] % block_tokens * kv_heads * dim * 2;
    for (uint32_t i = 0; i < 2 * kv_heads * dim; ++i) {
      uint16_t bits;
      const size_t at = i < kv_heads * dim ? 2 * i : half_bytes + 2 * (i - kv_heads * dim);
      std::memcpy(&bits, k + at, 2);
      got.push_back(FromBf16(bits));
      want.push_back(x[heads * dim + i]);
    }
  }
  ExpectClose(Distance(got, want), 3e-3,
              "rope + append, dim " + std::to_string(dim) + " rope " + std::to_string(rope_dims) +
                  (with_bias ? " bias" : ""));
  size_t written = 0;
  for (size_t i = 0; i < memory.size(); ++i) written += memory[i] != std::byte{0xff};
  Expect(written <= rows * 2 * kv_heads * dim * 2,
         "rope + append writes its rows and nothing else");

  // The same rows, out to pinned host memory: to blocks of these heads, and to a rank's part of
  // blocks that hold three times as many.
  for (const uint32_t ranks : {1u, 3u}) {
    const size_t token_bytes = kv_heads * dim * 2, host_token_bytes = ranks * token_bytes;
    Pages shared = pages;
    shared.host_token_bytes = host_token_bytes;
    shared.host_layer_bytes = (2 * block_tokens * host_token_bytes + 4095) / 4096 * 4096;
    shared.host_offset = (ranks - 1) / 2 * token_bytes;
    const size_t block_bytes = layers * shared.host_layer_bytes;
    PinnedArray<std::byte> host;
    OK(host.Allocate(2 * block_bytes));
    std::memset(host.data(), 0xee, 2 * block_bytes);
    std::vector<std::byte> expected(2 * block_bytes, std::byte{0xee});
    // More rows than the copy has blocks of threads; two of them want to leave.
    constexpr uint32_t kCopied = 40;
    std::vector<uint32_t> copied_positions(kCopied);
    std::vector<int32_t> copied_pages(kCopied);
    std::vector<uint64_t> targets(kCopied);
    for (uint32_t i = 0; i < kCopied; ++i) {
      copied_positions[i] = positions[i % rows];
      copied_pages[i] = row_pages[i % rows];
    }
    for (const auto& [row, block] : {std::pair{36u, 0u}, {38u, 1u}}) {
      targets[row] = reinterpret_cast<uint64_t>(host.data() + block * block_bytes);
      const size_t token = copied_positions[row] % block_tokens;
      for (uint32_t layer = 0; layer < layers; ++layer) {
        const std::byte* from = memory.data() + copied_pages[row] * pages.page_bytes +
                                layer * layer_bytes + token * token_bytes;
        std::byte* to = expected.data() + block * block_bytes + layer * shared.host_layer_bytes +
                        token * host_token_bytes + shared.host_offset;
        std::memcpy(to, from, token_bytes);
        std::memcpy(to + block_tokens * host_token_bytes, from + half_bytes, token_bytes);
      }
    }
    OnDevice<uint64_t> targets_d(targets);
    OnDevice<uint32_t> copied_positions_d(copied_positions);
    OnDevice<int32_t> copied_pages_d(copied_pages);
    OK(CopyRowsOut(shared, copied_positions_d.data(), copied_pages_d.data(), targets_d.data(),
                   kCopied, 0, layers, stream));
    OK(cudaStreamSynchronize(stream));
    Expect(std::memcmp(host.data(), expected.data(), expected.size()) == 0,
           "rows reach the host and nothing else is written, blocks of " + std::to_string(ranks) +
               " times as many heads");
  }
}

void TestProduct(Gemm& gemm, uint32_t rows, uint32_t n, uint32_t k, bool accumulate, bool tune) {
  const auto x = ToBf16(Random(size_t{RowBucket(rows)} * k)), w = ToBf16(Random(size_t{n} * k));
  OnDevice<uint16_t> x_d(x), w_d(w);
  const auto before = Random(size_t{RowBucket(rows)} * n);
  OnDevice<float> y(before);
  const Product product = {
      .n = n, .k = k, .float_output = true, .accumulate = accumulate, .y_stride = n};
  if (tune) {
    auto scratch = OnDevice<float>::Poisoned(before.size());
    OK(gemm.Tune(product, rows, {w_d.data()}, x_d.data(), scratch.data()));
  }
  OK(gemm.Run(product, rows, w_d.data(), x_d.data(), y.data()));
  const auto got = y.Get();
  // A sample of the elements: all of them would take the CPU longer than the rest of the test.
  std::vector<double> some, want;
  for (size_t pick = 0; pick < 400; ++pick) {
    const size_t row = pick * 7919 % rows, column = pick * 104729 % n;
    double sum = accumulate ? before[row * n + column] : 0;
    for (uint32_t i = 0; i < k; ++i) {
      sum += double(FromBf16(x[row * k + i])) * FromBf16(w[column * k + i]);
    }
    want.push_back(sum);
    some.push_back(got[row * n + column]);
  }
  ExpectClose(Distance(some, want), 1e-4,
              "product " + std::to_string(rows) + " x " + std::to_string(n) + " x " +
                  std::to_string(k) + (accumulate ? " added" : "") + (tune ? " tuned" : ""));
}

// All outputs, from a norm and from bf16 rows, one launched behind the other.
void TestFewRows(uint32_t rows, uint32_t n, uint32_t k, bool dependent) {
  const auto residual = Random(rows * k), norm = Random(k);
  const auto w = ToBf16(Random(size_t{n} * k)), x = ToBf16(Random(rows * k));
  const uint32_t stride = n + 3;
  const auto before = Random(rows * stride);
  OnDevice<float> residual_d(residual), norm_d(norm), added(before);
  OnDevice<uint16_t> w_d(w), x_d(x);
  auto bf16 = OnDevice<uint16_t>::Poisoned(rows * stride);
  auto floats = OnDevice<float>::Poisoned(rows * stride);
  auto silu = OnDevice<uint16_t>::Poisoned(rows * (n / 2));
  FewRowsProduct p = {.w = w_d.data(),
                      .n = n,
                      .k = k,
                      .residual = residual_d.data(),
                      .norm = norm_d.data(),
                      .eps = 1e-5f,
                      .y = bf16.data(),
                      .y_stride = stride};
  OK(MultiplyFewRows(p, rows, dependent, stream));
  p.y = floats.data();
  p.output = FewRowsOutput::kFloat;
  OK(MultiplyFewRows(p, rows, dependent, stream));
  p.y = silu.data();
  p.y_stride = n / 2;
  p.output = FewRowsOutput::kSilu;
  if (n % 2 == 0) OK(MultiplyFewRows(p, rows, dependent, stream));
  p.x = x_d.data();
  p.y = added.data();
  p.y_stride = stride;
  p.output = FewRowsOutput::kAddFloat;
  OK(MultiplyFewRows(p, rows, dependent, stream));
  const auto bf16_got = FromBf16(bf16.Get()), floats_got = floats.Get(), added_got = added.Get(),
             silu_got = FromBf16(silu.Get());
  std::vector<double> normed(rows * k), of_norm, of_x, got_bf16, got_float, got_added, want_silu;
  for (uint32_t r = 0; r < rows; ++r) {
    double squares = 0;
    for (uint32_t i = 0; i < k; ++i) squares += double(residual[r * k + i]) * residual[r * k + i];
    const double scale = 1 / std::sqrt(squares / k + 1e-5);
    for (uint32_t i = 0; i < k; ++i) normed[r * k + i] = residual[r * k + i] * scale * norm[i];
    std::vector<double> row(n);
    for (uint32_t o = 0; o < n; ++o) {
      double a = 0, b = before[r * stride + o];
      for (uint32_t i = 0; i < k; ++i) {
        const double weight = FromBf16(w[size_t{o} * k + i]);
        a += weight * normed[r * k + i];
        b += weight * FromBf16(x[r * k + i]);
      }
      row[o] = a;
      of_norm.push_back(a);
      of_x.push_back(b);
      got_bf16.push_back(bf16_got[r * stride + o]);
      got_float.push_back(floats_got[r * stride + o]);
      got_added.push_back(added_got[r * stride + o]);
    }
    for (uint32_t i = 0; i < n / 2 && n % 2 == 0; ++i) {
      want_silu.push_back(row[i] / (1 + std::exp(-row[i])) * row[n / 2 + i]);
    }
    for (uint32_t o = n; o < stride; ++o) {
      Expect(std::isnan(floats_got[r * stride + o]), "nothing is written behind a row");
    }
  }
  const std::string name = std::to_string(rows) + " rows x " + std::to_string(n) + " x " +
                           std::to_string(k) + (dependent ? " dependent" : "");
  ExpectClose(Distance(got_float, of_norm), 3e-3, name + ", normed, float");
  ExpectClose(Distance(got_bf16, of_norm), 5e-3, name + ", normed, bf16");
  ExpectClose(Distance(got_added, of_x), 1e-5, name + ", added");
  if (n % 2 == 0) ExpectClose(Distance(silu_got, want_silu), 8e-3, name + ", silu");
}

struct Context {
  uint32_t queries, length;
};
void TestAttention(uint32_t dim, uint32_t heads, uint32_t kv_heads, std::vector<Context> contexts,
                   bool graph) {
  const uint32_t block_tokens = 16;
  const size_t token = size_t{kv_heads} * dim, half = token * block_tokens, page = 2 * half;
  std::vector<int32_t> query_starts = {0}, page_starts = {0}, last, ids;
  uint32_t rows = 0, pages = 0;
  for (const Context& c : contexts) {
    rows += c.queries;
    pages += (c.length + block_tokens - 1) / block_tokens;
    query_starts.push_back(static_cast<int32_t>(rows));
    page_starts.push_back(static_cast<int32_t>(pages));
    last.push_back(static_cast<int32_t>((c.length - 1) % block_tokens + 1));
  }
  ids.resize(pages);
  for (uint32_t i = 0; i < pages; ++i) ids[i] = static_cast<int32_t>(pages - 1 - i);
  const uint32_t stride = (heads + 2 * kv_heads) * dim;
  const auto q = ToBf16(Random(size_t{rows} * stride, 2));
  auto kv = ToBf16(Random(pages * page, 2));
  // What lies behind a context's end must not be read.
  for (size_t c = 0; c < contexts.size(); ++c) {
    const auto last_page = static_cast<size_t>(ids[static_cast<size_t>(page_starts[c + 1]) - 1]);
    for (size_t t = static_cast<size_t>(last[c]); t < block_tokens; ++t) {
      for (size_t i = 0; i < token; ++i) {
        kv[last_page * page + t * token + i] = kv[last_page * page + half + t * token + i] = 0x7fc0;
      }
    }
  }
  OnDevice<uint16_t> q_d(q), kv_d(kv);
  OnDevice<int32_t> query_starts_d(query_starts), page_starts_d(page_starts), last_d(last),
      ids_d(ids);
  auto out = OnDevice<uint16_t>::Poisoned(size_t{rows} * heads * dim);
  DeviceArray<std::byte> partials, tables;
  PinnedArray<std::byte> pinned;
  const size_t partial_bytes = size_t{192} << 20, table_bytes = size_t{8} << 20;
  OK(partials.Allocate(partial_bytes));
  OK(tables.Allocate(table_bytes));
  OK(pinned.Allocate(table_bytes));
  const AttentionWorkspace workspace = {.partials = partials.data(),
                                        .partial_bytes = partial_bytes,
                                        .tables = tables.data(),
                                        .tables_pinned = pinned.data(),
                                        .table_bytes = table_bytes};
  const AttentionShape shape = {.heads = heads,
                                .kv_heads = kv_heads,
                                .head_dim = dim,
                                .page_tokens = block_tokens,
                                .page_stride = static_cast<uint32_t>(page),
                                .query_stride = stride};
  AttentionPlan plan;
  OK(PlanAttention(shape, workspace, query_starts.data(), page_starts.data(),
                   static_cast<uint32_t>(contexts.size()), graph, stream, &plan));
  const AttentionBatch batch = {.query_starts = query_starts_d.data(),
                                .page_starts = page_starts_d.data(),
                                .pages = ids_d.data(),
                                .last_page_tokens = last_d.data(),
                                .chunks = static_cast<uint32_t>(contexts.size())};
  OK(Attend(shape, workspace, plan, batch, q_d.data(), kv_d.data(), kv_d.data() + half, out.data(),
            stream));
  const auto got = FromBf16(out.Get());
  std::vector<double> some, want;
  for (size_t c = 0; c < contexts.size(); ++c) {
    const Context context = contexts[c];
    for (uint32_t i = 0; i < context.queries; i += std::max(1u, context.queries / 5)) {
      const size_t row = static_cast<size_t>(query_starts[c]) + i;
      for (uint32_t head = 0; head < heads; head += std::max(1u, heads / 3)) {
        const uint32_t visible = context.length - context.queries + i + 1;
        const size_t kv_head = head / (heads / kv_heads);
        const auto element = [&](uint32_t t, size_t which, uint32_t d) {
          const size_t id =
              static_cast<size_t>(ids[static_cast<size_t>(page_starts[c]) + t / block_tokens]);
          return double(FromBf16(
              kv[id * page + which * half + t % block_tokens * token + kv_head * dim + d]));
        };
        std::vector<double> weights(visible);
        double peak = -1e30, total = 0;
        for (uint32_t t = 0; t < visible; ++t) {
          double score = 0;
          for (uint32_t d = 0; d < dim; ++d) {
            score += FromBf16(q[row * stride + head * dim + d]) * element(t, 0, d);
          }
          weights[t] = score / std::sqrt(double(dim));
          peak = std::max(peak, weights[t]);
        }
        for (double& w : weights) total += w = std::exp(w - peak);
        for (uint32_t d = 0; d < dim; ++d) {
          double sum = 0;
          for (uint32_t t = 0; t < visible; ++t) sum += weights[t] / total * element(t, 1, d);
          want.push_back(sum);
          some.push_back(got[(row * heads + head) * dim + d]);
        }
      }
    }
  }
  ExpectClose(
      Distance(some, want), 8e-3,
      "attention dim " + std::to_string(dim) + " heads " + std::to_string(heads) + "/" +
          std::to_string(kv_heads) + " chunks " + std::to_string(contexts.size()) + " longest " +
          std::to_string(std::max_element(contexts.begin(), contexts.end(),
                                          [](auto a, auto b) { return a.length < b.length; })
                             ->length) +
          (graph ? " graph" : ""));
}

// Pages in any order with any number of tokens, for all layers and for some.
void TestChecksum(uint32_t block_tokens, uint32_t kv_heads, uint32_t dim) {
  const uint32_t layers = 3, page_count = 7;
  const size_t token_bytes = size_t{kv_heads} * dim * 2, half_bytes = token_bytes * block_tokens;
  const size_t layer_bytes = (2 * half_bytes + 4095) / 4096 * 4096;
  const size_t page_bytes = layers * layer_bytes;
  auto kv = OnDevice<std::byte>::Poisoned(page_count * page_bytes);
  OK(RandomBf16(reinterpret_cast<uint16_t*>(kv.data()), page_count * page_bytes / 2, ++seed, 1,
                stream));
  const auto memory = kv.Get();
  const Pages pages = {.base = kv.data(),
                       .page_bytes = page_bytes,
                       .layer_bytes = layer_bytes,
                       .block_tokens = block_tokens,
                       .kv_heads = kv_heads,
                       .head_dim = dim};
  std::vector<FilledPage> filled;
  for (uint32_t tokens = 1; tokens <= block_tokens; ++tokens) {
    filled.push_back({.page = static_cast<int32_t>(tokens * 3 % page_count), .tokens = tokens});
  }
  OnDevice<FilledPage> filled_d(filled);
  const auto count = static_cast<uint32_t>(filled.size());
  for (const auto& [first, end] : {std::pair(0u, layers), {1u, 2u}}) {
    PinnedArray<uint64_t> sums;  // as the engine has it
    const size_t size = size_t{count} * layers;
    OK(sums.Allocate(size + 1));
    std::memset(sums.data(), 0xee, (size + 1) * sizeof(uint64_t));
    const uint64_t poison = sums[size];
    OK(Checksum(pages, filled_d.data(), count, layers, first, end, sums.data(), stream));
    OK(cudaStreamSynchronize(stream));
    bool same = sums[size] == poison;
    for (uint32_t i = 0; i < count; ++i) {
      for (uint32_t layer = 0; layer < layers; ++layer) {
        const std::byte* at =
            memory.data() + static_cast<size_t>(filled[i].page) * page_bytes + layer * layer_bytes;
        const uint64_t want = layer < first || layer >= end
                                  ? poison
                                  : SerialChecksum(at, half_bytes, filled[i].tokens * token_bytes);
        same = same && sums[i * layers + layer] == want;
      }
    }
    Expect(same, "checksums of 1 to " + std::to_string(block_tokens) + " tokens of " +
                     std::to_string(kv_heads) + " x " + std::to_string(dim) + ", layers " +
                     std::to_string(first) + " to " + std::to_string(end));
  }
  std::printf("checksums of 1 to %u tokens of %u x %u\n", block_tokens, kv_heads, dim);
}

int Main() {
  NeedDevice();
  seed = static_cast<uint64_t>(std::time(nullptr)) * 1000;
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  TestEmbed();
  for (uint32_t size : {576u, 4096u, 12u}) TestRmsNorm(size);
  for (uint32_t size : {1536u, 14336u}) TestSilu(size);
  TestArgmax();
  for (uint32_t size : {300u, 2048u, 49152u, 128256u}) {
    for (float spread : {0.0f, 2.0f, 8.0f, 30.0f}) TestDraw(size, spread);
  }
  TestRopeAndAppend(64, 9, 3, 64, false);
  TestRopeAndAppend(128, 32, 8, 128, true);
  TestRopeAndAppend(64, 4, 2, 32, true);
  for (const auto& [block_tokens, kv_heads, dim] :
       {std::tuple(16u, 1u, 64u), std::tuple(16u, 3u, 64u), std::tuple(16u, 8u, 128u),
        std::tuple(1u, 1u, 64u), std::tuple(33u, 5u, 128u), std::tuple(128u, 8u, 128u)}) {
    TestChecksum(block_tokens, kv_heads, dim);
  }
  Gemm gemm;
  OK(gemm.Init(stream));
  for (bool tune : {false, true}) {
    for (uint32_t rows : {1u, 3u, 32u, 100u, 700u}) {
      TestProduct(gemm, rows, 960, 576, false, tune);
      TestProduct(gemm, rows, 4096, 1536, true, tune);
    }
  }
  TestProduct(gemm, 4, 49153, 576, false, true);  // an odd vocabulary
  for (uint32_t rows : {1u, 2u}) {
    for (bool dependent : {false, true}) {
      TestFewRows(rows, 960, 576, dependent);
      TestFewRows(rows, 257, 1536, dependent);
      TestFewRows(rows, 34, 4096, dependent);
    }
  }
  TestFewRows(2, 64, 14336, true);
  for (const auto& [dim, heads, kv_heads] : {std::tuple(64u, 9u, 3u), std::tuple(128u, 32u, 8u),
                                             std::tuple(128u, 28u, 4u), std::tuple(64u, 4u, 4u)}) {
    TestAttention(dim, heads, kv_heads, {{1, 1}}, false);
    TestAttention(dim, heads, kv_heads, {{300, 300}, {1, 1000}, {17, 40}, {128, 1128}}, false);
    TestAttention(dim, heads, kv_heads, {{1, 3000}}, true);
    std::vector<Context> many;
    for (uint32_t i = 0; i < 48; ++i) many.push_back({1, 1 + i * 37 % 900});
    TestAttention(dim, heads, kv_heads, many, true);
  }
  return Verdict();
}

}  // namespace
}  // namespace antiphon::engine::cuda

int main() { return antiphon::engine::cuda::Main(); }
