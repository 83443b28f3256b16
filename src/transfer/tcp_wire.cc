#include "transfer/tcp_wire.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <bit>
#include <cstring>

namespace antiphon::transfer {
namespace {

static_assert(std::endian::native == std::endian::little, "frames are little-endian");

constexpr uint64_t kHelloMagic = 0x314C4C5550544E41;  // "ANTPULL1"
constexpr uint32_t kRequestMagic = 0x51525450;        // "PTRQ"
constexpr uint32_t kReplyMagic = 0x50525450;          // "PTRP"

struct HelloWire {
  uint64_t magic;
  uint16_t version_min, version_max;
  uint32_t reserved;
};
struct RequestWire {
  uint32_t magic;
  uint32_t bytes;
  uint64_t id, region, offset;
  uint64_t reserved;
};
struct ReplyWire {
  uint32_t magic;
  uint32_t code;
  uint64_t id;
  uint32_t bytes;
  uint32_t reserved;
};
static_assert(sizeof(HelloWire) == kHelloBytes && sizeof(RequestWire) == kRequestBytes &&
              sizeof(ReplyWire) == kReplyBytes);

absl::Status Bad(const char* field) {
  return absl::InvalidArgumentError(fmt::format("pull frame: {}", field));
}

}  // namespace

void Encode(const HelloFrame& frame, std::byte* out) {
  const HelloWire w{kHelloMagic, frame.version_min, frame.version_max, 0};
  std::memcpy(out, &w, sizeof(w));
}

void Encode(const RequestFrame& frame, std::byte* out) {
  const RequestWire w{kRequestMagic, frame.bytes, frame.id, frame.region, frame.offset, 0};
  std::memcpy(out, &w, sizeof(w));
}

void Encode(const ReplyFrame& frame, std::byte* out) {
  const ReplyWire w{kReplyMagic, static_cast<uint32_t>(frame.code), frame.id, frame.bytes, 0};
  std::memcpy(out, &w, sizeof(w));
}

absl::StatusOr<HelloFrame> DecodeHello(const std::byte* in) {
  HelloWire w;
  std::memcpy(&w, in, sizeof(w));
  if (w.magic != kHelloMagic) return Bad("hello magic");
  if (w.version_min == 0 || w.version_min > w.version_max) return Bad("versions");
  return HelloFrame{w.version_min, w.version_max};
}

absl::StatusOr<RequestFrame> DecodeRequest(const std::byte* in) {
  RequestWire w;
  std::memcpy(&w, in, sizeof(w));
  if (w.magic != kRequestMagic) return Bad("request magic");
  if (w.bytes == 0 || w.bytes > kPullBytesMax) return Bad("bytes");
  if (w.offset > UINT64_MAX - w.bytes) return Bad("offset");
  if (w.reserved != 0) return Bad("reserved");
  return RequestFrame{w.id, w.region, w.offset, w.bytes};
}

absl::StatusOr<ReplyFrame> DecodeReply(const std::byte* in) {
  ReplyWire w;
  std::memcpy(&w, in, sizeof(w));
  if (w.magic != kReplyMagic) return Bad("reply magic");
  if (w.code > static_cast<uint32_t>(ReplyCode::kOutOfRange)) return Bad("code");
  if (w.bytes > kPullBytesMax) return Bad("bytes");
  if ((w.code == 0) == (w.bytes == 0)) return Bad("bytes for this code");
  if (w.reserved != 0) return Bad("reserved");
  return ReplyFrame{w.id, static_cast<ReplyCode>(w.code), w.bytes};
}

absl::StatusOr<uint16_t> ChooseVersion(const HelloFrame& peer) {
  const uint16_t version = std::min(kPullVersionMax, peer.version_max);
  if (version >= std::max(kPullVersionMin, peer.version_min)) return version;
  return absl::FailedPreconditionError(
      fmt::format("no pull version in common: this side speaks {}-{}, the peer {}-{}",
                  kPullVersionMin, kPullVersionMax, peer.version_min, peer.version_max));
}

}  // namespace antiphon::transfer
