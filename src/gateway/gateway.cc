#include "gateway/gateway.h"

#include <spdlog/fmt/fmt.h>

#include <array>
#include <cstring>
#include <utility>

#include "absl/synchronization/notification.h"
#include "antiphon/v1/inference.pb.h"
#include "common/block_key.h"
#include "common/logging.h"
#include "common/philox.h"

namespace antiphon::gateway {
namespace {

double Milliseconds(absl::Time from, absl::Time to) {
  if (from == absl::InfinitePast() || to == absl::InfinitePast()) return 0;
  return absl::ToDoubleMilliseconds(to - from);
}

// Names of the choices' generations: the request's own, then what descends from it.
std::vector<RequestId> ChoiceIds(const RequestId& request, size_t count) {
  std::vector<RequestId> ids = {request};
  for (size_t i = 1; i < count; ++i) {
    const std::string digest = Sha256Hex(fmt::format("{}/{}", request.Hex(), i));
    std::array<uint8_t, RequestId::kBytes> bytes;
    for (size_t b = 0; b < bytes.size(); ++b) {
      bytes[b] = static_cast<uint8_t>(std::stoi(digest.substr(2 * b, 2), nullptr, 16));
    }
    ids.emplace_back(bytes);
  }
  return ids;
}

}  // namespace

MaybeError CheckClass(std::string_view header, std::string_view request_class) {
  if (request_class.empty() || (request_class.size() <= 64 && IsGoodLabel(request_class))) {
    return std::nullopt;
  }
  return InvalidValue(header, "It must be at most 64 letters, digits, '.', '_' and '-'.");
}

// Keeps the books of one request on its way to the front. On the dispatcher's executor.
class Gateway::AccountedSink final : public ResponseSink {
 public:
  AccountedSink(Gateway* gateway, RequestMeta meta, std::shared_ptr<ResponseSink> next)
      : gateway_(gateway), meta_(std::move(meta)), next_(std::move(next)) {}

  void Prepared(const ServedModelPtr& model, absl::Time now) {
    model_ = model->card.name();
    prepared_ = now;
    metrics_ = &gateway_->metrics_.ForModel(model_);
    metrics_->inflight->Add(1);
    next_->OnPrepared(model);
  }

  void OnDelta(const ChoiceDelta& delta) override { next_->OnDelta(delta); }
  void OnChoiceEnd(const ChoiceEnd& end) override { next_->OnChoiceEnd(end); }
  void OnIntervals(const std::vector<float>& seconds) override {
    for (float s : seconds) metrics_->inter_token->Observe(s);
  }

  void OnDone(const RequestEnd& end, const Exchange* exchange) override {
    const absl::Time now = gateway_->options_.clock->Now();
    if (exchange != nullptr) Count(end, *exchange, now);
    const int status = end.cancelled ? 499 : end.error ? end.error->status : 200;
    const std::string_view type = end.cancelled ? "cancelled"
                                  : end.error   ? ErrorTypeLabel(*end.error)
                                                : "none";
    gateway_->metrics_.CountRequest(model_, meta_.endpoint, meta_.stream, status, type);
    Line(end, exchange, now, status);
    next_->OnDone(end, exchange);
    gateway_->inflight_.fetch_sub(1);
    gateway_->executor_.Post([gateway = gateway_] { gateway->WhenIdle(); });
  }

