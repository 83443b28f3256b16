// The CUDA engine at the shape of Llama-3-8B with random weights, as fractions of what the card can
// do: it measures the copy bandwidth and the bf16 matrix rate first.
//   cuda_bench [--json FILE] [--quick] [--products]
// Needs about 78 GB of device memory. Bytes and operations are counted as in bench/RESULTS.md.
#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "engine/cuda/engine.h"
#include "engine/cuda/gemm.h"
#include "engine/cuda/kernels.h"
#include "engine/cuda/memory.h"

namespace antiphon::engine::cuda {
namespace {

void Ok(const Error& error, const char* what) {
  if (!error) return;
  std::fprintf(stderr, "%s: %s\n", what, error.message.c_str());
  std::exit(1);
}
void Ok(cudaError_t status, const char* what) {
  if (status != cudaSuccess) Ok(FromCuda(status, what), what);
}
#define OK(expression) Ok((expression), #expression)

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Spread {
  double median, least, most;
};
Spread Of(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return {values[values.size() / 2], values.front(), values.back()};
}

EngineConfig Llama8B() {
  EngineConfig c;
  c.layers = 32;
  c.hidden = 4096;
  c.feed_forward = 14336;
  c.heads = 32;
  c.kv_heads = 8;
  c.head_dim = 128;
  c.vocab = 128256;
  c.context = 8192 + 64;
  c.rope_dims = 128;
  c.rms_eps = 1e-5f;
  c.block_tokens = 16;
  c.layer_bytes = 65536;
  c.step_tokens_max = 8192;
  c.rows_max = 128;
  c.memory_bytes = uint64_t{60} << 30;
  return c;
}

// Bytes read and written by a large copy on the device, per second.
double CopyBandwidth(cudaStream_t stream) {
  const size_t bytes = size_t{4} << 30;
  DeviceArray<std::byte> a, b;
  OK(a.Allocate(bytes));
  OK(b.Allocate(bytes));
  OK(RandomBf16(reinterpret_cast<uint16_t*>(a.data()), bytes / 2, 1, 1, stream));
  std::vector<double> rates;
  Event begin, end;
  OK(cudaEventCreate(begin.address()));
  OK(cudaEventCreate(end.address()));
  for (int i = 0; i < 12; ++i) {
    OK(cudaEventRecord(begin.get(), stream));
    OK(cudaMemcpyAsync(b.data(), a.data(), bytes, cudaMemcpyDeviceToDevice, stream));
    OK(cudaEventRecord(end.get(), stream));
    OK(cudaEventSynchronize(end.get()));
    float ms = 0;
    OK(cudaEventElapsedTime(&ms, begin.get(), end.get()));
    if (i > 1) rates.push_back(2.0 * static_cast<double>(bytes) / (ms / 1e3));
  }
  return Of(rates).median;
}

// Operations of an 8192 x 8192 x 8192 product of random numbers, per second.
double MatrixRate(cudaStream_t stream) {
  const uint32_t n = 8192;
  DeviceArray<uint16_t> w, x, y;
  for (auto* a : {&w, &x, &y}) OK(a->Allocate(size_t{n} * n));
  OK(RandomBf16(w.data(), size_t{n} * n, 2, 1, stream));
  OK(RandomBf16(x.data(), size_t{n} * n, 3, 1, stream));
  Gemm gemm;
  OK(gemm.Init(stream));
  const Product product = {.n = n, .k = n, .y_stride = n};
  OK(gemm.Tune(product, n, {w.data(), w.data()}, x.data(), y.data()));
  Event begin, end;
  OK(cudaEventCreate(begin.address()));
  OK(cudaEventCreate(end.address()));
  std::vector<double> rates;
  for (int i = 0; i < 12; ++i) {
    OK(cudaEventRecord(begin.get(), stream));
    OK(gemm.Run(product, n, w.data(), x.data(), y.data()));
    OK(cudaEventRecord(end.get(), stream));
    OK(cudaEventSynchronize(end.get()));
    float ms = 0;
    OK(cudaEventElapsedTime(&ms, begin.get(), end.get()));
    if (i > 1) rates.push_back(2.0 * n * n * n / (ms / 1e3));
  }
  return Of(rates).median;
}

double Step(Engine& engine, const std::vector<ChunkView>& chunks) {
  std::vector<ChunkOutput> outputs(chunks.size());
  const double begin = Now();
  OK(engine.Submit(chunks.data(), chunks.size()));
  while (!engine.Poll().finished) {
  }
  OK(engine.Take(outputs.data()));
  return Now() - begin;
}

class Bench {
 public:
  explicit Bench(bool quick) : quick_(quick) {
    Stream stream;
    OK(cudaStreamCreateWithFlags(stream.address(), cudaStreamNonBlocking));
    bandwidth_ = CopyBandwidth(stream.get());
    matrix_rate_ = MatrixRate(stream.get());
    std::printf("copy %.2f TB/s (read + written), bf16 products %.0f TFLOP/s\n", bandwidth_ / 1e12,
                matrix_rate_ / 1e12);
  }

