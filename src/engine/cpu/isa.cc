#include "engine/cpu/isa.h"

#include <array>

#include "common/logging.h"
#include "engine/cpu/detect.h"

namespace antiphon::engine::cpu {

const std::vector<const Kernels*>& GrantedKernels() {
  static const std::vector<const Kernels*>* const granted =
      new std::vector<const Kernels*>(DetectKernels());
  return *granted;
}

absl::StatusOr<const Kernels*> KernelsNamed(std::string_view name) {
  const std::vector<const Kernels*>& granted = GrantedKernels();
  if (name == "auto") return granted.front();
  std::string names;
  for (const Kernels* kernels : granted) {
    if (name == kernels->name) return kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->name);
  }
  constexpr std::array<std::string_view, 7> kKnown = {
      "scalar", "avx2", "avx512", "avx512-bf16", "amx", "neon", "neon-dotprod"};
  for (std::string_view known : kKnown) {
    if (name == known) {
      return absl::FailedPreconditionError(fmt::format(
          "instruction_set {} is not granted on this machine; granted: {}", name, names));
    }
  }
  return absl::InvalidArgumentError(
      fmt::format("instruction_set \"{}\" is unknown; use auto, scalar, avx2, avx512, avx512-bf16, "
                  "amx, neon or neon-dotprod",
                  name));
}

std::string SlowKernelsNotice(const Kernels& kernels) {
  if (std::string_view(kernels.name) != "scalar") return "";
  return "this processor (or the virtual machine it shows) has neither AVX2 with FMA and F16C nor "
         "AVX-512 with VNNI: the engine serves with its portable kernels, many times slower; use a "
         "processor of 2013 or later, or give the virtual machine the host's CPU model";
}

}  // namespace antiphon::engine::cpu
