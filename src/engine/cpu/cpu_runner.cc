#include "engine/cpu/cpu_runner.h"

#include <algorithm>
#include <optional>
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

// A model loaded, or one rank's shard of it.
struct Loaded {
  std::unique_ptr<cpu::Weights> weights;
  const cpu::Kernels* kernels = nullptr;
  KvLayout layout;  // the whole model's
  int threads = 0;
};

std::string RopeText(const model::LlamaShape& s) {
  return fmt::format("halves dims={} base={} scale={} freqs={}", s.rope_dims, s.rope_base,
                     s.rope_scale, s.has_rope_freqs ? "file" : "none");
}

// Every instruction set computes the same bits, so none is named. Before 2, Q5 and K formats were
// multiplied with float activations; before 3, attention did not round queries and weights to bf16;
// before 4, activations at 16 bits were two rows of 8, whose products were rounded apart.
std::string KernelClass(Activations activations) {
  return activations == Activations::kFloat ? "cpu-float-1" : "cpu-int8x32-4";
}

// What ranks must agree on.
std::string ModelText(const Loaded& loaded, const CpuRunnerOptions& options) {
  const model::LlamaShape& s = loaded.weights->shape;
  return fmt::format("{} {} {} vocab={} hidden={} feed_forward={} heads={} step_tokens={}",
                     loaded.layout.Text(), RopeText(s), KernelClass(options.activations), s.vocab,
                     s.hidden, s.feed_forward, s.heads, options.step_tokens_max);
}

class CpuRunner final : public ModelRunner {
 public:
  CpuRunner(Loaded loaded, const CpuRunnerOptions& options)
      : weights_(std::move(loaded.weights)),
        layout_(loaded.layout),
        activations_(options.activations),
        group_(options.group),
        shape_{.vocab = weights_->shape.vocab,
               .context = weights_->shape.context,
               .step_tokens_max = options.step_tokens_max,
               .makes_checksums = options.group.comm == nullptr},
        forward_(weights_.get(), loaded.kernels, layout_, options.step_tokens_max, loaded.threads,
                 group_.comm, group_.timeout),
        speed_class_(fmt::format("{} on {} threads", loaded.kernels->name, loaded.threads)),
        team_(loaded.threads, "engine", options.nice, [this](int thread) { Round(thread); }) {
    if (group_.comm != nullptr) leader_.emplace(group_, layout_);
  }

  ~CpuRunner() override {
    {
      absl::MutexLock lock(&mutex_);
      const auto ended = [this] {
        mutex_.AssertHeld();
        return state_ != State::kRunning;
      };
      mutex_.Await(absl::Condition(&ended));
    }
    if (leader_.has_value()) leader_->End();
  }

  absl::Status AwaitRanks(const std::string& model) {
    return leader_.has_value() ? leader_->Begin(model) : absl::OkStatus();
  }

  const RunnerShape& shape() const override { return shape_; }
  const KvLayout& layout() const override { return layout_; }

  std::string rope_text() const override { return RopeText(weights_->shape); }
  std::string kernel_class() const override { return KernelClass(activations_); }
  std::string speed_class() const override { return speed_class_; }
  uint32_t tp_degree() const override { return weights_->shard.size; }

  absl::Status UsePool(const PoolMemory& pool) override {
    if (!leader_.has_value()) return absl::OkStatus();
    {
      absl::MutexLock lock(&mutex_);
      if (state_ != State::kIdle) {
        return absl::FailedPreconditionError("a step is running or was not taken");
      }
    }
    pool_status_ = leader_->UsePool(pool);
    return pool_status_;
  }

  void ReleaseScratch() override {
    {
      absl::MutexLock lock(&mutex_);
      if (state_ != State::kIdle) return;
    }
    forward_.ReleaseScratch();
  }

