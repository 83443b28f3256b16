// Keys of KV blocks (DESIGN.md section 4): SHA-256 over (parent key, token ids), rooted in all else
// that changes the KV bytes or may see them, truncated to 128 bits. Every variable-length field is
// preceded by its length, so no two inputs share an encoding.
#ifndef ANTIPHON_COMMON_BLOCK_KEY_H_
#define ANTIPHON_COMMON_BLOCK_KEY_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/types/span.h"
#include "common/ids.h"

namespace antiphon {

// What block 0 descends from.
struct KeyRoot {
  std::string_view weights_digest;  // hex
  uint32_t block_tokens = 0;
  std::string_view tenant_salt;  // derived by the gateway from the authenticated tenant
  std::string_view cache_salt;   // the client's; narrows the tenant's further
  std::string_view adapter;
};

BlockKey RootKey(const KeyRoot& root);

// The key of the block that follows `parent` and holds `tokens` (one whole block).
BlockKey NextKey(const BlockKey& parent, absl::Span<const uint32_t> tokens);

// Keys of all whole blocks of `tokens`; tokens.size() / block_tokens of them.
std::vector<BlockKey> BlockKeys(const BlockKey& root, absl::Span<const uint32_t> tokens,
                                uint32_t block_tokens);

// Lower-case hex of SHA-256.
std::string Sha256Hex(std::string_view bytes);

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_BLOCK_KEY_H_
