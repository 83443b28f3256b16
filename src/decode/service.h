// The Decode service over gRPC: gateways' streams in, events on the handler's executor.
#ifndef ANTIPHON_DECODE_SERVICE_H_
#define ANTIPHON_DECODE_SERVICE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "common/executor.h"
#include "common/wire.h"

namespace grpc {
class Service;
}
namespace antiphon::internal::v1 {
class Start;
class Cancel;
class TokenBatch;
}  // namespace antiphon::internal::v1

namespace antiphon::decode {

// Called on the service's executor. `gateway` names a stream, unique over the service's life.
class GatewayHandler {
 public:
  virtual ~GatewayHandler() = default;
  virtual void OnStart(uint64_t gateway, const wire::Start& start) = 0;
  virtual void OnCancel(uint64_t gateway, const wire::Cancel& cancel) = 0;
  // Once for each stream, also when the gateway read so slowly that we ended it.
  virtual void OnGatewayBroken(uint64_t gateway) = 0;
};

// Thread-safe. Both executor and handler outlive the RPC server that serves this. The next message
// of a stream is read when the handler has returned from the last.
class DecodeService {
 public:
  static std::unique_ptr<DecodeService> Make(const Identity& self, Executor* executor,
                                             GatewayHandler* handler);
  virtual ~DecodeService() = default;
  virtual grpc::Service* service() = 0;
  // Never waits. A stream with more than kUnreadBytesMax unread is ended RESOURCE_EXHAUSTED.
  virtual void Send(uint64_t gateway, wire::TokenBatch batch) = 0;
  // Ends all streams after what was sent before (drain).
  virtual void EndAll(const absl::Status& status) = 0;
};

inline constexpr size_t kUnreadBytesMax = 8 << 20;

}  // namespace antiphon::decode

#endif  // ANTIPHON_DECODE_SERVICE_H_
