#include "engine/cpu/pack.h"

#include <cstdint>
#include <cstring>

#include "common/status_macros.h"
#include "engine/cpu/gguf_blocks.h"

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

// One row's values of a block to their bits, which are zero.
void PackValues(QuantFormat format, const uint8_t (&values)[kQuantBlock], size_t lane,
                std::byte* block) {
  std::byte* high = block + format.head_bytes;
  std::byte* nibbles = high + format.high_bytes;
  for (size_t k = 0; k < kQuantBlock; ++k) {
    const size_t at = 4 * lane + k % 4, step = k / 4;
    const unsigned value = values[k];
    nibbles[64 * (step % 4) + at] |= static_cast<std::byte>((value & 15) << (step < 4 ? 0 : 4));
    if (format.bits == 5) high[at] |= static_cast<std::byte>((value >> 4) << step);
    if (format.bits == 6) {
      high[64 * (step / 4) + at] |= static_cast<std::byte>((value >> 4) << (2 * (step % 4)));
    }
  }
}

// Q5_0 and Q5_1: `head` f16 numbers, then the bits.
void PackQ5(PackedType type, const std::byte* const* rows, size_t columns, std::byte* out) {
  const QuantFormat format = FormatOf(type);
  const size_t head = format.head_bytes / 32;
  for (size_t lane = 0; lane < kGroupRows; ++lane) {
    if (rows[lane] == nullptr) continue;
    const uint8_t* source = reinterpret_cast<const uint8_t*>(rows[lane]);
    std::byte* block = out;
    for (size_t b = 0; b < columns / kQuantBlock; ++b) {
      for (size_t h = 0; h < head; ++h) std::memcpy(block + 32 * h + 2 * lane, source + 2 * h, 2);
      uint8_t values[kQuantBlock];
      ReadQ5Block(source + 2 * head, values);
      PackValues(format, values, lane, block);
      source += 2 * head + 20;
      block += BlockBytes(format);
    }
  }
}

// A super-block of the file to its lane.
void PackSuperBlock(PackedType type, const uint8_t* source, size_t lane, std::byte* out) {
  const QuantFormat format = FormatOf(type);
  const bool six = type == PackedType::kQ6_K;
  std::memcpy(out + 2 * lane, source + (six ? kQ6KSuperScale : 0), 2);
  if (!six) std::memcpy(out + 32 + 2 * lane, source + 2, 2);
  std::byte* block = out + format.super_bytes;
  for (int j = 0; j < kSuperBlock / kQuantBlock; ++j, block += BlockBytes(format)) {
    uint8_t values[kQuantBlock];
    if (six) {
      block[lane] = static_cast<std::byte>(source[kQ6KScales + 2 * static_cast<size_t>(j)]);
      block[16 + lane] =
          static_cast<std::byte>(source[kQ6KScales + 2 * static_cast<size_t>(j) + 1]);
      ReadQ6KBlock(source, j, values);
    } else {
      const ScaleAndMinimum numbers = ReadScaleAndMinimum(source, j);
      block[lane] = static_cast<std::byte>(numbers.scale);
      block[16 + lane] = static_cast<std::byte>(numbers.minimum);
      (type == PackedType::kQ4_K ? ReadQ4KBlock : ReadQ5KBlock)(source, j, values);
    }
    PackValues(format, values, lane, block);
  }
}

void PackSuperBlocks(PackedType type, size_t source_bytes, const std::byte* const* rows,
                     size_t columns, std::byte* out) {
  CHECK(columns % kSuperBlock == 0);
  const size_t packed_bytes = PackedGroupBytes(type, kSuperBlock);
  for (size_t lane = 0; lane < kGroupRows; ++lane) {
    if (rows[lane] == nullptr) continue;
    const uint8_t* source = reinterpret_cast<const uint8_t*>(rows[lane]);
    for (size_t b = 0; b < columns / kSuperBlock; ++b) {
      PackSuperBlock(type, source + b * source_bytes, lane, out + b * packed_bytes);
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
    case model::TensorType::kQ5_0:
      return PackedType::kQ5_0;
    case model::TensorType::kQ5_1:
      return PackedType::kQ5_1;
    case model::TensorType::kQ4_K:
      return PackedType::kQ4_K;
    case model::TensorType::kQ5_K:
      return PackedType::kQ5_K;
    case model::TensorType::kQ6_K:
      return PackedType::kQ6_K;
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
    case PackedType::kQ5_0:
    case PackedType::kQ5_1:
      return PackQ5(type, rows, columns, out);
    case PackedType::kQ4_K:
      return PackSuperBlocks(type, kQ4KBytes, rows, columns, out);
    case PackedType::kQ5_K:
      return PackSuperBlocks(type, kQ5KBytes, rows, columns, out);
    case PackedType::kQ6_K:
      return PackSuperBlocks(type, kQ6KBytes, rows, columns, out);
  }
}

}  // namespace antiphon::engine::cpu
