// The CPU engine: llama and qwen2 families, with weights that stay as quantised as they are.
#ifndef ANTIPHON_ENGINE_CPU_CPU_RUNNER_H_
#define ANTIPHON_ENGINE_CPU_CPU_RUNNER_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "engine/image_source.h"
#include "engine/model_runner.h"
#include "engine/tensor_group.h"

namespace antiphon::model {
class ModelFile;
}

namespace antiphon::engine {

enum class Activations { kFast, kFloat };  // int8 blocks with integer accumulation, or float32

struct CpuRunnerOptions {
  uint32_t block_tokens = 16;
  uint32_t step_tokens_max = 1024;
  int threads = 0;                               // 0: all cores granted to the process
  int nice = 0;                                  // of the engine's threads, 0 to 19
  Activations activations = Activations::kFast;  // kFloat also makes the KV dtype f32
  std::string instruction_set = "auto";          // or the name of a granted table (isa.h)
  std::function<void(double)> on_load_progress;  // 0 .. 1
  TensorGroup group;                             // this process's rank in it
  ImageSource* images = nullptr;                 // of `file`; used at load. Null: none is shared
};

// FAILED_PRECONDITION when the model cannot be served (naming tensor or key), its ranks cannot
// share it out evenly, or the instruction set is not granted by this machine; RESOURCE_EXHAUSTED
// when memory for it cannot be had, with both sizes. `file` must outlive the runner. In a group
// this is rank 0, and it waits until all ranks have loaded: UNAVAILABLE when one of them cannot.
absl::StatusOr<std::unique_ptr<ModelRunner>> MakeCpuRunner(const model::ModelFile* file,
                                                           const CpuRunnerOptions& options);

// FAILED_PRECONDITION when the model cannot be shared out over `ranks`, naming field or tensor.
// Quick.
absl::Status CheckCpuRanks(const model::ModelFile& file, uint32_t ranks);

// Any other rank of a group, with rank 0's options but for `group`: loads its shard of the model
// and runs rank 0's steps on it until that runner ends. Blocks. Errors are those of MakeCpuRunner
// and of Comm, and break the group.
absl::Status ServeCpuRank(const model::ModelFile* file, const CpuRunnerOptions& options);

}  // namespace antiphon::engine

#endif  // ANTIPHON_ENGINE_CPU_CPU_RUNNER_H_