 private:
  void Count(const RequestEnd& end, const Exchange& exchange, absl::Time now) {
    const ModelMetrics& m = *metrics_;
    m.inflight->Add(-1);
    m.stage_prepare->Observe(absl::ToDoubleSeconds(prepared_ - meta_.began));
    m.duration->Observe(absl::ToDoubleSeconds(now - meta_.began));
    for (const auto& g : exchange.choices()) {
      const GenerationStats& s = g->stats();
      m.replacements->Add(s.replacements);
      m.refusals->Add(s.refusals);
      m.recomputed->Add(static_cast<double>(s.recomputed_tokens));
      gateway_->metrics_.divergences->Add(s.divergences);
      if (s.first_token == absl::InfinitePast()) continue;
      m.stage_queue->Observe(s.timings.queue_s());
      m.stage_prefill->Observe(s.timings.prefill_s());
      m.stage_transfer->Observe(s.timings.transfer_s());
      const double decode_s = absl::ToDoubleSeconds(now - s.first_token);
      m.stage_decode->Observe(decode_s);
      if (s.output_tokens > 1) m.per_output_token->Observe(decode_s / (s.output_tokens - 1));
    }
    if (!exchange.first_token_seen()) return;
    absl::Time first = absl::InfiniteFuture();
    for (const auto& g : exchange.choices()) {
      if (g->first_token_seen()) first = std::min(first, g->stats().first_token);
    }
    m.ttft->Observe(absl::ToDoubleSeconds(first - meta_.began));
    // What a client is billed: only requests that had an answer count, so that the sources add up
    // to the prompt tokens of usage.
    const wire::PromptSource source = exchange.prompt_source();
    m.source_computed->Add(source.computed());
    m.source_dram->Add(source.dram());
    m.source_remote->Add(source.remote());
    m.source_ssd->Add(source.ssd());
    m.source_device->Add(source.device());
    m.output_total->Add(end.usage.completion_tokens);
    m.prompt_tokens->Observe(end.usage.prompt_tokens);
    m.output_tokens->Observe(end.usage.completion_tokens);
    m.cached_tokens->Observe(end.usage.cached_tokens);
    gateway_->metrics_.CountTenant(meta_.tenant, end.usage.prompt_tokens,
                                   end.usage.completion_tokens);
  }

  void Line(const RequestEnd& end, const Exchange* exchange, absl::Time now, int status) {
    std::string workers = "-";
    double queue = 0, prefill = 0, transfer = 0, ttft = 0;
    if (exchange != nullptr) {
      const GenerationStats& s = exchange->choices()[0]->stats();
      if (!s.decode_node.empty()) workers = fmt::format("{},{}", s.prefill_node, s.decode_node);
      queue = s.timings.queue_s() * 1e3;
      prefill = s.timings.prefill_s() * 1e3;
      transfer = s.timings.transfer_s() * 1e3;
      ttft = Milliseconds(meta_.began, s.first_token);
    }
    LogInfo(Req(meta_.label),
            "access {} status={} id={} prompt={} cached={} output={} queue_ms={:.1f} "
            "prefill_ms={:.1f} transfer_ms={:.1f} ttft_ms={:.1f} total_ms={:.1f} workers={} "
            "reason={}",
            EndpointName(meta_.endpoint), status, meta_.id.Hex(), end.usage.prompt_tokens,
            end.usage.cached_tokens, end.usage.completion_tokens, queue, prefill, transfer, ttft,
            Milliseconds(meta_.began, now), workers,
            end.cancelled ? "client_gone"
            : end.error   ? end.error->code
                          : "-");
  }

