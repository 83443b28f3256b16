// The conductor's gRPC services: callback reactors that check a message and post it. The one header
// between the conductor and gRPC; includes none of gRPC's.
#ifndef ANTIPHON_CONDUCTOR_RPC_SERVICE_H_
#define ANTIPHON_CONDUCTOR_RPC_SERVICE_H_

#include <memory>
#include <string>

#include "absl/functional/any_invocable.h"
#include "absl/status/statusor.h"
#include "common/executor.h"
#include "conductor/conductor.h"

namespace antiphon::conductor {

struct RpcServiceOptions {
  std::string listen;        // host:port
  std::string local_socket;  // path; empty: none. Administration is served here alone
  Conductor* conductor = nullptr;
  Executor* executor = nullptr;      // the conductor's; must run until this is destroyed
  absl::AnyInvocable<void()> drain;  // Admin.Drain was called; any thread
};

// Listens from Start to destruction, which ends all streams. Not to be destroyed on the executor.
class RpcService {
 public:
  static absl::StatusOr<std::unique_ptr<RpcService>> Start(RpcServiceOptions options);
  virtual ~RpcService() = default;
  virtual int port() const = 0;
};

}  // namespace antiphon::conductor

#endif  // ANTIPHON_CONDUCTOR_RPC_SERVICE_H_
