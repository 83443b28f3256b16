#include "gateway/http/connection.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <algorithm>
#include <boost/asio/buffer.hpp>
#include <boost/asio/defer.hpp>
#include <boost/asio/dispatch.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/http/read.hpp>
#include <chrono>
#include <iterator>

#include "common/status_macros.h"

namespace antiphon::gateway::http {
namespace {

constexpr size_t kReadBytes = 16u << 10;
// How long what a refused client still sends is read and thrown away; closing at once would reset
// the connection and lose the answer.
constexpr absl::Duration kLingerMax = absl::Seconds(5);
// What the buffer may hold beside a head and pipelined requests: what one read adds, and a chunk's
// header, which is parsed whole.
constexpr size_t kBufferSpare = 64u << 10;

namespace errors = beast::http;

void TuneSocket(int fd) {
  const auto set = [fd](int level, int option, int value) {
    setsockopt(fd, level, option, &value, sizeof(value));
  };
  set(IPPROTO_TCP, TCP_NODELAY, 1);
  // With the kernel's defaults 2.9 MB of events fit into the socket before a dead client shows.
  set(SOL_SOCKET, SO_SNDBUF, 64 << 10);
  set(IPPROTO_TCP, TCP_NOTSENT_LOWAT, 16 << 10);
  set(IPPROTO_TCP, TCP_USER_TIMEOUT, 30'000);
  set(SOL_SOCKET, SO_KEEPALIVE, 1);
  set(IPPROTO_TCP, TCP_KEEPIDLE, 15);
  set(IPPROTO_TCP, TCP_KEEPINTVL, 5);
  set(IPPROTO_TCP, TCP_KEEPCNT, 3);
}

std::string Lower(std::string_view s) {
  std::string out(s);
  for (char& c : out) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c + 32);
  }
  return out;
}

Head HeadOf(const beast::http::request_parser<beast::http::string_body>& parser) {
  const auto& message = parser.get();
  Head head;
  head.method = std::string(message.method_string().data(), message.method_string().size());
  std::string_view target(message.target().data(), message.target().size());
  // A proxy's form: http://host/path.
  if (target.starts_with("http://") || target.starts_with("https://")) {
    const size_t path = target.find('/', target.find("//") + 2);
    target = path == std::string_view::npos ? std::string_view("/") : target.substr(path);
  }
  const size_t query = target.find('?');
  head.path = std::string(target.substr(0, query));
  if (query != std::string_view::npos) head.query = std::string(target.substr(query + 1));
  for (const auto& field : message) {
    head.headers.emplace_back(Lower({field.name_string().data(), field.name_string().size()}),
                              std::string(field.value().data(), field.value().size()));
  }
  head.has_body = parser.chunked() || parser.content_length().value_or(0) > 0;
  return head;
}

}  // namespace

void WakeList::Add(std::shared_ptr<Connection> connection) {
  {
    absl::MutexLock lock(&mu_);
    waiting_.push_back(std::move(connection));
    if (waiting_.size() <= kBatch * drainers_) return;
    ++drainers_;
  }
  asio::post(*io_, [this] { Drain(); });
}

void WakeList::Drain() {
  std::vector<std::shared_ptr<Connection>> batch;
  {
    absl::MutexLock lock(&mu_);
    const auto end = waiting_.begin() + static_cast<ptrdiff_t>(std::min(kBatch, waiting_.size()));
    batch.assign(std::make_move_iterator(waiting_.begin()), std::make_move_iterator(end));
    waiting_.erase(waiting_.begin(), end);
  }
  for (const auto& connection : batch) connection->PumpOnStrand();
  {
    absl::MutexLock lock(&mu_);
    if (waiting_.empty()) {
      --drainers_;
      return;
    }
  }
  // Behind what else the thread has to do, and without waking another.
  asio::defer(*io_, [this] { Drain(); });
}

void WakeList::Clear() {
  absl::MutexLock lock(&mu_);
  waiting_.clear();
}

Connection::Connection(asio::ip::tcp::socket socket, std::shared_ptr<Shared> shared)
    : socket_(std::move(socket)),
      work_(socket_.get_executor()),
      timer_(socket_.get_executor()),
      shared_(std::move(shared)),
      buffer_(std::max(shared_->limits.header_bytes, shared_->limits.pipelined_bytes) + kReadBytes +
              kBufferSpare) {
  {
    absl::MutexLock lock(&shared_->count_mu);
    ++shared_->connections;
  }
  TuneSocket(socket_.native_handle());
  beast::error_code ignored;
  socket_.non_blocking(true, ignored);  // for Pump; asynchronous operations are so anyway
}

