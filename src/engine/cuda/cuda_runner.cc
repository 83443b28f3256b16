#include "engine/cuda/cuda_runner.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "common/logging.h"
#include "common/status_macros.h"
#include "common/thread.h"
#include "engine/check_step.h"
#include "engine/cpu/dequantize.h"
#include "engine/cpu/team.h"
#include "engine/cpu/weights.h"
#include "engine/cuda/arithmetic.h"
#include "engine/cuda/draw_request.h"
#include "engine/cuda/module.h"
#include "model/card.h"

namespace antiphon::engine {
namespace {

using cuda::Module;
using cuda::ModuleError;
using cuda::Weight;

constexpr char kFile[] = "libantiphon_cuda.so";
constexpr int kDrawThreadsMax = 8;
// A step is polled without a pause for so long, then every kPause.
constexpr int kEagerPolls = 4000;
constexpr absl::Duration kPause = absl::Microseconds(50);

absl::Status ToStatus(const ModuleError& error) {
  if (error.code == 0) return absl::OkStatus();
  return absl::Status(static_cast<absl::StatusCode>(error.code), error.message);
}

std::vector<std::string> ModulePlaces(const std::string& configured) {
  if (!configured.empty()) return {configured};
  std::error_code ignored;
  const auto bin = std::filesystem::read_symlink("/proc/self/exe", ignored).parent_path();
  std::vector<std::string> places;
  for (const char* place :
       {".", "../lib", "../lib/antiphon", "../lib64/antiphon", "../lib/x86_64-linux-gnu/antiphon",
        "../lib/aarch64-linux-gnu/antiphon"}) {
    places.push_back((bin / place / kFile).lexically_normal().string());
  }
  return places;
}

// Stays loaded for the process's life: CUDA does not like to be unloaded.
absl::StatusOr<const Module*> LoadModule(const std::string& configured) {
  std::string tried;
  for (const std::string& place : ModulePlaces(configured)) {
    if (!std::filesystem::exists(place)) {
      absl::StrAppend(&tried, tried.empty() ? "" : ", ", place);
      continue;
    }
    void* library = dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      return absl::FailedPreconditionError(
          absl::StrCat("the CUDA module does not load: ", dlerror()));
    }
    const auto entry = reinterpret_cast<cuda::ModuleEntry>(dlsym(library, cuda::kModuleEntry));
    const Module* module = entry == nullptr ? nullptr : entry();
    if (module == nullptr || module->abi != cuda::kModuleAbi) {
      return absl::FailedPreconditionError(absl::StrCat(
          place, " belongs to another version of antiphon; install both from one build"));
    }
    return module;
  }
  return absl::NotFoundError(absl::StrCat("there is no CUDA module (looked for ", tried, ")"));
}

// Asked ahead of the module, which would say the same: it and cuBLASLt take a quarter of a second
// and 80 MiB of a process's own.
bool DriverIsThere() {
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (driver == nullptr) return false;
  dlclose(driver);
  return true;
}

struct Device {
  uint64_t memory_bytes = 0;
  std::string text;
};
absl::StatusOr<Device> Describe(const Module& module, int device) {
  ModuleError error;
  const int count = module.device_count(&error);
  if (error.code != 0 || count == 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("no CUDA device: ", error.code == 0 ? "the driver has none" : error.message));
  }
  if (device < 0 || device >= count) {
    return absl::FailedPreconditionError(absl::StrCat(
        "CUDA device ", device, " does not exist; there are ", count, ", numbered from 0"));
  }
  cuda::DeviceDescription d;
  module.describe_device(device, &d, &error);
  RETURN_IF_ERROR(ToStatus(error));
  if (d.compute_major < 8) {
    return absl::FailedPreconditionError(
        fmt::format("CUDA device {} ({}) has compute capability {}.{}; 8.0 or newer is needed",
                    device, d.name, d.compute_major, d.compute_minor));
  }
  return Device{d.memory_bytes, fmt::format("{} (compute {}.{}, {:.1f} of {:.1f} GiB free)", d.name,
                                            d.compute_major, d.compute_minor,
                                            static_cast<double>(d.memory_free_bytes) / (1 << 30),
                                            static_cast<double>(d.memory_bytes) / (1 << 30))};
}

