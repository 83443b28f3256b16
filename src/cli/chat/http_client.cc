#include "cli/chat/http_client.h"

#include <netdb.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <memory>

#include "common/logging.h"
#include "common/net.h"
#include "common/status_macros.h"

namespace antiphon::cli {
namespace {

constexpr size_t kHeadBytesMax = 64 << 10;
constexpr size_t kEventBytesMax = 16 << 20;

class Socket {
 public:
  explicit Socket(int fd) : fd_(fd) {}
  ~Socket() {
    if (fd_ >= 0) close(fd_);
  }
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;
  int fd() const { return fd_; }

 private:
  const int fd_;
};

absl::StatusOr<int> Connect(const HostPort& address) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int rc =
      getaddrinfo(address.host.c_str(), fmt::format("{}", address.port).c_str(), &hints, &found);
  if (rc != 0) {
    return absl::UnavailableError(
        fmt::format("no such host: {} ({})", address.host, gai_strerror(rc)));
  }
  std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> list(found, &freeaddrinfo);
  int error = 0;
  for (addrinfo* a = list.get(); a != nullptr; a = a->ai_next) {
    const int fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) continue;
    const timeval timeout{.tv_sec = 10};
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
    if (connect(fd, a->ai_addr, a->ai_addrlen) == 0) return fd;
    error = errno;
    close(fd);
  }
  return absl::UnavailableError(
      fmt::format("cannot reach {}: {}", address.Text(), std::strerror(error)));
}

std::string Lower(std::string_view text) {
  std::string out(text);
  for (char& c : out) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  return out;
}

}  // namespace

absl::Status HttpAnswerParser::ParseHead(std::string_view head) {
  if (head.substr(0, 7) != "HTTP/1." || head.size() < 12) {
    return absl::InvalidArgumentError("the server does not speak HTTP/1.1");
  }
  std::from_chars(head.data() + 9, head.data() + 12, status_);
  if (status_ < 100) return absl::InvalidArgumentError("the server does not speak HTTP/1.1");
  state_ = State::kUntilClose;
  while (true) {
    const size_t end = head.find("\r\n");
    if (end == std::string_view::npos) break;
    head.remove_prefix(end + 2);
    const std::string_view line = head.substr(0, head.find("\r\n"));
    const size_t colon = line.find(':');
    if (colon == std::string_view::npos) continue;
    const std::string name = Lower(line.substr(0, colon));
    std::string_view value = line.substr(colon + 1);
    while (!value.empty() && value[0] == ' ') value.remove_prefix(1);
    if (name == "transfer-encoding" && Lower(value).find("chunked") != std::string::npos) {
      state_ = State::kChunkSize;
    } else if (name == "content-length" && state_ == State::kUntilClose) {
      const auto [stop, error] = std::from_chars(value.data(), value.data() + value.size(), left_);
      if (error != std::errc()) return absl::InvalidArgumentError("a bad Content-Length came");
      state_ = left_ == 0 ? State::kDone : State::kPlain;
    }
  }
  return absl::OkStatus();
}

