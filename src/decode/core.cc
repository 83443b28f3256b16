#include "decode/core.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/block_key.h"
#include "common/status_macros.h"
#include "common/wire.h"
#include "decode/sequence.h"
#include "engine/wire_sampling.h"

namespace antiphon::decode {
namespace {

absl::Status StatusOf(const wire::OpStatus& status) {
  return absl::Status(static_cast<absl::StatusCode>(status.code()), status.message());
}

}  // namespace

DecodeCore::DecodeCore(CoreOptions options) : options_(std::move(options)) {}
DecodeCore::~DecodeCore() = default;

std::vector<Action> DecodeCore::TakeActions() {
  std::vector<Action> actions;
  actions.reserve(batches_.size() + actions_.size());
  for (auto& [gateway, batch] : batches_) actions.push_back(SendTokens{gateway, std::move(batch)});
  batches_.clear();
  std::move(actions_.begin(), actions_.end(), std::back_inserter(actions));
  actions_.clear();
  return actions;
}

Sequence* DecodeCore::Find(uint64_t handle) {
  auto it = sequences_.find(handle);
  return it == sequences_.end() || it->second->ended ? nullptr : it->second.get();
}

uint64_t DecodeCore::CallStore(wire::StoreRequest request, Call call) {
  const uint64_t id = next_call_;
  calls_.emplace(id, std::move(call));
  Fire(std::move(request));
  return id;
}

void DecodeCore::Fire(wire::StoreRequest request) {
  request.set_id(next_call_++);
  actions_.push_back(StoreCall{std::move(request)});
}

void DecodeCore::ReleaseSlots(const std::vector<SlotId>& slots) {
  if (slots.empty()) return;
  wire::StoreRequest request;
  for (const SlotId& slot : slots) *request.mutable_release()->add_slots() = SlotToProto(slot);
  Fire(std::move(request));
}

void DecodeCore::OnStoreAttached(AttachedStore store) {
  store_ = std::move(store);
  attached_ = true;
}

void DecodeCore::OnStoreLost(const absl::Status& why, absl::Time now) {
  attached_ = false;
  calls_.clear();
  fetches_.clear();
  std::vector<uint64_t> all;
  for (auto& [handle, s] : sequences_) {
    for (Block& block : s->blocks) block.held = false;
    s->spare.clear();
    s->fetch = 0;
    s->closing_fetch = false;
    all.push_back(handle);
  }
  const absl::Status status = absl::UnavailableError(
      absl::StrCat("the KV store of the decode worker is lost: ", std::string(why.message())));
  for (uint64_t handle : all) {
    if (Sequence* s = Find(handle); s != nullptr) {
      Fail(*s, status, options_.self.value());
    } else {
      Clean(*sequences_[handle]);
    }
  }
}

void DecodeCore::OnStoreReply(const wire::StoreReply& reply, absl::Time now) {
  if (reply.id() == 0) {
    if (reply.has_progress()) OnProgress(reply.progress(), now);
    return;
  }
  auto it = calls_.find(reply.id());
  if (it == calls_.end()) return;
  const Call call = std::move(it->second);
  calls_.erase(it);
  const absl::Status status = StatusOf(reply.status());
  if (call.kind == CallKind::kFetchClose) {
    auto& s = *sequences_.at(call.sequence);
    s.closing_fetch = false;
    if (s.ended) Clean(s);
    return;
  }
  std::vector<SlotId> slots;
  for (const auto& ref : reply.slots().slots()) slots.push_back(SlotFromProto(ref));
  Sequence* s = Find(call.sequence);
  if (s == nullptr) {  // it ended while the store was at work
    if (call.kind == CallKind::kPinSlots && status.ok()) slots = call.slots;
    ReleaseSlots(slots);
    return;
  }
  if (absl::IsUnavailable(status)) return Fail(*s, status, options_.self.value());
  switch (call.kind) {
    case CallKind::kPin:
      if (!status.ok()) return Fail(*s, status, "");
      for (size_t i = 0; i < slots.size() && i < s->blocks.size(); ++i) {
        s->blocks[i] = {.slot = slots[i], .held = true, .ready = true};
      }
      s->blocks_missing = s->blocks.size() - slots.size();
      if (--s->first_replies_missing == 0) OpenPrefillFor(*s, now);
      return;
    case CallKind::kReserve:
      if (!status.ok()) {
        ++counters_.refused;
        return Fail(*s, status, options_.self.value());
      }
      s->spare = std::move(slots);
      --s->first_replies_missing;
      if (s->state == Sequence::State::kPrefilling) return JoinWhenComplete(*s, now);
      if (s->first_replies_missing == 0) OpenPrefillFor(*s, now);
      return;
    case CallKind::kReserveRemote: {
      if (!status.ok()) {
        ++counters_.refused;
        return Fail(*s, status, options_.self.value());
      }
      return AssignSlots(*s, std::move(slots), now);
    }
    case CallKind::kPinSlots:
      if (!status.ok()) return FailPrefill(*s, status);
      PinnedSlots(*s, call);
      return JoinWhenComplete(*s, now);
    case CallKind::kFetchOpen:
      if (!status.ok()) {
        ++counters_.fetch_failures;
        return FailPrefill(*s, status);
      }
      return;
    case CallKind::kGrow:
      s->growing = false;
      if (status.ok()) {
        s->spare.insert(s->spare.end(), slots.begin(), slots.end());
      } else {
        s->growth_failed = true;
      }
      return;
    case CallKind::kFetchClose:
      return;
  }
}

absl::Status DecodeCore::Validate(const wire::Start& start) const {
  const auto sixteen = [](const std::string& bytes, const char* field) {
    return bytes.size() == 16 ? absl::OkStatus()
                              : absl::InvalidArgumentError(absl::StrCat(
                                    field, " has ", bytes.size(), " bytes; 16 are expected"));
  };
  RETURN_IF_ERROR(sixteen(start.id(), "id"));
  RETURN_IF_ERROR(sixteen(start.root_key(), "root_key"));
  if (start.epoch() == 0) return absl::InvalidArgumentError("epoch is 0; they are counted from 1");
  if (start.prompt_ids_size() == 0) return absl::InvalidArgumentError("prompt_ids is empty");
  const auto in_vocabulary = [this](const auto& ids, const char* field) {
    for (int i = 0; i < ids.size(); ++i) {
      if (ids[i] >= options_.vocab) {
        return absl::InvalidArgumentError(
            absl::StrCat(field, "[", i, "] is ", ids[i], "; the vocabulary has ", options_.vocab));
      }
    }
    return absl::OkStatus();
  };
  RETURN_IF_ERROR(in_vocabulary(start.prompt_ids(), "prompt_ids"));
  RETURN_IF_ERROR(in_vocabulary(start.emitted_ids(), "emitted_ids"));
  if (static_cast<uint32_t>(start.prompt_ids_size()) >= options_.context) {
    return absl::InvalidArgumentError(absl::StrCat("prompt_ids has ", start.prompt_ids_size(),
                                                   " tokens, which leaves no room in the context "
                                                   "of ",
                                                   options_.context));
  }
  if (start.stop().max_tokens() == 0) {
    return absl::InvalidArgumentError("stop.max_tokens is 0; at least one token is generated");
  }
  if (start.placement().prefill_address().empty()) {
    return absl::InvalidArgumentError("placement.prefill_address is empty");
  }
  return absl::OkStatus();
}

absl::Status DecodeCore::Admit(uint32_t tokens) const {
  if (by_id_.size() >= options_.sequences_max) {
    return absl::ResourceExhaustedError(absl::StrCat("decode is full: ", by_id_.size(), " of ",
                                                     options_.sequences_max, " sequences"));
  }
  if (by_id_.empty() || options_.tbt_max == absl::InfiniteDuration()) return absl::OkStatus();
  uint64_t context = tokens;
  for (const auto& [id, handle] : by_id_) context += sequences_.at(handle)->ids.size();
  const absl::Duration step =
      absl::Seconds(cost_.base + cost_.per_row * (by_id_.size() + 1) + cost_.per_context * context);
  if (step <= options_.tbt_max) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat("a step with this sequence would take ",
                                                   absl::FormatDuration(step), "; slo.tbt is ",
                                                   absl::FormatDuration(options_.tbt_max)));
}