Connection::~Connection() {
  shared_->body_bytes -= counted_body_;
  absl::MutexLock lock(&shared_->count_mu);
  --shared_->connections;
}

void Connection::Start() {
  self_ = shared_from_this();
  asio::post(socket_.get_executor(), [self = shared_from_this()] {
    self->Arm(self->shared_->limits.idle_timeout, &Connection::OnIdle);
    self->Watch();
  });
}

void Connection::Arm(absl::Duration timeout, void (Connection::*on_timeout)()) {
  const uint64_t round = ++timer_round_;
  timer_.expires_after(absl::ToChronoNanoseconds(timeout));
  timer_.async_wait([self = shared_from_this(), round, on_timeout](beast::error_code ec) {
    if (ec || round != self->timer_round_ || self->closed_) return;
    (self.get()->*on_timeout)();
  });
}

void Connection::Disarm() {
  ++timer_round_;
  timer_.cancel();
}

void Connection::Watch() {
  if (watching_ || closed_) return;
  watching_ = true;
  socket_.async_read_some(buffer_.prepare(kReadBytes),
                          [self = shared_from_this()](beast::error_code ec, size_t bytes) {
                            self->OnWatched(ec, bytes);
                          });
}

void Connection::OnWatched(beast::error_code ec, size_t bytes) {
  watching_ = false;
  buffer_.commit(bytes);
  if (closed_ || closing_) return;
  if (ec == asio::error::operation_aborted && resume_after_watch_) ec = {};
  if (ec == asio::error::eof && exchange_ != nullptr && exchange_->answered()) {
    peer_closed_ = true;
    return;
  }
  if (ec) return LeaveAndClose(Gone::kDisconnected);
  if (exchange_ != nullptr) {
    if (buffer_.size() < shared_->limits.pipelined_bytes) Watch();
    return;
  }
  resume_after_watch_ = false;
  ReadHead();
}

void Connection::ReadHead() {
  // Some clients end a body with a line end that its length does not count.
  const auto* bytes = static_cast<const char*>(buffer_.data().data());
  size_t blank = 0;
  while (blank < buffer_.size() && (bytes[blank] == '\r' || bytes[blank] == '\n')) ++blank;
  buffer_.consume(blank);
  if (buffer_.size() == 0) return Watch();
  Arm(shared_->limits.header_timeout, &Connection::OnSlowHead);
  parser_.emplace();
  parser_->header_limit(static_cast<uint32_t>(shared_->limits.header_bytes));
  parser_->body_limit(shared_->limits.body_bytes);
  beast::http::async_read_header(
      socket_, buffer_, *parser_,
      [self = shared_from_this()](beast::error_code ec, size_t) { self->OnHead(ec); });
}

void Connection::RefuseParse(beast::error_code ec) {
  if (ec == errors::error::end_of_stream || ec == errors::error::partial_message ||
      ec == asio::error::connection_reset || ec == asio::error::operation_aborted) {
    return Close();
  }
  ApiError error = HttpError(400, "The request is not valid HTTP/1.1: " + ec.message() + ".");
  if (ec == errors::error::header_limit || ec == errors::error::buffer_overflow) {
    error = HttpError(431, "The request's headers are too large.");
  } else if (ec == errors::error::body_limit) {
    error = HttpError(413, "The request's body is larger than " +
                               std::to_string(shared_->limits.body_bytes) + " bytes.");
  } else if (ec == errors::error::bad_version) {
    error = HttpError(505, "Only HTTP/1.1 and HTTP/1.0 are spoken here.");
  }
  RefuseAndClose(shared_->handler->OnProtocolError(error));
}

MaybeError Connection::CheckHead() const {
  const auto& message = parser_->get();
  // What is behind an encoding that we do not undo would be read as the next request.
  if (const auto encodings = message.count(errors::field::transfer_encoding); encodings > 0) {
    if (message.version() == 10) return HttpError(400, "HTTP/1.0 has no Transfer-Encoding.");
    if (encodings > 1 || !beast::iequals(message[errors::field::transfer_encoding], "chunked")) {
      return HttpError(400, "The only Transfer-Encoding understood is 'chunked'.");
    }
  }
  const auto length = message[errors::field::content_length];
  if (message.count(errors::field::content_length) > 1 ||
      length.find_first_not_of("0123456789") != length.npos) {
    return HttpError(400, "The request has more than one Content-Length.");
  }
  const auto hosts = message.count(errors::field::host);
  if (hosts > 1 || (hosts == 0 && message.version() == 11)) {
    return HttpError(400, "A request has one Host header.");
  }
  return std::nullopt;
}

