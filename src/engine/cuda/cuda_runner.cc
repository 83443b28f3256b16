#include "engine/cuda/cuda_runner.h"

#include <algorithm>
#include <atomic>
#include <optional>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "common/logging.h"
#include "common/status_macros.h"
#include "engine/check_step.h"
#include "engine/cpu/team.h"
#include "engine/cuda/draw_request.h"
#include "engine/cuda/load.h"
#include "engine/cuda/module.h"

namespace antiphon::engine {
namespace {

using cuda::LoadedEngine;
using cuda::Module;
using cuda::ModuleError;
using cuda::ToStatus;

constexpr int kDrawThreadsMax = 8;
// A step is polled without a pause for so long, then every kPause.
constexpr int kEagerPolls = 4000;
constexpr absl::Duration kPause = absl::Microseconds(50);

void Rest() {
  absl::Mutex mutex;
  absl::MutexLock lock(&mutex);
  const bool never = false;
  mutex.AwaitWithTimeout(absl::Condition(&never), kPause);
}

cuda::ChunkView ViewOf(const SequenceChunk& chunk, cuda::Output output) {
  return {.sequence = chunk.sequence,
          .tokens = chunk.tokens.data(),
          .token_count = static_cast<uint32_t>(chunk.tokens.size()),
          .start = chunk.start,
          .blocks = chunk.blocks.data(),
          .output = output,
          .checksums = chunk.checksums.empty() ? nullptr : chunk.checksums.data()};
}

class CudaRunner final : public ModelRunner {
 public:
  CudaRunner(LoadedEngine loaded, const TensorGroup& group)
      : loaded_(std::move(loaded)),
        module_(loaded_.module),
        engine_(loaded_.engine.get()),
        group_(group),
        shape_(loaded_.shape),
        layout_(loaded_.layout),
        draw_requests_(shape_.vocab),
        samplers_(static_cast<size_t>(std::min(loaded_.threads, kDrawThreadsMax))),
        team_(static_cast<int>(samplers_.size()), "draw", 0, [this](int thread) { Draw(thread); }) {
    if (group_.comm != nullptr) leader_.emplace(group_, layout_);
  }
  ~CudaRunner() override {
    if (leader_.has_value()) leader_->End();
  }

  absl::Status AwaitRanks() {
    if (!leader_.has_value()) return absl::OkStatus();
    RETURN_IF_ERROR(leader_->Begin(loaded_.model));
    return AgreeOnPages(loaded_, group_);
  }

  const RunnerShape& shape() const override { return shape_; }
  const KvLayout& layout() const override { return layout_; }
  std::string rope_text() const override { return loaded_.rope; }
  uint32_t tp_degree() const override { return loaded_.ranks; }
  // Sums of products are ordered by shape and batch: equal workers agree up to rounding.
  std::string kernel_class() const override { return "cuda-bf16-1"; }

  absl::Status UsePool(const PoolMemory& pool) override {
    if (state_ != State::kIdle) {
      return absl::FailedPreconditionError("a step is running or was not taken");
    }
    if (pinned_ != nullptr) module_->unregister_memory(engine_, pinned_);
    pinned_ = nullptr;
    if (leader_.has_value()) RETURN_IF_ERROR(Noted(leader_->UsePool(pool)));
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
      views_.push_back(ViewOf(chunk, OutputOf(chunk)));
      if (views_.back().output != cuda::Output::kDraw) continue;
      draws_.push_back(draw_requests_.Make(*chunk.sample, &edits_));
      views_.back().draw = &draws_.back();
    }
    const cuda::LogitEdit* edits = edits_.data();
    for (cuda::Draw& draw : draws_) {
      draw.edits = edits;
      edits += draw.edit_count;
    }
    if (leader_.has_value()) RETURN_IF_ERROR(TellRanks(step));
    ModuleError error;
    module_->submit(engine_, views_.data(), views_.size(), &error);
    if (error.code != 0) return Failed(ToStatus(error));
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
      Rest();
    }
  }

  void Interrupt() override { interrupted_ = true; }