void DecodeCore::OnStart(uint64_t gateway, const wire::Start& start, absl::Time now) {
  const auto refuse = [&](const absl::Status& status) { Refuse(gateway, start, status); };
  if (absl::Status status = Validate(start); !status.ok()) return refuse(status);
  auto params = engine::SamplingFromProto(start.sampling(), options_.vocab);
  if (!params.ok()) return refuse(params.status());
  const RequestId id = *RequestId::FromBytes(start.id());
  switch (fence_.Raise(id, start.epoch())) {
    case EpochFence::Verdict::kSame:
      return;
    case EpochFence::Verdict::kStale:
      return refuse(absl::AbortedError(
          absl::StrCat("epoch ", start.epoch(), " is stale; ", fence_.EpochOf(id), " was seen")));
    case EpochFence::Verdict::kRaised:
      break;
  }
  if (auto older = by_id_.find(id); older != by_id_.end()) {
    Fail(*sequences_[older->second],
         absl::AbortedError(absl::StrCat("epoch ", start.epoch(), " took over")), "");
  }
  const uint32_t n = start.prompt_ids_size() + start.emitted_ids_size();
  if (static_cast<uint32_t>(start.emitted_ids_size()) >= start.stop().max_tokens() ||
      n >= options_.context) {
    ++counters_.started;
    UpdateFor(gateway, start.id(), start.epoch()).set_finish(wire::FINISH_REASON_LENGTH);
    return;
  }
  if (draining_) return refuse(absl::UnavailableError("draining"));
  if (!attached_) return refuse(absl::UnavailableError("no KV store is attached"));
  if (absl::Status status = Admit(n); !status.ok()) return refuse(status);

  ++counters_.started;
  auto owned = std::make_unique<Sequence>();
  Sequence& s = *owned;
  s.handle = next_handle_++;
  s.gateway = gateway;
  s.id_bytes = start.id();
  s.id = id;
  s.epoch = start.epoch();
  s.label = start.request_label();
  s.ids.reserve(std::min<uint64_t>(options_.context, uint64_t{n} + start.stop().max_tokens()));
  s.ids.assign(start.prompt_ids().begin(), start.prompt_ids().end());
  s.prompt_count = s.ids.size();
  s.ids.insert(s.ids.end(), start.emitted_ids().begin(), start.emitted_ids().end());
  s.start_count = n;
  s.root = *BlockKey::FromBytes(start.root_key());
  s.keys = BlockKeys(s.root, s.ids, options_.layout.block_tokens);
  s.params = *std::move(params);
  s.sampling = start.sampling();
  s.max_tokens = start.stop().max_tokens();
  s.min_tokens = start.stop().min_tokens();
  s.stop_ids.assign(start.stop().stop_ids().begin(), start.stop().stop_ids().end());
  std::sort(s.stop_ids.begin(), s.stop_ids.end());
  s.placement = start.placement();
  if (start.deadline_ms() > 0) s.deadline = now + absl::Milliseconds(start.deadline_ms());
  s.blocks.resize(options_.layout.BlocksFor(n));
  s.blocks_missing = s.blocks.size();
  sequences_.emplace(s.handle, std::move(owned));
  by_id_[id] = s.handle;

  if (s.placement.prefill_store_incarnation() == store_.incarnation) {
    // Prefill looks for the prompt's blocks in the same store, and tells of all of them.
    ReserveFirst(s);
    return OpenPrefillFor(s, now);
  }
  PinPrefix(s);
  ReserveFirst(s);
}

