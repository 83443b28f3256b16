#include "common/ops_server.h"

#include <fcntl.h>
#include <poll.h>
#include <spdlog/fmt/fmt.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <list>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "common/clock.h"
#include "common/net.h"
#include "common/status_macros.h"
#include "common/thread.h"

namespace antiphon {
namespace {

constexpr size_t kRequestBytesMax = 8 << 10;
constexpr size_t kConnectionsMax = 64;
constexpr absl::Duration kConnectionTime = absl::Seconds(10);

const char* ReasonPhrase(int status) {
  switch (status) {
    case 200:
      return "OK";
    case 400:
      return "Bad Request";
    case 404:
      return "Not Found";
    case 405:
      return "Method Not Allowed";
    case 431:
      return "Request Header Fields Too Large";
    case 503:
      return "Service Unavailable";
    default:
      return "Error";
  }
}

// One request, one answer, then the connection closes.
struct Connection {
  int fd = -1;
  absl::Time deadline;
  std::string in;
  std::string out;  // not empty: the answer is on its way
};

std::string Serialise(const HttpAnswer& answer, bool head, std::string_view extra = "") {
  std::string out = fmt::format(
      "HTTP/1.1 {} {}\r\nContent-Type: {}\r\nContent-Length: {}\r\nConnection: close\r\n"
      "Cache-Control: no-store\r\n{}\r\n",
      answer.status, ReasonPhrase(answer.status), answer.content_type, answer.body.size(), extra);
  if (!head) out += answer.body;
  return out;
}

std::string Answer(std::string_view request, const OpsHandlers& handlers) {
  const std::string_view line = request.substr(0, request.find("\r\n"));
  const size_t first = line.find(' ');
  const size_t last = line.rfind(' ');
  if (first == std::string_view::npos || last <= first ||
      line.substr(last + 1).substr(0, 7) != "HTTP/1.") {
    return Serialise({400, "text/plain; charset=utf-8", "this is not an HTTP/1.1 request\n"},
                     false);
  }
  const std::string_view method = line.substr(0, first);
  std::string_view path = line.substr(first + 1, last - first - 1);
  path = path.substr(0, path.find('?'));
  const std::function<HttpAnswer()>* handler = nullptr;
  if (path == "/metrics") handler = &handlers.metrics;
  if (path == "/livez") handler = &handlers.livez;
  if (path == "/readyz") handler = &handlers.readyz;
  if (path == "/debug") handler = &handlers.debug;
  if (handler == nullptr || !*handler) {
    return Serialise({404, "text/plain; charset=utf-8",
                      "not found; there are /metrics, /livez, /readyz and /debug\n"},
                     method == "HEAD");
  }
  if (method != "GET" && method != "HEAD") {
    return Serialise({405, "text/plain; charset=utf-8", "only GET and HEAD are answered here\n"},
                     false, "Allow: GET, HEAD\r\n");
  }
  return Serialise((*handler)(), method == "HEAD");
}

}  // namespace

struct OpsServer::State {
  int listener = -1;
  int wake = -1;
  uint16_t port = 0;
  OpsHandlers handlers;
  std::list<Connection> connections;
  Thread thread;

  void Run();
  void Accept();
  // False when the connection is over.
  bool Read(Connection& c);
  bool Write(Connection& c);
};

void OpsServer::State::Accept() {
  while (true) {
    const int fd = accept4(listener, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) return;
    if (connections.size() >= kConnectionsMax) {  // the oldest is the likeliest to be stuck
      close(connections.front().fd);
      connections.pop_front();
    }
    connections.push_back({.fd = fd, .deadline = Clock::Real().Now() + kConnectionTime});
  }
}

bool OpsServer::State::Read(Connection& c) {
  char buffer[2048];
  const ssize_t n = recv(c.fd, buffer, sizeof(buffer), 0);
  if (n < 0) return errno == EAGAIN || errno == EINTR;
  if (n == 0) return false;
  c.in.append(buffer, static_cast<size_t>(n));
  if (c.in.find("\r\n\r\n") != std::string::npos) {
    c.out = Answer(c.in, handlers);
    return Write(c);
  }
  if (c.in.size() > kRequestBytesMax) {
    c.out = Serialise({431, "text/plain; charset=utf-8", "the request is too long\n"}, false);
    return Write(c);
  }
  return true;
}

bool OpsServer::State::Write(Connection& c) {
  while (!c.out.empty()) {
    const ssize_t n = send(c.fd, c.out.data(), c.out.size(), MSG_NOSIGNAL);
    if (n < 0) return errno == EAGAIN || errno == EINTR;
    c.out.erase(0, static_cast<size_t>(n));
  }
  // The peer may still be sending; a close with unread bytes would reset the answer away.
  shutdown(c.fd, SHUT_WR);
  char rest[4096];
  for (int i = 0; i < 16 && recv(c.fd, rest, sizeof(rest), 0) > 0; ++i) {
  }
  return false;
}

void OpsServer::State::Run() {
  std::vector<pollfd> polls;
  while (true) {
    polls.assign({{wake, POLLIN, 0}, {listener, POLLIN, 0}});
    absl::Time next = absl::InfiniteFuture();
    for (const Connection& c : connections) {
      polls.push_back({c.fd, static_cast<short>(c.out.empty() ? POLLIN : POLLOUT), 0});
      next = std::min(next, c.deadline);
    }
    const absl::Duration wait = next - Clock::Real().Now();
    const int timeout_ms =
        next == absl::InfiniteFuture()
            ? -1
            : static_cast<int>(absl::ToInt64Milliseconds(std::max(wait, absl::ZeroDuration()))) + 1;
    if (poll(polls.data(), polls.size(), timeout_ms) < 0 && errno != EINTR) return;
    if (polls[0].revents != 0) return;
    const absl::Time now = Clock::Real().Now();
    size_t i = 2;
    for (auto it = connections.begin(); it != connections.end(); ++i) {
      bool open = now < it->deadline;
      if (open && polls[i].revents != 0) open = it->out.empty() ? Read(*it) : Write(*it);
      if (open) {
        ++it;
      } else {
        close(it->fd);
        it = connections.erase(it);
      }
    }
    if (polls[1].revents != 0) Accept();
  }
}

OpsServer::OpsServer() : state_(std::make_unique<State>()) {}

absl::StatusOr<std::unique_ptr<OpsServer>> OpsServer::Start(const std::string& listen,
                                                            OpsHandlers handlers) {
  ASSIGN_OR_RETURN(const HostPort address, ParseHostPort(listen));
  std::unique_ptr<OpsServer> server(new OpsServer);
  State& state = *server->state_;
  ASSIGN_OR_RETURN(state.listener, ListenTcp(address, state.port, 128));
  state.wake = eventfd(0, EFD_CLOEXEC);
  CHECK(state.wake >= 0);
  state.handlers = std::move(handlers);
  state.thread = Thread("ops", [&state] { state.Run(); });
  return server;
}

OpsServer::~OpsServer() {
  if (state_->thread.joinable()) {
    const uint64_t one = 1;
    CHECK(write(state_->wake, &one, sizeof(one)) == sizeof(one));
    state_->thread.Join();
  }
  for (const Connection& c : state_->connections) close(c.fd);
  if (state_->listener >= 0) close(state_->listener);
  if (state_->wake >= 0) close(state_->wake);
}

uint16_t OpsServer::port() const { return state_->port; }

}  // namespace antiphon
