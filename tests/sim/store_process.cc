#include "tests/sim/store_process.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "antiphon/v1/control.pb.h"
#include "antiphon/v1/store.pb.h"
#include "tests/sim/conductor_process.h"
#include "tests/sim/identity.h"

namespace antiphon::sim {

transfer::PullId SimTransport::Pull(transfer::PullRequest request, transfer::PullDone done) {
  World& world = self_->world();
  const transfer::PullId id = next_++;
  Running& r = running_[id];
  r.left = request.slices.size();
  r.lost = world.Chance(world.faults.pull_lost);
  r.flip = world.Chance(world.faults.pull_flip);
  r.torn = world.Chance(world.faults.pull_torn);
  world.counts["pulls"]++;
  if (r.lost) world.counts["pulls lost"]++;
  if (r.flip) world.counts["pulls flipped"]++;
  if (r.torn) world.counts["pulls torn"]++;
  r.request = std::move(request);
  r.done = std::move(done);
  if (r.lost) {
    const absl::Duration wait = r.request.deadline == absl::InfiniteFuture()
                                    ? absl::Seconds(1)
                                    : std::min(self_->Until(r.request.deadline), absl::Seconds(1));
    self_->After(wait, [this, id] { End(id, absl::UnavailableError("the peer fell silent")); });
    return id;
  }
  if (r.left == 0) self_->After(world.Latency(), [this, id] { End(id, absl::OkStatus()); });
  for (size_t i = 0; i < r.request.slices.size(); ++i) {
    // The network card works while the process is paused, so these are the world's events.
    world.At(world.Latency(), [this, life = self_->life(), id, i] {
      if (!life.expired()) CopySlice(id, i);
    });
  }
  return id;
}

void SimTransport::CopySlice(transfer::PullId id, size_t index) {
  auto it = running_.find(id);
  if (it == running_.end()) return;
  Running& r = it->second;
  const transfer::Slice& slice = r.request.slices[index];
  StoreProcess* peer = cluster_->StoreAt(r.request.peer);
  World& world = self_->world();
  if (peer == nullptr) {
    r.status = absl::UnavailableError("the peer is gone");
  } else if (peer->incarnation() != r.request.region) {
    r.status = absl::NotFoundError("no such region");
  } else if (slice.remote_offset + slice.bytes > peer->memory()->size()) {
    r.status = absl::OutOfRangeError("past the region's end");
  } else if (!(r.torn && index % 2 == 1)) {
    std::memcpy(slice.local, peer->memory()->data() + slice.remote_offset, slice.bytes);
    if (r.flip && index == 0 && slice.bytes > 0) {
      slice.local[world.Below(slice.bytes)] ^=
          std::byte{static_cast<uint8_t>(1 + world.Below(255))};
    }
  }
  if (--r.left == 0) {
    self_->After(world.Latency(), [this, id] {
      auto it = running_.find(id);
      if (it != running_.end()) End(id, it->second.status);
    });
  }
}

void SimTransport::Cancel(transfer::PullId id) {
  self_->After(absl::ZeroDuration(), [this, id] { End(id, absl::CancelledError("cancelled")); });
}

void SimTransport::End(transfer::PullId id, absl::Status status) {
  auto it = running_.find(id);
  if (it == running_.end()) return;
  transfer::PullDone done = std::move(it->second.done);
  running_.erase(it);
  done(std::move(status));
}

SimLeases::LeaseId SimLeases::Open(kvstore::LeaseQuery query, Granted granted) {
  const LeaseId id = next_++;
  Lease& lease = leases_[id];
  lease.granted = std::move(granted);
  StoreProcess* peer = cluster_->StoreAt(query.rpc_address);
  if (peer == nullptr) {
    self_->After(self_->world().Latency(),
                 [this, id] { Answer(id, absl::UnavailableError("no store there")); });
    return id;
  }
  lease.pipe = cluster_->Connect(*self_, *peer);
  lease.pipe->OnBroken(0, [this, id] { Answer(id, absl::UnavailableError("the store is gone")); });
  wire::LeaseRequest request;
  *request.mutable_hello() = MakeHello(identity_);
  request.set_fingerprint_id(query.fingerprint.ToBytes());
  for (const BlockKey& key : query.keys) request.add_keys(key.ToBytes());
  std::weak_ptr<Pipe> weak = lease.pipe;
  lease.pipe->Send(0, [this, id, peer, weak, request] {
    auto pipe = weak.lock();
    if (pipe == nullptr) return;
    const kvstore::ClientId client = peer->node().OpenLease();
    pipe->OnBroken(1, [peer, client] { peer->node().CloseLease(client); });
    wire::LeaseReply reply;
    const absl::Status status = peer->node().HandleLease(client, request, reply);
    pipe->Send(1, [this, id, status, reply] {
      if (status.ok()) {
        Answer(id, reply);
      } else {
        Answer(id, status);
      }
    });
  });
  self_->After(query.timeout, [this, id] { Answer(id, absl::DeadlineExceededError("no answer")); });
  return id;
}

void SimLeases::Answer(LeaseId id, absl::StatusOr<wire::LeaseReply> reply) {
  auto it = leases_.find(id);
  if (it == leases_.end() || !it->second.granted) return;
  Granted granted = std::move(it->second.granted);
  it->second.granted = nullptr;
  granted(std::move(reply));
}

void SimLeases::Close(LeaseId id) {
  auto it = leases_.find(id);
  if (it == leases_.end()) return;
  if (it->second.pipe != nullptr) it->second.pipe->Close(0);
  leases_.erase(it);
}

std::string StoreProcess::RpcAddress(uint32_t host) { return absl::StrCat("host-", host, ":7402"); }
std::string StoreProcess::DataAddress(uint32_t host) {
  return absl::StrCat("host-", host, ":7403");
}

StoreProcess::StoreProcess(Cluster* cluster, uint32_t host)
    : Process(&cluster->world(), absl::StrCat("store-", host)),
      cluster_(cluster),
      host_(host),
      identity_(IdentityOf(name(), cluster->NextIncarnation())),
      memory_(std::make_shared<std::vector<std::byte>>(cluster->shape().slots *
                                                       fakes::SmallLayout().slot_bytes())),
      transport_(cluster, this, DataAddress(host)),
      leases_(cluster, this, identity_) {
  kvstore::NodeOptions options;
  options.self = identity_;
  options.pool = absl::MakeSpan(*memory_);
  options.executor = this;
  options.verifier = this;
  options.transport = &transport_;
  options.leases = &leases_;
  options.clock = this;
  options.registry = &registry_;
  options.rpc_address = RpcAddress(host);
  options.on_changes = [this] { SendEvents(false); };
  node_ = std::make_unique<kvstore::StoreNode>(std::move(options));
  After(absl::ZeroDuration(), [this] { Join(); });
  After(absl::Milliseconds(100), [this] { Report(); });
}

kvstore::StoreNode::SessionId StoreProcess::Accept(
    std::shared_ptr<Pipe> pipe, std::function<void(const wire::StoreReply&)> deliver) {
  std::weak_ptr<Pipe> weak = pipe;
  const auto session =
      node_->OpenSession([weak, deliver = std::move(deliver)](const wire::StoreReply& reply) {
        if (auto pipe = weak.lock()) pipe->Send(1, [deliver, reply] { deliver(reply); });
      });
  pipe->OnBroken(1, [this, session] {
    node_->Disconnect(session);
    // Its pidfd reports the worker's exit a little later.
    After(absl::Milliseconds(1) * (1 + world().Uniform()),
          [this, session] { node_->CloseSession(session); });
  });
  return session;
}

void StoreProcess::Join() {
  ConductorProcess* conductor = cluster_->conductor();
  if (conductor == nullptr) {
    After(absl::Milliseconds(200), [this] { Join(); });
    return;
  }
  accepted_ = false;
  control_ = cluster_->Connect(*this, *conductor);
  control_->OnBroken(0, [this] {
    accepted_ = false;
    After(absl::Milliseconds(100), [this] { Join(); });
  });
  wire::NodeReport report;
  wire::NodeHello& hello = *report.mutable_hello();
  *hello.mutable_hello() = MakeHello(identity_);
  hello.set_kind(wire::NODE_KIND_STORE);
  hello.set_rpc_address(RpcAddress(host_));
  hello.set_data_address(DataAddress(host_));
  hello.set_slot_count(cluster_->shape().slots);
  conductor->Accept(control_, [this](const wire::NodeDirective& directive) {
    if (directive.has_accepted() || directive.has_resnapshot()) {
      accepted_ = true;
      SendEvents(true);
    }
  });
  conductor->Deliver(control_, report);
}

void StoreProcess::SendEvents(bool snapshot) {
  wire::NodeReport report;
  if (snapshot) {
    node_->FillSnapshot(*report.mutable_events());
  } else if (!node_->TakeEvents(*report.mutable_events())) {
    return;
  }
  if (accepted_) ConductorProcess::Deliver(cluster_, control_, report);
}

void StoreProcess::Report() {
  wire::NodeReport report;
  node_->FillLoad(*report.mutable_store_load());
  if (accepted_) ConductorProcess::Deliver(cluster_, control_, report);
  After(absl::Milliseconds(100), [this] { Report(); });
}

}  // namespace antiphon::sim
