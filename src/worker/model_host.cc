#include "worker/model_host.h"

#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "antiphon/v1/config.pb.h"
#include "common/logging.h"
#include "common/memory.h"
#include "common/status_macros.h"
#include "common/thread.h"
#include "engine/cuda/cuda_runner.h"
#include "model/card.h"

namespace antiphon::worker {
namespace {

// Scratch of a step, tables and the process itself, beside the weights.
constexpr uint64_t kMemoryBeside = 128 << 20;

absl::Status WithPath(const absl::Status& status, const std::string& path) {
  std::string text(status.message());
  if (text.find(path) == std::string::npos) text = absl::StrCat(path, ": ", text);
  return absl::Status(status.code(), absl::StrCat("models[0].path: ", text));
}

double Gib(uint64_t bytes) { return static_cast<double>(bytes) / (1 << 30); }

void ApplyConfig(const config::v1::Config& config, internal::v1::ModelCard& card) {
  const auto& entry = config.models(0);
  for (const std::string& alias : entry.aliases()) card.add_aliases(alias);
  card.set_block_tokens(config.worker().block_tokens());
  const auto& s = entry.sampling();
  auto& sampling = *card.mutable_sampling();
  if (s.has_temperature()) sampling.set_temperature(s.temperature());
  if (s.has_top_p()) sampling.set_top_p(s.top_p());
  if (s.has_top_k()) sampling.set_top_k(s.top_k());
  if (s.has_min_p()) sampling.set_min_p(s.min_p());
  if (s.has_repetition_penalty()) sampling.set_repetition_penalty(s.repetition_penalty());
}

engine::CudaRunnerOptions CudaOptions(const config::v1::Worker& worker) {
  engine::CudaRunnerOptions options;
  options.device = static_cast<int>(worker.cuda_device());
  options.block_tokens = worker.block_tokens();
  options.step_tokens_max = worker.chunk_tokens() + worker.max_sequences();
  options.rows_max = worker.max_sequences();
  options.memory_fraction = worker.gpu_memory_fraction();
  options.threads = static_cast<int>(worker.threads());
  return options;
}

// INVALID_ARGUMENT, FAILED_PRECONDITION: a GPU is demanded and none serves.
absl::StatusOr<bool> UsesCuda(const config::v1::Worker& worker) {
  if (worker.device() == "cpu") return false;
  if (worker.tensor_parallel() > 1) {
    if (worker.device() == "auto") return false;
    return absl::InvalidArgumentError(
        "worker.tensor_parallel: above 1 is for the CPU so far; with worker.device: cuda leave it "
        "at 1");
  }
  if (worker.activations() == "float") {
    if (worker.device() == "auto") return false;
    return absl::InvalidArgumentError(
        "worker.activations: float is for the CPU; with worker.device: cuda leave it at fast");
  }
  std::string description;
  const absl::Status status =
      engine::FindCudaDevice("", static_cast<int>(worker.cuda_device()), &description);
  if (status.ok()) return true;
  if (worker.device() == "cuda") {
    return absl::Status(absl::StatusCode::kFailedPrecondition,
                        absl::StrCat("worker.device is cuda, but ", status.message()));
  }
  LogInfo("serving on the CPU: {}", std::string(status.message()));
  return false;
}

}  // namespace

engine::CpuRunnerOptions RunnerOptions(const config::v1::Worker& worker, bool prefill_role) {
  engine::CpuRunnerOptions options;
  options.block_tokens = worker.block_tokens();
  options.step_tokens_max = worker.chunk_tokens() + worker.max_sequences();
  options.threads = static_cast<int>(worker.threads());
  // A stream that stutters is worse than a first token that comes later.
  if (prefill_role) options.nice = static_cast<int>(worker.prefill_nice());
  options.activations =
      worker.activations() == "float" ? engine::Activations::kFloat : engine::Activations::kFast;
  options.instruction_set = worker.instruction_set();
  return options;
}

absl::StatusOr<std::unique_ptr<model::GgufFile>> OpenModel(const config::v1::Config& config) {
  if (config.models_size() == 0 || config.models(0).path().empty()) {
    return absl::InvalidArgumentError(
        "models is empty; name the file to serve: models: [{path: /path/to/model.gguf}]");
  }
  if (config.models_size() > 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("models has ", config.models_size(), " entries; a cluster serves one model"));
  }
  const std::string& path = config.models(0).path();
  auto file = model::GgufFile::Open(path);
  if (!file.ok()) {
    // Whatever is wrong, it is the file, not the syntax of the configuration.
    const bool data = absl::IsInvalidArgument(file.status());
    const absl::Status status = WithPath(file.status(), path);
    return data ? absl::DataLossError(status.message()) : status;
  }
  if (auto shape = model::LlamaShapeOf(**file); !shape.ok()) return WithPath(shape.status(), path);
  const uint32_t ranks = std::max(config.worker().tensor_parallel(), 1u);
  if (absl::Status even = engine::CheckCpuRanks(**file, ranks); !even.ok()) {
    return WithPath(even, path);
  }
  uint64_t needed = kMemoryBeside * ranks;
  for (const model::Tensor& tensor : (*file)->tensors()) needed += tensor.bytes;
  const uint64_t available = MemoryAvailableBytes();
  if (needed > available) {
    return absl::ResourceExhaustedError(
        fmt::format("models[0].path: {} needs about {:.1f} GiB of memory; {:.1f} GiB can be had "
                    "(the KV store's pool is counted already)",
                    path, Gib(needed), Gib(available)));
  }
  return file;
}

