#include "prefill/core.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/block_key.h"
#include "common/status_macros.h"
#include "common/wire.h"
#include "engine/check_step.h"
#include "engine/wire_sampling.h"
#include "prefill/stream.h"

namespace antiphon::prefill {
namespace {

// How long another store may take to deliver a prefix before it is computed here instead.
constexpr absl::Duration kFetchDeadline = absl::Seconds(10);

absl::Status StatusOf(const wire::StoreReply& reply) {
  return absl::Status(static_cast<absl::StatusCode>(reply.status().code()),
                      reply.status().message());
}

}  // namespace

PrefillCore::PrefillCore(CoreOptions options) : options_(std::move(options)) {
  if (options_.publish_layers == 0) {
    options_.publish_layers = std::max(1u, options_.layout.layers / 8);
  }
}

PrefillCore::~PrefillCore() = default;

std::vector<Action> PrefillCore::TakeActions() { return std::exchange(actions_, {}); }

Stream* PrefillCore::Find(uint64_t handle) {
  auto it = streams_.find(handle);
  return it == streams_.end() || it->second->ended ? nullptr : it->second.get();
}

void PrefillCore::CallStore(wire::StoreRequest request, CallKind kind, uint64_t stream) {
  calls_.emplace(next_call_, Call{kind, stream});
  Fire(std::move(request));
}

void PrefillCore::Fire(wire::StoreRequest request) {
  request.set_id(next_call_++);
  actions_.push_back(StoreCall{std::move(request)});
}

void PrefillCore::ReleaseSlots(const std::vector<SlotId>& slots) {
  if (slots.empty()) return;
  wire::StoreRequest request;
  for (const SlotId& slot : slots) *request.mutable_release()->add_slots() = SlotToProto(slot);
  Fire(std::move(request));
}

void PrefillCore::OnStoreAttached(AttachedStore store) {
  store_ = std::move(store);
  attached_ = true;
}

void PrefillCore::OnStoreLost(const absl::Status& why, absl::Time now) {
  attached_ = false;
  calls_.clear();
  for (auto& [handle, s] : streams_) s->blocks.clear();
  EndAll(absl::UnavailableError(
      absl::StrCat("the KV store of this host is lost: ", std::string(why.message()))));
}

void PrefillCore::OnStoreReply(const wire::StoreReply& reply, absl::Time now) {
  auto call = calls_.find(reply.id());
  if (call == calls_.end()) return;
  const auto [kind, handle] = call->second;
  calls_.erase(call);
  Stream* s = Find(handle);
  if (s == nullptr) {  // it ended while the store was at work
    std::vector<SlotId> slots;
    for (const auto& ref : reply.slots().slots()) slots.push_back(SlotFromProto(ref));
    ReleaseSlots(slots);
    return;
  }
  const absl::Status status = StatusOf(reply);
  if (absl::IsUnavailable(status)) return Finish(*s, status);
  switch (kind) {
    case CallKind::kPin:
      if (absl::IsResourceExhausted(status)) return RefuseSlots(*s, status);
      if (!status.ok()) return Finish(*s, status);
      AddSlots(*s, reply);
      s->dram_blocks =
          s->blocks.size() - std::min<size_t>(s->blocks.size(), reply.slots().reserved());
      if (reply.slots().reserved() > 0) return StartWithAllSlots(*s);
      return FetchOrReserve(*s, now);
    case CallKind::kFetch:
      // A fetch that fails is a miss.
      AddSlots(*s, reply);
      s->remote_blocks = s->blocks.size() - s->dram_blocks;
      return Reserve(*s);
    case CallKind::kReserve:
      if (!status.ok()) return RefuseSlots(*s, status);
      AddSlots(*s, reply);
      return StartWithAllSlots(*s);
  }
}

void PrefillCore::RefuseSlots(Stream& s, const absl::Status& status) {
  ++counters_.refused;
  Finish(s, absl::Status(status.code(), absl::StrCat("no KV slots for the prompt: ",
                                                     std::string(status.message()))));
}

void PrefillCore::StartWithAllSlots(Stream& s) {
  if (s.blocks.size() != options_.layout.BlocksFor(s.ids.size())) {
    return Finish(s, absl::InternalError("the store granted another number of slots than were "
                                         "asked for"));
  }
  StartComputing(s);
}

void PrefillCore::AddSlots(Stream& s, const wire::StoreReply& reply) {
  for (const auto& ref : reply.slots().slots()) {
    s.blocks.push_back(SlotFromProto(ref));
    s.payloads.push_back(store_.payload(ref.slot()));
  }
}

absl::Status PrefillCore::Validate(const wire::PrefillOpen& open) const {
  const auto sixteen = [](const std::string& bytes, const char* field) {
    return bytes.size() == 16 ? absl::OkStatus()
                              : absl::InvalidArgumentError(absl::StrCat(
                                    field, " has ", bytes.size(), " bytes; 16 are expected"));
  };
  RETURN_IF_ERROR(sixteen(open.id(), "id"));
  RETURN_IF_ERROR(sixteen(open.root_key(), "root_key"));
  if (open.epoch() == 0) return absl::InvalidArgumentError("epoch is 0; they are counted from 1");
  const uint32_t n = open.ids_size();
  if (n == 0) return absl::InvalidArgumentError("ids is empty");
  if (n > options_.context) {
    return absl::InvalidArgumentError(
        absl::StrCat("ids has ", n, " tokens; the context holds ", options_.context));
  }
  for (uint32_t i = 0; i < n; ++i) {
    if (open.ids(i) >= options_.vocab) {
      return absl::InvalidArgumentError(
          absl::StrCat("ids[", i, "] is ", open.ids(i), "; the vocabulary has ", options_.vocab));
    }
  }
  if (open.prompt_count() == 0 || open.prompt_count() > n) {
    return absl::InvalidArgumentError(
        absl::StrCat("prompt_count is ", open.prompt_count(), "; it must be between 1 and ", n));
  }
  if (open.have_blocks() > n / options_.layout.block_tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("have_blocks is ", open.have_blocks(), "; the prompt has ",
                     n / options_.layout.block_tokens, " whole blocks"));
  }
  return absl::OkStatus();
}

