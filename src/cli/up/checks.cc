#include "cli/up/checks.h"

#include <unistd.h>

#include <algorithm>
#include <filesystem>

#include "common/logging.h"
#include "common/net.h"
#include "common/status_macros.h"
#include "model/card.h"
#include "model/model_file.h"

namespace antiphon::cli {
namespace {

// Code, stacks, batches and tokenizers of one process; measured, generously rounded.
constexpr uint64_t kProcessBytes = 64 << 20;
constexpr uint64_t kSmallestPool = 64 << 20;

std::string MiB(uint64_t bytes) { return fmt::format("{} MiB", (bytes + (1 << 20) - 1) >> 20); }

}  // namespace

absl::Status CheckModel(const std::string& path, bool is_default, uint64_t& weights_bytes) {
  std::error_code error;
  if (!std::filesystem::exists(path, error)) {
    return absl::NotFoundError(
        is_default ? fmt::format("there is no model at {}; scripts/quickstart fetches it, or name "
                                 "another: antiphon up --model FILE.gguf|FOLDER",
                                 path)
                   : fmt::format("no such model: {}", path));
  }
  ASSIGN_OR_RETURN(const auto file, model::OpenModelFile(path));
  const auto shape = model::LlamaShapeOf(*file);
  if (!shape.ok()) {
    return absl::Status(shape.status().code(), fmt::format("{} cannot be served: {}", path,
                                                           std::string(shape.status().message())));
  }
  weights_bytes = file->size_bytes();
  return absl::OkStatus();
}

bool PortIsFree(const std::string& host, uint16_t port) {
  uint16_t real = 0;
  const auto fd = ListenTcp({host, port}, real);
  if (!fd.ok()) return false;
  close(*fd);
  return true;
}

absl::Status CheckListen(const std::string& listen, const std::string& flag) {
  const auto address = ParseHostPort(listen);
  if (!address.ok()) {
    return absl::InvalidArgumentError(
        fmt::format("{}: {}", flag, std::string(address.status().message())));
  }
  uint16_t real = 0;
  const auto fd = ListenTcp(*address, real);
  if (!fd.ok()) {
    const auto other = static_cast<uint16_t>(address->port < 60000 ? address->port + 10 : 8010);
    return absl::UnavailableError(fmt::format("{}, e.g. {} {}", std::string(fd.status().message()),
                                              flag, HostPort{address->host, other}.Text()));
  }
  close(*fd);
  return absl::OkStatus();
}

absl::StatusOr<uint64_t> FitPool(const MemoryNeed& need) {
  // Each worker repacks the weights; the file itself stays in the page cache, which can be dropped.
  const uint64_t fixed = need.weights_bytes * static_cast<uint64_t>(need.workers) +
                         kProcessBytes * static_cast<uint64_t>(need.workers + 3);
  if (fixed + need.pool_bytes <= need.available_bytes) return need.pool_bytes;
  const uint64_t left = need.available_bytes - std::min(need.available_bytes, fixed);
  if (!need.pool_was_chosen && left >= 2 * kSmallestPool) {
    return std::max(left / 2, kSmallestPool) >> 21 << 21;
  }
  return absl::ResourceExhaustedError(fmt::format(
      "too little memory: {} for the KV pool (kvstore.pool), {} for {} workers with {} of weights "
      "each; {} are available. {}",
      MiB(need.pool_bytes), MiB(fixed), need.workers, MiB(need.weights_bytes),
      MiB(need.available_bytes),
      left >= kSmallestPool ? fmt::format("Lower the pool: --kvstore.pool={}MiB", left / 2 >> 20)
                            : std::string("Free memory, use a smaller model, or fewer workers")));
}

std::string ProcessorWarning() {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    return "this processor has no AVX2 and FMA (it is older than 2013, or a virtual machine hides "
           "them): the engine runs, many times slower than it could";
  }
#endif
  return "";
}

}  // namespace antiphon::cli
