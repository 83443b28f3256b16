// The wire of the `tcp` transport, version 1. All integers little-endian.
//
//   puller                                      owner
//   Hello  {magic, version_min, version_max} -> checks
//          checks                            <- Hello {magic, chosen, chosen}
//   Request{magic, id, region, offset, bytes}->            any number, in order
//                                            <- Reply {magic, id, code, bytes} and that many bytes
//
// Replies come in the order of the requests. A reply with a code other than ok has no bytes. Any
// frame that does not decode ends the connection.
#ifndef ANTIPHON_TRANSFER_TCP_WIRE_H_
#define ANTIPHON_TRANSFER_TCP_WIRE_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace antiphon::transfer {

inline constexpr uint16_t kPullVersionMin = 1;
inline constexpr uint16_t kPullVersionMax = 1;
inline constexpr uint32_t kPullBytesMax = 64 << 20;  // of one request
inline constexpr size_t kHelloBytes = 16;
inline constexpr size_t kRequestBytes = 40;
inline constexpr size_t kReplyBytes = 24;

struct HelloFrame {
  uint16_t version_min = kPullVersionMin;
  uint16_t version_max = kPullVersionMax;
};
struct RequestFrame {
  uint64_t id = 0;
  uint64_t region = 0;
  uint64_t offset = 0;
  uint32_t bytes = 0;  // 1 .. kPullBytesMax
};
enum class ReplyCode : uint32_t { kOk = 0, kNoRegion = 1, kOutOfRange = 2 };
struct ReplyFrame {
  uint64_t id = 0;
  ReplyCode code = ReplyCode::kOk;
  uint32_t bytes = 0;  // kOk: those asked for; else 0
};

void Encode(const HelloFrame& frame, std::byte* out);
void Encode(const RequestFrame& frame, std::byte* out);
void Encode(const ReplyFrame& frame, std::byte* out);

// INVALID_ARGUMENT naming the field.
absl::StatusOr<HelloFrame> DecodeHello(const std::byte* in);
absl::StatusOr<RequestFrame> DecodeRequest(const std::byte* in);
absl::StatusOr<ReplyFrame> DecodeReply(const std::byte* in);

// The version both speak. FAILED_PRECONDITION with both ranges in the text.
absl::StatusOr<uint16_t> ChooseVersion(const HelloFrame& peer);

}  // namespace antiphon::transfer

#endif  // ANTIPHON_TRANSFER_TCP_WIRE_H_
