// Times the CPU engine on one case; compare runs it beside other engines.
//
//   engine_bench MODEL THREADS prompt LENGTH      a prompt in chunks of 512, its next token drawn
//   engine_bench MODEL THREADS generate STREAMS [TOKENS [CONTEXT]]
//                                                 64 greedy tokens each, after 128 of context
//   engine_bench MODEL THREADS context LENGTH     64 greedy tokens after LENGTH of context
//   engine_bench MODEL THREADS asked LENGTH       such a prompt whenever a line comes, as a server
//                                                 is asked: prints the seconds of each
//   engine_bench MODEL weights                    what a token reads and multiplies
//   engine_bench --instruction-set                what "auto" stands for on this machine
//
// A case prints {"tokens_per_s", "load_s": from opening the file to a first token drawn,
// "peak_bytes", "before_load_bytes": resident memory}.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/cpu/cpu_runner.h"
#include "engine/cpu/isa.h"
#include "engine/cpu/weights.h"
#include "model/model_file.h"

namespace antiphon::engine {
namespace {

constexpr uint32_t kContext = 128;
constexpr uint32_t kGenerated = 64;
constexpr uint32_t kChunk = 512;  // the worker's default

struct Stream {
  std::vector<uint32_t> tokens;
  cpu::Arena memory;  // on huge pages, as the store's pool
  std::vector<std::byte*> blocks;
};

class Bench {
 public:
  Bench(const char* path, int threads) {
    const auto started = std::chrono::steady_clock::now();
    absl::StatusOr<std::unique_ptr<model::ModelFile>> file = model::OpenModelFile(path);
    if (!file.ok()) Fail(file.status());
    file_ = *std::move(file);
    absl::StatusOr<std::unique_ptr<ModelRunner>> runner =
        MakeCpuRunner(file_.get(), {.step_tokens_max = kChunk, .threads = threads});
    if (!runner.ok()) Fail(runner.status());
    runner_ = *std::move(runner);
    greedy_.temperature = 0;
    Stream first = NewStream(1, 0, 0);
    Prefill(first);
    load_s_ = SecondsSince(started);
  }

  double load_s() const { return load_s_; }

  double Prompt(uint32_t length) {
    // The first run finds cold caches and memory that nothing has touched.
    Stream warm = NewStream(std::min(length, kChunk), 0, 0);
    Prefill(warm);
    Stream stream = NewStream(length, 0, 0);
    const auto started = std::chrono::steady_clock::now();
    Prefill(stream);
    return length / SecondsSince(started);
  }

  // Idle in between, as a server is.
  void Asked(uint32_t length) {
    Stream stream = NewStream(length, 0, 0);
    Prefill(stream);
    std::printf("ready\n");
    std::fflush(stdout);
    for (uint32_t number = 1; std::getchar() != EOF; ++number) {
      stream.tokens = Tokens(length, 1000 * number);
      const auto started = std::chrono::steady_clock::now();
      Prefill(stream);
      std::printf("%.6f\n", SecondsSince(started));
      std::fflush(stdout);
    }
  }

  double Generate(uint32_t count, uint32_t context, uint32_t tokens) {
    std::vector<Stream> streams;
    for (uint32_t i = 0; i < count; ++i) {
      streams.push_back(NewStream(context, 1000 * i, tokens));
      Prefill(streams.back());
    }
    const auto started = std::chrono::steady_clock::now();
    for (uint32_t i = 0; i < tokens; ++i) {
      Step step;
      for (Stream& s : streams) {
        step.chunks.push_back(ChunkOf(s, static_cast<uint32_t>(s.tokens.size()) - 1, 1));
      }
      const StepResult result = RunStep(std::move(step));
      for (uint32_t k = 0; k < count; ++k) {
        streams[k].tokens.push_back(result.chunks[k].sampled->id);
      }
    }
    return count * tokens / SecondsSince(started);
  }

 private:
  [[noreturn]] static void Fail(const absl::Status& status) {
    std::fprintf(stderr, "%s\n", status.ToString().c_str());
    std::exit(1);
  }
  static double SecondsSince(std::chrono::steady_clock::time_point started) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  }

  std::vector<uint32_t> Tokens(uint32_t length, uint32_t offset) const {
    std::vector<uint32_t> tokens;
    const uint32_t vocab = runner_->shape().vocab;
    for (uint32_t i = 0; i < length; ++i) {
      tokens.push_back((i + offset) * 7919 % (vocab - 64) + 64);
    }
    return tokens;
  }

  Stream NewStream(uint32_t length, uint32_t offset, uint32_t more) const {
    Stream stream;
    stream.tokens = Tokens(length, offset);
    const KvLayout& layout = runner_->layout();
    const size_t blocks = layout.BlocksFor(length + more + 1);
    absl::StatusOr<cpu::Arena> memory = cpu::Arena::Create(blocks * layout.payload_bytes());
    if (!memory.ok()) Fail(memory.status());
    stream.memory = *std::move(memory);
    std::memset(stream.memory.data(), 0, blocks * layout.payload_bytes());  // the pages are there
    for (size_t b = 0; b < blocks; ++b) {
      stream.blocks.push_back(stream.memory.data() + b * layout.payload_bytes());
    }
    return stream;
  }