absl::StatusOr<LoadedModel> LoadModel(const model::GgufFile& file, const config::v1::Config& config,
                                      bool prefill_role, const Clock& clock,
                                      const engine::TensorGroup& group,
                                      std::function<void(std::string)> on_progress) {
  LoadedModel loaded;
  const std::string& path = config.models(0).path();
  const std::string name = config.models(0).name().empty()
                               ? std::filesystem::path(path).stem().string()
                               : config.models(0).name();
  on_progress("loading weights 0%");
  const absl::Time begin = clock.Now();
  model::CardParts parts;
  absl::StatusOr<internal::v1::ModelCard> card = absl::UnknownError("not read");
  Thread card_thread("card", [&] { card = model::CardOf(file, name, parts); });
  const auto report = [&on_progress](double done) {
    on_progress(fmt::format("loading weights {}%", static_cast<int>(100 * done)));
  };
  absl::StatusOr<std::unique_ptr<engine::ModelRunner>> runner;
  const absl::StatusOr<bool> cuda = UsesCuda(config.worker());
  if (!cuda.ok()) {
    card_thread.Join();
    return cuda.status();
  }
  if (*cuda) {
    engine::CudaRunnerOptions options = CudaOptions(config.worker());
    options.on_load_progress = report;
    runner = engine::MakeCudaRunner(&file, options);
    if (!runner.ok() && config.worker().device() == "auto") {
      LogWarning("serving on the CPU: the GPU does not serve this model: {}",
                 std::string(runner.status().message()));
    }
  }
  if (!*cuda || (!runner.ok() && config.worker().device() == "auto")) {
    engine::CpuRunnerOptions options = RunnerOptions(config.worker(), prefill_role);
    options.on_load_progress = report;
    options.group = group;
    runner = engine::MakeCpuRunner(&file, options);
  }
  card_thread.Join();
  if (!runner.ok()) return WithPath(runner.status(), path);
  if (!card.ok()) return WithPath(card.status(), path);
  loaded.runner = *std::move(runner);
  loaded.card = *std::move(card);
  // /v1/models' `created`: what is known of the model's age.
  if (struct stat st; stat(path.c_str(), &st) == 0) loaded.card.set_created_unix_s(st.st_mtime);
  ApplyConfig(config, loaded.card);
  const KvLayout& layout = loaded.runner->layout();
  loaded.fingerprint.set_weights_digest(loaded.card.weights_digest());
  loaded.fingerprint.set_kv_dtype(layout.dtype == KvDtype::kBf16 ? "bf16" : "f32");
  loaded.fingerprint.set_rope(loaded.runner->rope_text());
  loaded.fingerprint.set_layout(layout.Text());
  loaded.fingerprint.set_tp_degree(loaded.runner->tp_degree());
  loaded.fingerprint.set_kernel_class(loaded.runner->kernel_class());
  loaded.blobs[loaded.card.tokenizer_digest()] = std::move(parts.tokenizer_blob);
  if (!parts.chat_template_blob.empty()) {
    loaded.blobs[loaded.card.chat_template_digest()] = std::move(parts.chat_template_blob);
  }
  on_progress("measuring speed");
  const absl::Time weights_done = clock.Now();
  ASSIGN_OR_RETURN(loaded.cost, MeasureCost(*loaded.runner, clock));
  LogInfo("{}: weights in {}, speed measured in {}: {:.0f} prompt tokens/s, {:.0f} tokens/s a row",
          name, absl::FormatDuration(weights_done - begin),
          absl::FormatDuration(clock.Now() - weights_done),
          256 / PrefillSeconds(loaded.cost, 256, 0), 1 / StepSeconds(loaded.cost, 1, 256));
  return loaded;
}

}  // namespace antiphon::worker
