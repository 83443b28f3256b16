// The continuous batch: rows, tokens, stops, growth and preemption.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/block_key.h"
#include "common/status_macros.h"
#include "common/wire.h"
#include "decode/core.h"
#include "decode/sequence.h"
#include "engine/check_step.h"
#include "engine/wire_sampling.h"

namespace antiphon::decode {

void DecodeCore::Plan(absl::Time now, std::vector<engine::SequenceChunk>& chunks) {
  CHECK(planned_.empty());
  // Growth may preempt, which removes sequences: settle it before rows are chosen.
  std::vector<uint64_t> running;
  for (const auto& [handle, s] : sequences_) {
    if (!s->ended && s->state == Sequence::State::kRunning) running.push_back(handle);
  }
  for (uint64_t handle : running) {
    if (Sequence* s = Find(handle); s != nullptr) Grow(*s);
  }
  for (uint64_t handle : running) {
    Sequence* s = Find(handle);
    if (s == nullptr || !HasSlotForNext(*s)) continue;
    s->in_step = true;
    planned_.push_back(handle);
    const auto ids = absl::MakeConstSpan(s->ids);
    const bool masked = s->emitted_count() < s->min_tokens;
    const bool fills = ids.size() % options_.layout.block_tokens == 0;
    s->filled_checksums.assign(fills ? options_.layout.layers : 0, 0);
    chunks.push_back(
        {.sequence = handle,
         .tokens = ids.last(1),
         .start = static_cast<uint32_t>(ids.size() - 1),
         .blocks = absl::MakeConstSpan(s->payloads),
         .sample = engine::SampleRequest{.params = &s->params,
                                         .prompt_ids = ids.first(s->prompt_count),
                                         .emitted_ids = ids.subspan(s->prompt_count),
                                         .masked_ids = masked ? absl::MakeConstSpan(s->stop_ids)
                                                              : absl::Span<const uint32_t>()}});
    if (options_.engine_makes_checksums) {
      chunks.back().checksums = absl::MakeSpan(s->filled_checksums);
    }
  }
}

void DecodeCore::OnStepDone(const absl::StatusOr<absl::Span<const engine::ChunkResult>>& results,
                            absl::Time now) {
  const std::vector<uint64_t> planned = std::exchange(planned_, {});
  CHECK(!results.ok() || results->size() == planned.size());
  const uint32_t block_tokens = options_.layout.block_tokens;
  for (size_t i = 0; i < planned.size(); ++i) {
    Sequence& s = *sequences_.at(planned[i]);
    s.in_step = false;
    if (s.ended) {
      Clean(s);
      continue;
    }
    if (!results.ok() || !(*results)[i].sampled.has_value()) {
      Fail(s,
           engine::EndOfSequences(
               results.ok() ? absl::InternalError("no token was drawn") : results.status()),
           options_.self.value());
      continue;
    }
    const uint32_t filled = s.ids.size();  // tokens whose K and V are in blocks now
    if (filled % block_tokens == 0) {
      const uint32_t index = filled / block_tokens - 1;
      for (uint32_t layer = 0; layer < options_.layout.layers && !options_.engine_makes_checksums;
           ++layer) {
        s.filled_checksums[layer] =
            LayerChecksum(options_.layout,
                          s.payloads[index] + layer * options_.layout.layer_bytes(), block_tokens);
      }
      s.keys.push_back(NextKey(index > 0 ? s.keys[index - 1] : s.root,
                               absl::MakeConstSpan(s.ids).last(block_tokens)));
      CommitBlock(s, index, std::move(s.filled_checksums));
    }
    const engine::SampledToken& sampled = *(*results)[i].sampled;
    wire::TokenLogprobs logprobs;
    if (s.params.logprobs) logprobs = engine::LogprobsToProto(sampled);
    wire::SequenceUpdate& update = UpdateFor(s.gateway, s.id_bytes, s.epoch);
    if (std::exchange(s.timings_due, false)) *update.mutable_timings() = s.timings;
    EmitToken(s, update, sampled.id, s.params.logprobs ? &logprobs : nullptr);
  }
}

// Appends a token to the sequence and to `update`; true when it was the last: the sequence is gone.
bool DecodeCore::EmitToken(Sequence& s, wire::SequenceUpdate& update, uint32_t id,
                           const wire::TokenLogprobs* logprobs) {
  update.set_first_index(s.emitted_count());
  update.add_ids(id);
  if (logprobs != nullptr) *update.add_logprobs() = *logprobs;
  s.ids.push_back(id);
  ++counters_.output_tokens;
  if (s.emitted_count() > s.min_tokens &&
      std::binary_search(s.stop_ids.begin(), s.stop_ids.end(), id)) {
    update.set_finish(wire::FINISH_REASON_STOP);
  } else if (s.emitted_count() >= s.max_tokens || s.ids.size() >= options_.context) {
    update.set_finish(wire::FINISH_REASON_LENGTH);
  } else {
    return false;
  }
  Drop(s);
  return true;
}

void DecodeCore::CommitBlock(Sequence& s, uint32_t index, std::vector<uint64_t> checksums) {
  const uint32_t block_tokens = options_.layout.block_tokens;
  wire::StoreRequest request;
  auto& commit = *request.mutable_commit();
  *commit.mutable_slot() = SlotToProto(s.blocks[index].slot);
  auto& meta = *commit.mutable_meta();
  meta.set_key(s.keys[index].ToBytes());
  meta.set_parent((index > 0 ? s.keys[index - 1] : s.root).ToBytes());
  meta.set_position(index);
  meta.mutable_token_ids()->Assign(s.ids.begin() + index * block_tokens,
                                   s.ids.begin() + (index + 1) * block_tokens);
  meta.mutable_layer_checksums()->Assign(checksums.begin(), checksums.end());
  Fire(std::move(request));
}

// The next row writes the last token's K and V.
bool DecodeCore::HasSlotForNext(Sequence& s) {
  const uint32_t index = (s.ids.size() - 1) / options_.layout.block_tokens;
  if (index < s.blocks.size()) return true;
  if (s.spare.empty()) return false;
  s.blocks.push_back({.slot = s.spare.back(), .held = true, .ready = true});
  s.spare.pop_back();
  s.payloads.push_back(store_.payload(s.blocks.back().slot.slot));
  return true;
}

// Asks for the next slot half a block ahead, so that the row need not wait for it. When the pool is
// full at the moment the row needs the slot, the youngest sequence makes room.
void DecodeCore::Grow(Sequence& s) {
  if (!s.spare.empty() || s.growing) return;
  const uint32_t block_tokens = options_.layout.block_tokens;
  const uint64_t room = uint64_t{s.blocks.size()} * block_tokens;
  const uint64_t last =
      std::min<uint64_t>(options_.context, uint64_t{s.prompt_count} + s.max_tokens);
  if (room + 1 >= last) return;  // the very last token's K and V are never needed
  const bool blocked = s.ids.size() > room;
  if (s.growth_failed) {
    if (!blocked) return;
    s.growth_failed = false;
    const uint64_t handle = s.handle;
    PreemptYoungest();
    if (Find(handle) == nullptr) return;
  } else if (!blocked && room - s.ids.size() > block_tokens / 2) {
    return;
  }
  s.growing = true;
  wire::StoreRequest request;
  request.mutable_reserve()->set_count(1);
  CallStore(std::move(request), {CallKind::kGrow, s.handle});
}

// Its whole blocks are committed already, so that another placement finds them.
void DecodeCore::PreemptYoungest() {
  for (auto it = sequences_.rbegin(); it != sequences_.rend(); ++it) {
    if (it->second->ended) continue;
    ++counters_.preempted;
    return Fail(*it->second, absl::ResourceExhaustedError("preempted: the KV pool is full"), "");
  }
}

}  // namespace antiphon::decode
