#include "tests/fakes/hash_runner.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "common/status_macros.h"

namespace antiphon::fakes {
namespace {

uint64_t Mix(uint64_t h, uint64_t v) {
  h = (h ^ v) * 0x9E3779B97F4A7C15u;
  return h ^ (h >> 29);
}

uint64_t MixBytes(uint64_t h, const std::byte* bytes, size_t size) {
  for (size_t at = 0; at < size; at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bytes + at, std::min<size_t>(8, size - at));
    h = Mix(h, word);
  }
  return h;
}

void Fill(uint64_t seed, std::byte* bytes, size_t size) {
  for (size_t at = 0; at < size; at += 8) {
    seed = Mix(seed, at + 1);
    std::memcpy(bytes + at, &seed, std::min<size_t>(8, size - at));
  }
}

std::byte* At(const KvLayout& layout, const engine::SequenceChunk& chunk, uint32_t position,
              uint32_t layer, bool value) {
  return chunk.blocks[position / layout.block_tokens] + layer * layout.layer_bytes() +
         (value ? layout.half_bytes() : 0) + position % layout.block_tokens * layout.token_bytes();
}

uint64_t MixToken(const KvLayout& layout, const engine::SequenceChunk& chunk, uint32_t position,
                  uint32_t layer, uint64_t h) {
  for (const bool value : {false, true}) {
    h = MixBytes(h, At(layout, chunk, position, layer, value), layout.token_bytes());
  }
  return h;
}

}  // namespace

KvLayout SmallLayout() {
  return {.block_tokens = 4,
          .layers = 3,
          .kv_heads = 1,
          .head_dim = 4,
          .dtype = KvDtype::kF32,
          .layer_align = 64};
}

HashRunner::HashRunner(KvLayout layout, engine::RunnerShape shape)
    : layout_(layout), shape_(shape) {}

absl::Status HashRunner::Submit(engine::Step step) {
  CHECK(!submitted_);
  uint64_t tokens = 0;
  for (const auto& chunk : step.chunks) {
    tokens += chunk.tokens.size();
    const uint64_t end = chunk.start + chunk.tokens.size();
    if (chunk.tokens.empty() || end > shape_.context ||
        chunk.blocks.size() < layout_.BlocksFor(end)) {
      return absl::InvalidArgumentError("malformed chunk");
    }
    const size_t written = layout_.BlocksFor(end) - chunk.start / layout_.block_tokens;
    if (!chunk.checksums.empty() && chunk.checksums.size() != written * layout_.layers) {
      return absl::InvalidArgumentError("room for a wrong number of checksums");
    }
    for (uint32_t token : chunk.tokens) {
      if (token >= shape_.vocab) return absl::InvalidArgumentError("token out of range");
    }
    for (std::byte* block : chunk.blocks) {
      if (block == nullptr) return absl::InvalidArgumentError("block without memory");
    }
  }
  if (tokens == 0 || tokens > shape_.step_tokens_max) {
    return absl::InvalidArgumentError("step of a wrong size");
  }
  step_ = std::move(step);
  submitted_ = true;
  progress_ = {};
  return absl::OkStatus();
}

engine::StepProgress HashRunner::Await(engine::StepProgress seen, absl::Duration timeout) {
  if (submitted_ && progress_ == seen) AdvanceLayer();
  return progress_;
}

void HashRunner::AdvanceLayer() {
  if (!submitted_ || progress_.finished) return;
  if (progress_.layers_done < layout_.layers) {
    for (const auto& chunk : step_.chunks) {
      ComputeLayer(chunk, progress_.layers_done);
      if (shape_.makes_checksums && !chunk.checksums.empty()) {
        MakeChecksums(chunk, progress_.layers_done);
      }
    }
    ++progress_.layers_done;
  } else {
    progress_.finished = true;
  }
}

void HashRunner::ComputeLayer(const engine::SequenceChunk& chunk, uint32_t layer) {
  uint64_t past = layer + 1;
  for (uint32_t p = 0; p < chunk.start; ++p) past = MixToken(layout_, chunk, p, layer, past);
  for (uint32_t i = 0; i < chunk.tokens.size(); ++i) {
    const uint32_t p = chunk.start + i;
    uint64_t h = Mix(Mix(past, chunk.tokens[i]), p);
    if (layer > 0) h = MixToken(layout_, chunk, p, layer - 1, h);
    Fill(h, At(layout_, chunk, p, layer, false), layout_.token_bytes());
    Fill(Mix(h, 1), At(layout_, chunk, p, layer, true), layout_.token_bytes());
    past = MixToken(layout_, chunk, p, layer, past);
  }
}

