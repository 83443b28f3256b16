// The serving side of the `tcp` transport: answers requests for bytes of exported regions.
#ifndef ANTIPHON_TRANSFER_TCP_SERVER_H_
#define ANTIPHON_TRANSFER_TCP_SERVER_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "common/clock.h"
#include "transfer/event_loop.h"
#include "transfer/tcp_metrics.h"
#include "transfer/tcp_wire.h"
#include "transfer/transport.h"

namespace antiphon::transfer {

class TcpServer {
 public:
  // Unanswered requests of one connection; it is read no further while there are as many.
  static constexpr size_t kRequestsQueuedMax = 128;

  // Owns `listen_fd`.
  TcpServer(int listen_fd, int connections_max, const Clock& clock, TcpMetrics& metrics);
  ~TcpServer();

  // Thread-safe; as Transport's.
  absl::Status Export(RegionId id, const std::byte* base, size_t bytes);
  void Unexport(RegionId id);

 private:
  // A request on its way to becoming a reply.
  struct Answer {
    RequestFrame request;
    std::array<std::byte, kReplyBytes> header;
    size_t header_sent = 0;
    size_t payload = 0;  // bytes that follow the header
    size_t payload_sent = 0;
  };
  struct Connection {
    int fd = -1;
    EventLoop::WatchId watch = 0;
    bool greeted = false;
    std::array<std::byte, kRequestBytes * 64> in;
    size_t in_bytes = 0;
    std::deque<Answer> answers;
    std::array<std::byte, kHelloBytes> hello;  // ours
    size_t hello_left = 0;
    bool blocked = false;  // the socket takes no more
    absl::Time progress;   // the last one
  };
  using Region = absl::Span<const std::byte>;

  void Accept();
  void OnEvents(Connection& c, uint32_t events);
  // All of these: false when the connection has to end.
  bool Receive(Connection& c);
  bool Parse(Connection& c);
  bool Send(Connection& c);
  bool SendAnswers(Connection& c, size_t& budget);
  void Decide(Answer& answer) ABSL_SHARED_LOCKS_REQUIRED(mu_);
  void Close(Connection& c);
  bool CloseIdlest();
  void Sweep();

  const int listen_fd_;
  const size_t connections_max_;
  TcpMetrics& metrics_;
  EventLoop::WatchId listen_watch_ = 0;
  bool accepting_ = true;  // false: out of descriptors or memory, until the next Sweep
  std::map<EventLoop::WatchId, std::unique_ptr<Connection>> connections_;

  absl::Mutex mu_;  // held shared while region memory is read
  std::map<RegionId, Region> regions_ ABSL_GUARDED_BY(mu_);

  EventLoop loop_;
};

}  // namespace antiphon::transfer

#endif  // ANTIPHON_TRANSFER_TCP_SERVER_H_
