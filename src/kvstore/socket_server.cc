#include "kvstore/socket_server.h"

#include <fcntl.h>
#include <spdlog/fmt/fmt.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <deque>
#include <fstream>
#include <map>
#include <set>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "antiphon/v1/store.pb.h"
#include "common/fd_passing.h"
#include "common/logging.h"
#include "common/status_macros.h"
#include "kvstore/client/connection.h"
#include "kvstore/client/framing.h"
#include "transfer/event_loop.h"

namespace antiphon::kvstore {
namespace {

using transfer::EventLoop;

constexpr size_t kConnectionsMax = 256;
constexpr int kRequestsMax = 256;
constexpr size_t kUnsentBytesMax = 64 << 20;

// Any other descriptor might never become readable and so hold slots for ever.
bool IsPidfd(int fd) {
  std::ifstream info(fmt::format("/proc/self/fdinfo/{}", fd));
  std::string line;
  while (std::getline(info, line)) {
    if (line.rfind("Pid:", 0) == 0) return true;
  }
  return false;
}

struct Connection {
  // The loop's.
  EventLoop::WatchId watch = 0;
  EventLoop::WatchId pid_watch = 0;
  int pidfd = -1;
  Fd passed;  // any other descriptor: the next request's
  FrameCutter cutter;
  bool detached = false;
  bool attach_seen = false;
  bool want_write = false;

  // The executor's.
  StoreNode::SessionId session = 0;

  absl::Mutex mu;
  int fd ABSL_GUARDED_BY(mu) = -1;  // -1: closed
  struct Unsent {
    std::string bytes;
    size_t sent = 0;
    int fd = -1;
    BlobMemoryRef memory;  // whose fd that is, if it is not the pool's
  };
  std::deque<Unsent> unsent ABSL_GUARDED_BY(mu);
  bool corked ABSL_GUARDED_BY(mu) = false;  // replies gather
  size_t unsent_bytes ABSL_GUARDED_BY(mu) = 0;
  int in_executor ABSL_GUARDED_BY(mu) = 0;  // requests posted and not yet handled
  bool paused ABSL_GUARDED_BY(mu) = false;  // too many of them: no more are read

  // False: the connection is beyond use. Leaves what does not fit in `unsent`.
  bool Flush() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu) {
    while (!unsent.empty()) {
      Unsent& first = unsent.front();
      const ssize_t n = SendWithFd(fd, std::string_view(first.bytes).substr(first.sent), first.fd);
      if (n < 0) return errno == EAGAIN || errno == EWOULDBLOCK;
      first.fd = -1;
      first.memory = nullptr;
      first.sent += static_cast<size_t>(n);
      unsent_bytes -= static_cast<size_t>(n);
      if (first.sent == first.bytes.size()) unsent.pop_front();
    }
    return true;
  }
};
using ConnectionRef = std::shared_ptr<Connection>;

class UnixSocketServer final : public SocketServer {
 public:
  UnixSocketServer(SocketServerOptions options, int listen_fd, int lock_fd)
      : options_(std::move(options)),
        listen_fd_(listen_fd),
        lock_fd_(lock_fd),
        loop_("kv-socket", *options_.clock) {}

  ~UnixSocketServer() override {
    loop_.Post([this] {
      loop_.Unwatch(listen_watch_);
      auto all = std::exchange(connections_, {});
      for (const ConnectionRef& c : all) Close(c);
    });
    loop_.Stop();
    unlink(options_.path.c_str());
    close(listen_fd_);
    close(lock_fd_);
  }

  absl::Status Serve() override {
    if (listen(listen_fd_, 128) != 0) {
      return absl::UnavailableError(
          fmt::format("cannot listen on {}: {}", options_.path, std::strerror(errno)));
    }
    loop_.Post([this] {
      listen_watch_ = loop_.Watch(listen_fd_, EPOLLIN, [this](uint32_t) { Accept(); });
    });
    return absl::OkStatus();
  }

 private:
  void Accept() {
    const int fd = accept4(listen_fd_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) return;
    if (connections_.size() >= kConnectionsMax) {
      LogWarning("{} workers are connected already; one more is refused", connections_.size());
      close(fd);
      return;
    }
    auto c = std::make_shared<Connection>();
    {
      absl::MutexLock lock(&c->mu);
      c->fd = fd;
    }
    c->watch = loop_.Watch(fd, EPOLLIN, [this, c](uint32_t events) { OnEvents(c, events); });
    connections_.insert(c);
    options_.executor->Post([this, c] {
      c->session =
          options_.node->OpenSession([this, c](const wire::StoreReply& r) { Send(c, r, nullptr); });
    });
  }