// Rows of the file's tensors as bf16.
class Source {
 public:
  Source(const cpu::Weights& weights, int threads) : weights_(weights), threads_(threads) {}

  cuda::WeightSource Face() {
    cuda::WeightSource face;
    face.context = this;
    face.matrix = [](void* context, Weight weight, uint32_t layer, uint64_t first, uint64_t rows,
                     uint16_t* out) {
      static_cast<Source*>(context)->Fill(weight, layer, first, rows, out);
      return 0;
    };
    face.vector = [](void* context, Weight weight, uint32_t layer, float* out) {
      static_cast<Source*>(context)->Vector(weight, layer, out);
      return 0;
    };
    return face;
  }

 private:
  // Matrices that the engine has as one.
  std::vector<const cpu::Matrix*> Parts(Weight weight, uint32_t layer) const {
    const cpu::LayerWeights& l = weights_.layers[layer];
    switch (weight) {
      case Weight::kQkv:
        return {&l.q, &l.k, &l.v};
      case Weight::kAttentionOutput:
        return {&l.attention_output};
      case Weight::kGateUp:
        return {&l.gate, &l.up};
      case Weight::kDown:
        return {&l.down};
      default:
        return {&weights_.output};
    }
  }

  void Fill(Weight weight, uint32_t layer, uint64_t first, uint64_t rows, uint16_t* out) const {
    const uint64_t threads = std::min<uint64_t>(static_cast<uint64_t>(threads_), rows);
    std::vector<Thread> others;
    const auto part = [&](uint64_t i) {
      FillRows(weight, layer, first + rows * i / threads, first + rows * (i + 1) / threads, first,
               out);
    };
    for (uint64_t i = 1; i < threads; ++i) others.emplace_back("weights", [&part, i] { part(i); });
    part(0);
  }

  void FillRows(Weight weight, uint32_t layer, uint64_t begin, uint64_t end, uint64_t first,
                uint16_t* out) const {
    std::vector<float> values;
    uint64_t base = 0;
    const auto row_of = [&](const model::Tensor& tensor, uint64_t row, uint64_t columns,
                            uint16_t* to) {
      const model::TypeTraits traits = model::TraitsOf(tensor.type);
      const std::byte* from =
          tensor.data + row * (columns / traits.block_elements * traits.block_bytes);
      if (tensor.type == model::TensorType::kBF16) {
        std::memcpy(to, from, columns * 2);
        return;
      }
      values.resize(columns);
      cpu::Dequantize(tensor.type, from, columns, values.data());
      for (uint64_t i = 0; i < columns; ++i) to[i] = cuda::ToBf16(values[i]);
    };
    if (weight == Weight::kEmbedding) {
      const uint64_t columns = weights_.shape.hidden;
      for (uint64_t row = begin; row < end; ++row) {
        row_of(*weights_.embedding, row, columns, out + (row - first) * columns);
      }
      return;
    }
    for (const cpu::Matrix* matrix : Parts(weight, layer)) {
      for (uint64_t row = std::max(begin, base); row < std::min(end, base + matrix->rows); ++row) {
        row_of(*matrix->tensor, matrix->SourceRow(static_cast<uint32_t>(row - base)),
               matrix->columns, out + (row - first) * matrix->columns);
      }
      base += matrix->rows;
    }
  }

  void Vector(Weight weight, uint32_t layer, float* out) const {
    const model::LlamaShape& s = weights_.shape;
    const auto copy = [&out](const std::vector<float>& from, size_t size) {
      if (from.empty()) {
        std::fill(out, out + size, 0.0f);
      } else {
        std::copy(from.begin(), from.begin() + static_cast<ptrdiff_t>(size), out);
      }
      out += size;
    };
    switch (weight) {
      case Weight::kAttentionNorm:
        return copy(weights_.layers[layer].attention_norm, s.hidden);
      case Weight::kFeedForwardNorm:
        return copy(weights_.layers[layer].feed_forward_norm, s.hidden);
      case Weight::kOutputNorm:
        return copy(weights_.output_norm, s.hidden);
      case Weight::kQkvBias:
        copy(weights_.layers[layer].q_bias, size_t{s.heads} * s.head_dim);
        copy(weights_.layers[layer].k_bias, size_t{s.kv_heads} * s.head_dim);
        return copy(weights_.layers[layer].v_bias, size_t{s.kv_heads} * s.head_dim);
      default:
        return copy(weights_.rope_frequencies, weights_.rope_frequencies.size());
    }
  }

