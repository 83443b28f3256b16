// The Prefill service over gRPC: streams in, events on the handler's executor.
#ifndef ANTIPHON_PREFILL_SERVICE_H_
#define ANTIPHON_PREFILL_SERVICE_H_

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "common/executor.h"
#include "common/wire.h"

namespace grpc {
class Service;
}
namespace antiphon::internal::v1 {
class PrefillOpen;
class PrefillUp;
}  // namespace antiphon::internal::v1

namespace antiphon::prefill {

// Called on the service's executor. `stream` is unique over the service's life.
class StreamHandler {
 public:
  virtual ~StreamHandler() = default;
  virtual void OnPrefillOpen(uint64_t stream, const wire::PrefillOpen& open) = 0;
  virtual void OnPrefillHalfClose(uint64_t stream) = 0;
  virtual void OnPrefillBroken(uint64_t stream) = 0;
};

// Thread-safe. Both executor and handler outlive the RPC server that serves this.
class PrefillService {
 public:
  static std::unique_ptr<PrefillService> Make(const Identity& self, Executor* executor,
                                              StreamHandler* handler);
  virtual ~PrefillService() = default;
  virtual grpc::Service* service() = 0;
  // Dropped when the stream is gone. What one stream announces is bounded by its prompt.
  virtual void Send(uint64_t stream, wire::PrefillUp message) = 0;
  // After what was sent before.
  virtual void End(uint64_t stream, const absl::Status& status) = 0;
};

}  // namespace antiphon::prefill

#endif  // ANTIPHON_PREFILL_SERVICE_H_
