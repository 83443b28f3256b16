// The sampler's requests as the device takes them.
#ifndef ANTIPHON_ENGINE_CUDA_DRAW_REQUEST_H_
#define ANTIPHON_ENGINE_CUDA_DRAW_REQUEST_H_

#include <cstdint>
#include <vector>

#include "engine/cuda/module.h"
#include "engine/sampler.h"

namespace antiphon::engine::cuda {

// Whether the device draws it; what asks for log-probabilities is drawn on the host.
bool DeviceDraws(const SampleRequest& request);

class DrawRequests {
 public:
  explicit DrawRequests(uint32_t vocab) : edit_of_(vocab, 0) {}

  // Appends the request's edits to `edits`; the draw's own pointer stays nullptr, as they may move.
  Draw Make(const SampleRequest& request, std::vector<LogitEdit>* edits);

 private:
  std::vector<uint32_t> edit_of_;  // by id, counted from 1; all zero between calls
};

}  // namespace antiphon::engine::cuda

#endif  // ANTIPHON_ENGINE_CUDA_DRAW_REQUEST_H_
