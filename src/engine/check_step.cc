#include "engine/check_step.h"

#include <string>

#include "common/logging.h"
#include "common/status_macros.h"

namespace antiphon::engine {
namespace {

absl::Status CheckSampling(size_t index, const SampleRequest& sample, uint32_t vocab) {
  if (sample.params == nullptr) {
    return absl::InvalidArgumentError(fmt::format("chunk {}: sample has no params", index));
  }
  const auto outside = [&](const char* field, uint32_t id) {
    return absl::InvalidArgumentError(
        fmt::format("chunk {}: {} has token {}, the vocabulary has {}", index, field, id, vocab));
  };
  for (uint32_t id : sample.prompt_ids) {
    if (id >= vocab) return outside("prompt_ids", id);
  }
  for (uint32_t id : sample.emitted_ids) {
    if (id >= vocab) return outside("emitted_ids", id);
  }
  for (const auto& [id, bias] : sample.params->logit_bias) {
    if (id >= vocab) return outside("logit_bias", id);
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status EndOfSequences(const absl::Status& step) {
  const bool elsewhere = absl::IsUnavailable(step) || absl::IsDeadlineExceeded(step) ||
                         absl::IsResourceExhausted(step);
  return absl::Status(elsewhere ? absl::StatusCode::kUnavailable : absl::StatusCode::kInternal,
                      fmt::format("the engine failed: {}", std::string(step.message())));
}

absl::Status CheckStep(const Step& step, const RunnerShape& shape, const KvLayout& layout) {
  size_t tokens = 0;
  if (step.chunks.empty()) return absl::InvalidArgumentError("the step has no chunks");
  for (size_t i = 0; i < step.chunks.size(); ++i) {
    const SequenceChunk& chunk = step.chunks[i];
    if (chunk.tokens.empty()) {
      return absl::InvalidArgumentError(fmt::format("chunk {} has no tokens", i));
    }
    tokens += chunk.tokens.size();
    const size_t end = chunk.start + chunk.tokens.size();
    if (end > shape.context) {
      return absl::InvalidArgumentError(fmt::format(
          "chunk {} ends at position {}, the context is {} tokens", i, end, shape.context));
    }
    if (chunk.blocks.size() < layout.BlocksFor(end)) {
      return absl::InvalidArgumentError(fmt::format("chunk {} has {} blocks, needs {}", i,
                                                    chunk.blocks.size(), layout.BlocksFor(end)));
    }
    for (uint32_t b = 0; b < layout.BlocksFor(end); ++b) {
      if (chunk.blocks[b] == nullptr) {
        return absl::InvalidArgumentError(fmt::format("chunk {}: block {} is null", i, b));
      }
    }
    const size_t written = layout.BlocksFor(end) - chunk.start / layout.block_tokens;
    if (!chunk.checksums.empty() && chunk.checksums.size() != written * layout.layers) {
      return absl::InvalidArgumentError(
          fmt::format("chunk {} has room for {} checksums, needs {} for {} blocks", i,
                      chunk.checksums.size(), written * layout.layers, written));
    }
    for (uint32_t token : chunk.tokens) {
      if (token >= shape.vocab) {
        return absl::InvalidArgumentError(
            fmt::format("chunk {} has token {}, the vocabulary has {}", i, token, shape.vocab));
      }
    }
    if (chunk.sample.has_value()) {
      RETURN_IF_ERROR(CheckSampling(i, *chunk.sample, shape.vocab));
    }
  }
  if (tokens > shape.step_tokens_max) {
    return absl::InvalidArgumentError(
        fmt::format("the step has {} tokens, at most {} fit", tokens, shape.step_tokens_max));
  }
  return absl::OkStatus();
}

}  // namespace antiphon::engine
