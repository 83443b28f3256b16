// A model whose next token is a hash of the KV bytes that it reads: a wrong, stale or missing byte
// anywhere is a wrong token. K and V of a token hash the token, its position, and all K and V of
// the layer before it, read from the blocks; the token drawn hashes every byte of the last
// position's view of every layer, the sampling parameters that matter and (with penalties) the ids.
//
// No threads: one layer is computed by each Await (or AdvanceLayer), so that a test decides what
// happens between two layers. Memory is read and written at that moment, not at Submit. With
// shape.makes_checksums a layer's checksums are made with it.
#ifndef ANTIPHON_TESTS_FAKES_HASH_RUNNER_H_
#define ANTIPHON_TESTS_FAKES_HASH_RUNNER_H_

#include <string>
#include <vector>

#include "engine/model_runner.h"

namespace antiphon::fakes {

// Small blocks: 4 tokens, 3 layers, 16 bytes of K and of V a token.
KvLayout SmallLayout();

class HashRunner final : public engine::ModelRunner {
 public:
  explicit HashRunner(KvLayout layout = SmallLayout(),
                      engine::RunnerShape shape = {1000, 4096, 64});

  const engine::RunnerShape& shape() const override { return shape_; }
  const KvLayout& layout() const override { return layout_; }
  std::string rope_text() const override { return "hash"; }
  std::string kernel_class() const override { return "hash"; }

  absl::Status Submit(engine::Step step) override;
  engine::StepProgress Progress() const override { return progress_; }
  // Does not wait: computes the next layer.
  engine::StepProgress Await(engine::StepProgress seen, absl::Duration timeout) override;
  void Interrupt() override {}
  absl::StatusOr<engine::StepResult> Take() override;

  // Computes the next layer, or ends the step after the last.
  void AdvanceLayer();
  // The next Take returns this.
  void FailStep(absl::Status status) { failure_ = std::move(status); }
  // Checksums made from now on are wrong.
  void SpoilChecksums() { spoiled_ = true; }

 private:
  void ComputeLayer(const engine::SequenceChunk& chunk, uint32_t layer);
  void MakeChecksums(const engine::SequenceChunk& chunk, uint32_t layer) const;
  engine::SampledToken Draw(const engine::SequenceChunk& chunk) const;

  KvLayout layout_;
  engine::RunnerShape shape_;
  engine::Step step_;
  bool submitted_ = false;
  engine::StepProgress progress_;
  absl::Status failure_;
  bool spoiled_ = false;
};

// The tokens that follow `ids` (prompt, then emitted), computed in one place with memory of its
// own: what every cluster must answer. Ends like decode: max_tokens emitted in all, or a stop id.
std::vector<uint32_t> ReferenceTokens(const std::vector<uint32_t>& prompt,
                                      const engine::SamplingParams& params, uint32_t max_tokens,
                                      uint32_t min_tokens, const std::vector<uint32_t>& stop_ids);

}  // namespace antiphon::fakes

#endif  // ANTIPHON_TESTS_FAKES_HASH_RUNNER_H_
