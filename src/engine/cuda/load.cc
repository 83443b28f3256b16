#include "engine/cuda/load.h"

#include <dlfcn.h>
#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <functional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/logging.h"
#include "common/status_macros.h"
#include "engine/cpu/team.h"
#include "engine/cpu/weights.h"
#include "engine/cuda/bf16_source.h"

namespace antiphon::engine {
namespace cuda {
namespace {

constexpr char kFile[] = "libantiphon_cuda.so";

std::vector<std::string> ModulePlaces(const std::string& configured) {
  if (!configured.empty()) return {configured};
  std::error_code ignored;
  const auto bin = std::filesystem::read_symlink("/proc/self/exe", ignored).parent_path();
  std::vector<std::string> places;
  for (const char* place :
       {".", "../lib", "../lib/antiphon", "../lib64/antiphon", "../lib/x86_64-linux-gnu/antiphon",
        "../lib/aarch64-linux-gnu/antiphon"}) {
    places.push_back((bin / place / kFile).lexically_normal().string());
  }
  return places;
}

// Stays loaded for the process's life: CUDA does not like to be unloaded.
absl::StatusOr<const Module*> LoadModule(const std::string& configured) {
  std::string tried;
  for (const std::string& place : ModulePlaces(configured)) {
    if (!std::filesystem::exists(place)) {
      absl::StrAppend(&tried, tried.empty() ? "" : ", ", place);
      continue;
    }
    void* library = dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      return absl::FailedPreconditionError(
          absl::StrCat("the CUDA module does not load: ", dlerror()));
    }
    const auto entry = reinterpret_cast<ModuleEntry>(dlsym(library, kModuleEntry));
    const Module* module = entry == nullptr ? nullptr : entry();
    if (module == nullptr || module->abi != kModuleAbi) {
      return absl::FailedPreconditionError(absl::StrCat(
          place, " belongs to another version of antiphon; install both from one build"));
    }
    return module;
  }
  return absl::NotFoundError(absl::StrCat("there is no CUDA module (looked for ", tried, ")"));
}

// Asked ahead of the module, which would say the same: it and cuBLASLt take a quarter of a second
// and 80 MiB of a process's own.
bool DriverIsThere() {
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (driver == nullptr) return false;
  dlclose(driver);
  return true;
}

struct Device {
  uint64_t memory_bytes = 0;
  std::string text;
};
absl::StatusOr<Device> Describe(const Module& module, int device) {
  ModuleError error;
  const int count = module.device_count(&error);
  if (error.code != 0 || count == 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("no CUDA device: ", error.code == 0 ? "the driver has none" : error.message));
  }
  if (device < 0 || device >= count) {
    return absl::FailedPreconditionError(absl::StrCat(
        "CUDA device ", device, " does not exist; there are ", count, ", numbered from 0"));
  }
  DeviceDescription d;
  module.describe_device(device, &d, &error);
  RETURN_IF_ERROR(ToStatus(error));
  if (d.compute_major < 8) {
    return absl::FailedPreconditionError(
        fmt::format("CUDA device {} ({}) has compute capability {}.{}; 8.0 or newer is needed",
                    device, d.name, d.compute_major, d.compute_minor));
  }
  return Device{d.memory_bytes, fmt::format("{} (compute {}.{}, {:.1f} of {:.1f} GiB free)", d.name,
                                            d.compute_major, d.compute_minor,
                                            static_cast<double>(d.memory_free_bytes) / (1 << 30),
                                            static_cast<double>(d.memory_bytes) / (1 << 30))};
}

// What rank 0 tells the others before they make their engines.
struct GroupStart {
  uint32_t on_host = 0;  // who sums
  GroupId id;
};

// Where a rank's engine is.
struct Place {
  int device = 0;
  uint32_t sharers = 1;  // ranks on that device
};

Place PlaceOf(const Module& module, const CudaRunnerOptions& options) {
  Place place{.device = options.device};
  if (options.group.comm == nullptr) return place;
  const int rank = options.group.comm->rank(), size = options.group.comm->size();
  ModuleError error;
  const int there = module.device_count(&error) - options.device;
  if (there <= 0 || there >= size) {  // none: Describe says why
    place.device += rank;
    return place;
  }
  place.device += rank % there;
  place.sharers = static_cast<uint32_t>((size + there - 1) / there);
  if (rank == 0) {
    LogWarning(
        "{} ranks share {} GPU(s) from device {} on: their sums go through the host, which is "
        "slow; worker.tensor_parallel wants as many GPUs",
        size, there, options.device);
  }
  return place;
}

// NCCL wants a device for each rank.
absl::StatusOr<GroupStart> StartGroup(const Module& module, const TensorGroup& group,
                                      const Place& place) {
  GroupStart start;
  if (group.comm->rank() == 0) {
    start.on_host = place.sharers > 1;
    ModuleError error;
    if (start.on_host == 0) module.make_group_id(&start.id, &error);
    if (error.code != 0) {
      LogWarning("{}: the ranks' sums go through the host, which is slow",
                 std::string(error.message));
      start.on_host = 1;
    }
  }
  RETURN_IF_ERROR(
      group.comm->Broadcast(absl::MakeSpan(reinterpret_cast<std::byte*>(&start), sizeof(start)), 0,
                            absl::InfiniteDuration()));
  return start;
}

}  // namespace