void Connection::OnHead(beast::error_code ec) {
  if (closed_ || closing_) return;
  if (ec) return RefuseParse(ec);
  if (const MaybeError error = CheckHead()) {
    return RefuseAndClose(shared_->handler->OnProtocolError(*error));
  }
  head_ = HeadOf(*parser_);
  const Head& head = head_;
  if (std::optional<Response> refusal = shared_->handler->Screen(head)) {
    // Without a body the connection is in step and may go on.
    if (head.has_body) return RefuseAndClose(*std::move(refusal));
    Disarm();
    exchange_ = std::make_shared<ConnectionExchange>(shared_from_this(), shared_, Request{head},
                                                     parser_->get().keep_alive(),
                                                     parser_->get().version() == 10);
    if (buffer_.size() < shared_->limits.pipelined_bytes) Watch();
    exchange_->Respond(*std::move(refusal));
    return;
  }
  const std::string_view expect = Find(head.headers, "expect");
  if (!expect.empty() && Lower(expect) != "100-continue") {
    return RefuseAndClose(shared_->handler->OnProtocolError(
        HttpError(417, "Only 'Expect: 100-continue' is understood.")));
  }
  Arm(shared_->limits.body_timeout, &Connection::OnSlowBody);
  body_expiry_ = timer_.expiry();
  if (!expect.empty() && head.has_body && parser_->get().version() == 11) {
    writing_ = "HTTP/1.1 100 Continue\r\n\r\n";
    asio::async_write(socket_, asio::buffer(writing_),
                      [self = shared_from_this()](beast::error_code ec, size_t) {
                        if (self->closed_ || self->closing_) return;
                        if (ec) return self->Close();
                        self->ReadBody();
                      });
    return;
  }
  ReadBody();
}

void Connection::ReadBody() {
  if (parser_->is_done()) return Dispatch();
  beast::http::async_read_some(
      socket_, buffer_, *parser_,
      [self = shared_from_this()](beast::error_code ec, size_t bytes) { self->OnBody(ec, bytes); });
}

bool Connection::CountBody() {
  const size_t size = parser_->get().body().size();
  shared_->body_bytes += size - counted_body_;
  counted_body_ = size;
  // Small bodies pass always: memory is held by the big ones.
  return size <= (64u << 10) || shared_->body_bytes <= shared_->limits.all_bodies_bytes;
}

void Connection::OnBody(beast::error_code ec, size_t) {
  if (closed_ || closing_) return;
  if (ec == beast::http::error::need_buffer) ec = {};
  if (ec) return RefuseParse(ec);
  if (!CountBody()) {
    ApiError error = HttpError(503, "Too many large requests at once; try again.");
    error.retry_after_s = 1;
    return RefuseAndClose(shared_->handler->OnProtocolError(error));
  }
  const size_t size = counted_body_;
  ++timer_round_;
  timer_.expires_at(
      body_expiry_ +
      std::chrono::milliseconds(1000 * size / std::max<size_t>(shared_->limits.body_rate, 1)));
  timer_.async_wait([self = shared_from_this(), round = timer_round_](beast::error_code timer_ec) {
    if (timer_ec || round != self->timer_round_ || self->closed_) return;
    self->OnSlowBody();
  });
  ReadBody();
}

void Connection::Dispatch() {
  Disarm();
  Request request{std::move(head_)};
  request.body = std::move(parser_->get().body());
  exchange_ = std::make_shared<ConnectionExchange>(shared_from_this(), shared_, std::move(request),
                                                   parser_->get().keep_alive(),
                                                   parser_->get().version() == 10);
  if (buffer_.size() < shared_->limits.pipelined_bytes) Watch();
  shared_->handler->Handle(exchange_);
}

void Connection::OnSlowHead() {
  RefuseAndClose(shared_->handler->OnProtocolError(
      HttpError(408, "The request's headers took too long to arrive.")));
}

void Connection::OnSlowBody() {
  RefuseAndClose(shared_->handler->OnProtocolError(
      HttpError(408, "The request's body took too long to arrive.")));
}