  // Each product of a layer alone: the share of the copy bandwidth at which its weights come in.
  void Products() {
    Stream stream;
    OK(cudaStreamCreateWithFlags(stream.address(), cudaStreamNonBlocking));
    Gemm gemm;
    OK(gemm.Init(stream.get()));
    struct Shape {
      const char* name;
      uint32_t n, k;
      FewRowsOutput output;
    };
    const Shape shapes[] = {{"qkv", 6144, 4096, FewRowsOutput::kBf16},
                            {"attention output", 4096, 4096, FewRowsOutput::kAddFloat},
                            {"gate and up", 28672, 4096, FewRowsOutput::kSilu},
                            {"down", 4096, 14336, FewRowsOutput::kAddFloat},
                            {"logits", 128256, 4096, FewRowsOutput::kFloat}};
    DeviceArray<uint16_t> w, x;
    DeviceArray<float> y, norm;
    const size_t elements = size_t{128256} * 4096 * 2;
    OK(w.Allocate(elements));
    OK(x.Allocate(128 * 14336));
    OK(y.Allocate(size_t{128} * 128256));
    OK(norm.Allocate(14336));
    OK(RandomBf16(w.data(), elements, 4, 0.02f, stream.get()));
    OK(RandomBf16(x.data(), x.size(), 5, 1, stream.get()));
    OK(FillFloat(y.data(), y.size(), 0.5f, stream.get()));
    OK(FillFloat(norm.data(), norm.size(), 1, stream.get()));
    Event begin, end;
    OK(cudaEventCreate(begin.address()));
    OK(cudaEventCreate(end.address()));
    for (const Shape& s : shapes) {
      const size_t bytes = size_t{s.n} * s.k * 2;
      std::vector<const void*> places;
      for (size_t at = 0; at + size_t{s.n} * s.k <= elements && places.size() < 16;
           at += size_t{s.n} * s.k) {
        places.push_back(w.data() + at);
      }
      const auto report = [&](const char* kind, uint32_t rows, const auto& run) {
        for (int warm = 0; warm < 2; ++warm) run(places[0]);
        OK(cudaEventRecord(begin.get(), stream.get()));
        int count = 0;
        for (int turn = 0; turn < 32; ++turn, ++count) {
          run(places[static_cast<size_t>(turn) % places.size()]);
        }
        OK(cudaEventRecord(end.get(), stream.get()));
        OK(cudaEventSynchronize(end.get()));
        float ms = 0;
        OK(cudaEventElapsedTime(&ms, begin.get(), end.get()));
        const double seconds = ms / 1e3 / count;
        std::printf("%-16s %3u rows %-9s %7.1f us, weights at %.2f of the copy bandwidth\n", s.name,
                    rows, kind, 1e6 * seconds, static_cast<double>(bytes) / seconds / bandwidth_);
      };
      const bool added = s.output == FewRowsOutput::kAddFloat;
      const Product product = {.n = s.n,
                               .k = s.k,
                               .float_output = added || s.output == FewRowsOutput::kFloat,
                               .accumulate = added,
                               .y_stride = s.n};
      for (uint32_t rows : {1u, 4u, 32u, 128u}) {
        OK(gemm.Tune(product, rows, places, x.data(), y.data()));
        report("cuBLASLt", rows,
               [&](const void* at) { OK(gemm.Run(product, rows, at, x.data(), y.data())); });
        if (!FewRowsServes(rows, s.k)) continue;
        FewRowsProduct few = {
            .n = s.n, .k = s.k, .eps = 1e-5f, .y = y.data(), .y_stride = s.n, .output = s.output};
        if (added) few.x = x.data();
        few.residual = y.data() + size_t{64} * 128256;
        few.norm = norm.data();
        report("ours", rows, [&](const void* at) {
          few.w = static_cast<const uint16_t*>(at);
          OK(MultiplyFewRows(few, rows, true, stream.get()));
        });
      }
    }
  }

  void Run() {
    {
      const double begin = Now();
      const Served served(Llama8B());
      std::printf("engine ready in %.1f s, %llu pages\n", Now() - begin,
                  static_cast<unsigned long long>(served.engine->pages_total()));
      for (uint32_t rows : {1u, 2u, 4u, 8u, 32u, 64u, 128u}) Decode(served, rows, 1024);
      Decode(served, 1, 8000);
      for (uint32_t tokens : {512u, 2048u, 8192u}) Prefill(served, tokens);
      Load(served, 2048);
    }
    CopyOut();
  }

