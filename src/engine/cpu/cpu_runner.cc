#include "engine/cpu/cpu_runner.h"

#include <algorithm>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "common/logging.h"
#include "common/status_macros.h"
#include "engine/check_step.h"
#include "engine/cpu/forward.h"
#include "engine/cpu/isa.h"
#include "engine/cpu/team.h"
#include "engine/cpu/weights.h"

namespace antiphon::engine {
namespace {

constexpr int kThreadsMax = 512;

class CpuRunner final : public ModelRunner {
 public:
  CpuRunner(std::unique_ptr<cpu::Weights> weights, const cpu::Kernels* kernels,
            const KvLayout& layout, const CpuRunnerOptions& options, int threads)
      : weights_(std::move(weights)),
        layout_(layout),
        activations_(options.activations),
        shape_{.vocab = weights_->shape.vocab,
               .context = weights_->shape.context,
               .step_tokens_max = options.step_tokens_max},
        forward_(weights_.get(), kernels, layout, options.step_tokens_max, threads),
        team_(threads, "engine", options.nice, [this](int thread) { Round(thread); }) {}

  const RunnerShape& shape() const override { return shape_; }
  const KvLayout& layout() const override { return layout_; }

  std::string rope_text() const override {
    const model::LlamaShape& s = weights_->shape;
    return fmt::format("halves dims={} base={} scale={} freqs={}", s.rope_dims, s.rope_base,
                       s.rope_scale, s.has_rope_freqs ? "file" : "none");
  }
  // Every instruction set computes the same bits, so none is named. Before 2, Q5 and K formats were
  // multiplied with float activations.
  std::string kernel_class() const override {
    return activations_ == Activations::kFloat ? "cpu-float-1" : "cpu-int8x32-2";
  }

  absl::Status Submit(Step step) override {
    {
      absl::MutexLock lock(&mutex_);
      if (state_ != State::kIdle) {
        return absl::FailedPreconditionError("a step is running or was not taken");
      }
    }
    RETURN_IF_ERROR(CheckStep(step, shape_, layout_));
    forward_.Prepare(std::move(step));
    {
      absl::MutexLock lock(&mutex_);
      progress_ = {};
      state_ = State::kRunning;
    }
    team_.StartRound();
    return absl::OkStatus();
  }

  StepProgress Progress() const override {
    absl::MutexLock lock(&mutex_);
    return progress_;
  }

  StepProgress Await(StepProgress seen, absl::Duration timeout) override {
    absl::MutexLock lock(&mutex_);
    const auto changed = [&] {
      mutex_.AssertHeld();
      return !(progress_ == seen);
    };
    mutex_.AwaitWithTimeout(absl::Condition(&changed), timeout);
    return progress_;
  }

  absl::StatusOr<StepResult> Take() override {
    absl::MutexLock lock(&mutex_);
    if (state_ != State::kDone) return absl::FailedPreconditionError("no finished step to take");
    state_ = State::kIdle;
    return forward_.TakeResult();
  }

 private:
  enum class State { kIdle, kRunning, kDone };

  void Round(int thread) {
    forward_.Run(team_, thread, [this](uint32_t layers) {
      absl::MutexLock lock(&mutex_);
      progress_.layers_done = layers;
    });
    team_.Barrier();
    if (thread != 0) return;
    absl::MutexLock lock(&mutex_);
    progress_.finished = true;
    state_ = State::kDone;
  }

  const std::unique_ptr<cpu::Weights> weights_;
  const KvLayout layout_;
  const Activations activations_;
  const RunnerShape shape_;
  cpu::Forward forward_;
  mutable absl::Mutex mutex_;
  StepProgress progress_ ABSL_GUARDED_BY(mutex_);
  State state_ ABSL_GUARDED_BY(mutex_) = State::kIdle;
  cpu::Team team_;  // last: its threads use the rest
};

}  // namespace

absl::StatusOr<std::unique_ptr<ModelRunner>> MakeCpuRunner(const model::GgufFile* file,
                                                           const CpuRunnerOptions& options) {
  if (options.step_tokens_max == 0) {
    return absl::InvalidArgumentError("step_tokens_max must be at least 1");
  }
  if (options.threads < 0 || options.threads > kThreadsMax) {
    return absl::InvalidArgumentError(
        fmt::format("threads must be from 0 to {}, not {}", kThreadsMax, options.threads));
  }
  ASSIGN_OR_RETURN(const cpu::Kernels* kernels, cpu::KernelsNamed(options.instruction_set));
  const int threads = options.threads == 0 ? cpu::GrantedCores() : options.threads;
  LogInfo("CPU engine: {} kernels, {} threads", kernels->name, threads);
  if (const std::string notice = cpu::SlowKernelsNotice(*kernels);
      !notice.empty() && options.instruction_set == "auto") {
    LogWarning("{}", notice);
  }
  ASSIGN_OR_RETURN(std::unique_ptr<cpu::Weights> weights,
                   cpu::LoadWeights(*file, options.activations, threads, options.on_load_progress));
  const model::LlamaShape& shape = weights->shape;
  KvLayout layout;
  layout.block_tokens = options.block_tokens;
  layout.layers = shape.layers;
  layout.kv_heads = shape.kv_heads;
  layout.head_dim = shape.head_dim;
  layout.dtype = options.activations == Activations::kFloat ? KvDtype::kF32 : KvDtype::kBf16;
  RETURN_IF_ERROR(layout.Validate());
  return std::unique_ptr<ModelRunner>(
      new CpuRunner(std::move(weights), kernels, layout, options, threads));
}

}  // namespace antiphon::engine
