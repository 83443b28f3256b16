#include <spdlog/fmt/fmt.h>

#include <charconv>

#include "gateway/http/connection.h"

namespace antiphon::gateway::http {

std::string_view Find(const Headers& headers, std::string_view name) {
  for (const auto& [key, value] : headers) {
    if (key == name) return value;
  }
  return {};
}

std::string_view ReasonPhrase(int status) {
  switch (status) {
    case 200:
      return "OK";
    case 400:
      return "Bad Request";
    case 401:
      return "Unauthorized";
    case 403:
      return "Forbidden";
    case 404:
      return "Not Found";
    case 405:
      return "Method Not Allowed";
    case 408:
      return "Request Timeout";
    case 413:
      return "Content Too Large";
    case 415:
      return "Unsupported Media Type";
    case 417:
      return "Expectation Failed";
    case 429:
      return "Too Many Requests";
    case 431:
      return "Request Header Fields Too Large";
    case 500:
      return "Internal Server Error";
    case 501:
      return "Not Implemented";
    case 502:
      return "Bad Gateway";
    case 503:
      return "Service Unavailable";
    case 504:
      return "Gateway Timeout";
    case 505:
      return "HTTP Version Not Supported";
    case 529:
      return "Overloaded";
    default:
      return "Unknown";
  }
}

std::string FormatResponse(const Response& response, bool chunked, bool keep_alive,
                           bool with_body) {
  std::string out = fmt::format("HTTP/1.1 {} {}\r\ncontent-type: {}\r\n", response.status,
                                ReasonPhrase(response.status), response.content_type);
  for (const auto& [name, value] : response.headers) {
    out += name;
    out += ": ";
    out += value;
    out += "\r\n";
  }
  if (chunked) {
    out += "transfer-encoding: chunked\r\n";
  } else if (with_body || !response.body.empty()) {
    out += fmt::format("content-length: {}\r\n", response.body.size());
  }
  if (!keep_alive) out += "connection: close\r\n";
  out += "\r\n";
  if (with_body && !chunked) out += response.body;
  return out;
}

ConnectionExchange::ConnectionExchange(std::shared_ptr<Connection> connection,
                                       std::shared_ptr<Shared> shared, Request request,
                                       bool keep_alive, bool http_1_0)
    : connection_(connection),
      shared_(std::move(shared)),
      request_(std::move(request)),
      chunked_(!http_1_0),
      keep_alive_(keep_alive && !http_1_0) {}

template <typename Call>
void ConnectionExchange::WithConnection(Call call) {
  absl::ReaderMutexLock lock(&shared_->gate);
  if (!shared_->open) return;
  if (const auto connection = connection_.lock()) call(*connection);
}

// Posts at most once for all that is appended until the connection takes it.
void ConnectionExchange::Wake() {
  {
    absl::MutexLock lock(&mu_);
    if (woken_) return;
    woken_ = true;
  }
  WithConnection([](Connection& connection) { connection.WakeForOutput(); });
}

void ConnectionExchange::Respond(Response response) {
  absl::AnyInvocable<void(Gone)> unused;  // what it holds goes without our lock
  {
    absl::MutexLock lock(&mu_);
    if (state_ != State::kWaiting) return;
    state_ = State::kDone;
    unused = std::move(on_gone_);
    output_ = FormatResponse(response, false, keep_alive_ && !shared_->draining,
                             request_.method != "HEAD");
  }
  Wake();
}

void ConnectionExchange::BeginStream(Response head) {
  {
    absl::MutexLock lock(&mu_);
    if (state_ != State::kWaiting) return;
    state_ = State::kStreaming;
    // Without a length or chunks the end of the connection is the end of the answer.
    output_ = FormatResponse(head, chunked_, keep_alive_ && !shared_->draining, false);
  }
  Wake();
}

void ConnectionExchange::Append(std::string_view bytes) {
  if (chunked_) {
    char size[2 * sizeof(size_t)];
    output_.append(size, std::to_chars(size, size + sizeof(size), bytes.size(), 16).ptr);
    output_ += "\r\n";
    output_ += bytes;
    output_ += "\r\n";
  } else {
    output_ += bytes;
  }
}

void ConnectionExchange::Write(std::string_view piece) {
  if (piece.empty()) return;
  bool slow = false;
  {
    absl::MutexLock lock(&mu_);
    if (state_ != State::kStreaming) return;
    slow = output_.size() + piece.size() > shared_->limits.stream_buffer_bytes;
    if (slow) {
      state_ = State::kOverrun;
      output_.clear();
    } else {
      Append(piece);
    }
  }
  if (!slow) return Wake();
  WithConnection([](Connection& connection) { connection.Abort(Gone::kSlow); });
}

void ConnectionExchange::EndStream() {
  absl::AnyInvocable<void(Gone)> unused;
  {
    absl::MutexLock lock(&mu_);
    if (state_ != State::kStreaming) return;
    state_ = State::kDone;
    unused = std::move(on_gone_);
    if (chunked_) output_ += "0\r\n\r\n";
  }
  Wake();
}

void ConnectionExchange::OnGone(absl::AnyInvocable<void(Gone)> callback) {
  Gone why;
  {
    absl::MutexLock lock(&mu_);
    if (state_ == State::kDone) return;
    if (state_ != State::kGone) {
      on_gone_ = std::move(callback);
      return;
    }
    why = why_;
  }
  callback(why);
}

void ConnectionExchange::Leave(Gone why) {
  absl::AnyInvocable<void(Gone)> callback;
  {
    absl::MutexLock lock(&mu_);
    // An answer that was ready but not taken: its request is over.
    if (state_ == State::kDone || state_ == State::kGone) return;
    state_ = State::kGone;
    why_ = why;
    output_.clear();
    callback = std::move(on_gone_);
    on_gone_ = nullptr;
  }
  if (callback != nullptr) callback(why);
}

bool ConnectionExchange::answered() {
  absl::MutexLock lock(&mu_);
  return state_ == State::kDone;
}

bool ConnectionExchange::TakeOutput(std::string& out) {
  absl::MutexLock lock(&mu_);
  woken_ = false;
  out.clear();
  std::swap(out, output_);
  return state_ == State::kDone;
}

}  // namespace antiphon::gateway::http
