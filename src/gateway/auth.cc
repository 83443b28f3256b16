#include "gateway/auth.h"

#include <openssl/crypto.h>
#include <spdlog/fmt/fmt.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <fstream>
#include <set>

#include "common/block_key.h"
#include "common/status_macros.h"

namespace antiphon::gateway {
namespace {

constexpr size_t kKeysFileBytesMax = 16u << 20;

absl::Status KeyError(std::string_view file, const YAML::Node& at, std::string_view what) {
  return absl::InvalidArgumentError(fmt::format("{}:{}: {}", file, at.Mark().line + 1, what));
}

absl::StatusOr<std::string> ReadField(std::string_view file, const YAML::Node& entry,
                                      const char* name) {
  const YAML::Node value = entry[name];
  if (!value.IsDefined()) return KeyError(file, entry, fmt::format("{} is missing", name));
  if (!value.IsScalar() || value.Scalar().empty()) {
    return KeyError(file, value, fmt::format("{} must be a text", name));
  }
  return value.Scalar();
}

absl::StatusOr<ApiKey> ReadKey(std::string_view file, const YAML::Node& entry) {
  if (!entry.IsMap()) return KeyError(file, entry, "expected {name, tenant, sha256}");
  for (const auto& member : entry) {
    const std::string name = member.first.IsScalar() ? member.first.Scalar() : "?";
    if (name != "name" && name != "tenant" && name != "sha256") {
      return KeyError(file, member.first,
                      fmt::format("{}: unknown key; name, tenant and sha256 are known", name));
    }
  }
  ApiKey key;
  ASSIGN_OR_RETURN(key.name, ReadField(file, entry, "name"));
  ASSIGN_OR_RETURN(key.tenant, ReadField(file, entry, "tenant"));
  ASSIGN_OR_RETURN(key.sha256, ReadField(file, entry, "sha256"));
  if (key.sha256.size() != 64 ||
      key.sha256.find_first_not_of("0123456789abcdef") != std::string::npos) {
    return KeyError(file, entry["sha256"],
                    "sha256 must be 64 lower-case hexadecimal digits: printf %s KEY | sha256sum");
  }
  return key;
}

absl::StatusOr<std::vector<ApiKey>> ReadKeys(std::string_view yaml, std::string_view file) {
  const YAML::Node root = YAML::Load(std::string(yaml));
  if (!root.IsSequence()) {
    return absl::InvalidArgumentError(
        fmt::format("{}: expected a list of {{name, tenant, sha256}}", file));
  }
  std::vector<ApiKey> keys;
  std::set<std::string> names, digests;
  for (const YAML::Node& entry : root) {
    ASSIGN_OR_RETURN(ApiKey key, ReadKey(file, entry));
    if (!names.insert(key.name).second) {
      return KeyError(file, entry, fmt::format("the name {} is there twice", key.name));
    }
    if (!digests.insert(key.sha256).second) {
      return KeyError(file, entry, fmt::format("the key of {} is another's too", key.name));
    }
    keys.push_back(std::move(key));
  }
  if (keys.empty()) return absl::InvalidArgumentError(fmt::format("{}: no keys", file));
  return keys;
}

}  // namespace

absl::StatusOr<std::vector<ApiKey>> ParseKeys(std::string_view yaml, std::string_view file_name) {
  // yaml-cpp throws.
  try {
    return ReadKeys(yaml, file_name);
  } catch (const YAML::Exception& e) {
    return absl::InvalidArgumentError(fmt::format("{}:{}: {}", file_name, e.mark.line + 1, e.msg));
  } catch (const std::exception& e) {
    return absl::InvalidArgumentError(fmt::format("{}: {}", file_name, e.what()));
  }
}

absl::StatusOr<std::unique_ptr<Auth>> Auth::Create(std::string keys_file) {
  std::unique_ptr<Auth> auth(new Auth(std::move(keys_file)));
  RETURN_IF_ERROR(auth->Reload());
  return auth;
}

absl::Status Auth::Reload() {
  if (open()) return absl::OkStatus();
  std::ifstream in(keys_file_, std::ios::binary);
  if (!in) {
    return absl::NotFoundError(fmt::format("gateway.auth.keys_file: cannot read {}", keys_file_));
  }
  std::string text;
  char buffer[4096];
  while (in.read(buffer, sizeof(buffer)) || in.gcount() > 0) {
    text.append(buffer, static_cast<size_t>(in.gcount()));
    if (text.size() > kKeysFileBytesMax) {
      return absl::InvalidArgumentError(fmt::format("{}: larger than 16MiB", keys_file_));
    }
  }
  ASSIGN_OR_RETURN(std::vector<ApiKey> keys, ParseKeys(text, keys_file_));
  absl::MutexLock lock(&mu_);
  keys_ = std::move(keys);
  return absl::OkStatus();
}

absl::StatusOr<std::string> Auth::TenantOf(std::string_view authorization) const {
  if (open()) return std::string("default");
  if (authorization.empty()) {
    return absl::UnauthenticatedError(
        "You didn't provide an API key; send it as 'Authorization: Bearer YOUR_KEY'.");
  }
  const std::string_view scheme = authorization.substr(0, 7);
  const bool bearer = scheme.size() == 7 && (scheme[0] | 32) == 'b' && (scheme[1] | 32) == 'e' &&
                      (scheme[2] | 32) == 'a' && (scheme[3] | 32) == 'r' &&
                      (scheme[4] | 32) == 'e' && (scheme[5] | 32) == 'r' && scheme[6] == ' ';
  if (!bearer) {
    return absl::UnauthenticatedError("The Authorization header must be 'Bearer YOUR_KEY'.");
  }
  authorization.remove_prefix(7);
  while (authorization.starts_with(' ')) authorization.remove_prefix(1);
  const std::string digest = Sha256Hex(authorization);
  absl::MutexLock lock(&mu_);
  const ApiKey* found = nullptr;
  for (const ApiKey& key : keys_) {
    if (CRYPTO_memcmp(key.sha256.data(), digest.data(), digest.size()) == 0) found = &key;
  }
  if (found == nullptr) return absl::UnauthenticatedError("Incorrect API key provided.");
  return found->tenant;
}

std::vector<std::string> Auth::tenants() const {
  if (open()) return {"default"};
  absl::MutexLock lock(&mu_);
  std::set<std::string> names;
  for (const ApiKey& key : keys_) names.insert(key.tenant);
  return {names.begin(), names.end()};
}

}  // namespace antiphon::gateway