  Gateway* const gateway_;
  const RequestMeta meta_;
  const std::shared_ptr<ResponseSink> next_;
  std::string model_;
  const ModelMetrics* metrics_ = nullptr;  // from Prepared on
  absl::Time prepared_ = absl::InfinitePast();
};

Gateway::Gateway(Options options)
    : options_(std::move(options)),
      metrics_(options_.registry, options_.auth->tenants()),
      dispatcher_({.executor = &executor_, .clock = options_.clock}),
      streams_(DecodeStreams::Create(options_.self, &executor_, &dispatcher_)),
      conductor_(ConductorClient::Start({.conductors = options_.conductors,
                                         .self = options_.self,
                                         .executor = &executor_,
                                         .on_catalog = [this](CatalogPtr catalog) {
                                           for (const auto& m : catalog->models) {
                                             metrics_.ForModel(m->card.name());
                                           }
                                           absl::MutexLock lock(&mu_);
                                           catalog_ = std::move(catalog);
                                         }})) {
  dispatcher_.SetUpstream(this);
}

Gateway::~Gateway() {
  for (SerialExecutor& e : prepare_) e.Shutdown();
  // No request may reach for what goes next.
  absl::Notification idle;
  executor_.Post([this, &idle] {
    drained_ = nullptr;
    dispatcher_.AbortAll(gateway::Draining());
    idle.Notify();
  });
  idle.WaitForNotification();
  conductor_.reset();
  streams_.reset();  // while the executor still turns
  executor_.Shutdown();
}

uint64_t Gateway::Random() {
  const auto v = Philox4x32(options_.seed, next_random_.fetch_add(1));
  return (uint64_t{v[0]} << 32) | v[1];
}

RequestMeta Gateway::NewRequest(Endpoint endpoint, std::string_view label) {
  RequestMeta meta;
  const uint64_t high = Random(), low = Random();
  std::array<uint8_t, RequestId::kBytes> bytes;
  std::memcpy(bytes.data(), &high, 8);
  std::memcpy(bytes.data() + 8, &low, 8);
  meta.id = RequestId(bytes);
  meta.label = IsGoodLabel(label) ? std::string(label) : meta.id.Hex();
  meta.endpoint = endpoint;
  meta.began = options_.clock->Now();
  return meta;
}

CatalogPtr Gateway::catalog() const {
  absl::MutexLock lock(&mu_);
  return catalog_;
}

MaybeError Gateway::Enter() {
  if (refusing_) return Draining();
  if (inflight_.fetch_add(1) >= options_.max_inflight) {
    inflight_.fetch_sub(1);
    return ApiError{
        .status = options_.overload_status,
        .type = "rate_limit_error",
        .code = "queue_full",
        .message = fmt::format("This gateway runs {} requests already.", options_.max_inflight),
        .retry_after_s = 1,
        .rejected_reason = "queue-full"};
  }
  return std::nullopt;
}

template <typename RequestType>
void Gateway::SubmitAny(const RequestMeta& meta, std::shared_ptr<const RequestType> request,
                        std::shared_ptr<ResponseSink> sink) {
  if (MaybeError refused = Enter()) {
    Account(meta, refused->status, ErrorTypeLabel(*refused), refused->code);
    executor_.Post([sink, error = *refused] { sink->OnDone({.error = error}, nullptr); });
    return;
  }
  auto books = std::make_shared<AccountedSink>(this, meta, std::move(sink));
  const uint64_t lane = meta.id.bytes()[0] & 1;
  prepare_[lane].Post([this, meta, request, books] {
    const auto fail = [&](ApiError error) {
      executor_.Post(
          [books, error = std::move(error)] { books->OnDone({.error = error}, nullptr); });
    };
    const CatalogPtr catalog = this->catalog();
    if (MaybeError error = Validate(*request, {.max_n = options_.max_n})) return fail(*error);
    if (catalog->models.empty()) {
      return fail(Unavailable("no_workers", "No worker has registered a model yet."));
    }
    const ServedModelPtr model = catalog->Find(request->model());
    if (model == nullptr) return fail(ModelNotFound(request->model(), catalog->served_names()));
    Caller caller;
    caller.tenant = meta.tenant;
    caller.tenant_salt = TenantSalt(options_.self.cluster, meta.tenant);
    caller.label = meta.label;
    caller.request_class = meta.request_class;
    caller.deadline = meta.began + std::min(meta.timeout, options_.timeout);
    caller.wall_now = options_.clock->WallNow();
    caller.seed = Random();
    PreparedRequest prepared;
    if (MaybeError error = Prepare(*request, model, caller, prepared)) return fail(*error);
    const auto ids = ChoiceIds(meta.id, prepared.choices.size());
    GenerationLimits limits;
    limits.overload_status = options_.overload_status;
    limits.jitter = PhiloxUniform(options_.seed, Random());
    auto exchange = std::make_unique<Exchange>(std::move(prepared), ids, limits);
    books->Prepared(model, options_.clock->Now());
    executor_.Post([this, meta, books, exchange = std::move(exchange)]() mutable {
      dispatcher_.Submit(meta.id, std::move(exchange), books);
    });
  });
}

void Gateway::Submit(const RequestMeta& meta, std::shared_ptr<const api::ChatRequest> request,
                     std::shared_ptr<ResponseSink> sink) {
  SubmitAny(meta, std::move(request), std::move(sink));
}

void Gateway::Submit(const RequestMeta& meta, std::shared_ptr<const api::CompletionRequest> request,
                     std::shared_ptr<ResponseSink> sink) {
  SubmitAny(meta, std::move(request), std::move(sink));
}

void Gateway::Cancel(const RequestMeta& meta, bool slow) {
  // Behind its preparation, so that it finds the request wherever it is.
  prepare_[meta.id.bytes()[0] & 1].Post([this, id = meta.id, slow, stream = meta.stream] {
    executor_.Post([this, id, slow, stream] {
      if (slow) {
        metrics_.slow_clients->Add();
      } else {
        (stream ? metrics_.disconnects_streaming : metrics_.disconnects_waiting)->Add();
      }
      dispatcher_.Cancel(id);
    });
  });
}

MaybeError Gateway::Tokenize(const api::TokenizeRequest& request, api::TokenizeResponse& out) {
  if (MaybeError error = Validate(request)) return error;
  const CatalogPtr now = catalog();
  if (now->models.empty())
    return Unavailable("no_workers", "No worker has registered a model yet.");
  const ServedModelPtr model = now->Find(request.model());
  if (model == nullptr) return ModelNotFound(request.model(), now->served_names());
  return gateway::Tokenize(request, *model, WallNow(), out);
}

MaybeError Gateway::Detokenize(const api::DetokenizeRequest& request,
                               api::DetokenizeResponse& out) {
  const CatalogPtr now = catalog();
  if (now->models.empty())
    return Unavailable("no_workers", "No worker has registered a model yet.");
  const ServedModelPtr model = now->Find(request.model());
  if (model == nullptr) return ModelNotFound(request.model(), now->served_names());
  return gateway::Detokenize(request, *model, out);
}

void Gateway::Account(const RequestMeta& meta, int status, std::string_view error_type,
                      std::string_view reason) {
  metrics_.CountRequest("", meta.endpoint, meta.stream, status, error_type);
  LogInfo(Req(meta.label), "access {} status={} total_ms={:.1f} reason={}",
          EndpointName(meta.endpoint), status, Milliseconds(meta.began, options_.clock->Now()),
          reason.empty() ? "-" : reason);
}

std::string Gateway::NotReadyReason() const { return catalog()->not_ready; }

std::string Gateway::ReadyDetails() const {
  const CatalogPtr now = catalog();
  return fmt::format(R"("degraded":{},"healthy_workers":{{"prefill":{},"decode":{}}})",
                     now->degraded, now->prefill_ready, now->decode_ready);
}

void Gateway::Drain(absl::Duration delay, absl::Duration deadline,
                    absl::AnyInvocable<void()> done) {
  executor_.Post([this, delay, deadline, done = std::move(done)]() mutable {
    drained_ = std::move(done);
    executor_.PostAfter(delay, [this, deadline] {
      refusing_ = true;
      executor_.PostAfter(deadline, [this] { dispatcher_.AbortAll(gateway::Draining()); });
      WhenIdle();
    });
  });
}

void Gateway::WhenIdle() {
  if (!refusing_ || !drained_ || inflight_ > 0) return;
  auto done = std::move(drained_);
  drained_ = nullptr;
  done();
}

uint64_t Gateway::Admit(wire::AdmitRequest request,
                        absl::AnyInvocable<void(absl::StatusOr<wire::AdmitReply>)> done) {
  return conductor_->Admit(std::move(request), std::move(done));
}
void Gateway::AbandonAdmit(uint64_t call) { conductor_->AbandonAdmit(call); }
void Gateway::Start(const std::string& address, wire::Start start) {
  streams_->Start(address, std::move(start));
}
void Gateway::Cancel(const std::string& address, wire::Cancel cancel) {
  streams_->Cancel(address, std::move(cancel));
}
void Gateway::Finish(wire::FinishReport report) { conductor_->Finish(std::move(report)); }

}  // namespace antiphon::gateway
