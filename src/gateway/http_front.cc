#include "gateway/http_front.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/numbers.h"
#include "antiphon/v1/inference.pb.h"
#include "common/strings.h"
#include "gateway/api_text.h"
#include "gateway/json_text.h"

namespace antiphon::gateway {
namespace {

using http::Find;
using http::Headers;

std::string Lower(std::string_view text) {
  std::string out(text);
  for (char& c : out) {
    if (c >= 'A' && c <= 'Z') c += 'a' - 'A';
  }
  return out;
}

Headers ErrorHeaders(const ApiError& error) {
  Headers headers;
  if (error.retry_after_s > 0) {
    headers.emplace_back("Retry-After",
                         fmt::format("{}", static_cast<int64_t>(std::ceil(error.retry_after_s))));
    headers.emplace_back(
        "retry-after-ms",
        fmt::format("{}", static_cast<int64_t>(std::ceil(error.retry_after_s * 1000))));
  }
  if (error.retry_is_useless) headers.emplace_back("x-should-retry", "false");
  if (!error.rejected_reason.empty()) {
    headers.emplace_back("X-Antiphon-Rejected-Reason", error.rejected_reason);
  }
  if (!error.allow.empty()) headers.emplace_back("Allow", error.allow);
  if (error.status == 401) headers.emplace_back("WWW-Authenticate", "Bearer");
  return headers;
}

http::Response ErrorResponse(const ApiError& error, std::string_view label) {
  http::Response response;
  response.status = error.status;
  response.headers = ErrorHeaders(error);
  if (!label.empty()) response.headers.emplace_back("x-request-id", label);
  response.body = ErrorJson(error);
  return response;
}

int HexDigit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

// What is no escape stays as it is.
std::string PercentDecoded(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    const int high = text[i] == '%' && i + 2 < text.size() ? HexDigit(text[i + 1]) : -1;
    const int low = high >= 0 ? HexDigit(text[i + 2]) : -1;
    if (low >= 0) {
      out += static_cast<char>(16 * high + low);
      i += 2;
    } else {
      out += text[i];
    }
  }
  return out;
}

void AddIgnored(const std::vector<std::string>& ignored, Headers& headers) {
  if (ignored.empty()) return;
  std::string names;
  for (const std::string& name : ignored) {
    // Only what a header may carry; the rest of a name says nothing a client could use.
    if (!names.empty()) names += ", ";
    for (char c : name.substr(0, 64)) names += c > 0x20 && c < 0x7f && c != ',' ? c : '?';
  }
  headers.emplace_back("X-Antiphon-Ignored-Fields", names);
}

// From the dispatcher's events to one HTTP answer.
class HttpSink final : public ResponseSink {
 public:
  struct Setup {
    std::shared_ptr<http::Exchange> exchange;
    AnswerHead head;  // the model comes with OnPrepared
    Headers headers;
    HttpOptions options;
    std::string label;
  };
  explicit HttpSink(Setup setup) : s_(std::move(setup)) {}

  void OnPrepared(const ServedModelPtr& model) override { s_.head.model = model; }
  void OnDelta(const ChoiceDelta& delta) override {
    if (!s_.options.stream) return whole_.Add(delta);
    Begin();
    if (events_) Write(events_->Render(delta));
  }
  void OnChoiceEnd(const ChoiceEnd& end) override {
    if (!s_.options.stream) return whole_.Add(end);
    Begin();
    if (events_) Write(events_->Render(end));
  }
  void OnDone(const RequestEnd& end, const Exchange* exchange) override {
    if (end.cancelled) return;  // nobody listens
    if (end.error) {
      if (!events_) return s_.exchange->Respond(ErrorResponse(*end.error, s_.label));
      Write(EventStream::RenderError(*end.error));
      return s_.exchange->EndStream();
    }
    if (s_.options.stream) {
      Begin();
      Write(events_->RenderDone(end.usage));
      return s_.exchange->EndStream();
    }
    http::Response response;
    response.headers = s_.headers;
    response.body = whole_.Render(s_.head, end.usage);
    s_.exchange->Respond(std::move(response));
  }