void Connection::OnSlowWrite() { LeaveAndClose(Gone::kSlow); }

void Connection::RefuseAndClose(Response response) {
  closing_ = true;
  beast::error_code ignored;
  socket_.cancel(ignored);
  writing_ = FormatResponse(response, false, false, true);
  Arm(shared_->limits.write_timeout, &Connection::OnIdle);
  asio::async_write(socket_, asio::buffer(writing_),
                    [self = shared_from_this()](beast::error_code ec, size_t) {
                      if (ec) return self->Close();
                      self->Linger();
                    });
}

void Connection::PumpOnStrand() {
  asio::dispatch(socket_.get_executor(), [self = shared_from_this()] { self->Pump(); });
}

void Connection::Pump() {
  if (closed_ || write_pending_ || exchange_ == nullptr) return;
  last_write_ = exchange_->TakeOutput(writing_);
  if (!writing_.empty()) {
    // What fits into the socket's buffer, as nearly every token does, needs no one to wait for it.
    beast::error_code ec;
    const size_t sent = socket_.write_some(asio::buffer(writing_), ec);
    if (ec && ec != asio::error::would_block) return LeaveAndClose(Gone::kDisconnected);
    writing_.erase(0, ec ? 0 : sent);
  }
  if (writing_.empty()) {
    if (last_write_) OnAnswered();
    return;
  }
  write_pending_ = true;
  Arm(shared_->limits.write_timeout, &Connection::OnSlowWrite);
  asio::async_write(socket_, asio::buffer(writing_),
                    [self = shared_from_this()](beast::error_code ec, size_t bytes) {
                      self->OnWritten(ec, bytes);
                    });
}

void Connection::OnWritten(beast::error_code ec, size_t) {
  write_pending_ = false;
  if (closed_) return;
  if (ec) return LeaveAndClose(Gone::kDisconnected);
  Disarm();
  if (last_write_) return OnAnswered();
  Pump();
}

void Connection::OnAnswered() {
  const bool keep = exchange_->keep_alive() && !shared_->draining;
  exchange_.reset();
  parser_.reset();
  shared_->body_bytes -= counted_body_;
  counted_body_ = 0;
  if (peer_closed_) return Close();
  if (!keep) {
    closing_ = true;
    return Linger();
  }
  Arm(shared_->limits.idle_timeout, &Connection::OnIdle);
  if (buffer_.size() == 0) return Watch();
  if (!watching_) return ReadHead();
  // One read at a time: the watch ends first.
  resume_after_watch_ = true;
  beast::error_code ignored;
  socket_.cancel(ignored);
}

void Connection::Linger() {
  if (lingering_ || closed_) return;
  lingering_ = true;
  beast::error_code ignored;
  socket_.cancel(ignored);
  socket_.shutdown(asio::ip::tcp::socket::shutdown_send, ignored);
  if (ending_) return Close();
  Arm(kLingerMax, &Connection::OnIdle);
  waste_.resize(kReadBytes);
  Discard();
}

void Connection::Discard() {
  socket_.async_read_some(asio::buffer(waste_.data(), waste_.size()),
                          [self = shared_from_this()](beast::error_code ec, size_t) {
                            if (ec) return self->Close();
                            self->Discard();
                          });
}

void Connection::BeginDrain() {
  asio::post(socket_.get_executor(), [self = shared_from_this()] {
    // In the middle of a request it closes when that is answered.
    if (self->exchange_ == nullptr && self->watching_ && !self->closing_) self->Close();
  });
}

void Connection::End() {
  asio::post(socket_.get_executor(), [self = shared_from_this()] {
    self->ending_ = true;
    const bool answering = self->exchange_ != nullptr && self->exchange_->answered();
    const bool refusing = self->closing_ && !self->lingering_;
    if (!answering && !refusing) self->LeaveAndClose(Gone::kDisconnected);
  });
}

void Connection::Abort(Gone why) {
  asio::post(socket_.get_executor(),
             [self = shared_from_this(), why] { self->LeaveAndClose(why); });
}

void Connection::LeaveAndClose(Gone why) {
  if (const auto exchange = std::move(exchange_)) {
    exchange_.reset();
    exchange->Leave(why);
  }
  Close();
}

void Connection::Close() {
  if (closed_) return;
  closed_ = true;
  Disarm();
  beast::error_code ignored;
  socket_.close(ignored);
  work_.reset();
  // Whoever called holds another reference.
  self_.reset();
}

}  // namespace antiphon::gateway::http
