#include "tests/transfer/raw_peer.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "common/net.h"
#include "common/status_macros.h"

namespace antiphon::transfer {
namespace {

void SetPatience(int fd) {
  const timeval patience = absl::ToTimeval(kPatience);
  CHECK(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience)) == 0);
  CHECK(setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience)) == 0);
}

sockaddr_in Loopback(uint16_t port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

template <size_t kBytes, typename Frame>
Bytes EncodedIn(const Frame& frame) {
  Bytes out(kBytes);
  Encode(frame, out.data());
  return out;
}

}  // namespace

Bytes Encoded(const HelloFrame& frame) { return EncodedIn<kHelloBytes>(frame); }
Bytes Encoded(const RequestFrame& frame) { return EncodedIn<kRequestBytes>(frame); }
Bytes Encoded(const ReplyFrame& frame) { return EncodedIn<kReplyBytes>(frame); }

RawConnection::RawConnection(int fd) : fd_(fd) {
  if (fd_ < 0) return;
  SetPatience(fd_);
  const int on = 1;
  setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
}

RawConnection& RawConnection::operator=(RawConnection&& other) {
  Close();
  fd_ = std::exchange(other.fd_, -1);
  return *this;
}

RawConnection RawConnection::Unconnected() {
  return RawConnection(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
}

RawConnection RawConnection::To(const std::string& address) {
  RawConnection c = Unconnected();
  if (!c.ConnectTo(address)) c.Close();
  return c;
}

bool RawConnection::ConnectTo(const std::string& address) {
  const auto to = ParseHostPort(address);
  CHECK(to.ok());
  const sockaddr_in sa = Loopback(to->port);
  return connect(fd_, reinterpret_cast<const sockaddr*>(&sa), sizeof(sa)) == 0;
}

bool RawConnection::Send(absl::Span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t n = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    bytes.remove_prefix(static_cast<size_t>(n));
  }
  return true;
}

Bytes RawConnection::Receive(size_t bytes) {
  Bytes out(bytes);
  size_t got = 0;
  while (got < bytes) {
    const ssize_t n = recv(fd_, out.data() + got, bytes - got, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    got += static_cast<size_t>(n);
  }
  out.resize(got);
  return out;
}

bool RawConnection::Ended() {
  std::byte byte;
  const ssize_t n = recv(fd_, &byte, 1, 0);
  return n == 0 || (n < 0 && errno == ECONNRESET);
}

void RawConnection::Close() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

void RawConnection::Reset() {
  const linger now{.l_onoff = 1, .l_linger = 0};
  setsockopt(fd_, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
  Close();
}

bool RawConnection::GreetPuller() {
  const Bytes hello = Receive(kHelloBytes);
  return hello.size() == kHelloBytes && DecodeHello(hello.data()).ok() &&
         Send(Encoded(HelloFrame{kPullVersionMax, kPullVersionMax}));
}

RequestFrame RawConnection::NextRequest() {
  const Bytes in = Receive(kRequestBytes);
  if (in.size() < kRequestBytes) return {};
  return DecodeRequest(in.data()).value_or(RequestFrame{});
}

bool RawConnection::Reply(const RequestFrame& request, absl::Span<const std::byte> payload) {
  return Send(Encoded(
             ReplyFrame{.id = request.id, .code = ReplyCode::kOk, .bytes = request.bytes})) &&
         Send(payload);
}

bool RawConnection::GreetOwner() {
  if (!Send(Encoded(HelloFrame{}))) return false;
  const Bytes hello = Receive(kHelloBytes);
  return hello.size() == kHelloBytes && DecodeHello(hello.data()).ok();
}

ReplyFrame RawConnection::NextReply() {
  const Bytes in = Receive(kReplyBytes);
  const ReplyFrame none{.id = ~uint64_t{0}};
  if (in.size() < kReplyBytes) return none;
  return DecodeReply(in.data()).value_or(none);
}

RawListener::RawListener(uint16_t port) {
  fd_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  CHECK(fd_ >= 0);
  SetPatience(fd_);
  const int on = 1;
  setsockopt(fd_, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  sockaddr_in address = Loopback(port);
  socklen_t size = sizeof(address);
  CHECK(bind(fd_, reinterpret_cast<sockaddr*>(&address), size) == 0);
  CHECK(listen(fd_, 64) == 0);
  CHECK(getsockname(fd_, reinterpret_cast<sockaddr*>(&address), &size) == 0);
  port_ = ntohs(address.sin_port);
}

RawListener::~RawListener() { close(fd_); }

RawConnection RawListener::Accept() {
  return RawConnection(accept4(fd_, nullptr, nullptr, SOCK_CLOEXEC));
}

RawConnection RawListener::AcceptPuller() {
  RawConnection c = Accept();
  if (c.open() && !c.GreetPuller()) c.Close();
  return c;
}

std::string RawListener::address() const { return HostPort{"127.0.0.1", port_}.Text(); }

}  // namespace antiphon::transfer