 private:
  // The status line goes out with the first token, never before.
  void Begin() {
    if (events_) return;
    events_.emplace(s_.head, s_.options.include_usage, s_.options.continuous_usage);
    http::Response head;
    head.content_type = "text/event-stream; charset=utf-8";
    head.headers = s_.headers;
    head.headers.emplace_back("Cache-Control", "no-cache");
    head.headers.emplace_back("X-Accel-Buffering", "no");
    s_.exchange->BeginStream(std::move(head));
  }
  void Write(const std::string& piece) {
    if (!piece.empty()) s_.exchange->Write(piece);
  }

  Setup s_;
  WholeAnswer whole_;
  std::optional<EventStream> events_;
};

}  // namespace

enum class HttpFront::Route {
  kNone,
  kRoot,
  kChat,
  kCompletions,
  kModels,
  kModel,
  kTokenize,
  kDetokenize,
  kHealth,
  kLivez,
  kReadyz,
  kVersion,
  kMetrics,
  kUnserved,
};

struct HttpFront::Match {
  Route route = Route::kNone;
  std::string_view method = "GET";
  bool guarded = true;
  Endpoint endpoint = Endpoint::kOther;
  std::string_view rest;  // the model's name
};

HttpFront::Match HttpFront::RouteOf(const http::Head& head) {
  std::string_view path = head.path;
  if (path.starts_with("/v1/")) path.remove_prefix(3);
  while (path.size() > 1 && path.back() == '/') path.remove_suffix(1);
  static constexpr struct {
    std::string_view path;
    Route route;
    std::string_view method;
    bool guarded;
    Endpoint endpoint;
  } kRoutes[] = {
      {"/", Route::kRoot, "GET", false, Endpoint::kOther},
      {"/chat/completions", Route::kChat, "POST", true, Endpoint::kChat},
      {"/completions", Route::kCompletions, "POST", true, Endpoint::kCompletions},
      {"/models", Route::kModels, "GET", true, Endpoint::kModels},
      {"/tokenize", Route::kTokenize, "POST", true, Endpoint::kTokenize},
      {"/detokenize", Route::kDetokenize, "POST", true, Endpoint::kDetokenize},
      {"/health", Route::kHealth, "GET", false, Endpoint::kOther},
      {"/livez", Route::kLivez, "GET", false, Endpoint::kOther},
      {"/readyz", Route::kReadyz, "GET", false, Endpoint::kOther},
      {"/version", Route::kVersion, "GET", false, Endpoint::kOther},
      {"/metrics", Route::kMetrics, "GET", true, Endpoint::kOther},
      {"/embeddings", Route::kUnserved, "POST", true, Endpoint::kOther},
      {"/responses", Route::kUnserved, "POST", true, Endpoint::kOther},
      {"/messages", Route::kUnserved, "POST", true, Endpoint::kOther},
  };
  for (const auto& r : kRoutes) {
    if (path == r.path) return {r.route, r.method, r.guarded, r.endpoint, {}};
  }
  if (path.starts_with("/models/")) {
    return {Route::kModel, "GET", true, Endpoint::kModels, path.substr(8)};
  }
  return {};
}

MaybeError HttpFront::Check(const http::Head& head, const Match& match) const {
  const bool operations = match.route == Route::kMetrics || match.route == Route::kLivez ||
                          match.route == Route::kReadyz;
  if (match.route == Route::kNone || (operations && !options_.operations)) {
    return HttpError(404, fmt::format("There is no {} here; see GET / for what is.", head.path));
  }
  const bool reads = match.method == "GET";
  if (head.method != match.method && !(reads && head.method == "HEAD")) {
    ApiError error = HttpError(405, fmt::format("{} wants {}.", head.path, match.method));
    error.allow = reads ? "GET, HEAD" : "POST";
    return error;
  }
  if (match.guarded) {
    const auto tenant = options_.gateway->auth().TenantOf(Find(head.headers, "authorization"));
    if (!tenant.ok()) return Unauthenticated(std::string(tenant.status().message()));
  }
  if (!reads) {
    const std::string type = Lower(Find(head.headers, "content-type"));
    if (!type.empty() && !type.starts_with("application/json")) {
      return HttpError(415, "The body must be JSON: Content-Type: application/json.");
    }
  }
  if (match.route == Route::kUnserved) {
    return HttpError(501, fmt::format("{} is not served; chat and completions are.", head.path));
  }
  return std::nullopt;
}