wire::SequenceUpdate& DecodeCore::UpdateFor(uint64_t gateway, const std::string& id,
                                            uint32_t epoch) {
  wire::SequenceUpdate& update = *batches_[gateway].add_updates();
  update.set_id(id);
  update.set_epoch(epoch);
  return update;
}

void DecodeCore::Refuse(uint64_t gateway, const wire::Start& start, const absl::Status& status) {
  ++counters_.refused;
  wire::SequenceUpdate& update = UpdateFor(gateway, start.id(), start.epoch());
  update.mutable_error()->set_code(static_cast<int>(status.code()));
  update.mutable_error()->set_message(std::string(status.message()));
  if (absl::IsUnavailable(status) || absl::IsResourceExhausted(status)) {
    update.set_failed_node(options_.self.value());
  }
}

void DecodeCore::Fail(Sequence& s, const absl::Status& status, const std::string& failed_node) {
  wire::SequenceUpdate& update = UpdateFor(s.gateway, s.id_bytes, s.epoch);
  update.set_first_index(s.emitted_count());
  update.mutable_error()->set_code(static_cast<int>(status.code()));
  update.mutable_error()->set_message(std::string(status.message()));
  update.set_failed_node(failed_node);
  Drop(s);
}

// The sequence is over for everyone outside; its slots follow when nothing touches them.
void DecodeCore::Drop(Sequence& s) {
  s.ended = true;
  by_id_.erase(s.id);
  if (std::exchange(s.prefill_open, false)) actions_.push_back(CancelPrefill{s.handle});
  if (s.fetch != 0) {
    wire::StoreRequest request;
    request.mutable_fetch_close()->set_fetch(s.fetch);
    fetches_.erase(std::exchange(s.fetch, 0));
    s.closing_fetch = true;
    CallStore(std::move(request), {CallKind::kFetchClose, s.handle});
  }
  Clean(s);
}

