#include <asm/hwcap.h>
#include <sys/auxv.h>

#include "engine/cpu/detect.h"
#include "engine/cpu/kernels_arm.h"

namespace antiphon::engine::cpu {

// NEON is part of AArch64. What the system does not list, it does not grant.
std::vector<const Kernels*> DetectKernels() {
  std::vector<const Kernels*> granted;
  if ((getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0) granted.push_back(&NeonDotprodKernels());
  granted.push_back(&NeonKernels());
  granted.push_back(&ScalarKernels());
  return granted;
}

}  // namespace antiphon::engine::cpu