http::Response HttpFront::Refuse(const RequestMeta& meta, const ApiError& error) {
  options_.gateway->Account(meta, error.status, ErrorTypeLabel(error), error.code);
  return ErrorResponse(error, meta.label);
}

std::optional<http::Response> HttpFront::Screen(const http::Head& head) {
  const Match match = RouteOf(head);
  const MaybeError error = Check(head, match);
  if (!error) return std::nullopt;
  return Refuse(options_.gateway->NewRequest(match.endpoint, Find(head.headers, "x-request-id")),
                *error);
}

http::Response HttpFront::OnProtocolError(const ApiError& error) {
  return Refuse(options_.gateway->NewRequest(Endpoint::kOther, ""), error);
}

void HttpFront::Handle(std::shared_ptr<http::Exchange> exchange) {
  const http::Request& request = exchange->request();
  const Match match = RouteOf(request);
  RequestMeta meta =
      options_.gateway->NewRequest(match.endpoint, Find(request.headers, "x-request-id"));
  if (match.guarded) {
    // Again: the key may have been withdrawn while the body came.
    const auto tenant = options_.gateway->auth().TenantOf(Find(request.headers, "authorization"));
    if (!tenant.ok()) {
      return exchange->Respond(
          Refuse(meta, Unauthenticated(std::string(tenant.status().message()))));
    }
    meta.tenant = *tenant;
  }
  switch (match.route) {
    case Route::kChat:
    case Route::kCompletions:
      return HandleGenerate(std::move(exchange), std::move(meta), match.route == Route::kChat);
    case Route::kTokenize:
    case Route::kDetokenize:
      return exchange->Respond(HandleTokens(request, meta, match.route == Route::kDetokenize));
    default:
      return exchange->Respond(HandleSimple(request, match, meta));
  }
}

void HttpFront::HandleGenerate(std::shared_ptr<http::Exchange> exchange, RequestMeta meta,
                               bool chat) {
  const http::Request& request = exchange->request();
  HttpSink::Setup setup;
  auto chat_request = std::make_shared<api::ChatRequest>();
  auto completion = std::make_shared<api::CompletionRequest>();
  MaybeError error = chat ? ParseChat(request.body, *chat_request, setup.options)
                          : ParseCompletion(request.body, *completion, setup.options);
  if (IsGoodLabel(setup.options.label) && Find(request.headers, "x-request-id").empty()) {
    meta.label = setup.options.label;
  }
  meta.stream = setup.options.stream;
  meta.request_class = Find(request.headers, "x-antiphon-class");
  if (!error) error = CheckClass("X-Antiphon-Class", meta.request_class);
  if (const auto text = Find(request.headers, "x-antiphon-timeout-ms"); !error && !text.empty()) {
    uint32_t ms = 0;
    if (!absl::SimpleAtoi(ToAbsl(text), &ms) || ms == 0) {
      error = InvalidValue("X-Antiphon-Timeout-Ms",
                           "It must be a positive number of milliseconds, e.g. 30000.");
    }
    meta.timeout = absl::Milliseconds(ms);
  }
  setup.label = meta.label;
  setup.headers.emplace_back("x-request-id", meta.label);
  AddIgnored(setup.options.ignored, setup.headers);
  if (!setup.options.ignored.empty()) {
    options_.gateway->CountIgnored(setup.options.ignored.size());
  }
  if (error) {
    http::Response response = Refuse(meta, *error);
    AddIgnored(setup.options.ignored, response.headers);
    return exchange->Respond(std::move(response));
  }
  setup.head = {
      .chat = chat,
      .id = (chat ? "chatcmpl-" : "cmpl-") + meta.id.Hex(),
      .created = absl::ToUnixSeconds(options_.gateway->WallNow()),
      .logprobs = chat ? chat_request->options().logprobs() : completion->options().logprobs(),
      .return_token_ids = setup.options.return_token_ids};
  setup.exchange = exchange;
  auto sink = std::make_shared<HttpSink>(std::move(setup));
  exchange->OnGone([gateway = options_.gateway, meta](http::Gone why) {
    gateway->Cancel(meta, why == http::Gone::kSlow);
  });
  if (chat) {
    options_.gateway->Submit(meta, std::shared_ptr<const api::ChatRequest>(chat_request), sink);
  } else {
    options_.gateway->Submit(meta, std::shared_ptr<const api::CompletionRequest>(completion), sink);
  }
}