void DecodeCore::Clean(Sequence& s) {
  if (s.in_step || s.closing_fetch) return;
  std::vector<SlotId> slots = std::move(s.spare);
  for (const Block& block : s.blocks) {
    if (block.held) slots.push_back(block.slot);
  }
  ReleaseSlots(slots);
  sequences_.erase(s.handle);
}

void DecodeCore::OnCancel(uint64_t gateway, const wire::Cancel& cancel) {
  const auto id = RequestId::FromBytes(cancel.id());
  if (!id.has_value()) return;
  fence_.Raise(*id, cancel.epoch());
  auto live = by_id_.find(*id);
  if (live == by_id_.end()) return;
  Sequence& s = *sequences_[live->second];
  if (s.epoch <= cancel.epoch()) Fail(s, absl::CancelledError("cancelled by the gateway"), "");
}

void DecodeCore::OnGatewayBroken(uint64_t gateway) {
  std::vector<Sequence*> carried;
  for (auto& [handle, s] : sequences_) {
    if (!s->ended && s->gateway == gateway) carried.push_back(s.get());
  }
  for (Sequence* s : carried) Drop(*s);
  batches_.erase(gateway);
}

void DecodeCore::EndAll(const absl::Status& status) {
  std::vector<Sequence*> live;
  for (auto& [handle, s] : sequences_) {
    if (!s->ended) live.push_back(s.get());
  }
  for (Sequence* s : live) Fail(*s, status, options_.self.value());
}

absl::Time DecodeCore::StallAt(const Sequence& s) const {
  return s.copies.empty() ? absl::InfiniteFuture() : s.fetch_moved + options_.fetch_stall_max;
}

absl::Time DecodeCore::next_deadline() const {
  absl::Time next = absl::InfiniteFuture();
  for (const auto& [handle, s] : sequences_) {
    if (!s->ended) next = std::min({next, s->deadline, StallAt(*s)});
  }
  return next;
}

void DecodeCore::Tick(absl::Time now) {
  std::vector<Sequence*> live;
  for (auto& [handle, s] : sequences_) {
    if (!s->ended) live.push_back(s.get());
  }
  for (Sequence* s : live) {
    if (s->deadline <= now) {
      Fail(*s, absl::DeadlineExceededError("the request's deadline passed"), "");
    } else if (StallAt(*s) <= now) {
      ++counters_.fetch_failures;
      FailPrefill(*s, absl::UnavailableError("KV that prefill announced does not arrive"));
    }
  }
}

Load DecodeCore::load() const {
  Load load;
  for (const auto& [handle, s] : sequences_) {
    if (s->ended) continue;
    if (s->state == Sequence::State::kRunning) {
      ++load.running;
      load.context_tokens += s->ids.size();
    } else {
      ++load.prefilling;
    }
  }
  return load;
}

}  // namespace antiphon::decode
