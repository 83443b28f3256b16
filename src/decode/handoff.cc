// From Start to the batch: slots, the prefill stream, and the KV that it announces.
#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "common/wire.h"
#include "decode/core.h"
#include "decode/sequence.h"

namespace antiphon::decode {
namespace {

constexpr absl::Duration kDeadlineDefault = absl::Seconds(600);

uint32_t MillisecondsLeft(const Sequence& s, absl::Time now) {
  const absl::Duration left = std::min(s.deadline - now, kDeadlineDefault);
  return std::max<int64_t>(1, absl::ToInt64Milliseconds(left));
}

// The filled part of a block, K and V of every layer.
void CopyTokens(const KvLayout& layout, const std::byte* from, std::byte* to, uint32_t tokens) {
  const size_t bytes = layout.token_bytes() * tokens;
  for (uint32_t layer = 0; layer < layout.layers; ++layer) {
    for (const size_t half : {size_t{0}, layout.half_bytes()}) {
      const size_t at = layer * layout.layer_bytes() + half;
      std::memcpy(to + at, from + at, bytes);
    }
  }
}

}  // namespace

// What this host has of the prompt. Before ReserveFirst: the store pins before it makes room.
void DecodeCore::PinPrefix(Sequence& s) {
  if (s.keys.empty()) return;
  wire::StoreRequest request;
  for (const BlockKey& key : s.keys) request.mutable_pin_prefix()->add_keys(key.ToBytes());
  ++s.first_replies_missing;
  CallStore(std::move(request), {CallKind::kPin, s.handle});
}

// One slot, for the prompt's partial last block, or else for the block after it.
void DecodeCore::ReserveFirst(Sequence& s) {
  wire::StoreRequest request;
  request.mutable_reserve()->set_count(1);
  ++s.first_replies_missing;
  CallStore(std::move(request), {CallKind::kReserve, s.handle});
}

void DecodeCore::OpenPrefillFor(Sequence& s, absl::Time now) {
  s.state = Sequence::State::kPrefilling;
  s.prefill_open = true;
  OpenPrefill action{s.handle, s.placement.prefill_address(), {}};
  wire::PrefillOpen& open = action.open;
  open.set_id(s.id_bytes);
  open.set_epoch(s.epoch);
  open.mutable_ids()->Assign(s.ids.begin(), s.ids.end());
  open.set_prompt_count(s.prompt_count);
  *open.mutable_sampling() = s.sampling;
  open.mutable_stop()->set_max_tokens(s.max_tokens);
  open.mutable_stop()->set_min_tokens(s.min_tokens);
  open.mutable_stop()->mutable_stop_ids()->Assign(s.stop_ids.begin(), s.stop_ids.end());
  open.set_root_key(s.root.ToBytes());
  open.set_have_blocks(s.blocks.size() - s.blocks_missing);
  open.set_store_incarnation(store_.incarnation);
  *open.mutable_sources() = s.placement.sources();
  open.set_deadline_ms(MillisecondsLeft(s, now));
  open.set_request_label(s.label);
  actions_.push_back(std::move(action));
}

void DecodeCore::FailPrefill(Sequence& s, const absl::Status& status) {
  const std::string text =
      absl::StrCat("prefill ", s.placement.prefill_node(), ": ", std::string(status.message()));
  switch (status.code()) {
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kDeadlineExceeded:
    case absl::StatusCode::kResourceExhausted:
      return Fail(s, absl::Status(status.code(), text), s.placement.prefill_node());
    default:
      return Fail(s, absl::UnavailableError(text), s.placement.prefill_node());
  }
}

void DecodeCore::OnPrefillEnd(uint64_t prefill, const absl::Status& status, absl::Time now) {
  Sequence* s = Find(prefill);
  if (s == nullptr || !s->prefill_open) return;
  s->prefill_open = false;
  // Everything was announced: pins and verification decide from here.
  if (s->first_token_seen) return;
  FailPrefill(*s, status.ok() ? absl::UnavailableError("ended before the last Ready") : status);
}

void DecodeCore::OnPrefillUp(uint64_t prefill, const wire::PrefillUp& up, absl::Time now) {
  Sequence* s = Find(prefill);
  if (s == nullptr || !s->prefill_open || s->first_token_seen || !up.has_ready()) return;
  if (!ReadyIsSane(*s, up.ready())) {
    return FailPrefill(*s, absl::InternalError("announced blocks that do not fit the prompt"));
  }
  OnReady(*s, up.ready(), now);
}

bool DecodeCore::ReadyIsSane(const Sequence& s, const wire::Ready& ready) const {
  const uint32_t block_tokens = options_.layout.block_tokens;
  if (ready.full_tokens() > s.start_count || ready.next_tokens() > s.start_count) return false;
  if (ready.has_first() && ready.first().id() >= options_.vocab) return false;
  const bool same_host = s.greeted ? s.same_host : ready.store_incarnation() == store_.incarnation;
  for (const auto& block : ready.blocks()) {
    if (block.index() >= s.blocks.size() || s.blocks[block.index()].ready) return false;
    if (block.tokens() != std::min(block_tokens, s.start_count - block.index() * block_tokens)) {
      return false;
    }
    const uint64_t to_layer = uint64_t{block.first_layer()} + block.checksums_size();
    if (!same_host && (block.checksums_size() == 0 || to_layer > options_.layout.layers)) {
      return false;
    }
  }
  return true;
}

void DecodeCore::OnReady(Sequence& s, const wire::Ready& ready, absl::Time now) {
  s.waiting.insert(s.waiting.end(), ready.blocks().begin(), ready.blocks().end());
  if (!std::exchange(s.greeted, true)) {
    s.same_host = ready.store_incarnation() == store_.incarnation;
    s.source_incarnation = ready.store_incarnation();
    s.data_address = ready.data_address();
    if (!s.same_host && s.blocks_missing > 0) ReserveRemote(s, now);
  }
  if (ready.has_first()) {
    s.first_token_seen = true;
    s.prefill_end = now;
    s.timings.set_queue_s(ready.queue_s());
    s.timings.set_prefill_s(ready.prefill_s());
    const auto& first = ready.first();
    wire::SequenceUpdate& update = UpdateFor(s.gateway, s.id_bytes, s.epoch);
    *update.mutable_prompt_source() = ready.source();
    *update.mutable_timings() = s.timings;
    s.timings_due = true;
    if (EmitToken(s, update, first.id(), first.has_logprobs() ? &first.logprobs() : nullptr)) {
      return;
    }
  }
  TakeBlocks(s, now);
}

// Another host's blocks need slots here. The prompt's partial last block has one already.
void DecodeCore::ReserveRemote(Sequence& s, absl::Time now) {
  const bool partial = s.start_count % options_.layout.block_tokens != 0;
  const uint32_t count = s.blocks_missing - (partial ? 1 : 0);
  if (count == 0) return AssignSlots(s, {}, now);
  s.slots_pending = true;
  wire::StoreRequest request;
  request.mutable_reserve()->set_count(count);
  CallStore(std::move(request), {CallKind::kReserveRemote, s.handle});
}

void DecodeCore::AssignSlots(Sequence& s, std::vector<SlotId> slots, absl::Time now) {
  s.slots_pending = false;
  const uint32_t whole = s.start_count / options_.layout.block_tokens;
  auto next = slots.begin();
  for (uint32_t i = 0; i < s.blocks.size(); ++i) {
    Block& block = s.blocks[i];
    if (block.held) continue;
    if (i < whole && next != slots.end()) {
      block.slot = *next++;
    } else if (i == whole && !s.spare.empty()) {
      block.slot = s.spare.back();
      s.spare.pop_back();
    } else {
      s.spare.insert(s.spare.end(), next, slots.end());
      return Fail(s, absl::InternalError("the store granted fewer slots than were asked for"),
                  options_.self.value());
    }
    block.held = true;
  }
  TakeBlocks(s, now);
}

void DecodeCore::TakeBlocks(Sequence& s, absl::Time now) {
  if (!s.waiting.empty() && !s.slots_pending) {
    if (s.same_host) {
      PinAnnounced(s);
    } else {
      ExtendFetch(s, now);
    }
  }
  JoinWhenComplete(s, now);
}

void DecodeCore::PinAnnounced(Sequence& s) {
  wire::StoreRequest request;
  Call call{CallKind::kPinSlots, s.handle};
  for (const auto& block : s.waiting) {
    *request.mutable_pin_slots()->add_slots() = block.slot();
    call.slots.push_back(SlotFromProto(block.slot()));
    call.blocks.push_back(block.index());
  }
  s.waiting.clear();
  CallStore(std::move(request), std::move(call));
}

void DecodeCore::PinnedSlots(Sequence& s, const Call& call) {
  const uint32_t block_tokens = options_.layout.block_tokens;
  for (size_t i = 0; i < call.slots.size(); ++i) {
    const uint32_t index = call.blocks[i];
    Block& block = s.blocks[index];
    const uint32_t tokens = std::min(block_tokens, s.start_count - index * block_tokens);
    if (block.ready || (tokens < block_tokens && s.spare.empty())) {
      ReleaseSlots({call.slots[i]});
      continue;
    }
    block.slot = call.slots[i];
    if (tokens < block_tokens) {
      // A slot has one writer for life, and the next tokens are ours to write.
      block.slot = s.spare.back();
      s.spare.pop_back();
      CopyTokens(options_.layout, store_.payload(call.slots[i].slot),
                 store_.payload(block.slot.slot), tokens);
      ReleaseSlots({call.slots[i]});
    }
    block.held = true;
    block.ready = true;
    --s.blocks_missing;
  }
}

void DecodeCore::ExtendFetch(Sequence& s, absl::Time now) {
  if (s.fetch == 0) {
    wire::StoreRequest request;
    auto& open = *request.mutable_fetch_open();
    open.set_source_address(s.data_address);
    open.set_source_incarnation(s.source_incarnation);
    open.set_deadline_ms(MillisecondsLeft(s, now));
    s.fetch = CallStore(std::move(request), {CallKind::kFetchOpen, s.handle});
    fetches_[s.fetch] = s.handle;
  }
  if (s.copies.empty()) s.fetch_moved = now;
  wire::StoreRequest request;
  auto& extend = *request.mutable_fetch_extend();
  extend.set_fetch(s.fetch);
  for (const auto& announced : s.waiting) {
    Block& block = s.blocks[announced.index()];
    if (announced.first_layer() != block.checksums.size()) {
      return FailPrefill(s, absl::InternalError("announced layers out of order"));
    }
    block.checksums.insert(block.checksums.end(), announced.checksums().begin(),
                           announced.checksums().end());
    auto& copy = *extend.add_copies();
    *copy.mutable_source() = announced.slot();
    *copy.mutable_dest() = SlotToProto(block.slot);
    copy.set_first_layer(announced.first_layer());
    copy.set_tokens(announced.tokens());
    *copy.mutable_checksums() = announced.checksums();
    copy.set_tag(s.next_tag);
    s.copies.push_back(
        {s.next_tag++, announced.index(), static_cast<uint32_t>(announced.checksums_size())});
  }
  s.waiting.clear();
  Fire(std::move(request));
}

void DecodeCore::OnProgress(const wire::StoreReply::FetchProgress& progress, absl::Time now) {
  auto fetch = fetches_.find(progress.fetch());
  if (fetch == fetches_.end()) return;
  Sequence& s = *sequences_.at(fetch->second);
  if (progress.status().code() != 0) {
    ++counters_.fetch_failures;
    return FailPrefill(s, absl::Status(static_cast<absl::StatusCode>(progress.status().code()),
                                       absl::StrCat("KV transfer: ", progress.status().message())));
  }
  s.fetch_moved = now;
  while (!s.copies.empty() && s.copies.front().tag <= progress.done_tag()) {
    const Copy copy = s.copies.front();
    s.copies.pop_front();
    Block& block = s.blocks[copy.block];
    block.layers_verified += copy.layers;
    if (block.layers_verified == options_.layout.layers) BlockIsReady(s, copy.block);
  }
  JoinWhenComplete(s, now);
}

void DecodeCore::BlockIsReady(Sequence& s, uint32_t index) {
  Block& block = s.blocks[index];
  block.ready = true;
  --s.blocks_missing;
  if (index < s.start_count / options_.layout.block_tokens) {
    CommitBlock(s, index, std::move(block.checksums));
  }
  block.checksums = {};
}

void DecodeCore::JoinWhenComplete(Sequence& s, absl::Time now) {
  if (s.state != Sequence::State::kPrefilling || !s.first_token_seen || s.blocks_missing > 0 ||
      s.first_replies_missing > 0) {
    return;
  }
  s.state = Sequence::State::kRunning;
  s.timings.set_transfer_s(absl::ToDoubleSeconds(now - s.prefill_end));
  if (std::exchange(s.prefill_open, false)) actions_.push_back(HalfClosePrefill{s.handle});
  if (s.fetch != 0) {
    wire::StoreRequest request;
    request.mutable_fetch_close()->set_fetch(s.fetch);
    fetches_.erase(std::exchange(s.fetch, 0));
    s.closing_fetch = true;
    CallStore(std::move(request), {CallKind::kFetchClose, s.handle});
  }
  for (const Block& block : s.blocks) s.payloads.push_back(store_.payload(block.slot.slot));
}

}  // namespace antiphon::decode