void PrefillCore::OnOpen(uint64_t stream, const wire::PrefillOpen& open, absl::Time now) {
  const auto refuse = [&](absl::Status status) {
    ++counters_.refused;
    actions_.push_back(End{stream, std::move(status)});
  };
  if (absl::Status status = Validate(open); !status.ok()) return refuse(std::move(status));
  auto params = engine::SamplingFromProto(open.sampling(), options_.vocab);
  if (!params.ok()) return refuse(params.status());
  const RequestId id = *RequestId::FromBytes(open.id());
  if (fence_.Raise(id, open.epoch()) != EpochFence::Verdict::kRaised) {
    return refuse(
        absl::AbortedError(absl::StrCat("epoch ", open.epoch(), " of ", id.Hex(),
                                        " is not new; the highest seen is ", fence_.EpochOf(id))));
  }
  if (auto older = by_id_.find(id); older != by_id_.end()) {
    Finish(*streams_[older->second],
           absl::AbortedError(absl::StrCat("epoch ", open.epoch(), " took over")));
  }
  if (draining_) return refuse(absl::UnavailableError("draining"));
  if (!attached_) return refuse(absl::UnavailableError("no KV store is attached"));
  if (by_id_.size() >= options_.streams_max) {
    return refuse(absl::ResourceExhaustedError(
        absl::StrCat("the prefill queue is full: ", by_id_.size(), " streams")));
  }

  auto owned = std::make_unique<Stream>();
  Stream& s = *owned;
  s.handle = stream;
  s.id = id;
  s.epoch = open.epoch();
  s.label = open.request_label();
  s.ids.assign(open.ids().begin(), open.ids().end());
  s.prompt_count = open.prompt_count();
  s.root = *BlockKey::FromBytes(open.root_key());
  s.keys = BlockKeys(s.root, s.ids, options_.layout.block_tokens);
  s.sources.assign(open.sources().begin(), open.sources().end());
  s.params = *std::move(params);
  if (s.ids.size() - s.prompt_count < open.stop().min_tokens()) {
    s.masked_ids.assign(open.stop().stop_ids().begin(), open.stop().stop_ids().end());
  }
  s.have_blocks = open.have_blocks();
  s.same_host = open.store_incarnation() == store_.incarnation;
  s.arrival = now;
  s.deadline = now + (open.deadline_ms() > 0 ? absl::Milliseconds(open.deadline_ms())
                                             : options_.deadline_default);
  streams_.emplace(stream, std::move(owned));
  by_id_[id] = stream;

  const uint32_t reusable = ReusableBlocks(s);
  if (reusable == 0) return Reserve(s);
  wire::StoreRequest request;
  // What is not here is computed, when no other store has it.
  if (BestSource(s) == nullptr) {
    request.mutable_pin_prefix()->set_reserve_to(options_.layout.BlocksFor(s.ids.size()));
  }
  for (uint32_t i = 0; i < reusable; ++i) {
    request.mutable_pin_prefix()->add_keys(s.keys[i].ToBytes());
  }
  CallStore(std::move(request), CallKind::kPin, s.handle);
}