http::Response HttpFront::HandleTokens(const http::Request& request, RequestMeta& meta,
                                       bool detokenize) {
  HttpOptions options;
  MaybeError error;
  http::Response response;
  if (detokenize) {
    api::DetokenizeRequest message;
    api::DetokenizeResponse answer;
    error = ParseDetokenize(request.body, message, options);
    if (!error) error = options_.gateway->Detokenize(message, answer);
    response.body = fmt::format(R"({{"prompt":{}}})", JsonString(answer.prompt()));
  } else {
    api::TokenizeRequest message;
    api::TokenizeResponse answer;
    error = ParseTokenize(request.body, message, options);
    if (!error) error = options_.gateway->Tokenize(message, answer);
    std::string ids, strs;
    for (uint32_t id : answer.tokens()) {
      if (!ids.empty()) ids += ',';
      AppendUint(ids, id);
    }
    for (const std::string& s : answer.token_strs()) {
      if (!strs.empty()) strs += ',';
      AppendJsonString(strs, s);
    }
    response.body = fmt::format(
        R"({{"count":{},"max_model_len":{},"tokens":[{}],"token_strs":{}}})", answer.count(),
        answer.max_model_len(), ids, message.return_token_strs() ? "[" + strs + "]" : "null");
  }
  if (error) return Refuse(meta, *error);
  options_.gateway->Account(meta, 200, "none", "");
  response.headers.emplace_back("x-request-id", meta.label);
  AddIgnored(options.ignored, response.headers);
  return response;
}

http::Response HttpFront::HandleSimple(const http::Request& request, const Match& match,
                                       RequestMeta& meta) {
  http::Response response;
  response.headers.emplace_back("x-request-id", meta.label);
  const CatalogPtr catalog = options_.gateway->catalog();
  switch (match.route) {
    case Route::kRoot:
      response.content_type = "text/plain; charset=utf-8";
      response.body = fmt::format(
          "Antiphon {} serves: {}\n\n"
          "  curl {}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
          "    -d '{{\"messages\": [{{\"role\": \"user\", \"content\": \"Hello\"}}]}}'\n\n"
          "POST /v1/chat/completions /v1/completions /tokenize /detokenize\n"
          "GET  /v1/models /health /readyz /version /metrics\n",
          kVersion, catalog->models.empty() ? "nothing yet" : catalog->served_names(),
          options_.base_url);
      return response;
    case Route::kModels:
      response.body = ModelListJson(*catalog);
      return response;
    case Route::kModel: {
      const std::string name = PercentDecoded(match.rest);
      const ServedModelPtr model = catalog->Find(name);
      if (name.empty() || model == nullptr) {
        return Refuse(meta, ModelNotFound(name, catalog->served_names()));
      }
      response.body = ModelJson(*model);
      return response;
    }
    case Route::kLivez:
      response.body = "{\"status\":\"alive\"}\n";
      return response;
    case Route::kHealth:
    case Route::kReadyz: {
      const std::string reason = options_.not_ready();
      const std::string details = options_.gateway->ReadyDetails();
      if (reason.empty()) {
        response.body = fmt::format("{{\"status\":\"{}\",{}}}\n",
                                    match.route == Route::kHealth ? "ok" : "ready", details);
      } else {
        response.status = 503;
        response.body = fmt::format("{{\"status\":\"not ready\",\"reason\":{},{}}}\n",
                                    JsonString(reason), details);
      }
      return response;
    }
    case Route::kVersion:
      response.body = fmt::format("{{\"version\":\"{}\"}}\n", kVersion);
      return response;
    default:
      response.content_type = "text/plain; version=0.0.4; charset=utf-8";
      response.body = options_.metrics();
      return response;
  }
}

}  // namespace antiphon::gateway
