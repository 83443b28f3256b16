// The gateway's instruments. Labels are closed sets and exist from the start with value 0; those of
// a model from when it is known.
#ifndef ANTIPHON_GATEWAY_GATEWAY_METRICS_H_
#define ANTIPHON_GATEWAY_GATEWAY_METRICS_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "common/metrics.h"

namespace antiphon::gateway {

enum class Endpoint { kChat, kCompletions, kModels, kTokenize, kDetokenize, kOther };
std::string_view EndpointName(Endpoint endpoint);

struct ModelMetrics {
  Gauge* inflight;
  Histogram* duration;
  Histogram* ttft;
  Histogram* inter_token;
  Histogram* per_output_token;
  Histogram* stage_prepare;
  Histogram* stage_queue;
  Histogram* stage_prefill;
  Histogram* stage_transfer;
  Histogram* stage_decode;
  Histogram* prompt_tokens;
  Histogram* output_tokens;
  Histogram* cached_tokens;
  Counter* source_computed;
  Counter* source_dram;
  Counter* source_ssd;
  Counter* source_remote;
  Counter* source_device;
  Counter* output_total;
  Counter* recomputed;
  Counter* replacements;
  Counter* refusals;
};

// Thread-safe.
class GatewayMetrics {
 public:
  GatewayMetrics(Registry* registry, const std::vector<std::string>& tenants);

  // Created at the first call for a name; "" is what is not about a model. Lives as long as this.
  const ModelMetrics& ForModel(const std::string& model);
  void CountRequest(const std::string& model, Endpoint endpoint, bool stream, int status,
                    std::string_view error_type);
  void CountTenant(const std::string& tenant, uint64_t prompt_tokens, uint64_t output_tokens);

  Counter* disconnects_waiting;
  Counter* disconnects_streaming;
  Counter* slow_clients;
  Counter* ignored_fields;
  Counter* divergences;

 private:
  using RequestKey = std::tuple<std::string, Endpoint, bool, int, std::string>;
  struct Tenant {
    Counter* requests;
    Counter* prompt_tokens;
    Counter* output_tokens;
  };
  Counter& RequestCounter(const RequestKey& key) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  const Tenant& ForTenant(const std::string& tenant) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  Registry* const registry_;
  absl::Mutex mu_;
  std::map<std::string, ModelMetrics> models_ ABSL_GUARDED_BY(mu_);
  std::map<RequestKey, Counter*> requests_ ABSL_GUARDED_BY(mu_);
  std::map<std::string, Tenant> tenants_ ABSL_GUARDED_BY(mu_);
};

}  // namespace antiphon::gateway

#endif  // ANTIPHON_GATEWAY_GATEWAY_METRICS_H_