  void Write(const char* path) const {
    FILE* out = std::fopen(path, "w");
    if (out == nullptr) return std::perror(path);
    cudaDeviceProp properties;
    OK(cudaGetDeviceProperties(&properties, 0));
    std::fprintf(out, "{\"device\": \"%s\", \"copy_bytes_per_s\": %.4g, \"bf16_flop_per_s\": %.4g",
                 properties.name, bandwidth_, matrix_rate_);
    for (const auto& [name, value] : notes_)
      std::fprintf(out, ",\n \"%s\": %.6g", name.c_str(), value);
    std::fprintf(out, "}\n");
    std::fclose(out);
  }

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };

  // An engine and the host's memory for its blocks.
  struct Served {
    explicit Served(const EngineConfig& with)
        : config(with), page(config.layer_bytes * config.layers) {
      OK(Engine::Create(config, {}, nullptr, nullptr, &engine));
      const size_t bytes = (8192 / 16 + 256) * page;
      memory.reset(static_cast<std::byte*>(std::aligned_alloc(4096, bytes)));
      std::memset(memory.get(), 0, bytes);
      OK(engine->RegisterMemory(memory.get(), bytes));
    }
    EngineConfig config;
    size_t page;
    std::unique_ptr<std::byte, Free> memory;
    std::unique_ptr<Engine> engine;
  };

  void Note(const std::string& name, double value) { notes_.emplace_back(name, value); }

  // One row a sequence behind an adopted context. Blocks that only stand for the context share one
  // place in the host's memory; the block that a row writes is its own.
  class Rows {
   public:
    Rows(const Served& served, uint32_t rows, uint32_t context)
        : engine_(*served.engine), pointers_(rows), tokens_(rows, 17) {
      const uint32_t blocks = context / 16 + 4;
      for (uint32_t r = 0; r < rows; ++r) {
        pointers_[r].assign(blocks, served.memory.get());
        for (uint32_t b = context / 16; b < blocks; ++b)
          pointers_[r][b] = served.memory.get() + (r + 1) * served.page;
        chunks_.push_back({.sequence = 1000 * uint64_t{context} + r,
                           .tokens = &tokens_[r],
                           .token_count = 1,
                           .start = context,
                           .blocks = pointers_[r].data(),
                           .output = Output::kGreedy});
        OK(engine_.Adopt(chunks_.back()));
      }
    }
    double Next() {
      const double seconds = Step(engine_, chunks_);
      for (ChunkView& chunk : chunks_) ++chunk.start;
      return seconds;
    }

   private:
    Engine& engine_;
    std::vector<std::vector<std::byte*>> pointers_;
    std::vector<uint32_t> tokens_;
    std::vector<ChunkView> chunks_;
  };

  // The same prompt of `count` tokens again and again.
  class Prompt {
   public:
    Prompt(const Served& served, uint32_t count) : engine_(*served.engine), tokens_(count) {
      for (uint32_t i = 0; i < count; ++i) tokens_[i] = (i * 7919 + 13) % served.config.vocab;
      for (uint32_t b = 0; b < count / 16; ++b)
        pointers_.push_back(served.memory.get() + b * served.page);
    }
    double Next() {
      return Step(engine_, {{.sequence = 7,
                             .tokens = tokens_.data(),
                             .token_count = static_cast<uint32_t>(tokens_.size()),
                             .start = 0,
                             .blocks = pointers_.data(),
                             .output = Output::kGreedy}});
    }

   private:
    Engine& engine_;
    std::vector<uint32_t> tokens_;
    std::vector<std::byte*> pointers_;
  };

  void Decode(const Served& served, uint32_t rows, uint32_t context) {
    Rows step(served, rows, context);
    std::vector<double> seconds;
    for (int i = 0; i < (quick_ ? 15 : 40); ++i) {
      const double s = step.Next();
      if (i >= 5) seconds.push_back(s);
    }
    const Spread s = Of(seconds);
    // Weights once, each row's K and V once.
    const double weights = 2.0 * (6.979e9 + 0.525e9);
    const double bytes = weights + rows * (context + 20.0) * 131072.0;
    const double floor = bytes / bandwidth_;
    std::printf(
        "decode %3u rows at %u: %.0f tokens/s, step %.3f ms (%.3f-%.3f), %.2f of the roofline\n",
        rows, context, rows / s.median, 1e3 * s.median, 1e3 * s.least, 1e3 * s.most,
        floor / s.median);
    const std::string name = "decode_" + std::to_string(rows) + "_at_" + std::to_string(context);
    Note(name + "_tokens_per_s", rows / s.median);
    Note(name + "_roofline", floor / s.median);
  }

