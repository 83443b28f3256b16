// Core: what nodes report.
#include <spdlog/fmt/fmt.h>

#include <algorithm>

#include "common/logging.h"
#include "conductor/core.h"
#include "conductor/core_node.h"

namespace antiphon::conductor {
namespace {

// A store that was asked for a snapshot may take this long to send it.
constexpr absl::Duration kSnapshotPatience = absl::Seconds(5);
constexpr absl::Duration kBlobPatience = absl::Seconds(1);

}  // namespace

void Core::OnLoad(Node& node, const wire::WorkerLoad& load, absl::Time now) {
  Worker* worker = view_.FindWorker(node.id);
  if (worker == nullptr) return;
  worker->reported_at = now;
  worker->running = load.running();
  worker->context_tokens = static_cast<double>(load.context_tokens());
  worker->waiting = load.waiting();
  worker->waiting_tokens = static_cast<double>(load.waiting_tokens());
  worker->queue_s = load.queue_s();
  if (load.has_cost()) worker->cost = *CostFromProto(load.cost());  // checked by CheckLoad
  worker->Refresh();
}

void Core::OnStoreLoad(Node& node, const wire::StoreLoad& load, absl::Time now) {
  if (node.store < 0) return;
  Store& store = view_.stores[node.store];
  store.load_known = true;
  store.slots_free = load.slots_free();
  if (load.slots() > 0) store.slot_count = load.slots();
  store.slots_pinned = load.slots_pinned();
  store.slots_cached = load.slots_cached();
  store.Settle(now);
}

void Core::OnEvents(Node& node, const wire::StoreEvents& events, absl::Time now, Actions& actions) {
  if (node.store < 0) return;
  const uint64_t end = events.seq() + static_cast<uint64_t>(events.events_size());
  if (events.snapshot()) {
    ForgetBlocks(node);
    const PrefixIndex::Holder holder = view_.index.AddHolder();
    if (holder == PrefixIndex::kNoHolder) {
      LogWarning("no room to index the blocks of {}", node.id.value());
      return;
    }
    if (view_.store_of_holder.size() <= holder) view_.store_of_holder.resize(holder + 1, -1);
    view_.store_of_holder[holder] = node.store;
    view_.stores[node.store].holder = holder;
    node.synced = true;
  } else if (!node.synced || events.seq() != node.next_seq) {
    if (node.synced && end <= node.next_seq) return;  // delivered twice
    const bool gap = std::exchange(node.synced, false);
    if (gap || node.snapshot_asked_at + kSnapshotPatience <= now) {
      node.snapshot_asked_at = now;
      actions.directives.push_back({node.session, Actions::Kind::kResnapshot, {}});
    }
    return;
  }
  node.next_seq = end;
  const PrefixIndex::Holder holder = view_.stores[node.store].holder;
  for (const wire::BlockEvent& event : events.events()) {
    // Sizes are checked by CheckEvents.
    const BlockKey key = *BlockKey::FromBytes(event.key());
    const FingerprintId fingerprint = *FingerprintId::FromBytes(event.fingerprint_id());
    if (event.removed()) {
      view_.index.Erase(key, fingerprint, holder);
    } else {
      view_.index.Insert(key, fingerprint, holder);
    }
  }
}

std::vector<std::string> Core::MissingBlobs() {
  std::vector<std::string> missing;
  if (model_ == nullptr) return missing;
  for (const std::string& digest :
       {model_->card.tokenizer_digest(), model_->card.chat_template_digest()}) {
    if (!digest.empty() && blobs_.Find(digest) == nullptr) missing.push_back(digest);
  }
  return missing;
}

void Core::AskBlobs(SessionId session, Actions& actions) {
  std::vector<std::string> missing = MissingBlobs();
  if (missing.empty()) return;
  actions.directives.push_back({session, Actions::Kind::kNeedBlobs, std::move(missing)});
}

absl::Status Core::OnBlob(Node& node, const wire::Blob& blob, Actions& actions) {
  const std::vector<std::string> missing = MissingBlobs();
  if (std::find(missing.begin(), missing.end(), blob.digest()) == missing.end()) {
    return absl::OkStatus();  // another worker was quicker, or nobody asked
  }
  if (blob.content().empty()) return absl::OkStatus();  // it does not have it
  absl::Status status = blobs_.Put(blob.digest(), blob.content());
  if (!status.ok()) {
    return absl::Status(status.code(), fmt::format("{} sent a bad blob: {}", node.id.value(),
                                                   std::string(status.message())));
  }
  actions.blob_arrived = true;
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<const std::string>> Core::GetBlob(const std::string& digest,
                                                                 absl::Time now, Actions& actions) {
  if (auto blob = blobs_.Find(digest)) return blob;
  const std::vector<std::string> missing = MissingBlobs();
  if (std::find(missing.begin(), missing.end(), digest) == missing.end()) {
    return absl::NotFoundError(fmt::format("no registered model names the blob '{}'", digest));
  }
  if (blobs_asked_at_ + kBlobPatience <= now) {
    blobs_asked_at_ = now;
    for (const auto& [id, node] : nodes_) {
      if (node->kind == wire::NODE_KIND_WORKER && node->session != 0) {
        AskBlobs(node->session, actions);
      }
    }
  }
  return nullptr;
}

}  // namespace antiphon::conductor
