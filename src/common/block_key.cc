#include "common/block_key.h"

#include <openssl/sha.h>

#include <bit>
#include <cstring>

#include "common/status_macros.h"

namespace antiphon {
namespace {

static_assert(std::endian::native == std::endian::little, "token ids are hashed as little-endian");

void AppendU32(std::string& out, uint32_t v) {
  char b[4];
  std::memcpy(b, &v, 4);
  out.append(b, 4);
}

void AppendField(std::string& out, std::string_view field) {
  AppendU32(out, static_cast<uint32_t>(field.size()));
  out.append(field);
}

BlockKey Digest(const std::string& bytes) {
  uint8_t digest[SHA256_DIGEST_LENGTH];
  SHA256(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size(), digest);
  return BlockKey::Truncate(digest);
}

}  // namespace

BlockKey RootKey(const KeyRoot& root) {
  std::string bytes = "antiphon-root-1";
  AppendField(bytes, root.weights_digest);
  AppendU32(bytes, root.block_tokens);
  AppendField(bytes, root.tenant_salt);
  AppendField(bytes, root.cache_salt);
  AppendField(bytes, root.adapter);
  return Digest(bytes);
}

BlockKey NextKey(const BlockKey& parent, absl::Span<const uint32_t> tokens) {
  std::string bytes = parent.ToBytes();
  bytes.reserve(bytes.size() + 4 + tokens.size() * sizeof(uint32_t));
  AppendU32(bytes, static_cast<uint32_t>(tokens.size()));
  bytes.append(reinterpret_cast<const char*>(tokens.data()), tokens.size() * sizeof(uint32_t));
  return Digest(bytes);
}

std::vector<BlockKey> BlockKeys(const BlockKey& root, absl::Span<const uint32_t> tokens,
                                uint32_t block_tokens) {
  CHECK(block_tokens > 0);
  std::vector<BlockKey> keys;
  keys.reserve(tokens.size() / block_tokens);
  BlockKey parent = root;
  for (size_t begin = 0; begin + block_tokens <= tokens.size(); begin += block_tokens) {
    parent = NextKey(parent, tokens.subspan(begin, block_tokens));
    keys.push_back(parent);
  }
  return keys;
}

std::string Sha256Hex(std::string_view bytes) {
  uint8_t digest[SHA256_DIGEST_LENGTH];
  SHA256(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size(), digest);
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string out;
  for (uint8_t b : digest) {
    out += kDigits[b >> 4];
    out += kDigits[b & 15];
  }
  return out;
}

}  // namespace antiphon
