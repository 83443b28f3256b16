// One safetensors file (format: the README of huggingface/safetensors): a 64-bit little-endian
// length, a JSON header of that many bytes, and the data that it cuts up. Hostile input: a header
// is checked against the size of the file before it is read, and every offset before it is used;
// memory stays within a small multiple of the header.
#ifndef ANTIPHON_MODEL_SAFETENSORS_H_
#define ANTIPHON_MODEL_SAFETENSORS_H_

#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "model/model_file.h"

namespace antiphon::model {

inline constexpr uint64_t kSafetensorsHeaderBytesMax = 100'000'000;  // the reference reader's

// The tensors by ascending offset, with the names of the file and pointing into `bytes`; a scalar
// has one dimension of 1. DATA_LOSS when the file is cut short or inconsistent: as the format asks,
// the tensors cover the data without gap or overlap, and no name appears twice.
absl::StatusOr<std::vector<Tensor>> ParseSafetensors(std::string_view bytes);

}  // namespace antiphon::model

#endif  // ANTIPHON_MODEL_SAFETENSORS_H_
