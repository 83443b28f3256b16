// The worker's RPC port, which serves both of its services.
#ifndef ANTIPHON_WORKER_LISTENER_H_
#define ANTIPHON_WORKER_LISTENER_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace grpc {
class Service;
}

namespace antiphon::worker {

class Listener {
 public:
  // The services outlive it. UNAVAILABLE when the port is taken.
  static absl::StatusOr<std::unique_ptr<Listener>> Start(const std::string& listen,
                                                         grpc::Service* prefill,
                                                         grpc::Service* decode);
  virtual ~Listener() = default;
  virtual uint16_t port() const = 0;
  // Ends what still runs; returns when no handler runs any more.
  virtual void Shutdown() = 0;
};

}  // namespace antiphon::worker

#endif  // ANTIPHON_WORKER_LISTENER_H_