  void OnEvents(const ConnectionRef& c, uint32_t events) {
    bool alive = true;
    if ((events & EPOLLOUT) != 0) {
      absl::MutexLock lock(&c->mu);
      alive = c->Flush();
      c->want_write = !c->unsent.empty();
    }
    if (alive && (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0) alive = Receive(c);
    if (alive) {
      UpdateEvents(c);
    } else {
      Close(c);
    }
  }

  void UpdateEvents(const ConnectionRef& c) {
    bool paused = false;
    {
      absl::MutexLock lock(&c->mu);
      paused = c->paused = c->in_executor >= kRequestsMax;
    }
    loop_.Modify(c->watch, (paused ? 0u : EPOLLIN) | (c->want_write ? EPOLLOUT : 0u));
  }

  // False: the peer closed, or sent what cannot be read.
  bool Receive(const ConnectionRef& c) {
    int fd = -1;
    {
      absl::MutexLock lock(&c->mu);
      fd = c->fd;  // only the loop, which is us, closes it
    }
    std::vector<int> fds;
    const ssize_t n = RecvWithFds(fd, buffer_, sizeof(buffer_), fds);
    for (int passed : fds) TakeFd(c, passed);
    if (n == 0) return false;
    if (n < 0) return errno == EAGAIN || errno == EWOULDBLOCK;
    c->cutter.Append({buffer_, static_cast<size_t>(n)});
    std::vector<Received> received;
    const bool alive = CutRequests(c, received);
    if (!received.empty()) Hand(c, std::move(received));
    return alive;
  }

  struct Received {
    wire::StoreRequest request;
    Fd passed;
  };

  bool CutRequests(const ConnectionRef& c, std::vector<Received>& received) {
    while (true) {
      const auto frame = c->cutter.Next();
      if (!frame.ok()) {
        LogWarning("a worker's connection is closed: {}", std::string(frame.status().message()));
        return false;
      }
      if (!frame->has_value()) return true;
      wire::StoreRequest request;
      if (!request.ParseFromArray((*frame)->data(), static_cast<int>((*frame)->size()))) {
        LogWarning("a worker's connection is closed: a request cannot be read");
        return false;
      }
      if (request.has_detach()) c->detached = true;
      received.push_back({std::move(request), std::exchange(c->passed, Fd())});
    }
  }

  // What came together is handled together, and its replies leave together.
  void Hand(const ConnectionRef& c, std::vector<Received> received) {
    const int count = static_cast<int>(received.size());
    {
      absl::MutexLock lock(&c->mu);
      c->in_executor += count;
    }
    options_.executor->Post([this, c, count, received = std::move(received)]() mutable {
      {
        absl::MutexLock lock(&c->mu);
        c->corked = true;
      }
      for (Received& r : received) Handle(c, r.request, std::move(r.passed));
      Handled(c, count);
    });
  }

  // On the executor.
  void Handled(const ConnectionRef& c, int count) {
    absl::MutexLock lock(&c->mu);
    c->corked = false;
    if (c->fd >= 0 && !c->unsent.empty()) SendUnsent(c);
    c->in_executor -= count;
    if (!c->paused || c->in_executor >= kRequestsMax / 2) return;
    c->paused = false;
    loop_.Post([this, c] {
      if (c->watch != 0) UpdateEvents(c);
    });
  }

  // On the executor.
  void Handle(const ConnectionRef& c, const wire::StoreRequest& request, Fd passed) {
    if (!BlobDesk::Handles(request)) {
      options_.node->Handle(c->session, request);
      return;
    }
    options_.blobs->Handle(c->session, request, std::move(passed),
                           [this, c](const wire::StoreReply& reply, BlobMemoryRef memory) {
                             Send(c, reply, std::move(memory));
                           });
  }

  void TakeFd(const ConnectionRef& c, int fd) {
    if (c->pidfd >= 0 || !IsPidfd(fd)) {
      c->passed = Fd(fd);
      return;
    }
    c->pidfd = fd;
    c->pid_watch = loop_.Watch(fd, EPOLLIN, [this, c](uint32_t) {
      DropPidfd(c);
      Close(c);
      EndSession(c);
    });
    if (c->pid_watch == 0) DropPidfd(c);
  }

  void DropPidfd(const ConnectionRef& c) {
    if (c->pidfd < 0) return;
    if (c->pid_watch != 0) loop_.Unwatch(c->pid_watch);
    c->pid_watch = 0;
    close(std::exchange(c->pidfd, -1));
  }

  void EndSession(const ConnectionRef& c) {
    options_.executor->Post([this, c] { options_.node->CloseSession(c->session); });
  }

  void Close(const ConnectionRef& c) {
    if (c->watch == 0) return;
    loop_.Unwatch(std::exchange(c->watch, 0));
    {
      absl::MutexLock lock(&c->mu);
      close(std::exchange(c->fd, -1));
      c->unsent.clear();
      c->unsent_bytes = 0;
    }
    connections_.erase(c);
    options_.executor->Post([this, c] { options_.blobs->End(c->session); });
    if (c->detached) DropPidfd(c);
    if (c->pidfd < 0) {
      EndSession(c);
    } else {
      options_.executor->Post([this, c] { options_.node->Disconnect(c->session); });
    }
  }

  // On the executor.
  void Send(const ConnectionRef& c, const wire::StoreReply& reply, BlobMemoryRef memory) {
    absl::MutexLock lock(&c->mu);
    if (c->fd < 0) return;
    std::string bytes = EncodeFrame(reply);
    c->unsent_bytes += bytes.size();
    const bool waiting = !c->unsent.empty();
    const int passed = memory != nullptr      ? memory->fd()
                       : reply.has_attached() ? options_.pool_fd
                                              : -1;
    if (waiting && passed < 0 && c->unsent.back().fd < 0) {
      c->unsent.back().bytes += bytes;
    } else {
      c->unsent.push_back({std::move(bytes), 0, passed, std::move(memory)});
    }
    // Else Handled sends it, or the loop.
    if ((!waiting && !c->corked) || c->unsent_bytes > kUnsentBytesMax) SendUnsent(c);
  }

  // On the executor.
  void SendUnsent(const ConnectionRef& c) ABSL_EXCLUSIVE_LOCKS_REQUIRED(c->mu) {
    if (!c->Flush() || c->unsent_bytes > kUnsentBytesMax) {
      loop_.Post([this, c] { Close(c); });
    } else if (!c->unsent.empty()) {
      loop_.Post([this, c] {
        c->want_write = true;
        if (c->watch != 0) UpdateEvents(c);
      });
    }
  }

  const SocketServerOptions options_;
  const int listen_fd_;
  const int lock_fd_;
  EventLoop::WatchId listen_watch_ = 0;
  std::set<ConnectionRef> connections_;
  char buffer_[256 << 10];
  EventLoop loop_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<SocketServer>> SocketServer::Bind(SocketServerOptions options) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (options.path.size() >= sizeof(address.sun_path)) {
    return absl::InvalidArgumentError(
        fmt::format("cluster.runtime_dir is too long: {} has {} bytes, a socket's path has at most "
                    "{}",
                    options.path, options.path.size(), sizeof(address.sun_path) - 1));
  }
  std::memcpy(address.sun_path, options.path.data(), options.path.size());
  const auto failed = [&](const char* what) {
    return absl::UnavailableError(
        fmt::format("cannot {} {}: {}", what, options.path, std::strerror(errno)));
  };
  // The lock, unlike the socket's name, dies with its holder.
  const std::string lock_path = options.path + ".lock";
  const int lock_fd = open(lock_path.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0660);
  if (lock_fd < 0) return failed("create the lock beside");
  if (flock(lock_fd, LOCK_EX | LOCK_NB) != 0) {
    close(lock_fd);
    return absl::UnavailableError(fmt::format(
        "another store runs on {}; a host has one store in a cluster.runtime_dir", options.path));
  }
  unlink(options.path.c_str());
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0 || bind(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0 ||
      chmod(options.path.c_str(), 0660) != 0) {
    const absl::Status status = failed("create");
    if (fd >= 0) close(fd);
    close(lock_fd);
    return status;
  }
  return std::make_unique<UnixSocketServer>(std::move(options), fd, lock_fd);
}

}  // namespace antiphon::kvstore
