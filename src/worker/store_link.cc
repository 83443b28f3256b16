#include "worker/store_link.h"

#include "common/logging.h"
#include "common/status_macros.h"

namespace antiphon::worker {
namespace {

namespace wire = ::antiphon::internal::v1;

constexpr absl::Duration kRetry = absl::Milliseconds(200);

}  // namespace

StoreLink::StoreLink(StoreLinkOptions options)
    : options_(std::move(options)), attacher_("attach") {}

void StoreLink::Attach() {
  attacher_.Post([this] {
    kvstore::AttachOptions attach;
    attach.socket_path = options_.socket_path;
    attach.self = options_.self;
    attach.layout = options_.layout;
    attach.fingerprint = &options_.fingerprint;
    attach.executor = options_.executor;
    attach.on_event = [this](const wire::StoreReply& event) { OnEvent(event); };
    attach.on_refused = [this](const wire::StoreReply& reply) {
      if (lost_) return;
      LogWarning("the KV store refused a commit or a release: {}", reply.status().message());
    };
    // The store may die before its attachment was handed over.
    auto gone = std::make_shared<bool>(false);
    attach.on_lost = [this, gone](absl::Status why) {
      *gone = true;
      if (client_ == nullptr) return;
      lost_ = true;
      error_ = std::string(why.message());
      ledger_.Clear();
      fetches_.clear();
      fetch_names_.clear();
      options_.on_lost(why);
    };
    auto shared = std::make_shared<absl::StatusOr<std::unique_ptr<kvstore::StoreClient>>>(
        options_.attach(std::move(attach)));
    options_.executor->Post([this, shared, gone] {
      if (*gone) *shared = absl::UnavailableError("the store went away at once");
      OnAttachResult(std::move(*shared));
    });
  });
}

void StoreLink::OnAttachResult(absl::StatusOr<std::unique_ptr<kvstore::StoreClient>> client) {
  if (!client.ok()) {
    const std::string error(client.status().message());
    if (error != error_) LogWarning("no KV store at {}: {}", options_.socket_path, error);
    error_ = error;
    options_.executor->PostAfter(kRetry, [this] { Attach(); });
    return;
  }
  client_ = *std::move(client);
  lost_ = false;
  error_.clear();
  LogInfo("attached to the KV store at {}, incarnation {:x}, {} slots", options_.socket_path,
          client_->store_incarnation(), client_->slot_count());
  options_.on_attached(*client_);
}

void StoreLink::Reattach() {
  CHECK(lost_);
  client_ = nullptr;
  lost_ = false;
  Attach();
}

void StoreLink::Call(Side side, wire::StoreRequest request) {
  if (!attached()) return;
  const uint64_t id = request.id();
  if (request.has_release() && !ledger_.OnRelease(request.release())) {
    LogError("gave back a slot that is not held");
  }
  if (request.has_fetch_extend()) {
    auto fetch = fetches_.find({side, request.fetch_extend().fetch()});
    if (fetch == fetches_.end()) return;
    request.mutable_fetch_extend()->set_fetch(fetch->second);
  }
  if (request.has_fetch_close()) {
    auto fetch = fetches_.find({side, request.fetch_close().fetch()});
    if (fetch == fetches_.end()) return;
    request.mutable_fetch_close()->set_fetch(fetch->second);
    fetch_names_.erase(fetch->second);
    fetches_.erase(fetch);
  }
  // The cores wait for no answer to these.
  if (request.has_commit() || request.has_release()) return client_->Tell(std::move(request));
  const bool opens = request.has_fetch_open();
  // What the reply's booking needs: slots of PinSlots, else the kind alone.
  wire::StoreRequest kind;
  if (request.has_pin_slots()) *kind.mutable_pin_slots() = request.pin_slots();
  if (request.has_reserve()) kind.mutable_reserve();
  if (request.has_pin_prefix()) kind.mutable_pin_prefix();
  if (request.has_fetch_prefix()) kind.mutable_fetch_prefix();
  const uint64_t real = client_->Call(
      std::move(request), [this, side, id, kind = std::move(kind)](const wire::StoreReply& reply) {
        OnReply(side, id, kind, reply);
      });
  if (opens) {
    fetches_[{side, id}] = real;
    fetch_names_[real] = {side, id};
  }
}

void StoreLink::Cork() {
  if (client_ != nullptr) client_->Cork();
}

void StoreLink::Uncork() {
  if (client_ != nullptr) client_->Uncork();
}

void StoreLink::OnReply(Side side, uint64_t id, const wire::StoreRequest& request,
                        wire::StoreReply reply) {
  if (lost_) return;
  ledger_.OnReply(request, reply);
  reply.set_id(id);
  options_.on_reply(side, reply);
}

void StoreLink::OnEvent(const wire::StoreReply& event) {
  if (!event.has_progress()) return;
  auto name = fetch_names_.find(event.progress().fetch());
  if (name == fetch_names_.end()) return;
  wire::StoreReply renamed = event;
  renamed.mutable_progress()->set_fetch(name->second.second);
  options_.on_reply(name->second.first, renamed);
}

}  // namespace antiphon::worker
