// Any bytes as a safetensors file: every byte of its tensors can be read, or it is refused.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "model/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace antiphon::model;
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  const auto tensors = ParseSafetensors(bytes);
  if (!tensors.ok()) return 0;
  uint64_t all = 0;
  for (const Tensor& tensor : *tensors) {
    if (tensor.name.empty() && tensor.dims.empty()) std::abort();
    for (uint64_t i = 0; i < tensor.bytes; ++i) all += static_cast<uint64_t>(tensor.data[i]) | 256;
  }
  // They cover the data, each byte once.
  uint64_t sum = 0;
  for (const Tensor& tensor : *tensors) sum += tensor.bytes;
  if (sum >= size || all < sum) std::abort();
  return 0;
}
