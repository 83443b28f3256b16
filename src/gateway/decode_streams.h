// One Generate stream for each decode worker, shared by all generations that run there. Opened at
// the first use; when it breaks, everything on it is over and the next use opens another.
#ifndef ANTIPHON_GATEWAY_DECODE_STREAMS_H_
#define ANTIPHON_GATEWAY_DECODE_STREAMS_H_

#include <memory>
#include <string>

#include "common/executor.h"
#include "common/wire.h"
#include "gateway/upstream.h"

namespace antiphon::gateway {

// All methods on `executor`, where the listener's come too. The destructor runs off it, when it
// still turns, and waits for the streams' ends.
class DecodeStreams {
 public:
  static std::unique_ptr<DecodeStreams> Create(Identity self, Executor* executor,
                                               Upstream::Listener* listener);
  virtual ~DecodeStreams() = default;
  virtual void Start(const std::string& address, wire::Start start) = 0;
  virtual void Cancel(const std::string& address, wire::Cancel cancel) = 0;
};

}  // namespace antiphon::gateway

#endif  // ANTIPHON_GATEWAY_DECODE_STREAMS_H_