void HashRunner::MakeChecksums(const engine::SequenceChunk& chunk, uint32_t layer) const {
  const uint32_t end = chunk.start + chunk.tokens.size();
  const uint32_t first = chunk.start / layout_.block_tokens;
  for (uint32_t b = first; b < layout_.BlocksFor(end); ++b) {
    chunk.checksums[(b - first) * layout_.layers + layer] =
        LayerChecksum(layout_, chunk.blocks[b] + layer * layout_.layer_bytes(),
                      std::min(layout_.block_tokens, end - b * layout_.block_tokens)) +
        (spoiled_ ? 1 : 0);
  }
}

engine::SampledToken HashRunner::Draw(const engine::SequenceChunk& chunk) const {
  const auto& request = *chunk.sample;
  const engine::SamplingParams& params = *request.params;
  const uint32_t end = chunk.start + chunk.tokens.size();
  uint64_t h = 7;
  for (uint32_t layer = 0; layer < layout_.layers; ++layer) {
    for (uint32_t p = 0; p < end; ++p) h = MixToken(layout_, chunk, p, layer, h);
  }
  if (params.temperature > 0) h = Mix(Mix(h, params.seed), request.emitted_ids.size());
  if (params.repetition_penalty != 1) {
    for (uint32_t id : request.prompt_ids) h = Mix(h, id);
  }
  if (params.repetition_penalty != 1 || params.presence_penalty != 0) {
    for (uint32_t id : request.emitted_ids) h = Mix(h, id + 1);
  }
  engine::SampledToken token;
  token.id = h % shape_.vocab;
  while (std::find(request.masked_ids.begin(), request.masked_ids.end(), token.id) !=
         request.masked_ids.end()) {
    token.id = (token.id + 1) % shape_.vocab;
  }
  token.logprob = -static_cast<float>(h % 1000) / 100;
  for (uint32_t i = 0; params.logprobs && i < params.top_logprobs; ++i) {
    token.top.emplace_back((token.id + i) % shape_.vocab, token.logprob - i);
  }
  return token;
}

absl::StatusOr<engine::StepResult> HashRunner::Take() {
  CHECK(submitted_ && progress_.finished);
  submitted_ = false;
  engine::StepResult result;
  for (const auto& chunk : step_.chunks) {
    result.chunks.push_back({.sequence = chunk.sequence});
    if (chunk.sample.has_value()) result.chunks.back().sampled = Draw(chunk);
  }
  step_ = {};
  progress_ = {};
  if (!failure_.ok()) return std::exchange(failure_, absl::OkStatus());
  return result;
}

std::vector<uint32_t> ReferenceTokens(const std::vector<uint32_t>& prompt,
                                      const engine::SamplingParams& params, uint32_t max_tokens,
                                      uint32_t min_tokens, const std::vector<uint32_t>& stop_ids) {
  HashRunner runner(SmallLayout(), {1000, 4096, 4096});
  const KvLayout layout = runner.layout();
  const uint32_t blocks = layout.BlocksFor(prompt.size() + max_tokens);
  std::vector<std::byte> memory(blocks * layout.payload_bytes());
  std::vector<std::byte*> payloads;
  for (uint32_t i = 0; i < blocks; ++i) payloads.push_back(&memory[i * layout.payload_bytes()]);
  std::vector<uint32_t> ids = prompt;
  size_t done = 0;
  while (true) {
    const auto all = absl::MakeConstSpan(ids);
    const bool masked = ids.size() - prompt.size() < min_tokens;
    engine::Step step;
    step.chunks.push_back(
        {.tokens = all.subspan(done),
         .start = static_cast<uint32_t>(done),
         .blocks = payloads,
         .sample = engine::SampleRequest{
             .params = &params,
             .prompt_ids = all.first(prompt.size()),
             .emitted_ids = all.subspan(prompt.size()),
             .masked_ids = masked ? absl::MakeConstSpan(stop_ids) : absl::Span<const uint32_t>()}});
    CHECK(runner.Submit(std::move(step)).ok());
    while (!runner.Progress().finished) runner.AdvanceLayer();
    const uint32_t id = runner.Take()->chunks[0].sampled->id;
    done = ids.size();
    ids.push_back(id);
    const size_t emitted = ids.size() - prompt.size();
    const bool stop =
        emitted > min_tokens && std::find(stop_ids.begin(), stop_ids.end(), id) != stop_ids.end();
    if (stop || emitted >= max_tokens) break;
  }
  return {ids.begin() + prompt.size(), ids.end()};
}

}  // namespace antiphon::fakes
