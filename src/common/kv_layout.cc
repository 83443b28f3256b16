#include "common/kv_layout.h"

#include <algorithm>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace antiphon {
namespace {

constexpr size_t kPieceBytes = 4096;
constexpr size_t kSlotBytesMax = size_t{1} << 30;

uint64_t HalfChecksum(const std::byte* half, size_t bytes, uint64_t which) {
  uint64_t sum = 0;
  for (size_t begin = 0, index = 0; begin < bytes; begin += kPieceBytes, ++index) {
    const size_t size = std::min(kPieceBytes, bytes - begin);
    sum += XXH3_64bits_withSeed(half + begin, size, 2 * index + which);
  }
  return sum;
}

}  // namespace

absl::Status KvLayout::Validate() const {
  const auto positive = [](uint32_t v, const char* name) {
    return v > 0 && v <= (1u << 20)
               ? absl::OkStatus()
               : absl::InvalidArgumentError(absl::StrCat("layout.", name, " is ", v,
                                                         "; it must be between 1 and 1048576"));
  };
  RETURN_IF_ERROR(positive(block_tokens, "block_tokens"));
  RETURN_IF_ERROR(positive(layers, "layers"));
  RETURN_IF_ERROR(positive(kv_heads, "kv_heads"));
  RETURN_IF_ERROR(positive(head_dim, "head_dim"));
  RETURN_IF_ERROR(positive(layer_align, "layer_align"));
  const unsigned __int128 payload = static_cast<unsigned __int128>(block_tokens) * kv_heads *
                                    head_dim * element_bytes() * 2 * layers;
  if (payload > kSlotBytesMax) {
    return absl::InvalidArgumentError("layout: a block would pass 1 GiB; use fewer block_tokens");
  }
  return absl::OkStatus();
}

std::string KvLayout::Text() const {
  return absl::StrCat("L", layers, ",H", kv_heads, ",D", head_dim, ",B", block_tokens, ",",
                      dtype == KvDtype::kBf16 ? "bf16" : "f32", ",A", layer_align, ",xxh3-4k");
}

uint64_t LayerChecksum(const KvLayout& layout, const std::byte* layer, uint32_t tokens) {
  CHECK(tokens <= layout.block_tokens);
  const size_t filled = layout.token_bytes() * tokens;
  return HalfChecksum(layer, filled, 0) + HalfChecksum(layer + layout.half_bytes(), filled, 1);
}

}  // namespace antiphon
