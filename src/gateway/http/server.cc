#include "gateway/http/server.h"

#include <sys/socket.h>

#include <boost/asio/post.hpp>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/time/time.h"
#include "common/net.h"
#include "common/status_macros.h"
#include "common/thread.h"
#include "gateway/http/connection.h"

namespace antiphon::gateway::http {
namespace {

// Out of descriptors: accepting again at once would spin.
constexpr auto kAcceptRetry = std::chrono::milliseconds(100);
// How long complete answers may take to leave when the server ends.
constexpr absl::Duration kFlushMax = absl::Seconds(1);

class AsioServer final : public Server {
 public:
  AsioServer(const Limits& limits, int io_threads, Handler* handler)
      : io_(io_threads), acceptor_(asio::make_strand(io_)), retry_(acceptor_.get_executor()) {
    shared_->limits = limits;
    shared_->handler = handler;
  }

  absl::Status Open(const std::string& listen, int io_threads) {
    ASSIGN_OR_RETURN(const HostPort address, ParseHostPort(listen));
    ASSIGN_OR_RETURN(const int fd, ListenTcp(address, port_));
    sockaddr_storage name{};
    socklen_t size = sizeof(name);
    getsockname(fd, reinterpret_cast<sockaddr*>(&name), &size);
    beast::error_code ec;
    acceptor_.assign(name.ss_family == AF_INET6 ? asio::ip::tcp::v6() : asio::ip::tcp::v4(), fd,
                     ec);
    if (ec) return absl::InternalError("cannot use the listening socket: " + ec.message());
    asio::post(acceptor_.get_executor(), [this] { Accept(); });
    for (int i = 0; i < io_threads; ++i) {
      threads_.emplace_back("http-io", [this] { io_.run(); });
    }
    return absl::OkStatus();
  }

  ~AsioServer() override {
    shared_->draining = true;
    ForAll([](Connection& connection) { connection.End(); });
    {
      absl::MutexLock lock(&shared_->count_mu);
      const auto none = [this]() ABSL_SHARED_LOCKS_REQUIRED(shared_->count_mu) {
        return shared_->connections == 0;
      };
      shared_->count_mu.AwaitWithTimeout(absl::Condition(&none), kFlushMax);
    }
    ForAll([](Connection& connection) { connection.Abort(Gone::kDisconnected); });
    threads_.clear();  // they end when nothing is left to do
    absl::WriterMutexLock lock(&shared_->gate);
    shared_->open = false;
    shared_->wakes.Clear();  // whom it holds holds `shared_`
  }

  uint16_t port() const override { return port_; }
  int connections() const override {
    absl::MutexLock lock(&shared_->count_mu);
    return shared_->connections;
  }

  void Drain() override {
    shared_->draining = true;
    ForAll([](Connection& connection) { connection.BeginDrain(); });
  }

 private:
  // Ends accepting, then calls `each`, on the acceptor's strand.
  template <typename Each>
  void ForAll(Each each) {
    asio::post(acceptor_.get_executor(), [this, each] {
      beast::error_code ignored;
      acceptor_.close(ignored);
      retry_.cancel();
      for (const auto& weak : open_) {
        if (const auto connection = weak.lock()) each(*connection);
      }
    });
  }

  void Accept() {
    if (!acceptor_.is_open()) return;
    acceptor_.async_accept(
        asio::make_strand(io_), [this](beast::error_code ec, asio::ip::tcp::socket socket) {
          if (ec == asio::error::operation_aborted || !acceptor_.is_open()) return;
          if (ec) {
            retry_.expires_after(kAcceptRetry);
            retry_.async_wait([this](beast::error_code) { Accept(); });
            return;
          }
          if (connections() < shared_->limits.connections) {
            auto connection = std::make_shared<Connection>(std::move(socket), shared_);
            Remember(connection);
            connection->Start();
          }
          Accept();
        });
  }

  // Forgets those that are gone whenever the list has doubled.
  void Remember(const std::shared_ptr<Connection>& connection) {
    if (open_.size() >= forget_at_) {
      std::erase_if(open_, [](const auto& weak) { return weak.expired(); });
      forget_at_ = std::max<size_t>(64, 2 * open_.size());
    }
    open_.push_back(connection);
  }

  asio::io_context io_;
  std::shared_ptr<Shared> shared_ = std::make_shared<Shared>(&io_);
  asio::ip::tcp::acceptor acceptor_;
  asio::steady_timer retry_;
  uint16_t port_ = 0;
  std::vector<std::weak_ptr<Connection>> open_;  // on the acceptor's strand
  size_t forget_at_ = 64;
  std::vector<Thread> threads_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const std::string& listen,
                                                      const Limits& limits, int io_threads,
                                                      Handler* handler) {
  auto server = std::make_unique<AsioServer>(limits, io_threads, handler);
  RETURN_IF_ERROR(server->Open(listen, io_threads));
  return server;
}

}  // namespace antiphon::gateway::http
