#include "transfer/tcp_client.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <spdlog/fmt/fmt.h>
#include <sys/epoll.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "common/net.h"
#include "common/philox.h"
#include "common/status_macros.h"

namespace antiphon::transfer {
namespace {

constexpr size_t kBinBytes = 256 << 10;
// Received from one connection before the others get their turn.
constexpr size_t kTurnBytes = 8 << 20;
// Below the server's bound, so that it never has to stop reading.
constexpr size_t kLanePiecesMax = 96;

absl::Status Unreachable(const std::string& address, std::string_view why) {
  return absl::UnavailableError(fmt::format("peer {}: {}", address, why));
}

struct Resolved {
  sockaddr_storage address{};
  socklen_t size = 0;
  std::string error;
};

Resolved Lookup(const std::string& text, int flags) {
  Resolved out;
  const auto parsed = ParseHostPort(text);
  if (!parsed.ok() || parsed->host.empty() || parsed->port == 0) {
    out.error = "is no host:port";
    return out;
  }
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const int rc =
      getaddrinfo(parsed->host.c_str(), fmt::format("{}", parsed->port).c_str(), &hints, &found);
  if (rc != 0) {
    out.error = gai_strerror(rc);
    return out;
  }
  std::memcpy(&out.address, found->ai_addr, found->ai_addrlen);
  out.size = found->ai_addrlen;
  freeaddrinfo(found);
  return out;
}

bool WouldBlock() { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

}  // namespace

TcpClient::TcpClient(const TcpOptions& options, const Clock& clock, TcpMetrics& metrics)
    : options_(options), metrics_(metrics), bin_(kBinBytes), loop_("xfer-pull", clock) {
  loop_.Post([this] { loop_.AddTimer(loop_.Now() + options_.stall / 4, [this] { Sweep(); }); });
}

TcpClient::~TcpClient() {
  resolver_.Shutdown();
  loop_.Post([this] {
    ending_ = true;
    while (!pulls_.empty()) {
      Finish(PullRef(pulls_.begin()->second), absl::CancelledError("the transport ends"));
    }
    for (auto& [address, peer] : peers_) {
      peer->queue.clear();
      while (!peer->lanes.empty()) {
        FailLane(peer->lanes.begin(), absl::CancelledError("the transport ends"), false);
      }
    }
  });
  loop_.Stop();
}

PullId TcpClient::Pull(PullRequest request, PullDone done) {
  const PullId id = next_id_.fetch_add(1);
  loop_.Post([this, id, request = std::move(request), done = std::move(done)]() mutable {
    Start(id, std::move(request), std::move(done));
  });
  return id;
}

void TcpClient::Cancel(PullId id) {
  loop_.Post([this, id] {
    auto it = pulls_.find(id);
    if (it != pulls_.end()) Finish(PullRef(it->second), absl::CancelledError("cancelled"));
  });
}

void TcpClient::Start(PullId id, PullRequest request, PullDone done) {
  auto pull = std::make_shared<ActivePull>();
  pull->id = id;
  pull->done = std::move(done);
  pull->started = loop_.Now();
  pulls_[id] = pull;
  if (ending_) return Finish(pull, absl::CancelledError("the transport ends"));
  if (request.deadline <= pull->started) {
    return Finish(pull, absl::DeadlineExceededError("the deadline had passed"));
  }
  if (pulls_.size() > options_.queued_pulls_max) {
    return Finish(pull, absl::ResourceExhaustedError("too many pulls are under way"));
  }
  Peer& peer = PeerOf(request.peer);
  if (peer.lanes.empty() && loop_.Now() < peer.next_attempt) {
    return Finish(pull, Unreachable(peer.address, peer.last_error));
  }
  std::vector<Piece> pieces;
  for (const Slice& slice : request.slices) {
    for (uint32_t at = 0; at < slice.bytes;) {
      const uint32_t bytes = std::min(slice.bytes - at, options_.request_bytes_max);
      if (slice.remote_offset > UINT64_MAX - slice.bytes) {
        return Finish(pull, absl::OutOfRangeError("slice passes the end of any region"));
      }
      pieces.push_back({.pull = pull,
                        .region = request.region,
                        .offset = slice.remote_offset + at,
                        .local = slice.local + at,
                        .bytes = bytes});
      at += bytes;
    }
  }
  if (pieces.empty()) return Finish(pull, absl::OkStatus());
  pull->pieces_left = pieces.size();
  if (request.deadline != absl::InfiniteFuture()) {
    pull->timer = loop_.AddTimer(request.deadline, [this, pull] {
      pull->timer = 0;
      Finish(pull, absl::DeadlineExceededError("the deadline passed"));
    });
  }
  for (Piece& piece : pieces) peer.queue.push_back(std::move(piece));
  Pump(peer);
}

// From here on nothing writes to the pull's memory: what is on its way goes into the bin.
void TcpClient::Finish(const PullRef& pull, const absl::Status& status) {
  if (pull->over) return;
  pull->over = true;
  if (pull->timer != 0) loop_.CancelTimer(pull->timer);
  pulls_.erase(pull->id);
  metrics_.CountEnd(status, absl::ToDoubleSeconds(loop_.Now() - pull->started));
  pull->done(status);
  pull->done = nullptr;
}

TcpClient::Peer& TcpClient::PeerOf(const std::string& address) {
  auto& peer = peers_[address];
  if (peer == nullptr) {
    peer = std::make_unique<Peer>();
    peer->address = address;
  }
  return *peer;
}

// Numbers are looked up here, names on a thread that may block.
void TcpClient::Resolve(Peer& peer) {
  const auto take = [this](const std::string& address, const Resolved& found) {
    auto it = peers_.find(address);
    if (it == peers_.end()) return;
    Peer& p = *it->second;
    p.resolving = false;
    if (found.size == 0) {
      p.last_error = found.error;
      p.next_attempt = loop_.Now() + options_.backoff_min;
      FailQueue(p);
      return;
    }
    p.resolved = true;
    p.socket_address = found.address;
    p.socket_address_size = found.size;
    Pump(p);
  };
  peer.resolving = true;
  if (const Resolved found = Lookup(peer.address, AI_NUMERICHOST);
      found.size > 0 || !ParseHostPort(peer.address).ok()) {
    take(peer.address, found);
    return;
  }
  resolver_.Post([this, take, address = peer.address] {
    loop_.Post([take, address, found = Lookup(address, 0)] { take(address, found); });
  });
}

void TcpClient::DropSpentPieces(Peer& peer) {
  while (!peer.queue.empty() && peer.queue.front().pull->over) peer.queue.pop_front();
}

void TcpClient::Pump(Peer& peer) {
  while (true) {
    DropSpentPieces(peer);
    if (peer.queue.empty()) break;
    if (!peer.resolved) {
      if (!peer.resolving) Resolve(peer);
      return;
    }
    const uint32_t bytes = peer.queue.front().bytes;
    if (peer.in_flight_bytes > 0 && peer.in_flight_bytes + bytes > options_.peer_bytes_max) break;
    const LaneRef lane = PickLane(peer);
    if (lane == peer.lanes.end()) break;
    Piece piece = std::move(peer.queue.front());
    peer.queue.pop_front();
    piece.wire_id = next_wire_id_++;
    const size_t at = lane->out.size();
    lane->out.resize(at + kRequestBytes);
    Encode(RequestFrame{piece.wire_id, piece.region, piece.offset, piece.bytes},
           lane->out.data() + at);
    if (lane->in_flight.empty()) lane->progress = loop_.Now();
    lane->in_flight_bytes += bytes;
    peer.in_flight_bytes += bytes;
    metrics_.inflight_bytes.Add(bytes);
    lane->in_flight.push_back(std::move(piece));
  }
  for (auto lane = peer.lanes.begin(); lane != peer.lanes.end();) {
    const LaneRef current = lane++;
    if (!current->ready || current->out.empty()) continue;
    if (const absl::Status status = Send(*current); !status.ok()) {
      FailLane(current, status, true);
      return;  // which pumps again
    }
    UpdateEvents(*current);
  }
}

// The ready lane that owes least; opens another when all are busy, but not while the last attempt
// backs off (the first lane has been through that in Start). end(): none can take more.
TcpClient::LaneRef TcpClient::PickLane(Peer& peer) {
  LaneRef best = peer.lanes.end();
  bool opening = false;
  for (auto lane = peer.lanes.begin(); lane != peer.lanes.end(); ++lane) {
    opening |= !lane->ready;
    if (!lane->ready || lane->in_flight.size() >= kLanePiecesMax) continue;
    if (best == peer.lanes.end() || lane->in_flight_bytes < best->in_flight_bytes) best = lane;
  }
  const bool busy = best == peer.lanes.end() || best->in_flight_bytes >= options_.request_bytes_max;
  const bool may_open = peer.lanes.empty() || loop_.Now() >= peer.next_attempt;
  if (busy && !opening && may_open && peer.lanes.size() < static_cast<size_t>(options_.lanes)) {
    OpenLane(peer);
  }
  return best;
}

void TcpClient::OpenLane(Peer& peer) {
  const int fd = socket(peer.socket_address.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK,
                        IPPROTO_TCP);
  const int socket_error = errno;
  peer.lanes.emplace_back();
  const LaneRef lane = std::prev(peer.lanes.end());
  lane->peer = &peer;
  lane->number = next_lane_++;
  lane->fd = fd;
  lane->progress = loop_.Now();
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  const bool started =
      fd >= 0 && (connect(fd, reinterpret_cast<const sockaddr*>(&peer.socket_address),
                          peer.socket_address_size) == 0 ||
                  errno == EINPROGRESS);
  const int error = fd < 0 ? socket_error : errno;
  if (started) {
    lane->watch =
        loop_.Watch(fd, EPOLLOUT, [this, lane](uint32_t events) { OnEvents(lane, events); });
  }
  if (lane->watch != 0) return;
  // Not from under the feet of whoever iterates.
  loop_.Post([this, address = peer.address, fd, error] {
    auto it = peers_.find(address);
    if (it == peers_.end()) return;
    for (auto l = it->second->lanes.begin(); l != it->second->lanes.end(); ++l) {
      if (l->fd == fd && l->watch == 0) {
        FailLane(l, absl::UnavailableError(std::strerror(error)), false);
        return;
      }
    }
  });
}

void TcpClient::OnEvents(LaneRef lane, uint32_t events) {
  Peer& peer = *lane->peer;
  absl::Status status;
  if (!lane->connected) status = OnConnected(*lane);
  if (status.ok() && (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0) status = Receive(*lane);
  if (status.ok()) status = Send(*lane);
  if (!status.ok()) {
    FailLane(lane, status, lane->ready);
    return;
  }
  UpdateEvents(*lane);
  Pump(peer);
}

void TcpClient::UpdateEvents(Lane& lane) {
  loop_.Modify(lane.watch, EPOLLIN | (lane.out.empty() ? 0u : EPOLLOUT));
}

absl::Status TcpClient::OnConnected(Lane& lane) {
  int error = 0;
  socklen_t size = sizeof(error);
  getsockopt(lane.fd, SOL_SOCKET, SO_ERROR, &error, &size);
  if (error != 0) return absl::UnavailableError(std::strerror(error));
  lane.connected = true;
  lane.progress = loop_.Now();
  lane.out.resize(kHelloBytes);
  Encode(HelloFrame{}, lane.out.data());
  return absl::OkStatus();
}

absl::Status TcpClient::Send(Lane& lane) {
  while (lane.out_sent < lane.out.size()) {
    const ssize_t n = send(lane.fd, lane.out.data() + lane.out_sent,
                           lane.out.size() - lane.out_sent, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0) {
      if (WouldBlock()) return absl::OkStatus();
      return absl::UnavailableError(std::strerror(errno));
    }
    lane.out_sent += static_cast<size_t>(n);
  }
  lane.out.clear();
  lane.out_sent = 0;
  return absl::OkStatus();
}

// Straight into the destination, and the next reply's header behind it in the same call.
absl::Status TcpClient::Receive(Lane& lane) {
  size_t turn = 0;
  while (turn < kTurnBytes) {
    iovec iov[2];
    size_t parts = 0, payload = 0;
    if (lane.in_payload) {
      const Piece& piece = lane.in_flight.front();
      payload = piece.bytes - lane.payload_bytes;
      if (piece.pull->over) {
        payload = std::min(payload, bin_.size());
        iov[parts++] = {bin_.data(), payload};
      } else {
        iov[parts++] = {piece.local + lane.payload_bytes, payload};
      }
      if (lane.payload_bytes + payload == piece.bytes) {
        iov[parts++] = {lane.header.data(), lane.ready ? kReplyBytes : kHelloBytes};
      }
    } else {
      const size_t whole = lane.ready ? kReplyBytes : kHelloBytes;
      iov[parts++] = {lane.header.data() + lane.header_bytes, whole - lane.header_bytes};
    }
    const size_t room = iov[0].iov_len + (parts > 1 ? iov[1].iov_len : 0);
    const ssize_t n = readv(lane.fd, iov, static_cast<int>(parts));
    if (n == 0) return absl::UnavailableError("the peer closed the connection");
    if (n < 0) {
      if (errno == EINTR) continue;
      if (WouldBlock()) return absl::OkStatus();
      return absl::UnavailableError(std::strerror(errno));
    }
    lane.progress = loop_.Now();
    auto got = static_cast<size_t>(n);
    turn += got;
    if (lane.in_payload) {
      const size_t taken = std::min(got, payload);
      lane.payload_bytes += taken;
      got -= taken;
      if (lane.payload_bytes == lane.in_flight.front().bytes) PieceDone(lane);
    }
    lane.header_bytes += got;
    if (!lane.in_payload && lane.header_bytes == (lane.ready ? kReplyBytes : kHelloBytes)) {
      RETURN_IF_ERROR(TakeHeader(lane));
    }
    if (static_cast<size_t>(n) < room) break;  // the socket was empty; epoll tells when it is not
  }
  return absl::OkStatus();
}

absl::Status TcpClient::TakeHeader(Lane& lane) {
  lane.header_bytes = 0;
  if (!lane.ready) {
    ASSIGN_OR_RETURN(const HelloFrame hello, DecodeHello(lane.header.data()));
    RETURN_IF_ERROR(ChooseVersion(hello).status());
    lane.ready = true;
    lane.peer->failures = 0;
    lane.peer->next_attempt = absl::InfinitePast();
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(const ReplyFrame reply, DecodeReply(lane.header.data()));
  if (lane.in_flight.empty() || reply.id != lane.in_flight.front().wire_id) {
    return absl::InvalidArgumentError("reply to what was not asked");
  }
  const Piece& piece = lane.in_flight.front();
  if (reply.code == ReplyCode::kOk) {
    if (reply.bytes != piece.bytes) return absl::InvalidArgumentError("reply of another size");
    lane.in_payload = true;
    lane.payload_bytes = 0;
    return absl::OkStatus();
  }
  const PullRef pull = piece.pull;
  const RegionId region = piece.region;
  PopPiece(lane);
  Finish(pull, reply.code == ReplyCode::kNoRegion
                   ? absl::NotFoundError(
                         fmt::format("peer {} has no region {}", lane.peer->address, region))
                   : absl::OutOfRangeError("a slice passes the region's end"));
  return absl::OkStatus();
}

void TcpClient::PieceDone(Lane& lane) {
  lane.in_payload = false;
  const PullRef pull = lane.in_flight.front().pull;
  metrics_.bytes_in.Add(lane.in_flight.front().bytes);
  PopPiece(lane);
  if (!pull->over && --pull->pieces_left == 0) Finish(pull, absl::OkStatus());
}

void TcpClient::PopPiece(Lane& lane) {
  const uint32_t bytes = lane.in_flight.front().bytes;
  lane.in_flight.pop_front();
  lane.in_flight_bytes -= bytes;
  lane.peer->in_flight_bytes -= bytes;
  metrics_.inflight_bytes.Add(-static_cast<double>(bytes));
}

// `retry`: the peer may just have closed what was idle; its pulls get one more connection. It may
// have closed several lanes: all that were open when a pull was first tried again count as one.
void TcpClient::FailLane(LaneRef lane, const absl::Status& why, bool retry) {
  Peer& peer = *lane->peer;
  if (lane->watch != 0) loop_.Unwatch(lane->watch);
  if (lane->fd >= 0) close(lane->fd);
  if (absl::IsInvalidArgument(why)) metrics_.malformed.Add();
  const bool was_ready = lane->ready;
  const uint64_t number = lane->number;
  peer.in_flight_bytes -= lane->in_flight_bytes;
  metrics_.inflight_bytes.Add(-static_cast<double>(lane->in_flight_bytes));
  const std::deque<Piece> owed = std::move(lane->in_flight);
  peer.lanes.erase(lane);
  peer.last_error = std::string(why.message());
  if (ending_) return;
  std::vector<PullRef> retried;
  for (auto piece = owed.rbegin(); piece != owed.rend(); ++piece) {
    const PullRef& pull = piece->pull;
    if (pull->over) continue;
    if (!retry || (pull->retry_lanes_below != 0 && number >= pull->retry_lanes_below)) {
      Finish(pull, Unreachable(peer.address, peer.last_error));
      continue;
    }
    peer.queue.push_front(*piece);
    retried.push_back(pull);
  }
  for (const PullRef& pull : retried) {
    if (pull->retry_lanes_below != 0) continue;
    pull->retry_lanes_below = next_lane_;
    metrics_.retries.Add();
  }
  if (was_ready) {
    Pump(peer);
    return;
  }
  const absl::Duration backoff =
      std::min(options_.backoff_min * (1 << std::min(peer.failures++, 16)), options_.backoff_max);
  peer.next_attempt = loop_.Now() + backoff * (0.5 + PhiloxUniform(options_.seed, jitter_++));
  if (peer.lanes.empty()) FailQueue(peer);
}

void TcpClient::FailQueue(Peer& peer) {
  const std::deque<Piece> queue = std::move(peer.queue);
  peer.queue.clear();
  for (const Piece& piece : queue) Finish(piece.pull, Unreachable(peer.address, peer.last_error));
}

// Ends connections that do not come up or owe bytes and send none; forgets idle peers.
void TcpClient::Sweep() {
  const absl::Time now = loop_.Now();
  const auto stuck = [&](const Lane& lane) {
    const absl::Duration quiet = now - lane.progress;
    return lane.ready ? !lane.in_flight.empty() && quiet > options_.stall
                      : quiet > options_.connect_timeout;
  };
  for (auto it = peers_.begin(); it != peers_.end();) {
    Peer& peer = *it->second;
    while (true) {
      const LaneRef lane = std::find_if(peer.lanes.begin(), peer.lanes.end(), stuck);
      if (lane == peer.lanes.end()) break;
      FailLane(lane, absl::UnavailableError(lane->ready ? "sends nothing" : "does not connect"),
               false);
    }
    DropSpentPieces(peer);
    const bool idle =
        peer.lanes.empty() && peer.queue.empty() && !peer.resolving && now >= peer.next_attempt;
    it = idle ? peers_.erase(it) : std::next(it);
  }
  loop_.AddTimer(now + options_.stall / 4, [this] { Sweep(); });
}

}  // namespace antiphon::transfer
