#include "kvstore/client/framing.h"

#include <google/protobuf/message_lite.h>
#include <spdlog/fmt/fmt.h>

#include <bit>
#include <cstring>

namespace antiphon::kvstore {
namespace {

static_assert(std::endian::native == std::endian::little, "frame lengths are little-endian");
constexpr size_t kLengthBytes = sizeof(uint32_t);

}  // namespace

std::string EncodeFrame(const google::protobuf::MessageLite& message) {
  std::string out(kLengthBytes, '\0');
  message.AppendToString(&out);
  const auto length = static_cast<uint32_t>(out.size() - kLengthBytes);
  std::memcpy(out.data(), &length, kLengthBytes);
  return out;
}

absl::StatusOr<std::optional<std::string_view>> FrameCutter::Next() {
  const size_t have = buffered();
  if (have < kLengthBytes) {
    buffer_.erase(0, consumed_);
    consumed_ = 0;
    return std::nullopt;
  }
  uint32_t length = 0;
  std::memcpy(&length, buffer_.data() + consumed_, kLengthBytes);
  if (length == 0 || length > kFrameBytesMax) {
    return absl::InvalidArgumentError(
        fmt::format("frame length is {}; it is 1 to {}", length, kFrameBytesMax));
  }
  if (have - kLengthBytes < length) {
    buffer_.erase(0, consumed_);
    consumed_ = 0;
    return std::nullopt;
  }
  const std::string_view message =
      std::string_view(buffer_).substr(consumed_ + kLengthBytes, length);
  consumed_ += kLengthBytes + length;
  return message;
}

}  // namespace antiphon::kvstore