  absl::StatusOr<StepResult> Take() override {
    if (state_ != State::kDone) return absl::FailedPreconditionError("no finished step to take");
    state_ = State::kIdle;
    outputs_.assign(views_.size(), {});
    ModuleError error;
    module_->take(engine_, outputs_.data(), &error);
    if (error.code != 0) return Failed(ToStatus(error));
    if (!ranks_.ok()) return Failed(ranks_);
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

  // The others take their parts of the step. Nothing may be refused from here on.
  absl::Status TellRanks(const Step& step) {
    RETURN_IF_ERROR(leader_->Encode(step));
    uint64_t blocks = 0;
    for (const SequenceChunk& chunk : step.chunks) {
      blocks += layout_.BlocksFor(chunk.start + chunk.tokens.size());
    }
    if (const uint64_t pages = module_->pages_total(engine_); blocks > pages) {
      return absl::ResourceExhaustedError(fmt::format(
          "device memory: the step's contexts need {} KV pages, there are {}", blocks, pages));
    }
    if (absl::Status sent = leader_->Send(); !sent.ok()) return Failed(std::move(sent));
    return absl::OkStatus();
  }

  // A rank that is only slow would still write to blocks that are about to be given back.
  absl::Status Failed(absl::Status status) {
    if (leader_.has_value()) {
      group_.comm->Abort(status);
      if (group_.fence) group_.fence();
    }
    return Noted(std::move(status));
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
    // Of a group's blocks each rank writes some heads: they are complete when all have finished.
    if (now.finished && leader_.has_value()) ranks_ = group_.comm->Barrier(group_.timeout);
    if (now.finished) state_ = State::kDone;
    absl::MutexLock lock(&mutex_);
    progress_ = {.layers_done = leader_.has_value() && !now.finished ? 0 : now.layers_done,
                 .finished = now.finished};
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

  const LoadedEngine loaded_;
  const Module* const module_;
  cuda::Engine* const engine_;
  const TensorGroup group_;
  std::optional<GroupLeader> leader_;
  absl::Status ranks_;  // how they ended the step
  const RunnerShape shape_;
  const KvLayout layout_;

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

// Runs a step to its end.
absl::Status RunToEnd(const Module& module, cuda::Engine* engine, const Step& step,
                      std::vector<cuda::ChunkView>& views) {
  views.clear();
  for (const SequenceChunk& chunk : step.chunks) {
    views.push_back(
        ViewOf(chunk, chunk.want_logits ? cuda::Output::kAllLogits : cuda::Output::kNone));
  }
  ModuleError error;
  module.submit(engine, views.data(), views.size(), &error);
  RETURN_IF_ERROR(ToStatus(error));
  for (int polls = 0; !module.poll(engine).finished; ++polls) {
    if (polls > kEagerPolls) Rest();
  }
  std::vector<cuda::ChunkOutput> outputs(views.size());
  module.take(engine, outputs.data(), &error);
  return ToStatus(error);
}

}  // namespace

absl::StatusOr<std::unique_ptr<ModelRunner>> MakeCudaRunner(const model::ModelFile* file,
                                                            const CudaRunnerOptions& options) {
  CHECK(options.group.comm == nullptr || options.group.comm->rank() == 0);
  ASSIGN_OR_RETURN(LoadedEngine loaded, cuda::LoadEngine(*file, options));
  auto runner = std::make_unique<CudaRunner>(std::move(loaded), options.group);
  RETURN_IF_ERROR(runner->AwaitRanks());
  return runner;
}

absl::Status ServeCudaRank(const model::ModelFile* file, const CudaRunnerOptions& options) {
  CHECK(options.group.comm != nullptr && options.group.comm->rank() > 0);
  ASSIGN_OR_RETURN(const LoadedEngine loaded, cuda::LoadEngine(*file, options));
  const Module& module = *loaded.module;
  cuda::Engine* const engine = loaded.engine.get();
  std::byte* pinned = nullptr;
  GroupMember member(options.group, loaded.layout, [&](std::byte* base, size_t bytes) {
    if (pinned != nullptr) module.unregister_memory(engine, std::exchange(pinned, nullptr));
    if (base == nullptr) return;
    ModuleError error;
    module.register_memory(engine, base, bytes, &error);
    if (error.code == 0) {
      pinned = base;
    } else {
      LogWarning("the pool cannot be pinned, copies to and from it are slow: {}",
                 std::string(error.message));
    }
  });
  RETURN_IF_ERROR(member.Begin(loaded.model));
  RETURN_IF_ERROR(AgreeOnPages(loaded, options.group));
  std::vector<cuda::ChunkView> views;
  while (true) {
    ASSIGN_OR_RETURN(const std::optional<Step> step, member.Next());
    if (!step.has_value()) return absl::OkStatus();
    if (absl::Status status = RunToEnd(module, engine, *step, views); !status.ok()) {
      options.group.comm->Abort(status);
      return status;
    }
    RETURN_IF_ERROR(options.group.comm->Barrier(options.group.timeout));
  }
}

}  // namespace antiphon::engine
