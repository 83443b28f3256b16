// The tables of AArch64, each compiled with its own flags: call them only where they are granted.
#ifndef ANTIPHON_ENGINE_CPU_KERNELS_ARM_H_
#define ANTIPHON_ENGINE_CPU_KERNELS_ARM_H_

#include "engine/cpu/kernels.h"

namespace antiphon::engine::cpu {

const Kernels& NeonKernels();         // Armv8.0
const Kernels& NeonDotprodKernels();  // Armv8.2 with DotProd

}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_KERNELS_ARM_H_
