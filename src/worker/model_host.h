// The model of a worker: its file, card, blobs and runner.
#ifndef ANTIPHON_WORKER_MODEL_HOST_H_
#define ANTIPHON_WORKER_MODEL_HOST_H_

#include <functional>
#include <map>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "antiphon/v1/model.pb.h"
#include "common/clock.h"
#include "engine/cpu/cpu_runner.h"
#include "engine/cuda/cuda_runner.h"
#include "engine/model_runner.h"
#include "model/model_file.h"
#include "worker/cost_model.h"
#include "worker/host_blobs.h"

namespace antiphon::config::v1 {
class Config;
class Worker;
}  // namespace antiphon::config::v1

namespace antiphon::worker {

struct LoadedModel {
  internal::v1::ModelCard card;
  internal::v1::Fingerprint fingerprint;
  internal::v1::CostModel cost;
  std::map<std::string, std::string> blobs;  // by digest
  std::unique_ptr<engine::ModelRunner> runner;
};

// The engine's part of the configuration; the same for all ranks of a worker.
engine::CpuRunnerOptions RunnerOptions(const config::v1::Worker& worker, bool prefill_role);

engine::CudaRunnerOptions CudaOptions(const config::v1::Worker& worker);

// Whether the worker, and each of its ranks, serves on GPUs. Says in the log why it does not.
// INVALID_ARGUMENT, FAILED_PRECONDITION: a GPU is demanded and none serves.
absl::StatusOr<bool> UsesCuda(const config::v1::Worker& worker);

// The Unix socket of this host's store.
std::string StoreSocket(const config::v1::Config& config);

// What can be known quickly: the model is there, is GGUF or safetensors, is of a kind that we
// serve, can be shared out over worker.tensor_parallel ranks, and is not larger than the memory.
// INVALID_ARGUMENT: no model is configured; NOT_FOUND, DATA_LOSS, FAILED_PRECONDITION: of the file;
// RESOURCE_EXHAUSTED: too little memory, with both sizes.
absl::StatusOr<std::unique_ptr<model::ModelFile>> OpenModel(const config::v1::Config& config);

// Slow: repacks the weights and hashes the file at the same time, then measures speed. `file` must
// outlive the result. In the prefill role the engine's threads stand back (worker.prefill_nice).
// `on_progress` gets "loading weights 43%" and the like, from any thread. `group`: of the worker's
// ranks, which load meanwhile. `blobs`: what other workers of this host did already; may be null.
absl::StatusOr<LoadedModel> LoadModel(const model::ModelFile& file,
                                      const config::v1::Config& config, bool prefill_role,
                                      const Clock& clock, const engine::TensorGroup& group,
                                      HostBlobs* blobs,
                                      std::function<void(std::string)> on_progress);

}  // namespace antiphon::worker

#endif  // ANTIPHON_WORKER_MODEL_HOST_H_
