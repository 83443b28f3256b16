// The CUDA engine behind the face that the CPU engine has: llama and qwen2 families, with weights
// as bf16 on the device. It is a module (libantiphon_cuda.so) that is loaded when asked for.
#ifndef ANTIPHON_ENGINE_CUDA_CUDA_RUNNER_H_
#define ANTIPHON_ENGINE_CUDA_CUDA_RUNNER_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "engine/model_runner.h"
#include "engine/tensor_group.h"

namespace antiphon::model {
class ModelFile;
}

namespace antiphon::engine {

struct CudaRunnerOptions {
  std::string module_path;  // empty: beside the program, and where it is installed
  int device = 0;
  uint32_t block_tokens = 16;
  uint32_t step_tokens_max = 1024;
  uint32_t rows_max = 64;        // single rows that run as one graph; more of them run slower
  double memory_fraction = 0.9;  // of the device's memory that may be taken
  int threads = 0;               // that prepare weights and draw tokens; 0: all cores granted
  std::function<void(double)> on_load_progress;  // 0 .. 1
  // This process's rank: rank r has device `device` + r. With fewer devices ranks share them, and
  // sums go through the host.
  TensorGroup group;
};

// Loads the module and asks for devices. NOT_FOUND: there is no module. FAILED_PRECONDITION: it is
// of another build, or there is no driver, one too old, or no such device; the text says which.
absl::Status FindCudaDevice(const std::string& module_path, int device, std::string* description);

// Also FAILED_PRECONDITION when the model cannot be served, RESOURCE_EXHAUSTED when the device's
// memory does not hold it. `file` must outlive the call only. In a group this is rank 0, and it
// waits until all ranks have loaded: UNAVAILABLE when one of them cannot.
absl::StatusOr<std::unique_ptr<ModelRunner>> MakeCudaRunner(const model::ModelFile* file,
                                                            const CudaRunnerOptions& options);

// Any other rank of a group, with rank 0's options but for `group`: loads its shard of the model
// and runs rank 0's steps on it until that runner ends. Blocks. Errors are those of MakeCudaRunner
// and of Comm, and break the group.
absl::Status ServeCudaRank(const model::ModelFile* file, const CudaRunnerOptions& options);

}  // namespace antiphon::engine

#endif  // ANTIPHON_ENGINE_CUDA_CUDA_RUNNER_H_
