#include "common/config/rules.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <filesystem>
#include <set>

#include "antiphon/v1/config.pb.h"
#include "common/config.h"
#include "common/config/units.h"
#include "common/daemon.h"
#include "common/logging.h"
#include "common/memory.h"
#include "common/net.h"

namespace antiphon {
namespace {

struct NumberRule {
  std::string_view path;
  double min, max;
  std::string_view example;
};
constexpr NumberRule kNumbers[] = {
    {"version", 1, 1, "1, the only version that this program reads"},
    {"models.sampling.temperature", 0, 2, "0.7"},
    {"models.sampling.top_p", 0, 1, "0.9"},
    {"models.sampling.top_k", -1, 1'000'000, "40; 0 or -1 is off"},
    {"models.sampling.min_p", 0, 1, "0.05"},
    {"models.sampling.repetition_penalty", 0.01, 10, "1.1"},
    {"gateway.max_n", 1, 1024, "16"},
    {"gateway.max_inflight", 1, 1'000'000, "4096"},
    {"conductor.balancing_threshold", 1, 1000, "2.0"},
    {"conductor.max_queue", 1, 1'000'000, "1024"},
    {"worker.block_tokens", 1, 4096, "16"},
    {"worker.max_sequences", 1, 65'536, "64"},
    {"worker.chunk_tokens", 1, 1'000'000, "512"},
    {"worker.threads", 0, 4096, "4; 0 is all cores"},
    {"worker.prefill_nice", 0, 19, "10"},
    {"worker.tensor_parallel", 1, 64, "1"},
    {"worker.cuda_device", 0, 1023, "0"},
    {"worker.gpu_memory_fraction", 0.01, 0.99, "0.9"},
};

struct TextRule {
  std::string_view path;
  std::vector<std::string_view> allowed;
};
const std::vector<TextRule>& TextRules() {
  static const auto* rules = new std::vector<TextRule>{
      {"log.level", {"debug", "info", "warning", "error"}},
      {"log.format", {"text", "json"}},
      {"gateway.auth.mode", {"keys", "none"}},
      {"worker.activations", {"fast", "float"}},
      {"worker.device", {"auto", "cpu", "cuda"}},
      {"worker.instruction_set",
       {"auto", "scalar", "avx2", "avx512", "avx512-bf16", "amx", "neon", "neon-dotprod"}},
  };
  return *rules;
}

bool EndsWith(std::string_view s, std::string_view end) {
  return s.size() >= end.size() && s.substr(s.size() - end.size()) == end;
}

bool NameCharacter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
         c == '_' || c == '-';
}

// Names go into labels, host names, file names and answers.
absl::Status CheckName(std::string_view value, size_t bytes_max) {
  const bool ok = !value.empty() && value.size() <= bytes_max && value[0] != '.' &&
                  value[0] != '-' && std::all_of(value.begin(), value.end(), NameCharacter);
  if (ok) return absl::OkStatus();
  return absl::InvalidArgumentError(
      fmt::format("'{}' is no name; use at most {} letters, digits, '.', '_' and '-', e.g. smollm2",
                  EscapeForLog(value.substr(0, 40), false), bytes_max));
}

// A model's path as a name: "my model.gguf" is "my-model", and the folder "Llama-3.2-1B/" is
// "Llama-3.2-1B".
std::string NameOfModel(const std::string& path) {
  std::filesystem::path file = std::filesystem::path(path).lexically_normal();
  if (!file.has_filename()) file = file.parent_path();
  std::string name = (file.extension() == ".gguf" ? file.stem() : file.filename()).string();
  name.resize(std::min<size_t>(name.size(), 128));
  std::replace_if(
      name.begin(), name.end(), [](char c) { return !NameCharacter(c); }, '-');
  const size_t begin = name.find_first_not_of(".-");
  return begin == std::string::npos ? "model" : name.substr(begin);
}

void Listen(config::v1::Listener* listener, const char* address) { listener->set_listen(address); }

void SetDrain(config::v1::Drain* drain, int delay_s, int deadline_s) {
  drain->mutable_delay()->set_seconds(delay_s);
  drain->mutable_deadline()->set_seconds(deadline_s);
}

}  // namespace

absl::Status CheckNumber(std::string_view path, double value) {
  if (path == "gateway.overload_status") {
    if (value == 429 || value == 503 || value == 529) return absl::OkStatus();
    return absl::InvalidArgumentError(fmt::format("{} is none of 429, 503, 529", value));
  }
  for (const NumberRule& rule : kNumbers) {
    if (rule.path != path || (value >= rule.min && value <= rule.max)) continue;
    if (rule.min == rule.max) {
      return absl::InvalidArgumentError(fmt::format("{} is not {}", value, rule.example));
    }
    return absl::InvalidArgumentError(fmt::format("{} is not between {} and {}; e.g. {}", value,
                                                  rule.min, rule.max, rule.example));
  }
  return absl::OkStatus();
}

absl::Status CheckText(std::string_view path, std::string_view value) {
  for (const TextRule& rule : TextRules()) {
    if (rule.path != path) continue;
    if (std::find(rule.allowed.begin(), rule.allowed.end(), value) != rule.allowed.end()) {
      return absl::OkStatus();
    }
    return absl::InvalidArgumentError(fmt::format("'{}' is none of {}",
                                                  EscapeForLog(value.substr(0, 40), false),
                                                  fmt::join(rule.allowed, ", ")));
  }
  if (EndsWith(path, ".listen") || path == "cluster.conductors") {
    const auto address = ParseHostPort(value);
    if (!address.ok()) return absl::InvalidArgumentError(address.status().message());
    if (path == "cluster.conductors" && (address->host.empty() || address->port == 0)) {
      return absl::InvalidArgumentError(
          fmt::format("'{}' must name host and port of a conductor, e.g. 10.0.0.1:7401", value));
    }
    return absl::OkStatus();
  }
  if (EndsWith(path, ".advertise")) {
    const std::string with_port =
        value.find(':') == std::string_view::npos ? std::string(value) + ":0" : std::string(value);
    const auto address = ParseHostPort(with_port);
    if (!address.ok()) return absl::InvalidArgumentError(address.status().message());
    if (address->host.empty()) {
      return absl::InvalidArgumentError("needs a host that others can reach, e.g. 10.0.0.1:7401");
    }
    return absl::OkStatus();
  }
  if (path == "cluster.name") return CheckName(value, 64);
  if (path == "models.name" || path == "models.aliases") {
    // Hugging Face's owner/name is a usual way to write a model.
    std::string flat(value);
    std::replace(flat.begin(), flat.end(), '/', '-');
    std::replace(flat.begin(), flat.end(), ':', '-');
    return CheckName(flat, 128);
  }
  if (path == "models.path" || path == "gateway.auth.keys_file" || path == "cluster.runtime_dir") {
    if (value.empty()) return absl::InvalidArgumentError("is empty; write a path");
    if (value.size() > 4000) return absl::InvalidArgumentError("is too long for a path");
    // sun_path holds 108 bytes; sockets' names take up to 20 of them.
    if (path == "cluster.runtime_dir" && value.size() > 80) {
      return absl::InvalidArgumentError(
          "is longer than 80 bytes, too long for the sockets in it; use a shorter path");
    }
  }
  return absl::OkStatus();
}

absl::Status CheckDuration(std::string_view path, absl::Duration value) {
  const bool may_be_off = path == "slo.ttft" || path == "slo.tbt" || path == "gateway.timeout" ||
                          EndsWith(path, ".drain.deadline");
  if (value == absl::InfiniteDuration()) {
    if (may_be_off) return absl::OkStatus();
    return absl::InvalidArgumentError("cannot be off; write a duration, e.g. 5s");
  }
  const bool may_be_zero = EndsWith(path, ".delay") || EndsWith(path, ".deadline");
  if (value == absl::ZeroDuration() && !may_be_zero) {
    return absl::InvalidArgumentError("must be longer than 0s, e.g. 500ms");
  }
  if (path == "conductor.node_timeout" && value < absl::Seconds(1)) {
    return absl::InvalidArgumentError("is shorter than 1s, and nodes report every 500ms; e.g. 3s");
  }
  return absl::OkStatus();
}

absl::Status CheckByteSize(std::string_view path, uint64_t bytes) {
  if (path == "kvstore.pool" && bytes < (uint64_t{16} << 20)) {
    return absl::InvalidArgumentError(fmt::format(
        "{} is less than 16MiB, the least that holds a sequence; e.g. 2GiB", ByteSizeText(bytes)));
  }
  if (path == "gateway.max_body" && (bytes < (uint64_t{1} << 10) || bytes > (uint64_t{1} << 30))) {
    return absl::InvalidArgumentError(
        fmt::format("{} is not between 1KiB and 1GiB; e.g. 64MiB", ByteSizeText(bytes)));
  }
  return absl::OkStatus();
}

void SetDefaults(config::v1::Config& config) {
  config.set_version(1);
  config.mutable_cluster()->set_name("antiphon");
  config.mutable_cluster()->add_conductors("127.0.0.1:7401");
  config.mutable_slo()->mutable_ttft()->set_seconds(30);
  FromDuration(absl::InfiniteDuration(), *config.mutable_slo()->mutable_tbt());
  config.mutable_slo()->set_strict(false);
  config.mutable_log()->set_level("info");
  config.mutable_log()->set_format("text");

  auto* gateway = config.mutable_gateway();
  Listen(gateway->mutable_http(), "127.0.0.1:8000");
  Listen(gateway->mutable_grpc(), "127.0.0.1:8001");
  Listen(gateway->mutable_ops(), "127.0.0.1:7500");
  gateway->set_api_metrics(false);
  gateway->mutable_auth()->set_mode("keys");
  SetDrain(gateway->mutable_drain(), 5, 60);
  gateway->mutable_max_body()->set_bytes(64 << 20);
  gateway->mutable_timeout()->set_seconds(600);
  gateway->set_max_n(16);
  gateway->set_max_inflight(4096);
  gateway->set_overload_status(429);

  auto* conductor = config.mutable_conductor();
  Listen(conductor->mutable_rpc(), "127.0.0.1:7401");
  Listen(conductor->mutable_ops(), "127.0.0.1:7501");
  SetDrain(conductor->mutable_drain(), 5, 60);
  conductor->set_balancing_threshold(2.0);
  conductor->set_max_queue(1024);
  conductor->mutable_node_timeout()->set_seconds(3);

  auto* kvstore = config.mutable_kvstore();
  Listen(kvstore->mutable_rpc(), "127.0.0.1:7402");
  Listen(kvstore->mutable_data(), "127.0.0.1:7403");
  Listen(kvstore->mutable_ops(), "127.0.0.1:7502");
  kvstore->mutable_pool()->set_bytes(std::max(DefaultPoolBytes(), uint64_t{16} << 20));
  SetDrain(kvstore->mutable_drain(), 5, 120);

  auto* worker = config.mutable_worker();
  Listen(worker->mutable_prefill(), "127.0.0.1:7404");
  Listen(worker->mutable_decode(), "127.0.0.1:7405");
  Listen(worker->mutable_prefill_ops(), "127.0.0.1:7504");
  Listen(worker->mutable_decode_ops(), "127.0.0.1:7505");
  worker->set_block_tokens(16);
  worker->set_max_sequences(64);
  worker->set_chunk_tokens(512);
  worker->set_threads(0);
  worker->set_prefill_nice(10);
  worker->set_tensor_parallel(1);
  worker->set_activations("fast");
  worker->set_instruction_set("auto");
  worker->set_device("auto");
  worker->set_cuda_device(0);
  worker->set_gpu_memory_fraction(0.9);
  SetDrain(worker->mutable_drain(), 5, 120);
}

void SetDependentDefaults(config::v1::Config& config) {
  for (auto& model : *config.mutable_models()) {
    if (!model.has_name() && model.has_path()) {
      model.set_name(NameOfModel(model.path()));
    }
  }
  if (!config.cluster().has_runtime_dir()) {
    config.mutable_cluster()->set_runtime_dir(RuntimeDir(config));
  }
}

std::vector<ConfigProblem> CheckTogether(const config::v1::Config& config) {
  std::vector<ConfigProblem> problems;
  if (config.cluster().conductors().empty()) {
    problems.push_back({"cluster.conductors", "is empty; name one at least, e.g. 127.0.0.1:7401"});
  }
  std::set<std::string> names;
  if (config.models_size() > 1) {
    problems.push_back({"models", "has more than one entry; a cluster serves one model"});
  }
  for (int i = 0; i < config.models_size(); ++i) {
    const auto& model = config.models(i);
    const std::string path = fmt::format("models[{}]", i);
    if (!model.has_path()) {
      problems.push_back({path,
                          "has no path; write path: /path/to/model.gguf, or a folder "
                          "with safetensors"});
      continue;
    }
    if (const absl::Status s = CheckText("models.name", model.name()); !s.ok()) {
      problems.push_back({path + ".name", std::string(s.message())});
    }
    names.insert(model.name());
    for (const auto& alias : model.aliases()) {
      if (!names.insert(alias).second) {
        problems.push_back({path + ".aliases", fmt::format("'{}' is used twice", alias)});
      }
    }
  }
  const auto& gateway = config.gateway();
  for (const auto& [path, listener] :
       {std::pair("gateway.http", &gateway.http()), std::pair("gateway.grpc", &gateway.grpc())}) {
    const auto address = ParseHostPort(listener->listen());
    if (!address.ok() || IsLoopback(address->host)) continue;
    if (gateway.auth().keys_file().empty() && gateway.auth().mode() != "none") {
      problems.push_back(
          {std::string(path) + ".listen",
           fmt::format("{} can be reached from other machines and nothing guards it; set "
                       "gateway.auth.keys_file, or gateway.auth.mode: none to serve everybody",
                       address->Text())});
    }
  }
  return problems;
}

}  // namespace antiphon