absl::Status HttpAnswerParser::Push(std::string_view bytes,
                                    absl::FunctionRef<void(std::string_view)> piece) {
  buffer_.append(bytes);
  std::string_view rest = buffer_;
  bool more = true;
  while (more && !rest.empty() && state_ != State::kDone) {
    switch (state_) {
      case State::kHead: {
        const size_t end = rest.find("\r\n\r\n");
        if (end == std::string_view::npos) {
          if (rest.size() > kHeadBytesMax) {
            return absl::InvalidArgumentError("the head of the answer is too long");
          }
          more = false;
          break;
        }
        RETURN_IF_ERROR(ParseHead(rest.substr(0, end + 2)));
        rest.remove_prefix(end + 4);
        if (status_ == 100) state_ = State::kHead;
        break;
      }
      case State::kPlain:
      case State::kChunk: {
        const size_t size = std::min<uint64_t>(rest.size(), left_);
        piece(rest.substr(0, size));
        rest.remove_prefix(size);
        left_ -= size;
        if (left_ == 0) state_ = state_ == State::kPlain ? State::kDone : State::kChunkEnd;
        break;
      }
      case State::kUntilClose:
        piece(rest);
        rest.remove_prefix(rest.size());
        break;
      case State::kChunkSize: {
        const size_t end = rest.find("\r\n");
        if (end == std::string_view::npos) {
          if (rest.size() > 1024) return absl::InvalidArgumentError("a bad chunk came");
          more = false;
          break;
        }
        const auto [stop, error] = std::from_chars(rest.data(), rest.data() + end, left_, 16);
        if (error != std::errc()) return absl::InvalidArgumentError("a bad chunk came");
        rest.remove_prefix(end + 2);
        state_ = left_ == 0 ? State::kTrailer : State::kChunk;
        break;
      }
      case State::kChunkEnd:
        if (rest.size() < 2) {
          more = false;
          break;
        }
        rest.remove_prefix(2);
        state_ = State::kChunkSize;
        break;
      case State::kTrailer: {
        const size_t end = rest.find("\r\n");
        if (end == std::string_view::npos) {
          if (rest.size() > kHeadBytesMax) return absl::InvalidArgumentError("a bad trailer came");
          more = false;
          break;
        }
        if (end == 0) state_ = State::kDone;
        rest.remove_prefix(end + 2);
        break;
      }
      case State::kDone:
        break;
    }
  }
  buffer_ = std::string(rest);
  return absl::OkStatus();
}

absl::Status HttpAnswerParser::Finish() const {
  if (state_ == State::kDone || state_ == State::kUntilClose) return absl::OkStatus();
  return absl::UnavailableError("the server broke off before the answer was complete");
}

void EventStreamParser::Push(std::string_view bytes,
                             absl::FunctionRef<void(std::string_view)> data) {
  buffer_.append(bytes);
  size_t begin = 0;
  for (size_t end; (end = buffer_.find('\n', begin)) != std::string::npos; begin = end + 1) {
    std::string_view line(buffer_.data() + begin, end - begin);
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
    if (line.substr(0, 5) != "data:") continue;  // comments and other fields
    line.remove_prefix(5);
    if (!line.empty() && line[0] == ' ') line.remove_prefix(1);
    data(line);
  }
  buffer_.erase(0, begin);
  if (buffer_.size() > kEventBytesMax) buffer_.clear();
}

absl::StatusOr<int> Fetch(const HttpRequest& request,
                          absl::FunctionRef<void(std::string_view)> piece) {
  ASSIGN_OR_RETURN(const HostPort address, ParseHostPort(request.address));
  ASSIGN_OR_RETURN(const int fd, Connect(address));
  const Socket socket(fd);
  std::string text =
      fmt::format("{} {} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nAccept: */*\r\n",
                  request.method, request.path, address.Text());
  if (!request.api_key.empty()) {
    text += fmt::format("Authorization: Bearer {}\r\n", request.api_key);
  }
  if (!request.body.empty()) {
    text += fmt::format("Content-Type: application/json\r\nContent-Length: {}\r\n",
                        request.body.size());
  }
  text += "\r\n" + request.body;
  for (std::string_view rest = text; !rest.empty();) {
    const ssize_t n = send(fd, rest.data(), rest.size(), MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      return absl::UnavailableError(
          fmt::format("cannot send to {}: {}", address.Text(), std::strerror(errno)));
    }
    rest.remove_prefix(static_cast<size_t>(n));
  }
  const timeval timeout = absl::ToTimeval(request.silence);
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
  HttpAnswerParser parser;
  char buffer[16 << 10];
  while (!parser.done()) {
    const ssize_t n = recv(fd, buffer, sizeof(buffer), 0);
    if (n == 0) {
      RETURN_IF_ERROR(parser.Finish());
      break;
    }
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      return absl::DeadlineExceededError(fmt::format("{} said nothing for {}", address.Text(),
                                                     absl::FormatDuration(request.silence)));
    }
    if (n < 0 && errno == EINTR) return absl::CancelledError("interrupted");
    if (n < 0) {
      return absl::UnavailableError(
          fmt::format("{} broke off: {}", address.Text(), std::strerror(errno)));
    }
    RETURN_IF_ERROR(parser.Push(std::string_view(buffer, static_cast<size_t>(n)), piece));
  }
  return parser.status();
}

}  // namespace antiphon::cli
