// What the engine's tests share: a cache of their own blocks, and steps run to their end.
#ifndef ANTIPHON_TESTS_ENGINE_HARNESS_H_
#define ANTIPHON_TESTS_ENGINE_HARNESS_H_

#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/kv_layout.h"
#include "engine/cpu/cpu_runner.h"
#include "engine/model_runner.h"
#include "model/model_file.h"

namespace antiphon::engine {

// The blocks of one sequence. Every byte starts as NaN, so that reading what was not written shows.
class TestCache {
 public:
  TestCache(const KvLayout& layout, size_t tokens)
      : memory_(layout.BlocksFor(tokens) * layout.payload_bytes(), std::byte{0xff}) {
    for (size_t i = 0; i < layout.BlocksFor(tokens); ++i) {
      blocks_.push_back(memory_.data() + i * layout.payload_bytes());
    }
  }
  absl::Span<std::byte* const> blocks() const { return blocks_; }
  const std::vector<std::byte>& memory() const { return memory_; }

 private:
  std::vector<std::byte> memory_;
  std::vector<std::byte*> blocks_;
};

inline StepResult RunStep(ModelRunner& runner, Step step) {
  const absl::Status submitted = runner.Submit(std::move(step));
  EXPECT_TRUE(submitted.ok()) << submitted.ToString();
  if (!submitted.ok()) return {};
  StepProgress progress;
  while (!progress.finished) progress = runner.Await(progress, absl::Seconds(60));
  absl::StatusOr<StepResult> result = runner.Take();
  EXPECT_TRUE(result.ok());
  return *std::move(result);
}

// Logits of every token, in chunks of the given sizes (the last size repeats).
inline std::vector<float> AllLogits(ModelRunner& runner, absl::Span<const uint32_t> tokens,
                                    const std::vector<size_t>& sizes,
                                    absl::Span<std::byte* const> blocks) {
  std::vector<float> all;
  size_t start = 0;
  for (size_t i = 0; start < tokens.size(); ++i) {
    const size_t size = std::min(sizes[std::min(i, sizes.size() - 1)], tokens.size() - start);
    SequenceChunk chunk;
    chunk.tokens = tokens.subspan(start, size);
    chunk.start = static_cast<uint32_t>(start);
    chunk.blocks = blocks;
    chunk.want_logits = true;
    const StepResult result = RunStep(runner, Step{{chunk}});
    all.insert(all.end(), result.chunks[0].logits.begin(), result.chunks[0].logits.end());
    start += size;
  }
  return all;
}

inline std::vector<float> AllLogits(ModelRunner& runner, absl::Span<const uint32_t> tokens,
                                    const std::vector<size_t>& sizes, TestCache& cache) {
  return AllLogits(runner, tokens, sizes, cache.blocks());
}

// The model that ctest names; nullptr when there is none, and then the test is to be skipped.
inline const model::ModelFile* ShippedModel() {
  static const std::unique_ptr<model::ModelFile>* const file = [] {
    auto* holder = new std::unique_ptr<model::ModelFile>;
    const char* path = std::getenv("ANTIPHON_MODEL");
    if (path == nullptr || *path == '\0') return holder;
    absl::StatusOr<std::unique_ptr<model::ModelFile>> opened = model::OpenModelFile(path);
    EXPECT_TRUE(opened.ok()) << opened.status().ToString();
    if (opened.ok()) *holder = *std::move(opened);
    return holder;
  }();
  return file->get();
}

inline std::unique_ptr<ModelRunner> MakeRunner(const model::ModelFile* file,
                                               const CpuRunnerOptions& options) {
  absl::StatusOr<std::unique_ptr<ModelRunner>> runner = MakeCpuRunner(file, options);
  EXPECT_TRUE(runner.ok()) << runner.status().ToString();
  return runner.ok() ? *std::move(runner) : nullptr;
}

}  // namespace antiphon::engine

#endif  // ANTIPHON_TESTS_ENGINE_HARNESS_H_
