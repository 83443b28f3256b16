// From a model file to an engine on a device: the module, the device, and the place among the ranks
// of a group.
#ifndef ANTIPHON_ENGINE_CUDA_LOAD_H_
#define ANTIPHON_ENGINE_CUDA_LOAD_H_

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/kv_layout.h"
#include "engine/cuda/cuda_runner.h"
#include "engine/cuda/module.h"
#include "engine/model_runner.h"

namespace antiphon::engine::cuda {

absl::Status ToStatus(const ModuleError& error);

// Sums over ranks on the host. Its own thread after the engine's last step.
class RankSums;

struct LoadedEngine {
  LoadedEngine();
  LoadedEngine(LoadedEngine&&) noexcept;
  ~LoadedEngine();

  const Module* module = nullptr;
  std::unique_ptr<RankSums> sums;  // nullptr: the engine is alone, or NCCL sums
  std::unique_ptr<Engine, void (*)(Engine*)> engine{nullptr, nullptr};
  RunnerShape shape;
  KvLayout layout;  // the whole model's
  std::string rope;
  std::string model;  // what ranks must agree on
  uint32_t ranks = 1;
  int threads = 1;
};

// A failure breaks the group. Ranks call it together.
absl::StatusOr<LoadedEngine> LoadEngine(const model::ModelFile& file,
                                        const CudaRunnerOptions& options);
// After LoadEngine, and after the ranks have found each other: all get as many pages as the one
// with the fewest.
absl::Status AgreeOnPages(const LoadedEngine& loaded, const TensorGroup& group);

}  // namespace antiphon::engine::cuda

#endif  // ANTIPHON_ENGINE_CUDA_LOAD_H_
