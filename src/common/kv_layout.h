// The byte layout of one KV block, and the checksums of its layers.
//
// payload = [layer] of [K|V][token][kv_head][head_dim] of kv dtype; each layer starts at a
// multiple of `layer_align`. A slot of the pool is a kSlotHeaderBytes header and then the payload.
//
// Checksum of a layer with `tokens` filled tokens (xxh3-4k): over the filled bytes of K, then those
// of V, cut into 4 KiB pieces counted within each half: the sum modulo 2^64 of XXH3-64(piece,
// seed = 2 * piece index + (0 for K, 1 for V)). Pieces are independent,
// so any order and any device may compute them.
#ifndef ANTIPHON_COMMON_KV_LAYOUT_H_
#define ANTIPHON_COMMON_KV_LAYOUT_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/status.h"

namespace antiphon {

inline constexpr size_t kSlotHeaderBytes = 4096;

enum class KvDtype : uint8_t { kBf16, kF32 };

struct KvLayout {
  uint32_t block_tokens = 0;
  uint32_t layers = 0;
  uint32_t kv_heads = 0;
  uint32_t head_dim = 0;
  KvDtype dtype = KvDtype::kBf16;
  uint32_t layer_align = 4096;

  size_t element_bytes() const { return dtype == KvDtype::kBf16 ? 2 : 4; }
  size_t token_bytes() const { return size_t{kv_heads} * head_dim * element_bytes(); }  // K or V
  size_t half_bytes() const { return token_bytes() * block_tokens; }                    // K or V
  size_t layer_bytes() const {
    return (2 * half_bytes() + layer_align - 1) / layer_align * layer_align;
  }
  size_t payload_bytes() const { return layer_bytes() * layers; }
  size_t slot_bytes() const { return kSlotHeaderBytes + payload_bytes(); }
  uint32_t BlocksFor(size_t tokens) const {
    return static_cast<uint32_t>((tokens + block_tokens - 1) / block_tokens);
  }

  friend bool operator==(const KvLayout&, const KvLayout&) = default;

  // INVALID_ARGUMENT naming the field when a dimension is zero or the block is absurdly large.
  absl::Status Validate() const;
  // Canonical text; equal texts are equal layouts. Part of the fingerprint.
  std::string Text() const;
};

// `layer` points at the layer's first byte. 0 <= tokens <= block_tokens.
uint64_t LayerChecksum(const KvLayout& layout, const std::byte* layer, uint32_t tokens);

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_KV_LAYOUT_H_
