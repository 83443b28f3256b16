// An HTTP client that sends exactly the bytes a test wants and reads answers strictly. Blocking;
// what does not come within kPatience fails the test.
#ifndef ANTIPHON_TESTS_GATEWAY_HTTP_CLIENT_H_
#define ANTIPHON_TESTS_GATEWAY_HTTP_CLIENT_H_

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "absl/time/time.h"

namespace antiphon::gateway {

inline constexpr absl::Duration kPatience = absl::Seconds(30);

struct HttpAnswer {
  int status = 0;  // 0: the connection ended instead
  std::string version;
  std::multimap<std::string, std::string> headers;  // names are lower-case
  std::string body;
  std::string Header(const std::string& name) const {
    const auto it = headers.find(name);
    return it == headers.end() ? "" : it->second;
  }
};

class HttpClient {
 public:
  // `receive_buffer`: bytes that the kernel takes for us while we do not read; 0: its default.
  explicit HttpClient(uint16_t port, int receive_buffer = 0)
      : fd_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    if (receive_buffer > 0) {
      setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof(receive_buffer));
    }
    const int on = 1;
    setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    connected_ = connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0;
  }
  HttpClient(HttpClient&& other) noexcept
      : fd_(std::exchange(other.fd_, -1)),
        connected_(other.connected_),
        in_(std::move(other.in_)) {}
  ~HttpClient() { Close(); }

  bool connected() const { return connected_; }
  void Close() {
    if (fd_ >= 0) close(std::exchange(fd_, -1));
  }
  // Ends with a reset instead of an orderly end.
  void Reset() {
    const linger hard{.l_onoff = 1, .l_linger = 0};
    setsockopt(fd_, SOL_SOCKET, SO_LINGER, &hard, sizeof(hard));
    Close();
  }
  void EndSending() { shutdown(fd_, SHUT_WR); }

  // False when the peer has closed.
  bool Send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t n = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (n <= 0) return false;
      bytes.remove_prefix(static_cast<size_t>(n));
    }
    return true;
  }

  HttpAnswer Request(std::string_view bytes) {
    Send(bytes);
    return Read();
  }

  // Status line and headers.
  HttpAnswer ReadHead() {
    HttpAnswer answer;
    const std::optional<std::string> line = Line();
    if (!line) return answer;
    answer.version = line->substr(0, 8);
    if (line->size() < 12 || line->substr(0, 7) != "HTTP/1.") {
      ADD_FAILURE() << "not a status line: " << *line;
      return answer;
    }
    answer.status = std::atoi(line->c_str() + 9);
    while (true) {
      const std::optional<std::string> header = Line();
      if (!header) {
        ADD_FAILURE() << "the head ends early";
        return answer;
      }
      if (header->empty()) return answer;
      const size_t colon = header->find(": ");
      if (colon == std::string::npos) {
        ADD_FAILURE() << "not a header: " << *header;
        continue;
      }
      std::string name = header->substr(0, colon);
      for (char& c : name) c = static_cast<char>(tolower(c));
      answer.headers.emplace(name, header->substr(colon + 2));
    }
  }
  // One chunk; nullopt after the last one, or when the stream is cut (then cut() is true).
  std::optional<std::string> ReadChunk() {
    const std::optional<std::string> line = Line();
    if (!line || line->empty()) {
      cut_ = true;
      return std::nullopt;
    }
    const size_t size = std::strtoul(line->c_str(), nullptr, 16);
    std::optional<std::string> piece = Bytes(size);
    const std::optional<std::string> end = piece ? Line() : std::nullopt;
    if (!end) {
      cut_ = true;
      return std::nullopt;
    }
    EXPECT_EQ(*end, "");
    if (size == 0) return std::nullopt;
    return piece;
  }
  bool cut() const { return cut_; }
  // A whole answer. `head`: to a HEAD request.
  HttpAnswer Read(bool head = false) {
    HttpAnswer answer = ReadHead();
    if (answer.status == 0 || answer.status == 100 || head) return answer;
    if (answer.Header("transfer-encoding") == "chunked") {
      EXPECT_EQ(answer.headers.count("content-length"), 0u);
      while (auto piece = ReadChunk()) answer.body += *piece;
    } else if (answer.headers.count("content-length") == 1) {
      const auto body = Bytes(std::strtoul(answer.Header("content-length").c_str(), nullptr, 10));
      EXPECT_TRUE(body.has_value()) << "the body ends early";
      answer.body = body.value_or("");
    } else {
      EXPECT_EQ(answer.Header("connection"), "close") << "a body without an end";
      while (Fill()) {
      }
      answer.body = std::exchange(in_, {});
    }
    return answer;
  }
  // Whether the peer ends the connection, with nothing before that.
  bool AtEnd() {
    if (!in_.empty()) return false;
    return !Fill();
  }

 private:
  // More bytes into in_; false at the end.
  bool Fill() {
    pollfd poll_one{fd_, POLLIN, 0};
    if (poll(&poll_one, 1, static_cast<int>(absl::ToInt64Milliseconds(kPatience))) != 1) {
      ADD_FAILURE() << "nothing came in " << absl::FormatDuration(kPatience);
      return false;
    }
    char buffer[16384];
    const ssize_t n = recv(fd_, buffer, sizeof(buffer), 0);
    if (n <= 0) return false;
    in_.append(buffer, static_cast<size_t>(n));
    return true;
  }
  std::optional<std::string> Line() {
    size_t end;
    while ((end = in_.find("\r\n")) == std::string::npos) {
      if (!Fill()) return std::nullopt;
    }
    std::string line = in_.substr(0, end);
    in_.erase(0, end + 2);
    return line;
  }
  std::optional<std::string> Bytes(size_t count) {
    while (in_.size() < count) {
      if (!Fill()) return std::nullopt;
    }
    std::string bytes = in_.substr(0, count);
    in_.erase(0, count);
    return bytes;
  }

  int fd_;
  bool connected_ = false;
  bool cut_ = false;
  std::string in_;
};

inline std::string Get(std::string_view path, std::string_view headers = "") {
  std::string out = "GET ";
  out += path;
  out += " HTTP/1.1\r\nHost: test\r\n";
  out += headers;
  return out + "\r\n";
}
inline std::string Post(std::string_view path, std::string_view body,
                        std::string_view headers = "") {
  std::string out = "POST ";
  out += path;
  out += " HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: ";
  out += std::to_string(body.size());
  out += "\r\n";
  out += headers;
  out += "\r\n";
  out += body;
  return out;
}

}  // namespace antiphon::gateway

#endif  // ANTIPHON_TESTS_GATEWAY_HTTP_CLIENT_H_
