#include "engine/cuda/module.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "engine/cuda/engine.h"
#include "engine/cuda/nccl_group.h"

namespace antiphon::engine::cuda {
namespace {

void Tell(const Error& error, ModuleError* out) {
  out->code = error.code;
  const size_t size = std::min(error.message.size(), sizeof(out->message) - 1);
  std::memcpy(out->message, error.message.data(), size);
  out->message[size] = '\0';
}

Error DriverIsFit() {
  int driver = 0, runtime = 0;
  CUDA_RETURN_IF_ERROR(cudaDriverGetVersion(&driver));
  CUDA_RETURN_IF_ERROR(cudaRuntimeGetVersion(&runtime));
  if (driver == 0) return {kFailedPrecondition, "there is no NVIDIA driver"};
  // Within one major version any driver serves any runtime.
  if (driver / 1000 < runtime / 1000) {
    return {kFailedPrecondition, "the NVIDIA driver serves CUDA " + std::to_string(driver / 1000) +
                                     "." + std::to_string(driver % 1000 / 10) +
                                     ", the engine needs CUDA " + std::to_string(runtime / 1000) +
                                     "; install a newer driver"};
  }
  return {};
}

int32_t DeviceCount(ModuleError* error) {
  int count = 0;
  Error status = DriverIsFit();
  if (!status) {
    if (const cudaError_t code = cudaGetDeviceCount(&count); code != cudaSuccess) {
      status = FromCuda(code, "cudaGetDeviceCount(");
      count = 0;
    }
  }
  Tell(status, error);
  return status ? 0 : count;
}

Error Describe(int32_t device, DeviceDescription* out) {
  cudaDeviceProp properties;
  CUDA_RETURN_IF_ERROR(cudaGetDeviceProperties(&properties, device));
  std::memcpy(out->name, properties.name, sizeof(out->name) - 1);
  out->compute_major = properties.major;
  out->compute_minor = properties.minor;
  out->multiprocessors = properties.multiProcessorCount;
  CUDA_RETURN_IF_ERROR(cudaSetDevice(device));
  size_t free_bytes = 0, total_bytes = 0;
  CUDA_RETURN_IF_ERROR(cudaMemGetInfo(&free_bytes, &total_bytes));
  out->memory_bytes = total_bytes;
  out->memory_free_bytes = free_bytes;
  return {};
}

const Module kModule = {
    .abi = kModuleAbi,
    .device_count = DeviceCount,
    .describe_device = [](int32_t device, DeviceDescription* out,
                          ModuleError* error) { Tell(Describe(device, out), error); },
    .create = [](const EngineConfig& config, const WeightSource& source,
                 void (*progress)(void*, double), void* context, ModuleError* error) -> Engine* {
      std::unique_ptr<Engine> engine;
      Tell(Engine::Create(config, source, progress, context, &engine), error);
      return engine.release();
    },
    .destroy = [](Engine* engine) { delete engine; },
    .register_memory =
        [](Engine* engine, void* memory, size_t bytes, ModuleError* error) {
          Tell(engine->RegisterMemory(memory, bytes), error);
        },
    .unregister_memory = [](Engine* engine, void* memory) { engine->UnregisterMemory(memory); },
    .submit = [](Engine* engine, const ChunkView* chunks, size_t count,
                 ModuleError* error) { Tell(engine->Submit(chunks, count), error); },
    .poll = [](Engine* engine) { return engine->Poll(); },
    .take = [](Engine* engine, ChunkOutput* outputs,
               ModuleError* error) { Tell(engine->Take(outputs), error); },
    .make_group_id = [](GroupId* out, ModuleError* error) { Tell(NcclGroup::MakeId(out), error); },
    .pages_total = [](const Engine* engine) { return engine->pages_total(); },
    .limit_pages = [](Engine* engine, uint64_t pages) { engine->LimitPages(pages); },
    .adopt = [](Engine* engine, const ChunkView* chunk,
                ModuleError* error) { Tell(engine->Adopt(*chunk), error); },
};

}  // namespace
}  // namespace antiphon::engine::cuda

extern "C" __attribute__((visibility("default"))) const antiphon::engine::cuda::Module*
antiphon_cuda_module_v2() {
  return &antiphon::engine::cuda::kModule;
}
