// API keys: who may ask, and as which tenant. The file is a YAML list of {name, tenant, sha256},
// where sha256 is the lower-case hex digest of the key.
#ifndef ANTIPHON_GATEWAY_AUTH_H_
#define ANTIPHON_GATEWAY_AUTH_H_

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"

namespace antiphon::gateway {

struct ApiKey {
  std::string name;
  std::string tenant;
  std::string sha256;  // lower-case hex
};

// INVALID_ARGUMENT: "FILE:LINE: what is wrong". Names are unique, digests too.
absl::StatusOr<std::vector<ApiKey>> ParseKeys(std::string_view yaml, std::string_view file_name);

// Thread-safe.
class Auth {
 public:
  // Without a file everybody is tenant "default". NOT_FOUND or INVALID_ARGUMENT when the file
  // cannot be used.
  static absl::StatusOr<std::unique_ptr<Auth>> Create(std::string keys_file);
  // Reads the file again; the old keys stay when that fails.
  absl::Status Reload();

  // The tenant of "Bearer KEY"; UNAUTHENTICATED says what is missing. Takes the same time for every
  // wrong key.
  absl::StatusOr<std::string> TenantOf(std::string_view authorization) const;
  bool open() const { return keys_file_.empty(); }
  // Distinct, sorted.
  std::vector<std::string> tenants() const;

 private:
  explicit Auth(std::string keys_file) : keys_file_(std::move(keys_file)) {}
  const std::string keys_file_;
  mutable absl::Mutex mu_;
  std::vector<ApiKey> keys_ ABSL_GUARDED_BY(mu_);
};

}  // namespace antiphon::gateway

#endif  // ANTIPHON_GATEWAY_AUTH_H_
