#include "engine/cpu/detect.h"

namespace antiphon::engine::cpu {

std::vector<const Kernels*> DetectKernels() { return {&ScalarKernels()}; }

}  // namespace antiphon::engine::cpu
