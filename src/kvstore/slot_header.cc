#include "kvstore/slot_header.h"

#include <spdlog/fmt/fmt.h>

#include <bit>
#include <cstring>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "common/block_key.h"
#include "common/status_macros.h"

namespace antiphon::kvstore {
namespace {

static_assert(std::endian::native == std::endian::little, "the slot header is little-endian");

constexpr uint64_t kMagic = 0x31544F4C53544E41;  // "ANTSLOT1"

// Byte offsets; the arrays follow at kArrays, checksums first to keep them aligned.
struct Fixed {
  uint64_t magic;
  uint64_t header_checksum;  // XXH3-64 of the 4096 bytes with this field zero
  uint8_t key[16];
  uint8_t parent[16];
  uint8_t fingerprint[16];
  uint64_t generation;
  uint32_t position;
  uint32_t token_count;
  uint32_t layer_count;
  uint32_t reserved;
};
static_assert(sizeof(Fixed) == 88);
constexpr size_t kArrays = sizeof(Fixed);

size_t ArrayBytes(size_t tokens, size_t layers) {
  return layers * sizeof(uint64_t) + tokens * sizeof(uint32_t);
}

template <typename Id>
void CopyId(const Id& id, uint8_t* out) {
  std::memcpy(out, id.bytes().data(), Id::kBytes);
}

}  // namespace

absl::Status CheckHeaderFits(const KvLayout& layout) {
  const size_t need = kArrays + ArrayBytes(layout.block_tokens, layout.layers);
  if (need <= kSlotHeaderBytes) return absl::OkStatus();
  return absl::InvalidArgumentError(
      fmt::format("layout.block_tokens {} and layout.layers {} need a slot header of {} bytes; it "
                  "has {}",
                  layout.block_tokens, layout.layers, need, kSlotHeaderBytes));
}

void WriteSlotHeader(const SlotHeader& header, std::byte* out) {
  const size_t layers = header.layer_checksums.size(), tokens = header.token_ids.size();
  CHECK(kArrays + ArrayBytes(tokens, layers) <= kSlotHeaderBytes);
  Fixed fixed{.magic = kMagic,
              .generation = header.generation,
              .position = header.position,
              .token_count = static_cast<uint32_t>(tokens),
              .layer_count = static_cast<uint32_t>(layers)};
  CopyId(header.key, fixed.key);
  CopyId(header.parent, fixed.parent);
  CopyId(header.fingerprint, fixed.fingerprint);
  std::memset(out, 0, kSlotHeaderBytes);
  std::memcpy(out, &fixed, sizeof(fixed));
  std::memcpy(out + kArrays, header.layer_checksums.data(), layers * sizeof(uint64_t));
  std::memcpy(out + kArrays + layers * sizeof(uint64_t), header.token_ids.data(),
              tokens * sizeof(uint32_t));
  const uint64_t checksum = XXH3_64bits(out, kSlotHeaderBytes);
  std::memcpy(out + offsetof(Fixed, header_checksum), &checksum, sizeof(checksum));
}

absl::StatusOr<SlotHeader> ReadSlotHeader(absl::Span<const std::byte> bytes) {
  if (bytes.size() != kSlotHeaderBytes) return absl::DataLossError("slot header: size");
  // A worker of this host may be writing here: decide on a copy.
  std::byte copy[kSlotHeaderBytes];
  std::memcpy(copy, bytes.data(), kSlotHeaderBytes);
  Fixed fixed;
  std::memcpy(&fixed, copy, sizeof(fixed));
  if (fixed.magic != kMagic) return absl::DataLossError("slot header: magic");
  std::memset(copy + offsetof(Fixed, header_checksum), 0, sizeof(uint64_t));
  if (XXH3_64bits(copy, kSlotHeaderBytes) != fixed.header_checksum) {
    return absl::DataLossError("slot header: header_checksum");
  }
  constexpr size_t kRoom = kSlotHeaderBytes - kArrays;
  if (fixed.layer_count > kRoom / sizeof(uint64_t)) {
    return absl::DataLossError("slot header: layer_count");
  }
  if (fixed.token_count > (kRoom - fixed.layer_count * sizeof(uint64_t)) / sizeof(uint32_t)) {
    return absl::DataLossError("slot header: token_count");
  }
  SlotHeader header{.key = BlockKey::Truncate(fixed.key),
                    .parent = BlockKey::Truncate(fixed.parent),
                    .fingerprint = FingerprintId::Truncate(fixed.fingerprint),
                    .generation = fixed.generation,
                    .position = fixed.position};
  header.layer_checksums.resize(fixed.layer_count);
  header.token_ids.resize(fixed.token_count);
  const std::byte* arrays = copy + kArrays;
  std::memcpy(header.layer_checksums.data(), arrays, fixed.layer_count * sizeof(uint64_t));
  std::memcpy(header.token_ids.data(), arrays + fixed.layer_count * sizeof(uint64_t),
              fixed.token_count * sizeof(uint32_t));
  return header;
}

absl::Status CheckHeaderContent(const SlotHeader& header, const KvLayout& layout) {
  if (header.token_ids.size() != layout.block_tokens) {
    return absl::DataLossError(fmt::format("block has {} token ids; the layout says {}",
                                           header.token_ids.size(), layout.block_tokens));
  }
  if (header.layer_checksums.size() != layout.layers) {
    return absl::DataLossError(fmt::format("block has {} layer checksums; the layout says {}",
                                           header.layer_checksums.size(), layout.layers));
  }
  if (header.parent.empty() && header.position == 0) return absl::OkStatus();
  if (NextKey(header.parent, header.token_ids) != header.key) {
    return absl::DataLossError("token ids and parent do not hash to the key");
  }
  return absl::OkStatus();
}

absl::Status VerifyLayers(const KvLayout& layout, const std::byte* payload, uint32_t first_layer,
                          uint32_t tokens, absl::Span<const uint64_t> checksums) {
  for (uint32_t i = 0; i < checksums.size(); ++i) {
    const uint32_t layer = first_layer + i;
    if (LayerChecksum(layout, payload + layer * layout.layer_bytes(), tokens) != checksums[i]) {
      return absl::DataLossError(fmt::format("layer {}: checksum", layer));
    }
  }
  return absl::OkStatus();
}

}  // namespace antiphon::kvstore
