// The same inference service over gRPC (inference.proto), on its own port: health by service name,
// reflection, cancellation. One validator and one life of a request with the HTTP front.
#ifndef ANTIPHON_GATEWAY_GRPC_FRONT_H_
#define ANTIPHON_GATEWAY_GRPC_FRONT_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "gateway/gateway.h"

namespace antiphon::gateway {

// Thread-safe. Keys travel as metadata "authorization: Bearer KEY", the client's request id as
// "x-request-id", its class as "x-antiphon-class"; the call's deadline is the request's.
class GrpcFront {
 public:
  // `gateway` outlives the front. UNAVAILABLE when the port is taken.
  static absl::StatusOr<std::unique_ptr<GrpcFront>> Start(const std::string& listen,
                                                          Gateway* gateway);
  virtual ~GrpcFront() = default;
  virtual int port() const = 0;
  virtual void SetServing(bool serving) = 0;
};

}  // namespace antiphon::gateway

#endif  // ANTIPHON_GATEWAY_GRPC_FRONT_H_
