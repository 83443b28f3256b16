// The one face of an engine: CPU and CUDA runners stand behind it.
//
// A step processes any mix of prefill chunks and decode rows. K and V are written into, and read
// from, the blocks that the caller names (slots of the host's pool, read in place). A row's result
// depends on its tokens, positions, blocks and sampling alone, never on the rest of the batch, on
// how a prompt is cut into chunks, or on the worker's role.
#ifndef ANTIPHON_ENGINE_MODEL_RUNNER_H_
#define ANTIPHON_ENGINE_MODEL_RUNNER_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "common/kv_layout.h"
#include "engine/sampler.h"

namespace antiphon::engine {

// Consecutive tokens of one sequence. What the spans point at must stay until the step is taken.
struct SequenceChunk {
  // The caller's handle, echoed in the result. A runner that keeps copies of blocks (a GPU's) takes
  // it that under one handle, with the same addresses, what lies below `start` never changes.
  uint64_t sequence = 0;
  absl::Span<const uint32_t> tokens;  // at positions start .. start + size
  uint32_t start = 0;
  // Payload of every block of [0, start + size), in order. Blocks that hold positions >= start are
  // written; earlier ones are only read.
  absl::Span<std::byte* const> blocks;
  std::optional<SampleRequest> sample;  // draw the token after the chunk's last
  bool want_logits = false;             // return float logits of every token (tests, echo)
  // Room for the checksums (common/kv_layout.h) of what the chunk writes: [block][layer], from the
  // block of `start` to that of the last token; empty: nobody wants them. A runner that makes them
  // fills the layers below layers_done before it reports them, over all tokens that a block then
  // holds, those of earlier steps too.
  absl::Span<uint64_t> checksums;
};

struct Step {
  std::vector<SequenceChunk> chunks;
  // Whether somebody waits for layers_done; without it Await may return at the end only. A waiting
  // thread that wakes at each layer takes a core from the engine.
  bool report_layers = true;
};

struct ChunkResult {
  uint64_t sequence = 0;
  std::optional<SampledToken> sampled;
  std::vector<float> logits;  // [tokens][vocab] when asked for
};

struct StepResult {
  std::vector<ChunkResult> chunks;  // in the order of the step
};

struct StepProgress {
  uint32_t layers_done = 0;  // K and V of every chunk are in the blocks for layers [0, layers_done)
  bool finished = false;
  friend bool operator==(const StepProgress&, const StepProgress&) = default;
};

// Memory that blocks lie in, as this process maps it and as others can.
struct PoolMemory {
  std::byte* base = nullptr;
  size_t bytes = 0;
  int fd = -1;  // sealed against shrinking; stays the caller's
};

struct RunnerShape {
  uint32_t vocab = 0;
  uint32_t context = 0;          // tokens
  uint32_t step_tokens_max = 0;  // sum over the chunks of a step
  bool copies_blocks = false;    // a chunk's first step may have to fetch its context
  bool makes_checksums = false;  // others leave a chunk's `checksums` as they are
};

// Submit, Await, Take, UsePool and ReleaseScratch belong to one thread; Progress and Interrupt may
// be called from any.
class ModelRunner {
 public:
  virtual ~ModelRunner() = default;

  virtual const RunnerShape& shape() const = 0;
  virtual const KvLayout& layout() const = 0;
  virtual std::string rope_text() const = 0;     // for the fingerprint
  virtual std::string kernel_class() const = 0;  // for the fingerprint
  // What decides how fast it is, beside model, layout and shape; empty: nobody can say.
  virtual std::string speed_class() const { return ""; }
  // Ranks that a step is shared out over; for the fingerprint, as sums over ranks round otherwise.
  virtual uint32_t tp_degree() const { return 1; }

  // Between steps: from now on, blocks lie in `pool`; {} lets go of the last one, which may be
  // unmapped behind it. Runners of one process take blocks from anywhere and need no pool (a GPU's
  // pins it, and is slow elsewhere); others refuse steps outside of it. UNAVAILABLE,
  // DEADLINE_EXCEEDED: a rank is gone.
  virtual absl::Status UsePool(const PoolMemory& pool) { return absl::OkStatus(); }

  // Between steps: gives back the memory that steps have touched beside blocks and weights. Later
  // ones take it again.
  virtual void ReleaseScratch() {}

  // Not OK when no step will ever succeed again (a lost GPU): the worker is to leave.
  virtual absl::Status Health() const { return absl::OkStatus(); }

  // Starts a step. INVALID_ARGUMENT when a chunk is malformed (token out of range, position past
  // the context, too few blocks): nothing was started. One step at a time.
  virtual absl::Status Submit(Step step) = 0;
  virtual StepProgress Progress() const = 0;
  // Returns as soon as progress differs from `seen`, after `timeout`, or when interrupted.
  virtual StepProgress Await(StepProgress seen, absl::Duration timeout) = 0;
  // Ends the Await that runs or, when none does, the next one.
  virtual void Interrupt() = 0;
  // After `finished`. An error is the engine's: the step's rows are undefined.
  virtual absl::StatusOr<StepResult> Take() = 0;
};

}  // namespace antiphon::engine

#endif  // ANTIPHON_ENGINE_MODEL_RUNNER_H_
