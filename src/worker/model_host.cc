#include "worker/model_host.h"

#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <optional>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "antiphon/v1/config.pb.h"
#include "common/daemon.h"
#include "common/logging.h"
#include "common/memory.h"
#include "common/status_macros.h"
#include "common/thread.h"
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

}  // namespace

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

absl::StatusOr<bool> UsesCuda(const config::v1::Worker& worker) {
  if (worker.device() == "cpu") return false;
  if (worker.activations() == "float") {
    if (worker.device() == "auto") return false;
    return absl::InvalidArgumentError(
        "worker.activations: float is for the CPU; with worker.device: cuda leave it at fast");
  }
  std::string description;
  absl::Status status =
      engine::FindCudaDevice("", static_cast<int>(worker.cuda_device()), &description);
  // Ranks that share a GPU are slower than one rank: only who demands it gets that.
  if (const uint32_t ranks = worker.tensor_parallel();
      status.ok() && ranks > 1 && worker.device() == "auto") {
    status = engine::FindCudaDevice("", static_cast<int>(worker.cuda_device() + ranks - 1),
                                    &description);
  }
  if (status.ok()) return true;
  if (worker.device() == "cuda") {
    return absl::Status(absl::StatusCode::kFailedPrecondition,
                        absl::StrCat("worker.device is cuda, but ", status.message()));
  }
  LogInfo("serving on the CPU: {}", std::string(status.message()));
  return false;
}

namespace {

bool IsDigest(std::string_view text) {
  return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == text.npos;
}

// With the digests that another worker of this host found, if one did.
absl::StatusOr<internal::v1::ModelCard> CardOf(const model::ModelFile& file,
                                               const std::string& name, model::CardParts& parts,
                                               HostBlobs* blobs) {
  if (blobs == nullptr) return model::CardOf(file, name, parts);
  model::KnownDigests known;
  const auto valid = [&](const std::string& text) {
    known.weights = text.substr(0, text.find(' '));
    known.tokenizer = text.substr(std::min(known.weights.size() + 1, text.size()));
    return IsDigest(known.weights) && IsDigest(known.tokenizer);
  };
  std::optional<internal::v1::ModelCard> computed;
  const auto compute = [&]() -> absl::StatusOr<std::string> {
    ASSIGN_OR_RETURN(computed, model::CardOf(file, name, parts));
    return absl::StrCat(computed->weights_digest(), " ", computed->tokenizer_digest());
  };
  RETURN_IF_ERROR(blobs->Recall("digests", valid, compute).status());
  if (computed.has_value()) return *std::move(computed);
  return model::CardOf(file, name, parts, &known);
}

// Measured by whichever worker comes first, while the others leave it alone. The role is no part of
// the name: threads that stand back are as fast when nobody else runs.
absl::StatusOr<internal::v1::CostModel> CostOf(engine::ModelRunner& runner, const Clock& clock,
                                               HostBlobs* blobs) {
  const std::string speed = runner.speed_class();
  if (blobs == nullptr || speed.empty()) return MeasureCost(runner, clock);
  const std::string name =
      fmt::format("cost {} {} {} steps of {}, {} ranks", runner.kernel_class(), speed,
                  runner.layout().Text(), runner.shape().step_tokens_max, runner.tp_degree());
  internal::v1::CostModel cost;
  const auto valid = [&](const std::string& text) {
    return cost.ParseFromString(text) && IsPlausible(cost);
  };
  ASSIGN_OR_RETURN(const std::string text,
                   blobs->Recall(name, valid, [&]() -> absl::StatusOr<std::string> {
                     ASSIGN_OR_RETURN(const auto measured, MeasureCost(runner, clock));
                     return measured.SerializeAsString();
                   }));
  cost.ParseFromString(text);
  return cost;
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

std::string StoreSocket(const config::v1::Config& config) {
  return RuntimeDir(config) + "/kvstore.sock";
}

absl::StatusOr<std::unique_ptr<model::ModelFile>> OpenModel(const config::v1::Config& config) {
  if (config.models_size() == 0 || config.models(0).path().empty()) {
    return absl::InvalidArgumentError(
        "models is empty; name the file or folder to serve: models: [{path: /path/to/model.gguf}]");
  }
  if (config.models_size() > 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("models has ", config.models_size(), " entries; a cluster serves one model"));
  }
  const std::string& path = config.models(0).path();
  auto file = model::OpenModelFile(path);
  if (!file.ok()) {
    // Whatever is wrong, it is the model, not the syntax of the configuration.
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
  // Whether so much can be had now shows when it is known whether another worker has it already.
  const uint64_t limit = MemoryLimitBytes();
  if (needed > limit) {
    return absl::ResourceExhaustedError(
        fmt::format("models[0].path: {} needs about {:.1f} GiB of memory; there are {:.1f} GiB "
                    "(machine and cgroup limits)",
                    path, Gib(needed), Gib(limit)));
  }
  return file;
}

absl::StatusOr<LoadedModel> LoadModel(const model::ModelFile& file,
                                      const config::v1::Config& config, bool prefill_role,
                                      const Clock& clock, const engine::TensorGroup& group,
                                      HostBlobs* blobs,
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
  Thread card_thread("card", [&] { card = CardOf(file, name, parts, blobs); });
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
    options.group = group;
    runner = engine::MakeCudaRunner(&file, options);
  }
  // Ranks of a group have gone the same way, and end with it.
  const bool falls_back =
      *cuda && !runner.ok() && config.worker().device() == "auto" && group.comm == nullptr;
  if (falls_back) {
    LogWarning("serving on the CPU: the GPU does not serve this model: {}",
               std::string(runner.status().message()));
  }
  if (!*cuda || falls_back) {
    engine::CpuRunnerOptions options = RunnerOptions(config.worker(), prefill_role);
    options.on_load_progress = report;
    options.group = group;
    options.images = blobs;
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
  ASSIGN_OR_RETURN(loaded.cost, CostOf(*loaded.runner, clock, blobs));
  LogInfo("{}: weights in {}, speed known in {}: {:.0f} prompt tokens/s, {:.0f} tokens/s a row",
          name, absl::FormatDuration(weights_done - begin),
          absl::FormatDuration(clock.Now() - weights_done),
          256 / PrefillSeconds(loaded.cost, 256, 0), 1 / StepSeconds(loaded.cost, 1, 256));
  // What was read on the way is not needed again.
  file.DropPages();
  return loaded;
}

}  // namespace antiphon::worker
