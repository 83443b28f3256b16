// Any bytes: parsed, looked at and described, or refused.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "antiphon/v1/model.pb.h"
#include "model/card.h"
#include "model/gguf.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace antiphon::model;
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  const auto file = ParseGguf(bytes);
  if (!file.ok()) return 0;
  uint64_t sum = 0;
  for (const Tensor& tensor : (*file)->tensors()) {
    if (tensor.bytes == 0) continue;
    sum += static_cast<uint64_t>(tensor.data[0]) +
           static_cast<uint64_t>(tensor.data[tensor.bytes - 1]);
  }
  if (Inspect(**file).size() + sum == 0) std::abort();
  CardParts parts;
  static_cast<void>(CardOf(**file, "fuzz", parts));
  return 0;
}
