// Frames of the store's Unix socket: a 32-bit little-endian length, then that many bytes of one
// serialised message. Descriptors travel by SCM_RIGHTS beside the first byte of a frame.
#ifndef ANTIPHON_KVSTORE_CLIENT_FRAMING_H_
#define ANTIPHON_KVSTORE_CLIENT_FRAMING_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace google::protobuf {
class MessageLite;
}

namespace antiphon::kvstore {

inline constexpr size_t kFrameBytesMax = 16 << 20;

// Length and message.
std::string EncodeFrame(const google::protobuf::MessageLite& message);

// Cuts a byte stream into frames. Holds at most one frame and what came behind it.
class FrameCutter {
 public:
  void Append(std::string_view bytes) { buffer_.append(bytes); }
  // The next whole frame's message bytes, valid until the next call of either; nullopt: more bytes
  // are needed. INVALID_ARGUMENT: empty or larger than kFrameBytesMax; the stream is unusable.
  absl::StatusOr<std::optional<std::string_view>> Next();
  size_t buffered() const { return buffer_.size() - consumed_; }

 private:
  std::string buffer_;
  size_t consumed_ = 0;
};

}  // namespace antiphon::kvstore

#endif  // ANTIPHON_KVSTORE_CLIENT_FRAMING_H_
