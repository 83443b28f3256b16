#include "transfer/tcp_server.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <spdlog/fmt/fmt.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "common/logging.h"

namespace antiphon::transfer {
namespace {

constexpr absl::Duration kSweepEvery = absl::Seconds(1);
constexpr absl::Duration kGreetingPatience = absl::Seconds(10);
constexpr absl::Duration kReaderPatience = absl::Seconds(30);
// Sent for one connection before the others get their turn.
constexpr size_t kTurnBytes = 4 << 20;
constexpr size_t kAnswersPerSend = 16;

}  // namespace

TcpServer::TcpServer(int listen_fd, int connections_max, const Clock& clock, TcpMetrics& metrics)
    : listen_fd_(listen_fd),
      connections_max_(static_cast<size_t>(connections_max)),
      metrics_(metrics),
      loop_("xfer-serve", clock) {
  loop_.Post([this] {
    listen_watch_ = loop_.Watch(listen_fd_, EPOLLIN, [this](uint32_t) { Accept(); });
    loop_.AddTimer(loop_.Now() + kSweepEvery, [this] { Sweep(); });
  });
}

TcpServer::~TcpServer() {
  loop_.Post([this] {
    loop_.Unwatch(listen_watch_);
    while (!connections_.empty()) Close(*connections_.begin()->second);
  });
  loop_.Stop();
  close(listen_fd_);
}

absl::Status TcpServer::Export(RegionId id, const std::byte* base, size_t bytes) {
  if (base == nullptr || bytes == 0) return absl::InvalidArgumentError("region is empty");
  absl::MutexLock lock(&mu_);
  if (!regions_.emplace(id, Region(base, bytes)).second) {
    return absl::InvalidArgumentError(fmt::format("region {} is exported already", id));
  }
  return absl::OkStatus();
}

void TcpServer::Unexport(RegionId id) {
  absl::MutexLock lock(&mu_);  // waits for the send that reads it
  regions_.erase(id);
}

void TcpServer::Accept() {
  const int fd = accept4(listen_fd_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (fd < 0) {
    if (errno != EMFILE && errno != ENFILE && errno != ENOBUFS && errno != ENOMEM) return;
    // Whoever waits stays in the kernel's queue, and would wake this loop again at once.
    LogWarning("transfer connections have to wait: {}", std::strerror(errno));
    accepting_ = false;
    loop_.Modify(listen_watch_, 0);
    return;
  }
  if (connections_.size() >= connections_max_ && !CloseIdlest()) {
    LogWarning("{} transfer connections are open; one more is refused", connections_.size());
    close(fd);
    return;
  }
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  auto owned = std::make_unique<Connection>();
  Connection* c = owned.get();
  c->fd = fd;
  c->progress = loop_.Now();
  c->watch = loop_.Watch(fd, EPOLLIN, [this, c](uint32_t events) { OnEvents(*c, events); });
  if (c->watch == 0) {
    close(fd);
    return;
  }
  connections_[c->watch] = std::move(owned);
}

void TcpServer::OnEvents(Connection& c, uint32_t events) {
  bool alive = true;
  if ((events & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0) alive = Receive(c);
  if (alive) alive = Send(c);
  if (!alive) {
    Close(c);
    return;
  }
  const bool full = c.answers.size() >= kRequestsQueuedMax;
  const bool waiting = c.hello_left > 0 || !c.answers.empty();
  loop_.Modify(c.watch, (full ? 0u : EPOLLIN) | (waiting ? EPOLLOUT : 0u));
}

bool TcpServer::Receive(Connection& c) {
  const ssize_t n = recv(c.fd, c.in.data() + c.in_bytes, c.in.size() - c.in_bytes, MSG_DONTWAIT);
  if (n == 0) return false;
  if (n < 0) return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR;
  c.in_bytes += static_cast<size_t>(n);
  return Parse(c);
}

bool TcpServer::Parse(Connection& c) {
  size_t at = 0;
  absl::Status bad;
  if (!c.greeted && c.in_bytes >= kHelloBytes) {
    const auto hello = DecodeHello(c.in.data());
    const auto version = hello.ok() ? ChooseVersion(*hello) : hello.status();
    bad = version.status();
    if (bad.ok()) {
      Encode(HelloFrame{*version, *version}, c.hello.data());
      c.hello_left = kHelloBytes;
      c.greeted = true;
      at = kHelloBytes;
    }
  }
  while (bad.ok() && c.greeted && c.in_bytes - at >= kRequestBytes &&
         c.answers.size() < kRequestsQueuedMax) {
    const auto request = DecodeRequest(c.in.data() + at);
    bad = request.status();
    if (!bad.ok()) break;
    c.answers.push_back({.request = *request});
    at += kRequestBytes;
  }
  if (!bad.ok()) {
    metrics_.malformed.Add();
    LogWarning("a transfer connection is closed: {}", std::string(bad.message()));
    return false;
  }
  std::memmove(c.in.data(), c.in.data() + at, c.in_bytes - at);
  c.in_bytes -= at;
  return true;
}

bool TcpServer::Send(Connection& c) {
  while (c.hello_left > 0) {
    const ssize_t n = send(c.fd, c.hello.data() + kHelloBytes - c.hello_left, c.hello_left,
                           MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0) return errno == EAGAIN || errno == EWOULDBLOCK;
    c.hello_left -= static_cast<size_t>(n);
    c.progress = loop_.Now();
  }
  size_t budget = kTurnBytes;
  c.blocked = false;
  while (!c.blocked && budget > 0 && !c.answers.empty()) {
    if (!SendAnswers(c, budget)) return false;
    // Requests that had no place in the queue.
    if (c.in_bytes >= kRequestBytes && !Parse(c)) return false;
  }
  return true;
}

// The answer's header, as things are now.
void TcpServer::Decide(Answer& answer) {
  ReplyFrame reply{.id = answer.request.id, .bytes = answer.request.bytes};
  auto region = regions_.find(answer.request.region);
  if (region == regions_.end()) {
    reply.code = ReplyCode::kNoRegion;
  } else if (answer.request.offset > region->second.size() ||
             answer.request.bytes > region->second.size() - answer.request.offset) {
    reply.code = ReplyCode::kOutOfRange;
  }
  if (reply.code != ReplyCode::kOk) reply.bytes = 0;
  answer.payload = reply.bytes;
  Encode(reply, answer.header.data());
}

bool TcpServer::SendAnswers(Connection& c, size_t& budget) {
  iovec iov[2 * kAnswersPerSend];
  size_t parts = 0, total = 0;
  ssize_t n = 0;
  {
    absl::ReaderMutexLock lock(&mu_);
    for (Answer& a : c.answers) {
      if (parts + 2 > std::size(iov) || total >= budget) break;
      if (a.header_sent == 0) Decide(a);
      if (a.header_sent < kReplyBytes) {
        iov[parts++] = {a.header.data() + a.header_sent, kReplyBytes - a.header_sent};
        total += kReplyBytes - a.header_sent;
      }
      if (a.payload == 0) continue;
      auto region = regions_.find(a.request.region);
      if (region == regions_.end()) return false;  // went away in the middle of its bytes
      const size_t left = a.payload - a.payload_sent;
      iov[parts++] = {
          const_cast<std::byte*>(region->second.data()) + a.request.offset + a.payload_sent, left};
      total += left;
    }
    msghdr message{};
    message.msg_iov = iov;
    message.msg_iovlen = parts;
    n = sendmsg(c.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
  }
  if (n < 0) {
    c.blocked = errno == EAGAIN || errno == EWOULDBLOCK;
    return c.blocked || errno == EINTR;
  }
  c.progress = loop_.Now();
  c.blocked = static_cast<size_t>(n) < total;
  budget -= std::min(budget, static_cast<size_t>(n));
  auto sent = static_cast<size_t>(n);
  size_t payload_sent = 0;
  while (sent > 0) {
    Answer& a = c.answers.front();
    const size_t header = std::min(sent, kReplyBytes - a.header_sent);
    a.header_sent += header;
    const size_t payload = std::min(sent - header, a.payload - a.payload_sent);
    a.payload_sent += payload;
    payload_sent += payload;
    sent -= header + payload;
    if (a.header_sent < kReplyBytes || a.payload_sent < a.payload) break;
    c.answers.pop_front();
  }
  metrics_.bytes_out.Add(static_cast<double>(payload_sent));
  return true;
}

void TcpServer::Close(Connection& c) {
  loop_.Unwatch(c.watch);
  close(c.fd);
  connections_.erase(c.watch);
}

// Makes room for a new connection: hosts that vanished without a word would else fill the place for
// ever. A living puller whose idle connection goes opens another. False: none owes nothing.
bool TcpServer::CloseIdlest() {
  Connection* idlest = nullptr;
  for (const auto& [id, c] : connections_) {
    if (!c->answers.empty() || c->hello_left > 0) continue;
    if (idlest == nullptr || c->progress < idlest->progress) idlest = c.get();
  }
  if (idlest != nullptr) Close(*idlest);
  return idlest != nullptr;
}

// Ends connections of peers that do not greet or do not read; accepts again.
void TcpServer::Sweep() {
  const absl::Time now = loop_.Now();
  for (auto it = connections_.begin(); it != connections_.end();) {
    Connection& c = *(it++)->second;
    const absl::Duration quiet = now - c.progress;
    if ((!c.greeted && quiet > kGreetingPatience) ||
        (!c.answers.empty() && quiet > kReaderPatience)) {
      Close(c);
    }
  }
  if (!std::exchange(accepting_, true)) loop_.Modify(listen_watch_, EPOLLIN);
  loop_.AddTimer(now + kSweepEvery, [this] { Sweep(); });
}

}  // namespace antiphon::transfer
