// The tables of x86-64, each compiled with its own flags: call them only where they are granted.
#ifndef ANTIPHON_ENGINE_CPU_KERNELS_X86_H_
#define ANTIPHON_ENGINE_CPU_KERNELS_X86_H_

#include "engine/cpu/kernels.h"

namespace antiphon::engine::cpu {

const Kernels& Avx2Kernels();    // AVX2, FMA, F16C
const Kernels& Avx512Kernels();  // AVX-512 F, BW, DQ, VL, VNNI

}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_KERNELS_X86_H_
