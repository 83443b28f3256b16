// The OpenAI-compatible HTTP front: routes, headers, answers and event streams over http::Server.
#ifndef ANTIPHON_GATEWAY_HTTP_FRONT_H_
#define ANTIPHON_GATEWAY_HTTP_FRONT_H_

#include <functional>
#include <memory>
#include <string>

#include "gateway/gateway.h"
#include "gateway/http/server.h"

namespace antiphon::gateway {

struct HttpFrontOptions {
  Gateway* gateway = nullptr;  // outlives the front
  bool operations = true;      // /metrics, /livez and /readyz here too
  std::function<std::string()> metrics;
  std::function<std::string()> not_ready;  // empty: ready
  std::string base_url;                    // for the curl of GET /; set once known
};

// Thread-safe.
class HttpFront final : public http::Handler {
 public:
  explicit HttpFront(HttpFrontOptions options) : options_(std::move(options)) {}
  void SetBaseUrl(std::string url) { options_.base_url = std::move(url); }  // before traffic

  std::optional<http::Response> Screen(const http::Head& head) override;
  void Handle(std::shared_ptr<http::Exchange> exchange) override;
  http::Response OnProtocolError(const ApiError& error) override;

 private:
  enum class Route;
  struct Match;
  static Match RouteOf(const http::Head& head);
  MaybeError Check(const http::Head& head, const Match& match) const;
  http::Response Refuse(const RequestMeta& meta, const ApiError& error);
  void HandleGenerate(std::shared_ptr<http::Exchange> exchange, RequestMeta meta, bool chat);
  http::Response HandleTokens(const http::Request& request, RequestMeta& meta, bool detokenize);
  http::Response HandleSimple(const http::Request& request, const Match& match, RequestMeta& meta);

  HttpFrontOptions options_;
};

}  // namespace antiphon::gateway

#endif  // ANTIPHON_GATEWAY_HTTP_FRONT_H_