  const cpu::Weights& weights_;
  const int threads_;
};

class CudaRunner final : public ModelRunner {
 public:
  CudaRunner(const Module* module, cuda::Engine* engine, const RunnerShape& shape,
             const KvLayout& layout, std::string rope, int threads)
      : module_(module),
        engine_(engine),
        shape_(shape),
        layout_(layout),
        rope_(std::move(rope)),
        draw_requests_(shape.vocab),
        samplers_(static_cast<size_t>(threads)),
        team_(threads, "draw", 0, [this](int thread) { Draw(thread); }) {}
  ~CudaRunner() override { module_->destroy(engine_); }

  const RunnerShape& shape() const override { return shape_; }
  const KvLayout& layout() const override { return layout_; }
  std::string rope_text() const override { return rope_; }
  // Sums of products are ordered by shape and batch: equal workers agree up to rounding.
  std::string kernel_class() const override { return "cuda-bf16-1"; }

  absl::Status UsePool(const PoolMemory& pool) override {
    if (state_ != State::kIdle) {
      return absl::FailedPreconditionError("a step is running or was not taken");
    }
    if (pinned_ != nullptr) module_->unregister_memory(engine_, pinned_);
    pinned_ = nullptr;
    if (pool.base == nullptr) return absl::OkStatus();
    ModuleError error;
    module_->register_memory(engine_, pool.base, pool.bytes, &error);
    if (error.code != 0) {
      LogWarning("the pool cannot be pinned, copies to and from it are slow: {}",
                 std::string(error.message));
      return absl::OkStatus();
    }
    pinned_ = pool.base;
    return absl::OkStatus();
  }
  absl::Status Health() const override {
    absl::MutexLock lock(&mutex_);
    return health_;
  }

  absl::Status Submit(Step step) override {
    if (state_ != State::kIdle) {
      return absl::FailedPreconditionError("a step is running or was not taken");
    }
    RETURN_IF_ERROR(CheckStep(step, shape_, layout_));
    views_.clear();
    draws_.clear();
    edits_.clear();
    draws_.reserve(step.chunks.size());
    for (const SequenceChunk& chunk : step.chunks) {
      views_.push_back({.sequence = chunk.sequence,
                        .tokens = chunk.tokens.data(),
                        .token_count = static_cast<uint32_t>(chunk.tokens.size()),
                        .start = chunk.start,
                        .blocks = chunk.blocks.data(),
                        .output = OutputOf(chunk),
                        .checksums = chunk.checksums.empty() ? nullptr : chunk.checksums.data()});
      if (views_.back().output != cuda::Output::kDraw) continue;
      draws_.push_back(draw_requests_.Make(*chunk.sample, &edits_));
      views_.back().draw = &draws_.back();
    }
    const cuda::LogitEdit* edits = edits_.data();
    for (cuda::Draw& draw : draws_) {
      draw.edits = edits;
      edits += draw.edit_count;
    }
    ModuleError error;
    module_->submit(engine_, views_.data(), views_.size(), &error);
    RETURN_IF_ERROR(Noted(ToStatus(error)));
    step_ = std::move(step);
    state_ = State::kRunning;
    absl::MutexLock lock(&mutex_);
    progress_ = {};
    return absl::OkStatus();
  }

  StepProgress Progress() const override {
    absl::MutexLock lock(&mutex_);
    return progress_;
  }

  StepProgress Await(StepProgress seen, absl::Duration timeout) override {
    int64_t pauses = timeout / kPause;
    for (int polls = 0;; ++polls) {
      StepProgress now = Poll();
      if (!(now == seen) || interrupted_.exchange(false)) return now;
      if (polls < kEagerPolls) continue;
      if (--pauses < 0) return now;
      absl::MutexLock lock(&mutex_);
      const bool never = false;
      mutex_.AwaitWithTimeout(absl::Condition(&never), kPause);
    }
  }