// The last token is always computed: its row gives the first token's logits.
uint32_t PrefillCore::ReusableBlocks(const Stream& s) const {
  return (s.ids.size() - 1) / options_.layout.block_tokens;
}

// The other store that has most of the prompt, if it has more than is here.
const wire::BlockSource* PrefillCore::BestSource(const Stream& s) const {
  const wire::BlockSource* best = nullptr;
  for (const auto& source : s.sources) {
    if (source.incarnation() == store_.incarnation || source.blocks() <= s.blocks.size()) continue;
    if (best == nullptr || source.blocks() > best->blocks()) best = &source;
  }
  return best;
}

void PrefillCore::FetchOrReserve(Stream& s, absl::Time now) {
  const uint32_t have = s.blocks.size();
  const wire::BlockSource* best = BestSource(s);
  const uint32_t to = best == nullptr ? 0 : std::min(best->blocks(), ReusableBlocks(s));
  if (to <= have) return Reserve(s);
  s.state = Stream::State::kFetching;
  wire::StoreRequest request;
  auto& fetch = *request.mutable_fetch_prefix();
  fetch.set_source_rpc_address(best->rpc_address());
  fetch.set_source_incarnation(best->incarnation());
  fetch.set_first_position(have);
  fetch.set_deadline_ms(absl::ToInt64Milliseconds(
      std::max(absl::Milliseconds(1), std::min(kFetchDeadline, s.deadline - now))));
  for (uint32_t i = have; i < to; ++i) fetch.add_keys(s.keys[i].ToBytes());
  CallStore(std::move(request), CallKind::kFetch, s.handle);
}

void PrefillCore::Reserve(Stream& s) {
  s.state = Stream::State::kReserving;
  wire::StoreRequest request;
  request.mutable_reserve()->set_count(options_.layout.BlocksFor(s.ids.size()) - s.blocks.size());
  CallStore(std::move(request), CallKind::kReserve, s.handle);
}

void PrefillCore::StartComputing(Stream& s) {
  s.state = Stream::State::kComputing;
  s.done_tokens = (s.dram_blocks + s.remote_blocks) * options_.layout.block_tokens;
  counters_.dram_tokens += s.dram_blocks * options_.layout.block_tokens;
  counters_.remote_tokens += s.remote_blocks * options_.layout.block_tokens;
  AnnouncePrefix(s);
}

void PrefillCore::OnHalfClose(uint64_t stream, absl::Time now) {
  Stream* s = Find(stream);
  if (s == nullptr) return;
  Finish(*s, s->state == Stream::State::kServing
                 ? absl::OkStatus()
                 : absl::CancelledError("the consumer half-closed before the last Ready"));
}

void PrefillCore::OnBroken(uint64_t stream) {
  if (Stream* s = Find(stream); s != nullptr) Drop(*s);
}

void PrefillCore::Finish(Stream& s, const absl::Status& status) {
  actions_.push_back(End{s.handle, status});
  Drop(s);
}

void PrefillCore::Drop(Stream& s) {
  s.ended = true;
  by_id_.erase(s.id);
  Clean(s);
}

void PrefillCore::Clean(Stream& s) {
  if (s.in_step) return;
  ReleaseSlots(s.blocks);
  streams_.erase(s.handle);
}

void PrefillCore::EndAll(const absl::Status& status) {
  std::vector<uint64_t> live;
  for (const auto& [handle, s] : streams_) {
    if (!s->ended) live.push_back(handle);
  }
  for (uint64_t handle : live) Finish(*streams_[handle], status);
}

absl::Time PrefillCore::next_deadline() const {
  absl::Time next = absl::InfiniteFuture();
  for (const auto& [handle, s] : streams_) {
    if (!s->ended) next = std::min(next, s->deadline);
  }
  return next;
}

void PrefillCore::Tick(absl::Time now) {
  std::vector<uint64_t> late;
  for (const auto& [handle, s] : streams_) {
    if (!s->ended && s->deadline <= now) late.push_back(handle);
  }
  for (uint64_t handle : late) {
    Finish(*streams_[handle], absl::DeadlineExceededError("the request's deadline passed in "
                                                          "prefill"));
  }
}