  absl::Status Submit(Step step) override {
    {
      absl::MutexLock lock(&mutex_);
      if (state_ != State::kIdle) {
        return absl::FailedPreconditionError("a step is running or was not taken");
      }
    }
    RETURN_IF_ERROR(forward_.status());
    RETURN_IF_ERROR(pool_status_);
    RETURN_IF_ERROR(CheckStep(step, shape_, layout_));
    if (leader_.has_value()) RETURN_IF_ERROR(leader_->Encode(step));
    reports_layers_ = step.report_layers;
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
      return interrupted_ || !(progress_ == seen);
    };
    mutex_.AwaitWithTimeout(absl::Condition(&changed), timeout);
    interrupted_ = false;
    return progress_;
  }

  void Interrupt() override {
    absl::MutexLock lock(&mutex_);
    interrupted_ = true;
  }

  absl::StatusOr<StepResult> Take() override {
    absl::MutexLock lock(&mutex_);
    if (state_ != State::kDone) return absl::FailedPreconditionError("no finished step to take");
    state_ = State::kIdle;
    RETURN_IF_ERROR(forward_.status());
    return forward_.TakeResult();
  }

 private:
  enum class State { kIdle, kRunning, kDone };

  void Round(int thread) {
    // The others wait for thread 0 at the end of the first phase.
    if (thread == 0 && leader_.has_value()) {
      if (absl::Status sent = leader_->Send(); !sent.ok()) forward_.Fail(std::move(sent));
    }
    forward_.Run(team_, thread, [this](uint32_t layers) {
      if (!reports_layers_) return;
      absl::MutexLock lock(&mutex_);
      progress_.layers_done = std::max(progress_.layers_done, layers);
    });
    team_.Barrier();
    if (thread != 0) return;
    // A rank that is only slow would still write to blocks that are about to be given back.
    if (!forward_.status().ok() && group_.fence) group_.fence();
    absl::MutexLock lock(&mutex_);
    progress_.finished = true;
    state_ = State::kDone;
  }

  const std::unique_ptr<cpu::Weights> weights_;
  const KvLayout layout_;
  const Activations activations_;
  const TensorGroup group_;
  std::optional<GroupLeader> leader_;
  absl::Status pool_status_;
  bool reports_layers_ = true;  // of the step at hand
  const RunnerShape shape_;
  cpu::Forward forward_;
  mutable absl::Mutex mutex_;
  StepProgress progress_ ABSL_GUARDED_BY(mutex_);
  State state_ ABSL_GUARDED_BY(mutex_) = State::kIdle;
  bool interrupted_ ABSL_GUARDED_BY(mutex_) = false;
  const std::string speed_class_;
  cpu::Team team_;  // last: its threads use the rest
};

}  // namespace