  void Interrupt() override { interrupted_ = true; }

  absl::StatusOr<StepResult> Take() override {
    if (state_ != State::kDone) return absl::FailedPreconditionError("no finished step to take");
    state_ = State::kIdle;
    outputs_.assign(views_.size(), {});
    ModuleError error;
    module_->take(engine_, outputs_.data(), &error);
    RETURN_IF_ERROR(Noted(ToStatus(error)));
    result_.chunks.clear();
    result_.chunks.resize(views_.size());
    draws_here_.clear();
    for (size_t i = 0; i < views_.size(); ++i) {
      const SequenceChunk& chunk = step_.chunks[i];
      ChunkResult& out = result_.chunks[i];
      out.sequence = chunk.sequence;
      const size_t rows = views_[i].output == cuda::Output::kAllLogits ? chunk.tokens.size() : 0;
      if (chunk.want_logits) {
        out.logits.assign(outputs_[i].logits, outputs_[i].logits + rows * shape_.vocab);
      }
      if (!chunk.sample.has_value()) continue;
      // Logits are there for all that the device did not draw, or left undecided.
      if (outputs_[i].logits == nullptr) {
        out.sampled = SampledToken{.id = outputs_[i].token};
      } else {
        draws_here_.push_back(i);
      }
    }
    if (draws_here_.size() > 1 && team_.size() > 1) {
      {
        absl::MutexLock lock(&mutex_);
        drawing_ = true;
      }
      team_.StartRound();
      absl::MutexLock lock(&mutex_);
      const auto drawn = [this] {
        mutex_.AssertHeld();
        return !drawing_;
      };
      mutex_.Await(absl::Condition(&drawn));
    } else {
      for (size_t i : draws_here_) DrawOne(0, i);
    }
    return std::move(result_);
  }

 private:
  enum class State { kIdle, kRunning, kDone };

  static cuda::Output OutputOf(const SequenceChunk& chunk) {
    if (chunk.want_logits) return cuda::Output::kAllLogits;
    if (!chunk.sample.has_value()) return cuda::Output::kNone;
    if (IsPlainGreedy(*chunk.sample)) return cuda::Output::kGreedy;
    return cuda::DeviceDraws(*chunk.sample) ? cuda::Output::kDraw : cuda::Output::kLogits;
  }

  absl::Status Noted(absl::Status status) {
    if (absl::IsUnavailable(status)) {
      absl::MutexLock lock(&mutex_);
      health_ = status;
    }
    return status;
  }

  StepProgress Poll() {
    if (state_ != State::kRunning) return Progress();
    const cuda::EngineProgress now = module_->poll(engine_);
    if (now.finished) state_ = State::kDone;
    absl::MutexLock lock(&mutex_);
    progress_ = {.layers_done = now.layers_done, .finished = now.finished};
    return progress_;
  }

  void Draw(int thread) {
    team_.ForEach(static_cast<int>(draws_here_.size()), 1, [&](int begin, int) {
      DrawOne(thread, draws_here_[static_cast<size_t>(begin)]);
    });
    if (thread != 0) return;
    absl::MutexLock lock(&mutex_);
    drawing_ = false;
  }

  void DrawOne(int thread, size_t i) {
    const size_t rows =
        views_[i].output == cuda::Output::kAllLogits ? step_.chunks[i].tokens.size() : 1;
    // The logits lie in memory that the next step overwrites: they may be changed.
    float* logits = const_cast<float*>(outputs_[i].logits) + (rows - 1) * shape_.vocab;
    result_.chunks[i].sampled = samplers_[static_cast<size_t>(thread)].Sample(
        absl::MakeSpan(logits, shape_.vocab), *step_.chunks[i].sample);
  }

  const Module* const module_;
  cuda::Engine* const engine_;
  const RunnerShape shape_;
  const KvLayout layout_;
  const std::string rope_;

