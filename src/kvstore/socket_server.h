// The Unix socket of the store: connections of local workers, their descriptors and their ends.
#ifndef ANTIPHON_KVSTORE_SOCKET_SERVER_H_
#define ANTIPHON_KVSTORE_SOCKET_SERVER_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "common/clock.h"
#include "common/executor.h"
#include "kvstore/blob_desk.h"
#include "kvstore/node.h"

namespace antiphon::kvstore {

struct SocketServerOptions {
  std::string path;
  int pool_fd = -1;           // passed to workers that attach; stays the caller's
  StoreNode* node = nullptr;  // used on `executor` only, as is the next
  BlobDesk* blobs = nullptr;
  Executor* executor = nullptr;
  const Clock* clock = nullptr;
};

// A worker's holdings outlive its connection until its pidfd reports its exit: until then it may
// still write to the pool. Workers that could pass no pidfd end with their connection, as does
// everybody's hold on a blob.
//
// Limits: 256 connections, 16 MiB a frame, 256 requests of one connection in the executor (then it
// is read no further), 64 MiB of unsent replies (then it is closed).
class SocketServer {
 public:
  // Creates the socket, mode 0660; replaces one that nobody listens to. UNAVAILABLE: another store
  // listens there, or the folder cannot be written. Connections wait until Serve.
  static absl::StatusOr<std::unique_ptr<SocketServer>> Bind(SocketServerOptions options);
  virtual ~SocketServer() = default;  // closes all connections; after the executor was shut down
  virtual absl::Status Serve() = 0;
};

}  // namespace antiphon::kvstore

#endif  // ANTIPHON_KVSTORE_SOCKET_SERVER_H_
