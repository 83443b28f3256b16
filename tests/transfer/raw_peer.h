// Plain blocking sockets, for tests that play a peer of the `tcp` transport by hand. Every wait
// gives up after kPatience, so that a test fails instead of hanging.
#ifndef ANTIPHON_TESTS_TRANSFER_RAW_PEER_H_
#define ANTIPHON_TESTS_TRANSFER_RAW_PEER_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "absl/types/span.h"
#include "transfer/tcp_wire.h"

namespace antiphon::transfer {

inline constexpr absl::Duration kPatience = absl::Seconds(30);

using Bytes = std::vector<std::byte>;

Bytes Encoded(const HelloFrame& frame);
Bytes Encoded(const RequestFrame& frame);
Bytes Encoded(const ReplyFrame& frame);

class RawConnection {
 public:
  RawConnection() = default;
  explicit RawConnection(int fd);
  RawConnection(RawConnection&& other) : fd_(std::exchange(other.fd_, -1)) {}
  RawConnection& operator=(RawConnection&& other);
  ~RawConnection() { Close(); }

  // A socket that is not connected yet.
  static RawConnection Unconnected();
  static RawConnection To(const std::string& address);
  bool ConnectTo(const std::string& address);

  bool open() const { return fd_ >= 0; }
  // All of it; false when the peer ended the connection.
  bool Send(absl::Span<const std::byte> bytes);
  // Fewer when the peer ended the connection (or patience did).
  Bytes Receive(size_t bytes);
  // Waits for the peer to end the connection; false when it sends something instead.
  bool Ended();
  void Close();
  // Ends the connection with a reset.
  void Reset();

  // The owner's part.
  bool GreetPuller();
  RequestFrame NextRequest();
  bool Reply(const RequestFrame& request, absl::Span<const std::byte> payload);

  // The puller's part.
  bool GreetOwner();
  ReplyFrame NextReply();

 private:
  int fd_ = -1;
};

class RawListener {
 public:
  explicit RawListener(uint16_t port = 0);  // 0: the kernel chooses
  ~RawListener();
  RawListener(const RawListener&) = delete;

  RawConnection Accept();
  // Accepts and greets.
  RawConnection AcceptPuller();
  std::string address() const;
  uint16_t port() const { return port_; }

 private:
  int fd_ = -1;
  uint16_t port_ = 0;
};

}  // namespace antiphon::transfer

#endif  // ANTIPHON_TESTS_TRANSFER_RAW_PEER_H_
