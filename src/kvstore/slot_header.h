// The 4 KiB at the start of a committed slot: what the block is and how to tell that its bytes are
// whole. Fixed layout, little-endian, described in docs/formats/slot.md. Written once, at commit.
#ifndef ANTIPHON_KVSTORE_SLOT_HEADER_H_
#define ANTIPHON_KVSTORE_SLOT_HEADER_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/ids.h"
#include "common/kv_layout.h"

namespace antiphon::kvstore {

struct SlotHeader {
  BlockKey key;
  BlockKey parent;  // block 0: the root key when the writer told it, else zero
  FingerprintId fingerprint;
  uint64_t generation = 0;  // of the slot that this header lies in
  uint32_t position = 0;    // block index in its sequence
  std::vector<uint32_t> token_ids;
  std::vector<uint64_t> layer_checksums;
};

// Whether token ids and checksums of this layout fit the header. INVALID_ARGUMENT with both sizes.
absl::Status CheckHeaderFits(const KvLayout& layout);

// Fills `out`, which has kSlotHeaderBytes. The header must fit (CheckHeaderFits).
void WriteSlotHeader(const SlotHeader& header, std::byte* out);

// Reads what may be stale, torn or hostile bytes. DATA_LOSS naming the field.
absl::StatusOr<SlotHeader> ReadSlotHeader(absl::Span<const std::byte> bytes);

// DATA_LOSS unless `header` has this layout's counts and, where the parent is known, its token ids
// hash to its key.
absl::Status CheckHeaderContent(const SlotHeader& header, const KvLayout& layout);

// DATA_LOSS naming the first layer of [first_layer, first_layer + checksums.size()) whose `tokens`
// filled tokens do not have the checksum. `payload` points at layer 0 of the slot.
absl::Status VerifyLayers(const KvLayout& layout, const std::byte* payload, uint32_t first_layer,
                          uint32_t tokens, absl::Span<const uint64_t> checksums);

}  // namespace antiphon::kvstore

#endif  // ANTIPHON_KVSTORE_SLOT_HEADER_H_