  void Prefill(const Served& served, uint32_t count) {
    Prompt prompt(served, count);
    std::vector<double> seconds;
    for (int i = 0; i < (quick_ ? 4 : 8); ++i) {
      const double s = prompt.Next();
      if (i >= 1) seconds.push_back(s);
    }
    const Spread s = Of(seconds);
    const EngineConfig& config = served.config;
    // Two operations a weight and token; causal attention: half of 4 x heads x dim a pair.
    const double products = 2.0 * 6.979e9 * count;
    const double attention =
        2.0 * config.layers * config.heads * config.head_dim * double(count) * count;
    const double floor = (products + attention) / matrix_rate_;
    std::printf("prefill %u: %.0f tokens/s, %.1f ms (%.1f-%.1f), %.2f of the roofline\n", count,
                count / s.median, 1e3 * s.median, 1e3 * s.least, 1e3 * s.most, floor / s.median);
    Note("prefill_" + std::to_string(count) + "_tokens_per_s", count / s.median);
    Note("prefill_" + std::to_string(count) + "_roofline", floor / s.median);
  }

  // What copying K and V out costs: an engine that does and one that does not, step by step in
  // turns, because the card's clock moves by more than that.
  void CopyOut() {
    EngineConfig config = Llama8B();
    config.memory_bytes = uint64_t{36} << 30;  // both on a card of 80 GB
    const Served with(config);
    config.copy_out = false;
    const Served without(config);
    const auto compare = [&](const std::string& name, auto a, auto b, int rounds) {
      std::vector<double> costs;
      for (int i = 0; i < rounds; ++i) {
        double copied, plain;
        if (i % 2 == 0) {
          copied = a.Next();
          plain = b.Next();
        } else {
          plain = b.Next();
          copied = a.Next();
        }
        if (i >= 2) costs.push_back(copied / plain - 1);
      }
      std::sort(costs.begin(), costs.end());
      const size_t n = costs.size();
      std::printf("copy-out, %s: %+.1f %% (middle half %+.1f to %+.1f, %zu pairs)\n", name.c_str(),
                  100 * costs[n / 2], 100 * costs[n / 4], 100 * costs[3 * n / 4], n);
      Note("copy_out_cost_" + name, costs[n / 2]);
    };
    for (uint32_t tokens : {2048u, 8192u}) {
      compare("prompt_" + std::to_string(tokens), Prompt(with, tokens), Prompt(without, tokens),
              quick_ ? 10 : 42);
    }
    for (uint32_t rows : {1u, 32u, 128u}) {
      compare("decode_" + std::to_string(rows) + "_at_1024", Rows(with, rows, 1024),
              Rows(without, rows, 1024), quick_ ? 20 : 50);
    }
  }

  // 64 new tokens behind a prefix that comes from the host.
  void Load(const Served& served, uint32_t prefix) {
    std::vector<uint32_t> tokens(64, 5);
    std::vector<std::byte*> pointers;
    for (uint32_t b = 0; b < prefix / 16 + 4; ++b)
      pointers.push_back(served.memory.get() + b * served.page);
    std::vector<double> cold, warm;
    for (uint64_t i = 0; i < 6; ++i) {
      const ChunkView chunk = {.sequence = 900 + i,
                               .tokens = tokens.data(),
                               .token_count = 64,
                               .start = prefix,
                               .blocks = pointers.data(),
                               .output = Output::kGreedy};
      cold.push_back(Step(*served.engine, {chunk}));
      warm.push_back(Step(*served.engine, {chunk}));
    }
    const double bytes = prefix / 16.0 * static_cast<double>(served.page);
    std::printf(
        "64 tokens behind %u cached ones: %.1f ms from the host, %.1f ms from the device "
        "(%.0f MB: %.1f GB/s)\n",
        prefix, 1e3 * Of(cold).median, 1e3 * Of(warm).median, bytes / 1e6,
        bytes / Of(cold).median / 1e9);
    Note("load_cold_s", Of(cold).median);
    Note("load_warm_s", Of(warm).median);
  }

  const bool quick_;
  double bandwidth_ = 0, matrix_rate_ = 0;
  std::vector<std::pair<std::string, double>> notes_;
};

}  // namespace
}  // namespace antiphon::engine::cuda

int main(int argc, char** argv) {
  using namespace antiphon::engine::cuda;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device\n");
    return 77;
  }
  bool quick = false, products = false;
  const char* json = nullptr;
  for (int i = 1; i < argc; ++i) {
    if (std::string(argv[i]) == "--quick") quick = true;
    if (std::string(argv[i]) == "--products") products = true;
    if (std::string(argv[i]) == "--json" && i + 1 < argc) json = argv[++i];
  }
  Bench bench(quick);
  if (products) bench.Products();
  bench.Run();
  if (json != nullptr) bench.Write(json);
  return 0;
}
