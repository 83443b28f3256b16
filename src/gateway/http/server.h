// An HTTP/1.1 server for few routes, long answers and hostile clients: keep-alive, pipelining,
// chunked answers, limits on everything a client can make us keep, and notice when it leaves.
//
// A request is read whole before it is handled. While it is handled the read side stays armed, so a
// client that goes away is noticed though nothing is sent to it.
#ifndef ANTIPHON_GATEWAY_HTTP_SERVER_H_
#define ANTIPHON_GATEWAY_HTTP_SERVER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "gateway/api_error.h"

namespace antiphon::gateway::http {

// Names are lower-case.
using Headers = std::vector<std::pair<std::string, std::string>>;
// The first of that name; empty when there is none.
std::string_view Find(const Headers& headers, std::string_view name);

struct Head {
  std::string method;
  std::string path;  // without the query, not decoded
  std::string query;
  Headers headers;
  bool has_body = false;
};
struct Request : Head {
  std::string body;
};
struct Response {
  int status = 200;
  std::string content_type = "application/json";
  Headers headers;
  std::string body;
};

// Why a client gets nothing more.
enum class Gone { kDisconnected, kSlow };

// The answering side of one request. Thread-safe; calls past the end, or after the client left,
// have no effect. Whoever gets one answers it, in the end.
class Exchange {
 public:
  virtual ~Exchange() = default;
  virtual const Request& request() const = 0;
  // A whole answer.
  virtual void Respond(Response response) = 0;
  // A chunked one: head, pieces, end. What the client does not take is kept up to
  // Limits::stream_buffer_bytes; past that it is gone (kSlow), and nothing more is sent to it.
  virtual void BeginStream(Response head) = 0;
  virtual void Write(std::string_view piece) = 0;
  virtual void EndStream() = 0;
  // `callback` runs once, on an io thread, when the client leaves before the answer's end; at once
  // when it has left already.
  virtual void OnGone(absl::AnyInvocable<void(Gone)> callback) = 0;
};

class Handler {
 public:
  virtual ~Handler() = default;
  // After the head, before the body: an answer refuses the request (the body is not read). On an io
  // thread; must be quick.
  virtual std::optional<Response> Screen(const Head& head) = 0;
  // On an io thread; must be quick.
  virtual void Handle(std::shared_ptr<Exchange> exchange) = 0;
  // An error that was found before there was a request.
  virtual Response OnProtocolError(const ApiError& error) = 0;
};

struct Limits {
  size_t body_bytes = 64u << 20;
  size_t all_bodies_bytes = 1u << 30;  // being read or handled, over all connections
  size_t header_bytes = 32u << 10;
  size_t pipelined_bytes = 64u << 10;  // kept while a request is handled
  size_t stream_buffer_bytes = 1u << 20;
  int connections = 8192;
  absl::Duration idle_timeout = absl::Seconds(75);  // between requests
  absl::Duration header_timeout = absl::Seconds(10);
  absl::Duration body_timeout = absl::Seconds(30);  // plus a second for each body_rate bytes
  size_t body_rate = 64u << 10;
  absl::Duration write_timeout = absl::Seconds(30);  // without progress
};

// Owns its io threads. Thread-safe.
class Server {
 public:
  // `handler` outlives the server. UNAVAILABLE: "port 8000 on 127.0.0.1 is taken" and the like.
  static absl::StatusOr<std::unique_ptr<Server>> Start(const std::string& listen,
                                                       const Limits& limits, int io_threads,
                                                       Handler* handler);
  // Closes everything. An answer that is complete gets a second to leave; exchanges that still run
  // are gone (kDisconnected), and calls on them have no effect any more.
  virtual ~Server() = default;
  virtual uint16_t port() const = 0;
  // No new connections; those there are close after their request.
  virtual void Drain() = 0;
  virtual int connections() const = 0;
};

}  // namespace antiphon::gateway::http

#endif  // ANTIPHON_GATEWAY_HTTP_SERVER_H_
