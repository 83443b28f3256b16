// The tables of x86-64, each compiled with its own flags: call them only where they are granted.
#ifndef ANTIPHON_ENGINE_CPU_KERNELS_X86_H_
#define ANTIPHON_ENGINE_CPU_KERNELS_X86_H_

#include "engine/cpu/kernels.h"

namespace antiphon::engine::cpu {

const Kernels& Avx2Kernels();        // AVX2, FMA, F16C
const Kernels& Avx512Kernels();      // AVX-512 F, BW, DQ, VL, VNNI
const Kernels& Avx512Bf16Kernels();  // and BF16
const Kernels& AmxKernels();         // and AMX-TILE, AMX-INT8, for which the system has been asked

// The attention of Avx512Bf16Kernels.
void AttendWithBf16(const Attention& a);
// Whether this processor multiplies bf16 pairs as attention is defined (attention-inl.h). AMD's
// family 25 does; the manuals say so of all.
bool Bf16ProductsAreTwoFmas();
// Whether the tile unit gives the sums that Intel's manual says: what a virtual machine or an
// emulator makes of the instructions shows here, not in an answer.
bool TileProductsAreExact();

}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_KERNELS_X86_H_
