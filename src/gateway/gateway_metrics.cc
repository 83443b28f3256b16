#include "gateway/gateway_metrics.h"

namespace antiphon::gateway {
namespace {

struct Ending {
  int status;
  const char* error_type;
};
// What a generating request can end with.
constexpr Ending kEndings[] = {{200, "none"},      {400, "validation"},  {401, "authentication"},
                               {404, "not_found"}, {429, "overload"},    {499, "cancelled"},
                               {500, "internal"},  {502, "unavailable"}, {503, "unavailable"},
                               {504, "timeout"}};

}  // namespace

std::string_view EndpointName(Endpoint endpoint) {
  switch (endpoint) {
    case Endpoint::kChat:
      return "chat_completions";
    case Endpoint::kCompletions:
      return "completions";
    case Endpoint::kModels:
      return "models";
    case Endpoint::kTokenize:
      return "tokenize";
    case Endpoint::kDetokenize:
      return "detokenize";
    case Endpoint::kOther:
      return "other";
  }
  return "other";
}

GatewayMetrics::GatewayMetrics(Registry* registry, const std::vector<std::string>& tenants)
    : registry_(registry) {
  const auto counter = [&](const char* name, const char* help, Labels labels = {}) {
    return &registry_->AddCounter(name, help, std::move(labels));
  };
  constexpr char kDisconnects[] = "antiphon_disconnects_total";
  constexpr char kDisconnectsHelp[] = "Clients that left before the end of their answer.";
  disconnects_waiting = counter(kDisconnects, kDisconnectsHelp, {{"phase", "waiting"}});
  disconnects_streaming = counter(kDisconnects, kDisconnectsHelp, {{"phase", "streaming"}});
  slow_clients = counter("antiphon_stream_backpressure_cancels_total",
                         "Streams ended because the client did not read.");
  ignored_fields = counter("antiphon_ignored_fields_total", "Unknown fields of JSON requests.");
  divergences = counter("antiphon_token_divergence_total",
                        "Tokens that a worker sent twice with different values.");
  absl::MutexLock lock(&mu_);
  for (const Endpoint endpoint :
       {Endpoint::kModels, Endpoint::kTokenize, Endpoint::kDetokenize, Endpoint::kOther}) {
    RequestCounter({"", endpoint, false, 200, "none"});
    RequestCounter({"", endpoint, false, 400, "validation"});
    RequestCounter({"", endpoint, false, 404, "not_found"});
  }
  for (const std::string& tenant : tenants) ForTenant(tenant);
}

const ModelMetrics& GatewayMetrics::ForModel(const std::string& model) {
  absl::MutexLock lock(&mu_);
  const auto it = models_.find(model);
  if (it != models_.end()) return it->second;
  const Labels labels = {{"model", model}};
  const auto with = [&](const char* name, const char* value) {
    Labels more = labels;
    more.emplace_back(name, value);
    return more;
  };
  const auto histogram = [&](const char* name, const char* help, std::vector<double> bounds) {
    return &registry_->AddHistogram(name, help, std::move(bounds), labels);
  };
  const auto stage = [&](const char* name) {
    return &registry_->AddHistogram("antiphon_request_stage_seconds", "Time of a request by stage.",
                                    TtftBuckets(), with("stage", name));
  };
  const auto source = [&](const char* name) {
    return &registry_->AddCounter("antiphon_prompt_tokens_total",
                                  "Prompt tokens of answered requests by where their KV came from.",
                                  with("source", name));
  };
  ModelMetrics m;
  m.inflight = &registry_->AddGauge("antiphon_requests_inflight", "Requests being served.", labels);
  m.duration = histogram("antiphon_request_duration_seconds", "From arrival to the answer's end.",
                         RequestSecondsBuckets());
  m.ttft = histogram("antiphon_time_to_first_token_seconds", "From arrival to the first token.",
                     TtftBuckets());
  m.inter_token =
      histogram("antiphon_inter_token_latency_seconds", "Between two tokens.", TbtBuckets());
  m.per_output_token = histogram("antiphon_time_per_output_token_seconds",
                                 "Mean time between tokens of a request.", TbtBuckets());
  m.stage_prepare = stage("prepare");
  m.stage_queue = stage("queue");
  m.stage_prefill = stage("prefill");
  m.stage_transfer = stage("transfer");
  m.stage_decode = stage("decode");
  m.prompt_tokens = histogram("antiphon_request_prompt_tokens", "Prompt tokens of a request.",
                              TokenCountBuckets());
  m.output_tokens = histogram("antiphon_request_output_tokens", "Output tokens of a request.",
                              TokenCountBuckets());
  m.cached_tokens = histogram("antiphon_request_cached_tokens",
                              "Prompt tokens of a request found in caches.", TokenCountBuckets());
  m.source_computed = source("computed");
  m.source_dram = source("dram");
  m.source_ssd = source("ssd");
  m.source_remote = source("remote");
  m.source_device = source("device");
  m.output_total = &registry_->AddCounter("antiphon_output_tokens_total",
                                          "Tokens received from workers.", labels);
  m.recomputed = &registry_->AddCounter("antiphon_recomputed_tokens_total",
                                        "Tokens computed again after a failure.",
                                        with("reason", "replacement"));
  m.replacements = &registry_->AddCounter("antiphon_replacements_total",
                                          "New placements after a failure.", labels);
  m.refusals = &registry_->AddCounter("antiphon_decode_refusals_total",
                                      "Refusals and preemptions by decode workers.", labels);
  for (const Endpoint endpoint : {Endpoint::kChat, Endpoint::kCompletions}) {
    for (const bool stream : {false, true}) {
      for (const Ending& e : kEndings) {
        RequestCounter({model, endpoint, stream, e.status, e.error_type});
      }
    }
  }
  return models_.emplace(model, m).first->second;
}

Counter& GatewayMetrics::RequestCounter(const RequestKey& key) {
  Counter*& counter = requests_[key];
  if (counter == nullptr) {
    const auto& [model, endpoint, stream, status, error_type] = key;
    counter = &registry_->AddCounter("antiphon_requests_total", "Requests by how they ended.",
                                     {{"model", model},
                                      {"endpoint", std::string(EndpointName(endpoint))},
                                      {"stream", stream ? "true" : "false"},
                                      {"status", std::to_string(status)},
                                      {"error_type", error_type}});
  }
  return *counter;
}

void GatewayMetrics::CountRequest(const std::string& model, Endpoint endpoint, bool stream,
                                  int status, std::string_view error_type) {
  absl::MutexLock lock(&mu_);
  RequestCounter({model, endpoint, stream, status, std::string(error_type)}).Add();
}

const GatewayMetrics::Tenant& GatewayMetrics::ForTenant(const std::string& tenant) {
  const auto it = tenants_.find(tenant);
  if (it != tenants_.end()) return it->second;
  const Labels labels = {{"tenant", tenant}};
  const Tenant t{
      &registry_->AddCounter("antiphon_tenant_requests_total", "Requests of a tenant.", labels),
      &registry_->AddCounter("antiphon_tenant_prompt_tokens_total", "Prompt tokens of a tenant.",
                             labels),
      &registry_->AddCounter("antiphon_tenant_output_tokens_total", "Output tokens of a tenant.",
                             labels)};
  return tenants_.emplace(tenant, t).first->second;
}

void GatewayMetrics::CountTenant(const std::string& tenant, uint64_t prompt_tokens,
                                 uint64_t output_tokens) {
  absl::MutexLock lock(&mu_);
  const Tenant& t = ForTenant(tenant);
  t.requests->Add();
  t.prompt_tokens->Add(static_cast<double>(prompt_tokens));
  t.output_tokens->Add(static_cast<double>(output_tokens));
}

}  // namespace antiphon::gateway
