// What the consumer is told of KV, and what the store is told of finished blocks.
#include <algorithm>
#include <utility>

#include "common/wire.h"
#include "engine/wire_sampling.h"
#include "prefill/core.h"
#include "prefill/stream.h"

namespace antiphon::prefill {
namespace {

uint32_t FilledTokens(uint32_t block, uint32_t end, uint32_t block_tokens) {
  return std::min(block_tokens, end - block * block_tokens);
}

uint64_t ChecksumOf(const KvLayout& layout, const std::byte* payload, uint32_t layer,
                    uint32_t tokens) {
  return LayerChecksum(layout, payload + layer * layout.layer_bytes(), tokens);
}

}  // namespace

// Extends the checksums of the chunk's blocks up to `to_layer`, where the engine did not.
void PrefillCore::ChecksumLayers(Stream& s, uint32_t to_layer) {
  if (options_.engine_makes_checksums) return;
  const KvLayout& layout = options_.layout;
  const uint32_t first = s.done_tokens / layout.block_tokens;
  for (uint32_t i = first; i < layout.BlocksFor(s.chunk_end); ++i) {
    const uint32_t tokens = FilledTokens(i, s.chunk_end, layout.block_tokens);
    uint64_t* sums = &s.checksums[(i - first) * size_t{layout.layers}];
    for (uint32_t layer = s.checksum_layers; layer < to_layer; ++layer) {
      sums[layer] = ChecksumOf(layout, s.payloads[i], layer, tokens);
    }
  }
  s.checksum_layers = std::max(s.checksum_layers, to_layer);
}

void PrefillCore::SendReady(Stream& s, wire::Ready ready) {
  if (std::exchange(s.first_message, false)) {
    ready.set_data_address(store_.data_address);
    ready.set_store_incarnation(store_.incarnation);
  }
  Send send{s.handle, {}};
  *send.message.mutable_ready() = std::move(ready);
  actions_.push_back(std::move(send));
}

// Sent as soon as the prompt has its slots, so that the consumer learns where it will pull from,
// and reserves its own, before anything is computed.
void PrefillCore::AnnouncePrefix(Stream& s) {
  const KvLayout& layout = options_.layout;
  wire::Ready ready;
  ready.set_full_tokens(s.done_tokens);
  ready.set_next_tokens(s.done_tokens);
  for (uint32_t i = s.have_blocks; i < s.done_tokens / layout.block_tokens; ++i) {
    auto& block = *ready.add_blocks();
    block.set_index(i);
    *block.mutable_slot() = SlotToProto(s.blocks[i]);
    block.set_tokens(layout.block_tokens);
    if (s.same_host) continue;
    for (uint32_t layer = 0; layer < layout.layers; ++layer) {
      block.add_checksums(ChecksumOf(layout, s.payloads[i], layer, layout.block_tokens));
    }
  }
  SendReady(s, std::move(ready));
}

void PrefillCore::AnnounceLayers(Stream& s, uint32_t to_layer) {
  const KvLayout& layout = options_.layout;
  ChecksumLayers(s, to_layer);
  wire::Ready ready;
  ready.set_full_tokens(s.done_tokens);
  ready.set_next_tokens(s.chunk_end);
  ready.set_next_layers(to_layer);
  const uint32_t first = s.done_tokens / layout.block_tokens;
  for (uint32_t i = std::max(first, s.have_blocks); i < layout.BlocksFor(s.chunk_end); ++i) {
    auto& block = *ready.add_blocks();
    block.set_index(i);
    *block.mutable_slot() = SlotToProto(s.blocks[i]);
    block.set_tokens(FilledTokens(i, s.chunk_end, layout.block_tokens));
    block.set_first_layer(s.announced_layers);
    for (uint32_t layer = s.announced_layers; layer < to_layer; ++layer) {
      block.add_checksums(s.checksums[(i - first) * size_t{layout.layers} + layer]);
    }
  }
  s.announced_layers = to_layer;
  SendReady(s, std::move(ready));
}

// The chunk is done in every layer; `last` is its result when it ends the prompt.
void PrefillCore::AnnounceChunk(Stream& s, const engine::ChunkResult* last, absl::Time now) {
  const KvLayout& layout = options_.layout;
  wire::Ready ready;
  ready.set_full_tokens(s.chunk_end);
  ready.set_next_tokens(s.chunk_end);
  const uint32_t first = s.done_tokens / layout.block_tokens;
  const bool layers_remain = s.same_host || s.announced_layers < layout.layers;
  for (uint32_t i = std::max(first, s.have_blocks);
       layers_remain && i < layout.BlocksFor(s.chunk_end); ++i) {
    auto& block = *ready.add_blocks();
    block.set_index(i);
    *block.mutable_slot() = SlotToProto(s.blocks[i]);
    block.set_tokens(FilledTokens(i, s.chunk_end, layout.block_tokens));
    if (s.same_host) continue;
    block.set_first_layer(s.announced_layers);
    for (uint32_t layer = s.announced_layers; layer < layout.layers; ++layer) {
      block.add_checksums(s.checksums[(i - first) * size_t{layout.layers} + layer]);
    }
  }
  if (last != nullptr) {
    auto& token = *ready.mutable_first();
    token.set_id(last->sampled->id);
    if (s.params.logprobs) *token.mutable_logprobs() = engine::LogprobsToProto(*last->sampled);
    const uint32_t dram = s.dram_blocks * layout.block_tokens;
    const uint32_t remote = s.remote_blocks * layout.block_tokens;
    ready.mutable_source()->set_dram(dram);
    ready.mutable_source()->set_remote(remote);
    ready.mutable_source()->set_computed(s.ids.size() - dram - remote);
    ready.set_queue_s(absl::ToDoubleSeconds(s.first_step - s.arrival));
    ready.set_prefill_s(absl::ToDoubleSeconds(now - s.first_step));
  }
  SendReady(s, std::move(ready));
}

void PrefillCore::CommitChunk(const Stream& s) {
  const uint32_t block_tokens = options_.layout.block_tokens;
  const uint32_t first = s.done_tokens / block_tokens;
  for (uint32_t i = first; i < s.chunk_end / block_tokens; ++i) {
    wire::StoreRequest request;
    auto& commit = *request.mutable_commit();
    *commit.mutable_slot() = SlotToProto(s.blocks[i]);
    auto& meta = *commit.mutable_meta();
    meta.set_key(s.keys[i].ToBytes());
    meta.set_parent((i > 0 ? s.keys[i - 1] : s.root).ToBytes());
    meta.set_position(i);
    meta.mutable_token_ids()->Assign(s.ids.begin() + i * block_tokens,
                                     s.ids.begin() + (i + 1) * block_tokens);
    const uint32_t layers = options_.layout.layers;
    const uint64_t* sums = &s.checksums[(i - first) * size_t{layers}];
    meta.mutable_layer_checksums()->Assign(sums, sums + layers);
    Fire(std::move(request));
  }
}

}  // namespace antiphon::prefill
