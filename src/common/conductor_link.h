// A node's streams to all its conductors: hello, then reports; reconnects for ever with jittered
// backoff, so daemons may start in any order.
#ifndef ANTIPHON_COMMON_CONDUCTOR_LINK_H_
#define ANTIPHON_COMMON_CONDUCTOR_LINK_H_

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/time/time.h"
#include "common/executor.h"
#include "common/wire.h"

namespace antiphon::internal::v1 {
class NodeHello;
class NodeReport;
}  // namespace antiphon::internal::v1

namespace antiphon {

struct ConductorLinkOptions {
  std::vector<std::string> conductors;  // RPC addresses
  Identity self;
  Executor* executor = nullptr;  // where callbacks run; outlives the link
  // The first message on every new stream.
  absl::AnyInvocable<wire::NodeHello()> hello;
  // Content of a blob that a conductor asks for; empty: unknown. Workers only.
  absl::AnyInvocable<std::string(const std::string& digest)> blob;
  // A conductor accepted us, or asks for a snapshot: answer with Send(conductor, events{snapshot}).
  absl::AnyInvocable<void(const std::string& conductor)> on_need_snapshot;
};

// Thread-safe.
class ConductorLink {
 public:
  static std::unique_ptr<ConductorLink> Start(ConductorLinkOptions options);
  virtual ~ConductorLink() = default;
  // To every conductor that has accepted us; dropped for the others. Reports of load replace an
  // unsent one; events queue up to 64 MiB, then that stream is resnapshotted.
  virtual void Broadcast(const wire::NodeReport& report) = 0;
  virtual void Send(const std::string& conductor, const wire::NodeReport& report) = 0;
  virtual int accepted_count() const = 0;
  // The newest refusal, for readiness texts; empty when none.
  virtual std::string last_error() const = 0;
};

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_CONDUCTOR_LINK_H_
