// The operations listener of a daemon: /metrics, /livez, /readyz, /debug. A thread of its own, so
// that it answers while the daemon is busy.
#ifndef ANTIPHON_COMMON_OPS_SERVER_H_
#define ANTIPHON_COMMON_OPS_SERVER_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "common/metrics.h"

namespace antiphon {

struct HttpAnswer {
  int status = 200;
  std::string content_type = "text/plain; charset=utf-8";
  std::string body;
};

struct OpsHandlers {
  std::function<HttpAnswer()> metrics;
  std::function<HttpAnswer()> livez;
  std::function<HttpAnswer()> readyz;
  std::function<HttpAnswer()> debug;  // may be empty
};

class OpsServer {
 public:
  static absl::StatusOr<std::unique_ptr<OpsServer>> Start(const std::string& listen,
                                                          OpsHandlers handlers);
  ~OpsServer();
  uint16_t port() const;

 private:
  OpsServer();
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_OPS_SERVER_H_
