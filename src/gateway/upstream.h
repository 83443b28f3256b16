// The cluster as the gateway uses it.
#ifndef ANTIPHON_GATEWAY_UPSTREAM_H_
#define ANTIPHON_GATEWAY_UPSTREAM_H_

#include <cstdint>
#include <string>

#include "absl/functional/any_invocable.h"
#include "absl/status/statusor.h"
#include "antiphon/v1/control.pb.h"
#include "antiphon/v1/worker.pb.h"

namespace antiphon::gateway {

namespace wire = ::antiphon::internal::v1;

// Called on the gateway's executor, where the events come back too, never from within a call.
// Hellos are added by whoever implements this.
class Upstream {
 public:
  class Listener {
   public:
    virtual ~Listener() = default;
    virtual void OnTokens(const wire::TokenBatch& batch) = 0;
    // The stream to that worker is over, and with it all it carried.
    virtual void OnDecodeBroken(const std::string& address, const absl::Status& why) = 0;
  };
  virtual ~Upstream() = default;

  // Returns a name for the call. `done` runs once unless the call is abandoned first.
  virtual uint64_t Admit(wire::AdmitRequest request,
                         absl::AnyInvocable<void(absl::StatusOr<wire::AdmitReply>)> done) = 0;
  virtual void AbandonAdmit(uint64_t call) = 0;
  // On the one stream to that worker, which is opened when there is none.
  virtual void Start(const std::string& address, wire::Start start) = 0;
  // No effect when there is no stream: its end cancelled everything.
  virtual void Cancel(const std::string& address, wire::Cancel cancel) = 0;
  virtual void Finish(wire::FinishReport report) = 0;
};

}  // namespace antiphon::gateway

#endif  // ANTIPHON_GATEWAY_UPSTREAM_H_
