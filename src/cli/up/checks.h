// What would make a cluster fail later, found before anything starts, with a sentence that helps.
#ifndef ANTIPHON_CLI_UP_CHECKS_H_
#define ANTIPHON_CLI_UP_CHECKS_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace antiphon::cli {

// NOT_FOUND with how to get one; INVALID_ARGUMENT, DATA_LOSS or FAILED_PRECONDITION when the file
// cannot be served. `weights_bytes` gets its size.
absl::Status CheckModel(const std::string& path, bool is_default, uint64_t& weights_bytes);

// UNAVAILABLE naming port and flag.
absl::Status CheckListen(const std::string& listen, const std::string& flag);
bool PortIsFree(const std::string& host, uint16_t port);

struct MemoryNeed {
  uint64_t pool_bytes = 0;
  bool pool_was_chosen = false;  // by the user
  uint64_t weights_bytes = 0;
  int workers = 0;
  uint64_t available_bytes = 0;
};
// The pool to use: what was asked for, or less when nobody asked and memory is short.
// RESOURCE_EXHAUSTED with the sum and what to lower.
absl::StatusOr<uint64_t> FitPool(const MemoryNeed& need);

// Empty, or a warning about an old processor.
std::string ProcessorWarning();

}  // namespace antiphon::cli

#endif  // ANTIPHON_CLI_UP_CHECKS_H_