void PrefillCore::Plan(uint32_t tokens, absl::Time now,
                       std::vector<engine::SequenceChunk>& chunks) {
  CHECK(planned_.empty() && uncommitted_.empty());
  // Least slack first. The key does not move as a stream progresses, so that two equal prompts run
  // one after the other and not in turns (which would delay both first tokens).
  std::vector<std::pair<absl::Time, Stream*>> queue;
  for (const auto& [handle, s] : streams_) {
    if (s->ended || s->state != Stream::State::kComputing) continue;
    queue.emplace_back(s->deadline - absl::Seconds(options_.seconds_per_token * s->ids.size()),
                       s.get());
  }
  std::sort(queue.begin(), queue.end(), [](const auto& a, const auto& b) {
    return std::pair(a.first, a.second->handle) < std::pair(b.first, b.second->handle);
  });
  const uint32_t block = options_.layout.block_tokens;
  for (auto& [slack, s] : queue) {
    const uint32_t n = s->ids.size();
    uint32_t end = std::min<uint64_t>(n, uint64_t{s->done_tokens} + tokens);
    if (end < n) end = end / block * block;
    if (end <= s->done_tokens) continue;
    tokens -= end - s->done_tokens;
    s->in_step = true;
    s->chunk_end = end;
    s->announced_layers = 0;
    const uint32_t blocks = options_.layout.BlocksFor(end);
    s->checksums.assign((blocks - s->done_tokens / block) * size_t{options_.layout.layers}, 0);
    s->checksum_layers = 0;
    s->first_step = std::min(s->first_step, now);
    planned_.push_back(s->handle);
    engine::SequenceChunk chunk{
        .sequence = s->handle,
        .tokens = absl::MakeConstSpan(s->ids).subspan(s->done_tokens, end - s->done_tokens),
        .start = s->done_tokens,
        .blocks = absl::MakeConstSpan(s->payloads).first(blocks)};
    if (options_.engine_makes_checksums) chunk.checksums = absl::MakeSpan(s->checksums);
    if (end == n) {
      chunk.sample =
          engine::SampleRequest{.params = &s->params,
                                .prompt_ids = absl::MakeConstSpan(s->ids).first(s->prompt_count),
                                .emitted_ids = absl::MakeConstSpan(s->ids).subspan(s->prompt_count),
                                .masked_ids = s->masked_ids};
    }
    chunks.push_back(std::move(chunk));
  }
}

bool PrefillCore::WatchesLayers() const {
  return std::any_of(planned_.begin(), planned_.end(), [this](uint64_t handle) {
    const Stream& s = *streams_.at(handle);
    return !s.ended && !s.same_host;
  });
}

void PrefillCore::OnProgress(uint32_t layers_done) {
  for (uint64_t handle : planned_) {
    Stream& s = *streams_[handle];
    if (s.ended || s.same_host) continue;
    if (layers_done >= s.announced_layers + options_.publish_layers) AnnounceLayers(s, layers_done);
  }
}

void PrefillCore::OnStepDone(const absl::StatusOr<absl::Span<const engine::ChunkResult>>& results,
                             absl::Time now) {
  const std::vector<uint64_t> planned = std::exchange(planned_, {});
  CHECK(!results.ok() || results->size() == planned.size());
  for (size_t i = 0; i < planned.size(); ++i) {
    Stream& s = *streams_[planned[i]];
    s.in_step = false;
    if (s.ended) {
      Clean(s);
      continue;
    }
    if (!results.ok()) {
      Finish(s, engine::EndOfSequences(results.status()));
      continue;
    }
    counters_.computed_tokens += s.chunk_end - s.done_tokens;
    if (s.epoch > 1) counters_.recomputed_tokens += s.chunk_end - s.done_tokens;
    const bool last = s.chunk_end == s.ids.size();
    if (last && !(*results)[i].sampled.has_value()) {
      Finish(s, absl::InternalError("the engine drew no token"));
      continue;
    }
    if (!s.same_host) ChecksumLayers(s, options_.layout.layers);
    AnnounceChunk(s, last ? &(*results)[i] : nullptr, now);
    uncommitted_.push_back(s.handle);
    if (last) s.state = Stream::State::kServing;
  }
}

void PrefillCore::CommitStep() {
  for (uint64_t handle : std::exchange(uncommitted_, {})) {
    const auto it = streams_.find(handle);
    if (it == streams_.end() || it->second->ended) continue;  // its slots are released
    Stream& s = *it->second;
    ChecksumLayers(s, options_.layout.layers);
    CommitChunk(s);
    s.done_tokens = s.chunk_end;
  }
}

Load PrefillCore::load() const {
  Load load;
  for (const auto& [handle, s] : streams_) {
    if (s->ended) continue;
    if (s->state == Stream::State::kServing) {
      ++load.serving;
    } else {
      ++load.waiting;
      load.waiting_tokens += s->ids.size() - s->done_tokens;
    }
  }
  return load;
}

}  // namespace antiphon::prefill
