// Implemented once per architecture, in isa_*.cc, of the standard library alone: a program that has
// no more than that can ask too.
#ifndef ANTIPHON_ENGINE_CPU_DETECT_H_
#define ANTIPHON_ENGINE_CPU_DETECT_H_

#include <vector>

#include "engine/cpu/kernels.h"

namespace antiphon::engine::cpu {

// Granted tables, best first; never empty.
std::vector<const Kernels*> DetectKernels();

}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_DETECT_H_
