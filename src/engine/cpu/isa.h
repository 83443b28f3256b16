// Which kernel tables this machine may run: what the processor has and the system grants.
#ifndef ANTIPHON_ENGINE_CPU_ISA_H_
#define ANTIPHON_ENGINE_CPU_ISA_H_

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/cpu/kernels.h"

namespace antiphon::engine::cpu {

// Granted tables, best first; never empty.
const std::vector<const Kernels*>& GrantedKernels();

// "auto" or the name of a table. INVALID_ARGUMENT for an unknown name, FAILED_PRECONDITION for one
// that this machine does not grant.
absl::StatusOr<const Kernels*> KernelsNamed(std::string_view name);

// What an operator should hear when `kernels` is the best that this machine grants; empty: nothing.
std::string SlowKernelsNotice(const Kernels& kernels);

}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_ISA_H_