  SequenceChunk ChunkOf(const Stream& stream, uint32_t start, uint32_t count) const {
    SequenceChunk chunk;
    chunk.tokens = absl::MakeConstSpan(stream.tokens).subspan(start, count);
    chunk.start = start;
    chunk.blocks = stream.blocks;
    if (start + count == stream.tokens.size()) chunk.sample = SampleRequest{.params = &greedy_};
    return chunk;
  }

  // Draws the token after the last.
  void Prefill(Stream& stream) {
    const uint32_t length = static_cast<uint32_t>(stream.tokens.size());
    for (uint32_t start = 0; start < length; start += kChunk) {
      const StepResult result =
          RunStep({{ChunkOf(stream, start, std::min(kChunk, length - start))}});
      if (start + kChunk >= length) stream.tokens.push_back(result.chunks[0].sampled->id);
    }
  }

  StepResult RunStep(Step step) {
    step.report_layers = false;
    if (const absl::Status status = runner_->Submit(std::move(step)); !status.ok()) Fail(status);
    StepProgress progress;
    while (!progress.finished) progress = runner_->Await(progress, absl::Seconds(60));
    absl::StatusOr<StepResult> result = runner_->Take();
    if (!result.ok()) Fail(result.status());
    return *std::move(result);
  }

  std::unique_ptr<model::ModelFile> file_;
  std::unique_ptr<ModelRunner> runner_;
  SamplingParams greedy_;
  double load_s_ = 0;
};

// Bytes of the tensors, and the weights that one token of a prompt is multiplied with: neither the
// embedding's rows nor the output matrix, which only a prompt's last token meets.
int PrintWeights(const char* path) {
  absl::StatusOr<std::unique_ptr<model::ModelFile>> file = model::OpenModelFile(path);
  if (!file.ok()) {
    std::fprintf(stderr, "%s\n", file.status().ToString().c_str());
    return 1;
  }
  uint64_t bytes = 0, elements = 0, prompt_weights = 0;
  for (const model::Tensor& tensor : (*file)->tensors()) {
    bytes += tensor.bytes;
    elements += tensor.elements();
    const bool end = tensor.name == "token_embd.weight" || tensor.name == "output.weight";
    if (!end && tensor.dims.size() > 1) prompt_weights += tensor.elements();
  }
  std::printf("{\"bytes\": %ju, \"elements\": %ju, \"prompt_weights\": %ju}\n",
              static_cast<uintmax_t>(bytes), static_cast<uintmax_t>(elements),
              static_cast<uintmax_t>(prompt_weights));
  return 0;
}

// Not getrusage's, which begins with what the parent had before exec.
uint64_t PeakBytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmHWM:")) return std::strtoull(line.c_str() + 6, nullptr, 10) * 1024;
  }
  return 0;
}

int Main(int argc, char** argv) {
  if (argc == 2 && std::string_view(argv[1]) == "--instruction-set") {
    std::printf("%s\n", cpu::GrantedKernels().front()->name);
    return 0;
  }
  if (argc == 3 && std::string_view(argv[2]) == "weights") return PrintWeights(argv[1]);
  const std::string_view what = argc >= 5 ? argv[3] : "";
  const auto number = [&](int i, int other) { return argc > i ? std::atoi(argv[i]) : other; };
  const int threads = number(2, 0), size = number(4, 0);
  const int tokens = number(5, kGenerated), context = number(6, kContext);
  const bool known = what == "prompt" || what == "asked" || what == "generate" || what == "context";
  if (!known || threads < 1 || size < 1 || tokens < 1 || context < 1 ||
      argc > (what == "generate" ? 7 : 5)) {
    std::fprintf(stderr,
                 "usage: engine_bench MODEL THREADS prompt|asked|generate|context SIZE\n"
                 "       engine_bench MODEL THREADS generate STREAMS [TOKENS [CONTEXT]]\n");
    return 2;
  }
  const uint64_t before_load_bytes = PeakBytes();
  Bench bench(argv[1], threads);
  const uint32_t n = static_cast<uint32_t>(size);
  if (what == "asked") {
    bench.Asked(n);
    return 0;
  }
  const double speed = what == "prompt"     ? bench.Prompt(n)
                       : what == "generate" ? bench.Generate(n, static_cast<uint32_t>(context),
                                                             static_cast<uint32_t>(tokens))
                                            : bench.Generate(1, n, kGenerated);
  std::printf(
      "{\"tokens_per_s\": %.2f, \"load_s\": %.4f, \"peak_bytes\": %ju, "
      "\"before_load_bytes\": %ju}\n",
      speed, bench.load_s(), static_cast<uintmax_t>(PeakBytes()),
      static_cast<uintmax_t>(before_load_bytes));
  return 0;
}

}  // namespace
}  // namespace antiphon::engine

int main(int argc, char** argv) { return antiphon::engine::Main(argc, argv); }
