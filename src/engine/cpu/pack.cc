#include "engine/cpu/pack.h"

#include <cstring>

namespace antiphon::engine::cpu {
namespace {

// Elements of `bytes` bytes: [column][16].
void PackElements(size_t bytes, const std::byte* const* rows, size_t columns, std::byte* out) {
  for (int lane = 0; lane < kGroupRows; ++lane) {
    if (rows[lane] == nullptr) continue;
    for (size_t k = 0; k < columns; ++k) {
      std::memcpy(out + (k * kGroupRows + static_cast<size_t>(lane)) * bytes,
                  rows[lane] + k * bytes, bytes);
    }
  }
}

// Blocks of 32: `head` f16 numbers (scale, minimum), then steps of four bytes a row.
void PackBlocks(size_t head, size_t steps, std::byte flip, const std::byte* const* rows,
                size_t columns, std::byte* out) {
  const size_t source_bytes = head * 2 + steps * 4;
  const size_t packed_bytes = source_bytes * kGroupRows;
  for (int lane = 0; lane < kGroupRows; ++lane) {
    if (rows[lane] == nullptr) continue;
    const size_t l = static_cast<size_t>(lane);
    for (size_t b = 0; b < columns / kQuantBlock; ++b) {
      const std::byte* source = rows[lane] + b * source_bytes;
      std::byte* block = out + b * packed_bytes;
      for (size_t h = 0; h < head; ++h) std::memcpy(block + 32 * h + 2 * l, source + 2 * h, 2);
      for (size_t s = 0; s < steps; ++s) {
        for (size_t c = 0; c < 4; ++c) {
          block[32 * head + 64 * s + 4 * l + c] = source[2 * head + 4 * s + c] ^ flip;
        }
      }
    }
  }
}

}  // namespace

std::optional<PackedType> PackedTypeOf(model::TensorType type) {
  switch (type) {
    case model::TensorType::kF32:
      return PackedType::kF32;
    case model::TensorType::kF16:
      return PackedType::kF16;
    case model::TensorType::kBF16:
      return PackedType::kBf16;
    case model::TensorType::kQ8_0:
      return PackedType::kQ8_0;
    case model::TensorType::kQ4_0:
      return PackedType::kQ4_0;
    case model::TensorType::kQ4_1:
      return PackedType::kQ4_1;
    default:
      return std::nullopt;
  }
}

void PackGroup(PackedType type, const std::byte* const* rows, size_t columns, std::byte* out) {
  std::memset(out, 0, PackedGroupBytes(type, columns));
  switch (type) {
    case PackedType::kF32:
      return PackElements(4, rows, columns, out);
    case PackedType::kF16:
    case PackedType::kBf16:
      return PackElements(2, rows, columns, out);
    // GGUF's nibble order (byte i: elements i and i + 16) is already the one of kernels.h.
    case PackedType::kQ4_0:
      return PackBlocks(1, 4, std::byte{0}, rows, columns, out);
    case PackedType::kQ4_1:
      return PackBlocks(2, 4, std::byte{0}, rows, columns, out);
    case PackedType::kQ8_0:
      return PackBlocks(1, 8, std::byte{0x80}, rows, columns, out);
  }
}

}  // namespace antiphon::engine::cpu
