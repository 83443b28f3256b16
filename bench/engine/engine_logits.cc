// The CPU engine's logits of every position of a text; accuracy runs it.
//
//   engine_logits MODEL TOKENS CHUNK [OPTION...]   TOKENS: a file of ids, one a line
//     --instruction-set NAME     "auto" is the best granted
//     --activations fast|float
//     --threads N                2
//     --count N                  of the tokens, from the first; 0: all
//     --out FILE                 float32 [tokens][vocabulary], in this machine's order
//   engine_logits --instruction-sets               the granted ones, best first
//   engine_logits --tokens MODEL TEXT              ids of a text without special tokens
//
// The text is computed in chunks of CHUNK tokens: 512 as a prompt is, 1 as answers are. Prints
// {"vocabulary", "hashes": {"N": XXH3 of the logits of the first N tokens}} with every power of two
// from 32 on and the number of tokens as N.
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "antiphon/v1/model.pb.h"
#include "engine/cpu/cpu_runner.h"
#include "engine/cpu/isa.h"
#include "model/model_file.h"
#include "model/tokenizer.h"

namespace antiphon::engine {
namespace {

constexpr char kUsage[] =
    "usage: engine_logits MODEL TOKENS CHUNK [--instruction-set NAME] [--activations fast|float] "
    "[--threads N] [--count N] [--out FILE]\n"
    "       engine_logits --instruction-sets\n"
    "       engine_logits --tokens MODEL TEXT";

struct Arguments {
  std::string model, tokens, out;
  uint32_t chunk = 0, count = 0;
  CpuRunnerOptions options{.threads = 2};
};

[[noreturn]] void Fail(std::string_view what) {
  std::fprintf(stderr, "%.*s\n", static_cast<int>(what.size()), what.data());
  std::exit(1);
}

[[noreturn]] void FailUsage() {
  std::fprintf(stderr, "%s\n", kUsage);
  std::exit(2);
}

std::string ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) Fail(path + " cannot be read");
  return std::string((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
}

std::unique_ptr<model::ModelFile> OpenModel(const std::string& path) {
  absl::StatusOr<std::unique_ptr<model::ModelFile>> file = model::OpenModelFile(path);
  if (!file.ok()) Fail(file.status().ToString());
  return *std::move(file);
}

Arguments ParseArguments(int argc, char** argv) {
  Arguments args;
  if (argc < 4 || argc % 2 != 0) FailUsage();
  args.model = argv[1];
  args.tokens = argv[2];
  if (!absl::SimpleAtoi(argv[3], &args.chunk) || args.chunk == 0) FailUsage();
  for (int i = 4; i < argc; i += 2) {
    const std::string_view name = argv[i], value = argv[i + 1];
    if (name == "--instruction-set") {
      args.options.instruction_set = value;
    } else if (name == "--activations" && (value == "fast" || value == "float")) {
      args.options.activations = value == "fast" ? Activations::kFast : Activations::kFloat;
    } else if (name == "--threads") {
      if (!absl::SimpleAtoi(argv[i + 1], &args.options.threads)) FailUsage();
    } else if (name == "--count") {
      if (!absl::SimpleAtoi(argv[i + 1], &args.count)) FailUsage();
    } else if (name == "--out") {
      args.out = value;
    } else {
      FailUsage();
    }
  }
  args.options.step_tokens_max = args.chunk;
  return args;
}

std::vector<uint32_t> ReadTokens(const Arguments& args) {
  std::vector<uint32_t> tokens;
  const std::string text = ReadFile(args.tokens);
  for (absl::string_view line : absl::StrSplit(text, '\n', absl::SkipWhitespace())) {
    uint32_t id;
    if (!absl::SimpleAtoi(line, &id)) Fail(args.tokens + " is no list of token ids");
    tokens.push_back(id);
  }
  if (tokens.size() < std::max(args.count, 1u)) Fail(args.tokens + " has too few tokens");
  if (args.count > 0) tokens.resize(args.count);
  return tokens;
}

StepResult RunStep(ModelRunner& runner, const SequenceChunk& chunk) {
  if (const absl::Status status = runner.Submit({{chunk}}); !status.ok()) Fail(status.ToString());
  StepProgress progress;
  while (!progress.finished) progress = runner.Await(progress, absl::Seconds(60));
  absl::StatusOr<StepResult> result = runner.Take();
  if (!result.ok()) Fail(result.status().ToString());
  return *std::move(result);
}

// Takes the logits of one token after the other.
class Ledger {
 public:
  Ledger(const std::string& out, size_t tokens) : tokens_(tokens) {
    XXH3_64bits_reset(state_.get());
    if (out.empty()) return;
    file_.reset(std::fopen(out.c_str(), "wb"));
    if (file_ == nullptr) Fail(out + ": " + std::strerror(errno));
  }

  void Add(absl::Span<const float> row) {
    XXH3_64bits_update(state_.get(), row.data(), row.size() * sizeof(float));
    const size_t n = ++added_;
    if ((n >= 32 && (n & (n - 1)) == 0) || n == tokens_) {
      char text[64];
      std::snprintf(text, sizeof(text), "%s\"%zu\": \"%016jx\"", hashes_.empty() ? "" : ", ", n,
                    static_cast<uintmax_t>(XXH3_64bits_digest(state_.get())));
      hashes_ += text;
    }
    if (file_ != nullptr &&
        std::fwrite(row.data(), sizeof(float), row.size(), file_.get()) != row.size()) {
      Fail(std::string("the logits cannot be written: ") + std::strerror(errno));
    }
  }

  // The last call.
  const std::string& Finish() {
    if (file_ != nullptr && std::fclose(file_.release()) != 0) {
      Fail(std::string("the logits cannot be written: ") + std::strerror(errno));
    }
    return hashes_;
  }

 private:
  struct Free {
    void operator()(XXH3_state_t* state) const { XXH3_freeState(state); }
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  const size_t tokens_;
  size_t added_ = 0;
  std::string hashes_;
  std::unique_ptr<XXH3_state_t, Free> state_{XXH3_createState()};
  std::unique_ptr<std::FILE, Free> file_;
};

int PrintInstructionSets() {
  for (const cpu::Kernels* kernels : cpu::GrantedKernels()) std::printf("%s\n", kernels->name);
  return 0;
}

int PrintTokens(const std::string& path, const std::string& text_path) {
  const std::unique_ptr<model::ModelFile> file = OpenModel(path);
  const auto spec = model::TokenizerSpecOf(*file);
  if (!spec.ok()) Fail(spec.status().ToString());
  const auto tokenizer = model::Tokenizer::Create(*spec);
  if (!tokenizer.ok()) Fail(tokenizer.status().ToString());
  const absl::StatusOr<std::vector<uint32_t>> ids =
      (*tokenizer)->Encode(ReadFile(text_path), {.add_bos = false, .parse_special = false});
  if (!ids.ok()) Fail(text_path + ": " + ids.status().ToString());
  for (uint32_t id : *ids) std::printf("%u\n", id);
  return 0;
}

int PrintLogits(const Arguments& args) {
  const std::vector<uint32_t> tokens = ReadTokens(args);
  const std::unique_ptr<model::ModelFile> file = OpenModel(args.model);
  absl::StatusOr<std::unique_ptr<ModelRunner>> runner = MakeCpuRunner(file.get(), args.options);
  if (!runner.ok()) Fail(runner.status().ToString());

  const KvLayout& layout = (*runner)->layout();
  const size_t block_count = layout.BlocksFor(tokens.size());
  std::vector<std::byte> memory(block_count * layout.payload_bytes());
  std::vector<std::byte*> blocks;
  for (size_t b = 0; b < block_count; ++b) {
    blocks.push_back(memory.data() + b * layout.payload_bytes());
  }
  const size_t vocab = (*runner)->shape().vocab;
  Ledger ledger(args.out, tokens.size());
  for (size_t start = 0; start < tokens.size(); start += args.chunk) {
    SequenceChunk chunk;
    chunk.tokens = absl::MakeConstSpan(tokens).subspan(start, args.chunk);
    chunk.start = static_cast<uint32_t>(start);
    chunk.blocks = blocks;
    chunk.want_logits = true;
    const StepResult result = RunStep(**runner, chunk);
    const absl::Span<const float> logits = result.chunks[0].logits;
    for (size_t at = 0; at < logits.size(); at += vocab) ledger.Add(logits.subspan(at, vocab));
  }
  std::printf("{\"vocabulary\": %zu, \"hashes\": {%s}}\n", vocab, ledger.Finish().c_str());
  return 0;
}

int Main(int argc, char** argv) {
  const std::string_view first = argc > 1 ? argv[1] : "";
  if (argc == 2 && first == "--instruction-sets") return PrintInstructionSets();
  if (argc == 4 && first == "--tokens") return PrintTokens(argv[2], argv[3]);
  return PrintLogits(ParseArguments(argc, argv));
}

}  // namespace
}  // namespace antiphon::engine

int main(int argc, char** argv) { return antiphon::engine::Main(argc, argv); }