class RankSums {
 public:
  explicit RankSums(const TensorGroup& group) : comm_(group.comm), timeout_(group.timeout) {}

  // From here on ranks wait for each other's steps, not for their loading.
  void Loaded() { loaded_ = true; }

  static int Sum(void* context, float* values, size_t count) {
    auto& sums = *static_cast<RankSums*>(context);
    const absl::Status status = sums.comm_->AllReduceSum(
        absl::MakeSpan(values, count), sums.loaded_ ? sums.timeout_ : absl::InfiniteDuration());
    if (!status.ok()) LogError("sum over ranks: {}", std::string(status.message()));
    return static_cast<int>(status.code());
  }

 private:
  Comm* const comm_;
  const absl::Duration timeout_;
  std::atomic<bool> loaded_ = false;
};

LoadedEngine::LoadedEngine() = default;
LoadedEngine::LoadedEngine(LoadedEngine&&) noexcept = default;
LoadedEngine::~LoadedEngine() = default;

absl::Status ToStatus(const ModuleError& error) {
  if (error.code == 0) return absl::OkStatus();
  return absl::Status(static_cast<absl::StatusCode>(error.code), error.message);
}

namespace {

absl::StatusOr<LoadedEngine> Load(const model::ModelFile& file, const CudaRunnerOptions& options) {
  const Comm* comm = options.group.comm;
  cpu::Shard shard;
  if (comm != nullptr) {
    shard = {.rank = static_cast<uint32_t>(comm->rank()),
             .size = static_cast<uint32_t>(comm->size())};
  }
  LoadedEngine loaded;
  ASSIGN_OR_RETURN(loaded.module, LoadModule(options.module_path));
  const Module& module = *loaded.module;
  const Place place = PlaceOf(module, options);
  ASSIGN_OR_RETURN(const Device device, Describe(module, place.device));
  LogInfo("CUDA engine: device {}, {}{}", place.device, device.text,
          shard.size > 1 ? fmt::format(", rank {} of {}", shard.rank, shard.size) : "");
  ASSIGN_OR_RETURN(const std::unique_ptr<cpu::Weights> weights,
                   cpu::FindWeights(file, Activations::kFloat, shard));
  const model::LlamaShape& s = weights->shape;
  // Rank 0 has the whole vocabulary, the others none of it.
  weights->output.first_row = 0;
  weights->output.rows = s.vocab;
  loaded.ranks = shard.size;
  loaded.threads = options.threads != 0
                       ? options.threads
                       : std::max(1, cpu::GrantedCores() / static_cast<int>(shard.size));
  KvLayout& layout = loaded.layout;
  layout.block_tokens = options.block_tokens;
  layout.layers = s.layers;
  layout.kv_heads = s.kv_heads * shard.size;
  layout.head_dim = s.head_dim;
  layout.dtype = KvDtype::kBf16;
  RETURN_IF_ERROR(layout.Validate());
  EngineConfig config;
  config.device = place.device;
  config.layers = s.layers;
  config.hidden = s.hidden;
  config.feed_forward = s.feed_forward;
  config.heads = s.heads;
  config.kv_heads = s.kv_heads;
  config.head_dim = s.head_dim;
  config.vocab = s.vocab;
  config.context = s.context;
  config.rope_dims = s.rope_dims;
  config.rms_eps = s.rms_eps;
  config.tied_output = s.tied_output;
  config.qkv_bias = !weights->layers[0].q_bias.empty();
  config.block_tokens = options.block_tokens;
  config.layer_bytes = layout.layer_bytes();
  config.step_tokens_max = options.step_tokens_max;
  config.rows_max = std::min(options.rows_max, options.step_tokens_max);
  config.memory_bytes = static_cast<uint64_t>(
      options.memory_fraction * static_cast<double>(device.memory_bytes) / place.sharers);
  if (comm != nullptr) {
    ASSIGN_OR_RETURN(const GroupStart start, StartGroup(module, options.group, place));
    config.ranks = shard.size;
    config.rank = shard.rank;
    config.block_kv_heads = layout.kv_heads;
    config.first_kv_head = s.kv_heads * shard.rank;
    config.group = start.id;
    if (start.on_host != 0) {
      loaded.sums = std::make_unique<RankSums>(options.group);
      config.sum = RankSums::Sum;
      config.sum_context = loaded.sums.get();
    }
  }
  Bf16Source source(*weights, loaded.threads);
  auto progress = options.on_load_progress;
  ModuleError error;
  loaded.engine = {module.create(
                       config, source.Face(),
                       [](void* context, double done) {
                         const auto& report = *static_cast<std::function<void(double)>*>(context);
                         if (report) report(done);
                       },
                       &progress, &error),
                   module.destroy};
  if (loaded.engine == nullptr) return ToStatus(error);
  if (loaded.sums != nullptr) loaded.sums->Loaded();
  LogInfo("CUDA engine: {} KV pages of {} tokens on the device",
          module.pages_total(loaded.engine.get()), options.block_tokens);
  loaded.shape = {.vocab = s.vocab,
                  .context = s.context,
                  .step_tokens_max = options.step_tokens_max,
                  .copies_blocks = true,
                  .makes_checksums = shard.size == 1};
  loaded.rope = fmt::format("halves dims={} base={} scale={} freqs={}", s.rope_dims, s.rope_base,
                            s.rope_scale, s.has_rope_freqs ? "file" : "none");
  loaded.model = fmt::format(
      "cuda {} {} vocab={} hidden={} feed_forward={} heads={} step_tokens={} "
      "rows={}",
      layout.Text(), loaded.rope, s.vocab, s.hidden, s.feed_forward, s.heads,
      options.step_tokens_max, config.rows_max);
  return loaded;
}

}  // namespace