  State state_ = State::kIdle;
  std::byte* pinned_ = nullptr;  // the pool
  Step step_;
  std::vector<cuda::ChunkView> views_;
  std::vector<cuda::ChunkOutput> outputs_;
  StepResult result_;
  cuda::DrawRequests draw_requests_;
  std::vector<cuda::Draw> draws_;
  std::vector<cuda::LogitEdit> edits_;
  std::vector<size_t> draws_here_;  // chunks whose tokens the host draws
  std::vector<Sampler> samplers_;
  std::atomic<bool> interrupted_ = false;

  mutable absl::Mutex mutex_;
  StepProgress progress_ ABSL_GUARDED_BY(mutex_);
  absl::Status health_ ABSL_GUARDED_BY(mutex_);
  bool drawing_ ABSL_GUARDED_BY(mutex_) = false;
  cpu::Team team_;  // last: its threads use the rest
};

}  // namespace

absl::Status FindCudaDevice(const std::string& module_path, int device, std::string* description) {
  if (module_path.empty() && !DriverIsThere()) {
    return absl::FailedPreconditionError("no CUDA device: there is no NVIDIA driver");
  }
  ASSIGN_OR_RETURN(const Module* module, LoadModule(module_path));
  ASSIGN_OR_RETURN(Device found, Describe(*module, device));
  *description = std::move(found.text);
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<ModelRunner>> MakeCudaRunner(const model::ModelFile* file,
                                                            const CudaRunnerOptions& options) {
  ASSIGN_OR_RETURN(const Module* module, LoadModule(options.module_path));
  ASSIGN_OR_RETURN(const Device device, Describe(*module, options.device));
  LogInfo("CUDA engine: device {}, {}", options.device, device.text);
  ASSIGN_OR_RETURN(const std::unique_ptr<cpu::Weights> weights,
                   cpu::FindWeights(*file, Activations::kFloat));
  const model::LlamaShape& s = weights->shape;
  KvLayout layout;
  layout.block_tokens = options.block_tokens;
  layout.layers = s.layers;
  layout.kv_heads = s.kv_heads;
  layout.head_dim = s.head_dim;
  layout.dtype = KvDtype::kBf16;
  RETURN_IF_ERROR(layout.Validate());
  cuda::EngineConfig config;
  config.device = options.device;
  config.layers = s.layers;
  config.hidden = s.hidden;
  config.feed_forward = s.feed_forward;
  config.heads = s.heads;
  config.kv_heads = s.kv_heads;
  config.head_dim = s.head_dim;
  config.vocab = s.vocab;
  config.context = s.context;
  config.rope_dims = s.rope_dims;
  config.rms_eps = s.rms_eps;
  config.tied_output = s.tied_output;
  config.qkv_bias = !weights->layers[0].q_bias.empty();
  config.block_tokens = options.block_tokens;
  config.layer_bytes = layout.layer_bytes();
  config.step_tokens_max = options.step_tokens_max;
  config.rows_max = std::min(options.rows_max, options.step_tokens_max);
  config.memory_bytes =
      static_cast<uint64_t>(options.memory_fraction * static_cast<double>(device.memory_bytes));
  const int threads = options.threads == 0 ? cpu::GrantedCores() : options.threads;
  Source source(*weights, threads);
  auto progress = options.on_load_progress;
  ModuleError error;
  cuda::Engine* engine = module->create(
      config, source.Face(),
      [](void* context, double done) {
        const auto& report = *static_cast<std::function<void(double)>*>(context);
        if (report) report(done);
      },
      &progress, &error);
  if (engine == nullptr) return ToStatus(error);
  LogInfo("CUDA engine: {} KV pages of {} tokens on the device", module->pages_total(engine),
          options.block_tokens);
  const RunnerShape shape = {.vocab = s.vocab,
                             .context = s.context,
                             .step_tokens_max = options.step_tokens_max,
                             .copies_blocks = true,
                             .makes_checksums = true};
  return std::unique_ptr<ModelRunner>(
      new CudaRunner(module, engine, shape, layout,
                     fmt::format("halves dims={} base={} scale={} freqs={}", s.rope_dims,
                                 s.rope_base, s.rope_scale, s.has_rope_freqs ? "file" : "none"),
                     std::min(threads, kDrawThreadsMax)));
}

}  // namespace antiphon::engine
