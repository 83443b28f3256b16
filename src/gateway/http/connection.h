// One client connection. Internal to gateway/http.
#ifndef ANTIPHON_GATEWAY_HTTP_CONNECTION_H_
#define ANTIPHON_GATEWAY_HTTP_CONNECTION_H_

#include <atomic>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <deque>
#include <memory>
#include <optional>
#include <string>

#include "absl/synchronization/mutex.h"
#include "gateway/http/server.h"

namespace antiphon::gateway::http {

namespace asio = boost::asio;
namespace beast = boost::beast;

class Connection;

// Connections with output to take. A message with tokens of many streams wakes one thread, which
// goes on until there are no more; of more than kBatch another helps, and so on.
class WakeList {
 public:
  explicit WakeList(asio::io_context* io) : io_(io) {}
  void Add(std::shared_ptr<Connection> connection);
  // Once nothing runs in the io_context any more.
  void Clear();

 private:
  static constexpr size_t kBatch = 16;
  void Drain();

  asio::io_context* const io_;
  absl::Mutex mu_;
  std::deque<std::shared_ptr<Connection>> waiting_ ABSL_GUARDED_BY(mu_);
  size_t drainers_ ABSL_GUARDED_BY(mu_) = 0;
};

// What connections and exchanges share. Outlives them.
struct Shared {
  explicit Shared(asio::io_context* io) : wakes(io) {}

  Limits limits;
  Handler* handler = nullptr;
  std::atomic<size_t> body_bytes{0};
  std::atomic<bool> draining{false};

  absl::Mutex count_mu;
  int connections ABSL_GUARDED_BY(count_mu) = 0;

  // Exchanges may outlive the server, connections must not: an exchange holds its connection only
  // under this lock, and only while the server is there.
  absl::Mutex gate ABSL_ACQUIRED_BEFORE(count_mu);
  bool open ABSL_GUARDED_BY(gate) = true;
  WakeList wakes;
};

// The Exchange that a connection hands to the handler. It may outlive the connection.
class ConnectionExchange final : public Exchange {
 public:
  ConnectionExchange(std::shared_ptr<Connection> connection, std::shared_ptr<Shared> shared,
                     Request request, bool keep_alive, bool http_1_0);

  const Request& request() const override { return request_; }
  void Respond(Response response) override;
  void BeginStream(Response head) override;
  void Write(std::string_view piece) override;
  void EndStream() override;
  void OnGone(absl::AnyInvocable<void(Gone)> callback) override;

  // The connection's side.
  void Leave(Gone why);
  // Moves what is to be written into `out`; true when nothing comes after it.
  bool TakeOutput(std::string& out);
  bool keep_alive() const { return keep_alive_; }
  // The answer is complete, written or not.
  bool answered();

 private:
  // kOverrun: the client is too slow; its connection is about to be told.
  enum class State { kWaiting, kStreaming, kDone, kOverrun, kGone };
  void Append(std::string_view bytes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Wake();
  // Runs `call` on the connection if that is still there.
  template <typename Call>
  void WithConnection(Call call);

  const std::weak_ptr<Connection> connection_;
  const std::shared_ptr<Shared> shared_;
  const Request request_;
  const bool chunked_;
  const bool keep_alive_;
  absl::Mutex mu_;
  State state_ ABSL_GUARDED_BY(mu_) = State::kWaiting;
  std::string output_ ABSL_GUARDED_BY(mu_);
  bool woken_ ABSL_GUARDED_BY(mu_) = false;
  Gone why_ ABSL_GUARDED_BY(mu_) = Gone::kDisconnected;
  absl::AnyInvocable<void(Gone)> on_gone_ ABSL_GUARDED_BY(mu_);
};

// Lives from Start to Close, whether or not an operation is pending: while a request is handled
// there may be none. All members are touched on its strand only.
class Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(asio::ip::tcp::socket socket, std::shared_ptr<Shared> shared);
  ~Connection();

  void Start();
  // All of these from any thread.
  // There is output of the current exchange.
  void WakeForOutput() { shared_->wakes.Add(shared_from_this()); }
  // Takes and sends it. On any thread of the io_context.
  void PumpOnStrand();
  // Closes now when idle, else after the request.
  void BeginDrain();
  // Closes now, unless a complete answer is on its way; then after that.
  void End();
  void Abort(Gone why);

 private:
  using Parser = beast::http::request_parser<beast::http::string_body>;

  void Arm(absl::Duration timeout, void (Connection::*on_timeout)());
  void Disarm();
  // Waits for bytes: of the next request, or to notice that the client left.
  void Watch();
  void OnWatched(beast::error_code ec, size_t bytes);
  void ReadHead();
  void OnHead(beast::error_code ec);
  // What is wrong with a head that the parser accepted.
  MaybeError CheckHead() const;
  void ReadBody();
  void OnBody(beast::error_code ec, size_t bytes);
  bool CountBody();
  void Dispatch();
  void OnIdle() { Close(); }
  void OnSlowHead();
  void OnSlowBody();
  void OnSlowWrite();
  // Answers `response` and closes: the rest of what the client sends is not understood or unwanted.
  void RefuseAndClose(Response response);
  void RefuseParse(beast::error_code ec);
  void Pump();
  void OnWritten(beast::error_code ec, size_t bytes);
  void OnAnswered();
  void Linger();
  void Discard();
  void LeaveAndClose(Gone why);
  void Close();

  std::shared_ptr<Connection> self_;
  asio::ip::tcp::socket socket_;
  asio::executor_work_guard<asio::ip::tcp::socket::executor_type> work_;  // as long as self_
  asio::steady_timer timer_;
  uint64_t timer_round_ = 0;
  std::shared_ptr<Shared> shared_;
  beast::flat_buffer buffer_;
  std::optional<Parser> parser_;
  Head head_;  // as it came before the body: trailers add nothing
  std::shared_ptr<ConnectionExchange> exchange_;
  std::string writing_;
  size_t counted_body_ = 0;
  bool watching_ = false;
  bool write_pending_ = false;
  bool last_write_ = false;   // nothing of the exchange comes after `writing_`
  bool closing_ = false;      // after the write
  bool peer_closed_ = false;  // its sending side, when the answer was complete already
  bool lingering_ = false;
  bool ending_ = false;              // with the server: no lingering
  bool resume_after_watch_ = false;  // bytes of the next request wait in buffer_
  asio::steady_timer::time_point body_expiry_;
  std::string waste_;  // what a lingering connection reads
  bool closed_ = false;
};

std::string FormatResponse(const Response& response, bool chunked, bool keep_alive, bool with_body);
std::string_view ReasonPhrase(int status);

}  // namespace antiphon::gateway::http

#endif  // ANTIPHON_GATEWAY_HTTP_CONNECTION_H_