namespace {

// Rounding keys and values to bf16 is lost in the noise of quantised products; of F16 and F32
// weights it would be nearly all the error that there is (bench/RESULTS.md, Accuracy).
bool NeedsFloatCache(const cpu::Weights& weights, Activations activations) {
  if (activations == Activations::kFloat) return true;
  for (const cpu::LayerWeights& w : weights.layers) {
    for (const cpu::Matrix* m : {&w.q, &w.k, &w.v, &w.attention_output, &w.gate, &w.up, &w.down}) {
      if (m->packed != cpu::PackedType::kF16 && m->packed != cpu::PackedType::kF32) return false;
    }
  }
  return true;
}

absl::StatusOr<Loaded> Load(const model::ModelFile* file, const CpuRunnerOptions& options) {
  if (options.step_tokens_max == 0) {
    return absl::InvalidArgumentError("step_tokens_max must be at least 1");
  }
  if (options.threads < 0 || options.threads > kThreadsMax) {
    return absl::InvalidArgumentError(
        fmt::format("threads must be from 0 to {}, not {}", kThreadsMax, options.threads));
  }
  const Comm* comm = options.group.comm;
  cpu::Shard shard;
  if (comm != nullptr) {
    shard = {.rank = static_cast<uint32_t>(comm->rank()),
             .size = static_cast<uint32_t>(comm->size())};
  }
  Loaded loaded;
  ASSIGN_OR_RETURN(loaded.kernels, cpu::KernelsNamed(options.instruction_set));
  // Ranks of one host share its cores.
  loaded.threads = options.threads != 0
                       ? options.threads
                       : std::max(1, cpu::GrantedCores() / static_cast<int>(shard.size));
  LogInfo("CPU engine: {} kernels, {} threads{}", loaded.kernels->name, loaded.threads,
          shard.size > 1 ? fmt::format(", rank {} of {}", shard.rank, shard.size) : "");
  if (const std::string notice = cpu::SlowKernelsNotice(*loaded.kernels);
      !notice.empty() && options.instruction_set == "auto") {
    LogWarning("{}", notice);
  }
  ASSIGN_OR_RETURN(loaded.weights,
                   cpu::LoadWeights(*file, options.activations, loaded.threads,
                                    options.on_load_progress, shard, options.images));
  const model::LlamaShape& shape = loaded.weights->shape;
  KvLayout& layout = loaded.layout;
  layout.block_tokens = options.block_tokens;
  layout.layers = shape.layers;
  layout.kv_heads = shape.kv_heads * shard.size;
  layout.head_dim = shape.head_dim;
  layout.dtype =
      NeedsFloatCache(*loaded.weights, options.activations) ? KvDtype::kF32 : KvDtype::kBf16;
  RETURN_IF_ERROR(layout.Validate());
  return loaded;
}

// The steps of one rank, one after the other.
class RankTeam {
 public:
  RankTeam(const Loaded& loaded, const CpuRunnerOptions& options)
      : forward_(loaded.weights.get(), loaded.kernels, loaded.layout, options.step_tokens_max,
                 loaded.threads, options.group.comm, options.group.timeout),
        team_(loaded.threads, "engine", options.nice, [this](int thread) { Round(thread); }) {}

  absl::Status Run(Step step) {
    forward_.Prepare(std::move(step));
    absl::MutexLock lock(&mutex_);
    done_ = false;
    team_.StartRound();
    mutex_.Await(absl::Condition(&done_));
    return forward_.status();
  }

 private:
  void Round(int thread) {
    forward_.Run(team_, thread, [](uint32_t) {});
    team_.Barrier();
    if (thread != 0) return;
    absl::MutexLock lock(&mutex_);
    done_ = true;
  }

  cpu::Forward forward_;
  absl::Mutex mutex_;
  bool done_ ABSL_GUARDED_BY(mutex_) = false;
  cpu::Team team_;  // last: its threads use the rest
};

}  // namespace

absl::StatusOr<std::unique_ptr<ModelRunner>> MakeCpuRunner(const model::ModelFile* file,
                                                           const CpuRunnerOptions& options) {
  CHECK(options.group.comm == nullptr || options.group.comm->rank() == 0);
  absl::StatusOr<Loaded> loaded = Load(file, options);
  if (!loaded.ok()) {
    if (options.group.comm != nullptr) options.group.comm->Abort(loaded.status());
    return loaded.status();
  }
  const std::string model = ModelText(*loaded, options);
  auto runner = std::make_unique<CpuRunner>(*std::move(loaded), options);
  RETURN_IF_ERROR(runner->AwaitRanks(model));
  return runner;
}

absl::Status CheckCpuRanks(const model::ModelFile& file, uint32_t ranks) {
  return cpu::CheckShards(file, ranks);
}

absl::Status ServeCpuRank(const model::ModelFile* file, const CpuRunnerOptions& options) {
  CHECK(options.group.comm != nullptr && options.group.comm->rank() > 0);
  absl::StatusOr<Loaded> loaded = Load(file, options);
  if (!loaded.ok()) {
    options.group.comm->Abort(loaded.status());
    return loaded.status();
  }
  GroupMember member(options.group, loaded->layout);
  RankTeam team(*loaded, options);
  RETURN_IF_ERROR(member.Begin(ModelText(*loaded, options)));
  while (true) {
    ASSIGN_OR_RETURN(std::optional<Step> step, member.Next());
    if (!step.has_value()) return absl::OkStatus();
    RETURN_IF_ERROR(team.Run(*std::move(step)));
  }
}

}  // namespace antiphon::engine
