// From GGUF rows to the packed groups of kernels.h.
#ifndef ANTIPHON_ENGINE_CPU_PACK_H_
#define ANTIPHON_ENGINE_CPU_PACK_H_

#include <cstddef>
#include <optional>

#include "engine/cpu/kernels.h"
#include "model/model_file.h"

namespace antiphon::engine::cpu {

// Changes whenever the bytes that PackGroup writes for a format do, or what an image of weights is
// made of (weights.cc): processes of different builds share images by this number.
inline constexpr int kPackedLayout = 1;

// None for a format that the engine cannot read.
std::optional<PackedType> PackedTypeOf(model::TensorType type);

// `rows`: sixteen rows in the file, nullptr past the end of the matrix; of whole super-blocks in
// the K formats, so `columns` is a multiple of 256 there, and elsewhere of the format's block.
// Writes PackedGroupBytes(type, columns) bytes.
void PackGroup(PackedType type, const std::byte* const* rows, size_t columns, std::byte* out);

}  // namespace antiphon::engine::cpu

#endif  // ANTIPHON_ENGINE_CPU_PACK_H_
