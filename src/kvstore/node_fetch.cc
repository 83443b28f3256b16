// The fetches of StoreNode: StreamFetch and PrefixFetch decide, this pulls, verifies and pins.
#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <utility>

#include "antiphon/v1/model.pb.h"
#include "antiphon/v1/store.pb.h"
#include "common/logging.h"
#include "common/status_macros.h"
#include "kvstore/node.h"
#include "kvstore/node_metrics.h"

namespace antiphon::kvstore {
namespace {

constexpr uint32_t kPrefixKeysMax = 1 << 16;
// A fetch behind a watermark lives as long as the prefill that it follows.
constexpr absl::Duration kStreamDefault = absl::Seconds(60), kStreamMax = absl::Minutes(30);
constexpr absl::Duration kPrefixDefault = absl::Seconds(5), kPrefixMax = absl::Seconds(60);

absl::Duration DeadlineOf(uint32_t ms, absl::Duration otherwise, absl::Duration max) {
  return ms == 0 ? otherwise : std::min(absl::Milliseconds(ms), max);
}

absl::Status CheckCopy(const wire::StoreRequest::LayerCopy& copy, const KvLayout& layout) {
  const auto layers = static_cast<uint32_t>(copy.checksums_size());
  if (layers == 0) return absl::InvalidArgumentError("copies.checksums is empty");
  if (layers > layout.layers || copy.first_layer() > layout.layers - layers) {
    return absl::InvalidArgumentError(
        fmt::format("copies: layers [{}, {}) of {}", copy.first_layer(),
                    uint64_t{copy.first_layer()} + layers, layout.layers));
  }
  if (copy.tokens() == 0 || copy.tokens() > layout.block_tokens) {
    return absl::InvalidArgumentError(
        fmt::format("copies.tokens is {}; it is 1 to {}", copy.tokens(), layout.block_tokens));
  }
  return absl::OkStatus();
}

}  // namespace

void StoreNode::HoldDestination(SlotId dest) {
  CHECK(core_->PinSlots(kStoreItself, {dest}).ok());
  ++writing_[dest.slot];
}

void StoreNode::LetGoDestination(SlotId dest) {
  auto it = writing_.find(dest.slot);
  if (--it->second == 0) writing_.erase(it);
  CHECK(core_->Release(kStoreItself, {dest}).ok());
}

// Pull, then verify, then `done` on the executor. Posted, so never before this returns.
transfer::PullId StoreNode::Pull(transfer::PullRequest request,
                                 absl::AnyInvocable<absl::Status()> verify,
                                 absl::AnyInvocable<void(absl::Status)> done) {
  return options_.transport->Pull(
      std::move(request),
      [executor = options_.executor, verifier = options_.verifier, verify = std::move(verify),
       done = std::move(done)](absl::Status pulled) mutable {
        if (!pulled.ok()) {
          executor->Post([done = std::move(done), pulled]() mutable { done(pulled); });
          return;
        }
        verifier->Post([executor, verify = std::move(verify), done = std::move(done)]() mutable {
          absl::Status verified = verify();
          executor->Post([done = std::move(done), verified]() mutable { done(verified); });
        });
      });
}

void StoreNode::EndFetchesOf(SessionId session) {
  std::vector<StreamKey> streams;
  for (auto it = streams_.lower_bound({session, 0});
       it != streams_.end() && it->first.first == session; ++it) {
    streams.push_back(it->first);
  }
  for (const StreamKey& key : streams) EndStream(key, absl::CancelledError("the worker left"));
  std::vector<uint64_t> prefixes;
  for (const auto& [id, prefix] : prefixes_) {
    if (prefix.session == session) prefixes.push_back(id);
  }
  for (uint64_t id : prefixes) EndPrefix(id);
}

// ---- behind a watermark

absl::Status StoreNode::OpenStream(SessionId session, const wire::StoreRequest& request) {
  const auto& open = request.fetch_open();
  if (options_.transport == nullptr) {
    return absl::UnavailableError("this store has no transport to other hosts");
  }
  if (open.source_address().empty()) {
    return absl::InvalidArgumentError("fetch_open.source_address is empty");
  }
  const StreamKey key(session, request.id());
  if (streams_.contains(key)) {
    return absl::InvalidArgumentError(fmt::format("fetch {} is open already", request.id()));
  }
  Stream& stream = streams_[key];
  stream.source = open.source_address();
  stream.incarnation = open.source_incarnation();
  const absl::Duration life = DeadlineOf(open.deadline_ms(), kStreamDefault, kStreamMax);
  stream.deadline = options_.clock->Now() + life;
  stream.timer = options_.executor->PostAfter(
      life, Guard([this, key] {
        EndStream(key, absl::DeadlineExceededError("the fetch's deadline passed"));
      }));
  return absl::OkStatus();
}

absl::Status StoreNode::ExtendStream(SessionId session, const wire::StoreRequest& request) {
  const auto& extend = request.fetch_extend();
  const StreamKey key(session, extend.fetch());
  auto it = streams_.find(key);
  if (it == streams_.end()) {
    return absl::NotFoundError(fmt::format("fetch {} is not open", extend.fetch()));
  }
  std::vector<LayerCopy> copies;
  copies.reserve(static_cast<size_t>(extend.copies_size()));
  for (const auto& proto : extend.copies()) {
    RETURN_IF_ERROR(CheckCopy(proto, *layout_));
    LayerCopy copy{.source = SlotFromProto(proto.source()),
                   .dest = SlotFromProto(proto.dest()),
                   .first_layer = proto.first_layer(),
                   .tokens = proto.tokens(),
                   .tag = proto.tag()};
    copy.checksums.assign(proto.checksums().begin(), proto.checksums().end());
    if (!core_->MayWrite(session, copy.dest)) {
      return absl::NotFoundError(
          fmt::format("copies.dest: slot {} generation {} is no reservation of this worker",
                      copy.dest.slot, copy.dest.generation));
    }
    copies.push_back(std::move(copy));
  }
  RETURN_IF_ERROR(it->second.plan.Extend(std::move(copies)));
  PumpStream(key);
  return absl::OkStatus();
}

// Answered when nothing writes to the worker's slots any more.
absl::Status StoreNode::CloseStream(SessionId session, const wire::StoreRequest& request) {
  const StreamKey key(session, request.fetch_close().fetch());
  auto it = streams_.find(key);
  if (it == streams_.end()) {
    Reply(session, request.id(), absl::OkStatus());  // it ended by itself
    return absl::OkStatus();
  }
  if (it->second.close_id != 0) return absl::InvalidArgumentError("the fetch is being closed");
  it->second.close_id = request.id();
  EndStream(key, absl::CancelledError("closed"));
  return absl::OkStatus();
}

void StoreNode::EndStream(const StreamKey& key, absl::Status status) {
  auto it = streams_.find(key);
  if (it == streams_.end()) return;
  it->second.plan.End(std::move(status));
  PumpStream(key);
}

std::vector<transfer::Slice> StoreNode::SlicesOf(const LayerCopy& copy) const {
  const KvLayout& layout = *layout_;
  const size_t first = kSlotHeaderBytes + copy.first_layer * layout.layer_bytes();
  const uint64_t remote = copy.source.slot * uint64_t{slot_bytes_} + first;
  std::byte* local = SlotAt(copy.dest.slot) + first;
  const auto layers = static_cast<uint32_t>(copy.checksums.size());
  if (copy.tokens == layout.block_tokens) {
    // Whole layers lie next to each other.
    const size_t bytes = (layers - 1) * layout.layer_bytes() + 2 * layout.half_bytes();
    return {{remote, local, static_cast<uint32_t>(bytes)}};
  }
  std::vector<transfer::Slice> slices;
  slices.reserve(2 * size_t{layers});
  const auto filled = static_cast<uint32_t>(copy.tokens * layout.token_bytes());
  for (uint32_t l = 0; l < layers; ++l) {
    for (const size_t half : {size_t{0}, layout.half_bytes()}) {
      const size_t offset = l * layout.layer_bytes() + half;
      slices.push_back({remote + offset, local + offset, filled});
    }
  }
  return slices;
}

void StoreNode::StartCopy(const StreamKey& key, Stream& stream, const LayerCopy& copy) {
  if (!core_->MayWrite(key.first, copy.dest)) {  // released meanwhile
    stream.plan.Done(copy.tag, absl::NotFoundError(fmt::format(
                                   "slot {} was given back while fetched", copy.dest.slot)));
    return;
  }
  HoldDestination(copy.dest);
  stream.pulls[copy.tag] = Pull(
      {.peer = stream.source,
       .region = stream.incarnation,
       .slices = SlicesOf(copy),
       .deadline = stream.deadline},
      [this, alive = std::weak_ptr<char>(alive_), copy]() -> absl::Status {
        if (alive.expired()) return absl::CancelledError("the store is gone");
        return VerifyLayers(*layout_, SlotAt(copy.dest.slot) + kSlotHeaderBytes, copy.first_layer,
                            copy.tokens, copy.checksums);
      },
      Guard([this, key, tag = copy.tag, dest = copy.dest](absl::Status status) {
        LetGoDestination(dest);
        CountChecksumFailure(status);
        if (auto it = streams_.find(key); it != streams_.end()) {
          it->second.pulls.erase(tag);
          it->second.plan.Done(tag, status);
          PumpStream(key);
        }
        Settle();
      }));
}

void StoreNode::PumpStream(const StreamKey& key) {
  auto it = streams_.find(key);
  if (it == streams_.end()) return;
  Stream& stream = it->second;
  for (auto starts = stream.plan.TakeStarts(); !starts.empty(); starts = stream.plan.TakeStarts()) {
    for (const LayerCopy& copy : starts) StartCopy(key, stream, copy);
  }
  if (stream.plan.ended()) {
    for (const auto& [tag, pull] : stream.pulls) options_.transport->Cancel(pull);
  }
  if (const auto progress = stream.plan.TakeProgress()) {
    const bool over = !progress->status.ok();
    if (!over || stream.close_id == 0) {
      wire::StoreReply event;
      auto* p = event.mutable_progress();
      p->set_fetch(key.second);
      p->set_done_tag(progress->done_tag);
      if (over) {
        p->mutable_status()->set_code(static_cast<int>(progress->status.code()));
        p->mutable_status()->set_message(std::string(progress->status.message()));
      }
      Reply(key.first, event, absl::OkStatus());
    }
    if (over) {
      if (stream.close_id != 0) Reply(key.first, stream.close_id, absl::OkStatus());
      options_.executor->CancelTimer(stream.timer);
      streams_.erase(it);
    }
  }
}

// ---- a prefix of another store

void StoreNode::OpenPrefix(SessionId session, uint64_t request_id,
                           const wire::StoreRequest& request, std::vector<BlockKey> keys) {
  const auto& fetch = request.fetch_prefix();
  const uint64_t id = next_prefix_++;
  Prefix& prefix = prefixes_[id];
  prefix.session = session;
  prefix.request_id = request_id;
  prefix.fingerprint = sessions_.at(session).fingerprint;
  prefix.pinned = core_->PinPrefix(session, keys);
  const size_t here = prefix.pinned.size();
  if (here > 0) prefix.parent = keys[here - 1];
  prefix.first_position = fetch.first_position() + static_cast<uint32_t>(here);
  if (keys.size() > kPrefixKeysMax) keys.resize(std::max<size_t>(kPrefixKeysMax, here));
  keys.erase(keys.begin(), keys.begin() + static_cast<ptrdiff_t>(here));
  prefix.keys = std::move(keys);
  prefix.incarnation = fetch.source_incarnation();
  if (prefix.keys.empty() || options_.transport == nullptr || options_.leases == nullptr ||
      draining_ || prefix.incarnation == options_.self.incarnation) {
    EndPrefix(id);
    return;
  }
  const absl::Duration life = DeadlineOf(fetch.deadline_ms(), kPrefixDefault, kPrefixMax);
  prefix.deadline = options_.clock->Now() + life;
  prefix.timer = options_.executor->PostAfter(life, Guard([this, id] { EndPrefix(id); }));
  prefix.lease = options_.leases->Open({.rpc_address = fetch.source_rpc_address(),
                                        .fingerprint = prefix.fingerprint,
                                        .keys = prefix.keys,
                                        .timeout = life},
                                       Guard([this, id](absl::StatusOr<wire::LeaseReply> grant) {
                                         PrefixGranted(id, std::move(grant));
                                       }));
}

void StoreNode::PrefixGranted(uint64_t id, absl::StatusOr<wire::LeaseReply> grant) {
  auto it = prefixes_.find(id);
  if (it == prefixes_.end() || it->second.ended || it->second.plan.has_value()) return;
  Prefix& prefix = it->second;
  if (!grant.ok() || grant->hello().incarnation() != prefix.incarnation) {
    if (!grant.ok()) {
      LogInfo("no lease of another store's blocks: {}", std::string(grant.status().message()));
    }
    EndPrefix(id);
    return;
  }
  size_t count = std::min({static_cast<size_t>(grant->slots_size()),
                           static_cast<size_t>(grant->metas_size()), prefix.keys.size()});
  // A shorter prefix is better than none.
  for (; count > 0; count /= 2) {
    if (auto dest = core_->Reserve(kStoreItself, static_cast<uint32_t>(count)); dest.ok()) {
      prefix.dest = *std::move(dest);
      break;
    }
  }
  prefix.held.assign(count, true);
  prefix.data_address = grant->data_address();
  for (size_t i = 0; i < count; ++i) {
    const int at = static_cast<int>(i);
    const wire::BlockMeta& meta = grant->metas(at);
    prefix.source.push_back(SlotFromProto(grant->slots(at)));
    SlotHeader expected{.key = prefix.keys[i],
                        .fingerprint = prefix.fingerprint,
                        .generation = prefix.source[i].generation,
                        .position = prefix.first_position + static_cast<uint32_t>(i)};
    expected.parent = i > 0 ? prefix.keys[i - 1]
                      : prefix.parent.has_value()
                          ? *prefix.parent
                          : BlockKey::FromBytes(meta.parent()).value_or(BlockKey());
    expected.token_ids.assign(meta.token_ids().begin(), meta.token_ids().end());
    expected.layer_checksums.assign(meta.layer_checksums().begin(), meta.layer_checksums().end());
    prefix.expected.push_back(std::move(expected));
  }
  prefix.plan.emplace(static_cast<uint32_t>(count));
  PumpPrefix(id);
  Settle();
}

// On the verifier. Bytes that came over the wire enter the pool only past this.
absl::Status StoreNode::CheckBlock(const SlotHeader& expected, SlotId dest) const {
  std::byte* slot = SlotAt(dest.slot);
  ASSIGN_OR_RETURN(const SlotHeader got, ReadSlotHeader({slot, kSlotHeaderBytes}));
  const char* differs = got.key != expected.key                           ? "key"
                        : got.parent != expected.parent                   ? "parent"
                        : got.fingerprint != expected.fingerprint         ? "fingerprint"
                        : got.generation != expected.generation           ? "generation"
                        : got.position != expected.position               ? "position"
                        : got.token_ids != expected.token_ids             ? "token ids"
                        : got.layer_checksums != expected.layer_checksums ? "layer checksums"
                                                                          : nullptr;
  if (differs != nullptr) {
    return absl::DataLossError(fmt::format("slot header: {} is not what was leased", differs));
  }
  RETURN_IF_ERROR(CheckHeaderContent(got, *layout_));
  return VerifyLayers(*layout_, slot + kSlotHeaderBytes, 0, layout_->block_tokens,
                      got.layer_checksums);
}

void StoreNode::StartBlock(uint64_t id, Prefix& prefix, uint32_t block) {
  const SlotId dest = prefix.dest[block];
  prefix.pulls[block] = Pull(
      {.peer = prefix.data_address,
       .region = prefix.incarnation,
       .slices = {{prefix.source[block].slot * uint64_t{slot_bytes_}, SlotAt(dest.slot),
                   static_cast<uint32_t>(slot_bytes_)}},
       .deadline = prefix.deadline},
      [this, alive = std::weak_ptr<char>(alive_), expected = prefix.expected[block],
       dest]() -> absl::Status {
        if (alive.expired()) return absl::CancelledError("the store is gone");
        return CheckBlock(expected, dest);
      },
      Guard([this, id, block](absl::Status status) { BlockDone(id, block, status); }));
}

void StoreNode::BlockDone(uint64_t id, uint32_t block, const absl::Status& status) {
  Prefix& prefix = prefixes_.at(id);  // stays until nothing is in flight
  prefix.pulls.erase(block);
  CountChecksumFailure(status);
  prefix.plan->Done(block, status.ok());
  for (uint32_t b : prefix.plan->TakeVerified()) EnterBlock(prefix, b);
  for (auto it = prefix.pulls.lower_bound(prefix.plan->limit()); it != prefix.pulls.end(); ++it) {
    options_.transport->Cancel(it->second);
  }
  PumpPrefix(id);
  Settle();
}

// Into the index, and a pin for the worker if it is still there.
void StoreNode::EnterBlock(Prefix& prefix, uint32_t block) {
  SlotHeader header = prefix.expected[block];
  const SlotId dest = prefix.dest[block];
  header.generation = dest.generation;
  const BlockPlace place{.name = {header.fingerprint, header.key},
                         .parent = header.parent,
                         .position = header.position};
  CHECK(core_->Commit(kStoreItself, dest, place).ok());  // reserved by ourselves
  WriteSlotHeader(header, SlotAt(dest.slot));
  metrics_->fetched_blocks.Add();
  if (core_->HasClient(prefix.session)) {
    // By name: when another copy came first, that one is pinned.
    const auto pinned = core_->PinPrefix(prefix.session, {header.key});
    prefix.pinned.insert(prefix.pinned.end(), pinned.begin(), pinned.end());
  }
  prefix.held[block] = false;
  CHECK(core_->Release(kStoreItself, {dest}).ok());
}

void StoreNode::EndPrefix(uint64_t id) {
  auto it = prefixes_.find(id);
  if (it == prefixes_.end()) return;
  Prefix& prefix = it->second;
  prefix.ended = true;
  if (prefix.plan.has_value()) {
    prefix.plan->End();
    for (const auto& [block, pull] : prefix.pulls) options_.transport->Cancel(pull);
  }
  PumpPrefix(id);
}

void StoreNode::PumpPrefix(uint64_t id) {
  auto it = prefixes_.find(id);
  Prefix& prefix = it->second;
  if (prefix.plan.has_value()) {
    for (uint32_t block : prefix.plan->TakeStarts()) StartBlock(id, prefix, block);
    if (!prefix.plan->finished()) return;
  } else if (!prefix.ended) {
    return;  // the lease is being asked for
  }
  for (size_t i = 0; i < prefix.dest.size(); ++i) {
    if (prefix.held[i]) CHECK(core_->Release(kStoreItself, {prefix.dest[i]}).ok());
  }
  if (prefix.lease != 0) options_.leases->Close(prefix.lease);
  if (prefix.timer != 0) options_.executor->CancelTimer(prefix.timer);
  wire::StoreReply reply;
  reply.set_id(prefix.request_id);
  auto* slots = reply.mutable_slots();
  for (const SlotId& slot : prefix.pinned) *slots->add_slots() = SlotToProto(slot);
  Reply(prefix.session, reply, absl::OkStatus());
  prefixes_.erase(it);
}

}  // namespace antiphon::kvstore
