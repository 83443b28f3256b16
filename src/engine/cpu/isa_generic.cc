#include "engine/cpu/isa.h"

namespace antiphon::engine::cpu {

std::vector<const Kernels*> DetectKernels() { return {&ScalarKernels()}; }

}  // namespace antiphon::engine::cpu