absl::StatusOr<LoadedEngine> LoadEngine(const model::ModelFile& file,
                                        const CudaRunnerOptions& options) {
  absl::StatusOr<LoadedEngine> loaded = Load(file, options);
  if (!loaded.ok() && options.group.comm != nullptr) options.group.comm->Abort(loaded.status());
  return loaded;
}

absl::Status AgreeOnPages(const LoadedEngine& loaded, const TensorGroup& group) {
  uint64_t pages = loaded.module->pages_total(loaded.engine.get());
  const auto bytes_of = [](uint64_t* values, size_t count) {
    return absl::MakeSpan(reinterpret_cast<std::byte*>(values), count * sizeof(uint64_t));
  };
  std::vector<uint64_t> all(static_cast<size_t>(group.comm->size()));
  RETURN_IF_ERROR(
      group.comm->Gather(bytes_of(&pages, 1), bytes_of(all.data(), all.size()), 0, group.timeout));
  if (group.comm->rank() == 0) pages = *std::min_element(all.begin(), all.end());
  RETURN_IF_ERROR(group.comm->Broadcast(bytes_of(&pages, 1), 0, group.timeout));
  loaded.module->limit_pages(loaded.engine.get(), pages);
  return absl::OkStatus();
}

}  // namespace cuda

absl::Status FindCudaDevice(const std::string& module_path, int device, std::string* description) {
  if (module_path.empty() && !cuda::DriverIsThere()) {
    return absl::FailedPreconditionError("no CUDA device: there is no NVIDIA driver");
  }
  ASSIGN_OR_RETURN(const cuda::Module* module, cuda::LoadModule(module_path));
  ASSIGN_OR_RETURN(cuda::Device found, cuda::Describe(*module, device));
  *description = std::move(found.text);
  return absl::OkStatus();
}

}  // namespace antiphon::engine
