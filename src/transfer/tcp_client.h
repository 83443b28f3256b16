// The pulling side of the `tcp` transport. All state lives on its loop; only that thread writes to
// the local memory of pulls, so a pull that has ended is never written to again.
#ifndef ANTIPHON_TRANSFER_TCP_CLIENT_H_
#define ANTIPHON_TRANSFER_TCP_CLIENT_H_

#include <sys/socket.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/executor.h"
#include "transfer/event_loop.h"
#include "transfer/tcp_metrics.h"
#include "transfer/tcp_transport.h"
#include "transfer/tcp_wire.h"
#include "transfer/transport.h"

namespace antiphon::transfer {

class TcpClient {
 public:
  TcpClient(const TcpOptions& options, const Clock& clock, TcpMetrics& metrics);
  ~TcpClient();  // ends all pulls CANCELLED

  // Thread-safe; as Transport's.
  PullId Pull(PullRequest request, PullDone done);
  void Cancel(PullId id);

 private:
  struct ActivePull {
    PullId id = 0;
    PullDone done;
    absl::Time started;
    EventLoop::TimerId timer = 0;
    size_t pieces_left = 0;
    uint64_t retry_lanes_below = 0;  // its pieces on these lanes may be asked for again; 0: all
    bool over = false;               // its memory is out of bounds
  };
  using PullRef = std::shared_ptr<ActivePull>;
  // One request on the wire.
  struct Piece {
    PullRef pull;
    RegionId region = 0;
    uint64_t offset = 0;
    std::byte* local = nullptr;
    uint32_t bytes = 0;
    uint64_t wire_id = 0;
  };
  struct Peer;
  struct Lane {
    Peer* peer = nullptr;
    uint64_t number = 0;  // ascending, from 1
    int fd = -1;
    EventLoop::WatchId watch = 0;
    bool connected = false;
    bool ready = false;          // greeted
    std::vector<std::byte> out;  // not yet sent
    size_t out_sent = 0;
    std::deque<Piece> in_flight;  // in the order of their replies
    uint64_t in_flight_bytes = 0;
    std::array<std::byte, kReplyBytes> header;
    size_t header_bytes = 0;
    size_t payload_bytes = 0;  // of the front piece, received
    bool in_payload = false;
    absl::Time progress;
  };
  struct Peer {
    std::string address;
    bool resolving = false;
    bool resolved = false;
    sockaddr_storage socket_address;
    socklen_t socket_address_size = 0;
    std::deque<Piece> queue;
    std::list<Lane> lanes;
    uint64_t in_flight_bytes = 0;
    int failures = 0;  // in a row, to connect
    absl::Time next_attempt = absl::InfinitePast();
    std::string last_error;
  };
  using LaneRef = std::list<Lane>::iterator;

  void Start(PullId id, PullRequest request, PullDone done);
  void Finish(const PullRef& pull, const absl::Status& status);
  Peer& PeerOf(const std::string& address);
  void Resolve(Peer& peer);
  void Pump(Peer& peer);
  LaneRef PickLane(Peer& peer);
  void OpenLane(Peer& peer);
  void OnEvents(LaneRef lane, uint32_t events);
  // Not ok: the lane has to end.
  absl::Status OnConnected(Lane& lane);
  absl::Status Send(Lane& lane);
  absl::Status Receive(Lane& lane);
  absl::Status TakeHeader(Lane& lane);
  void PieceDone(Lane& lane);
  void PopPiece(Lane& lane);
  void FailLane(LaneRef lane, const absl::Status& why, bool retry);
  void FailQueue(Peer& peer);
  void DropSpentPieces(Peer& peer);
  void UpdateEvents(Lane& lane);
  void Sweep();

  const TcpOptions options_;
  TcpMetrics& metrics_;
  std::atomic<PullId> next_id_{1};
  uint64_t next_wire_id_ = 1;
  uint64_t next_lane_ = 1;
  uint64_t jitter_ = 0;
  bool ending_ = false;
  std::map<PullId, PullRef> pulls_;
  std::map<std::string, std::unique_ptr<Peer>> peers_;
  std::vector<std::byte> bin_;  // where cancelled bytes go

  EventLoop loop_;
  SerialExecutor resolver_{"xfer-resolve"};
};

}  // namespace antiphon::transfer

#endif  // ANTIPHON_TRANSFER_TCP_CLIENT_H_
