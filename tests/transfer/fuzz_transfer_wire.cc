// Frames of the `tcp` transport from hostile bytes. The first byte picks the frame; what decodes
// must hold the promises of tcp_wire.h and encode back to the same bytes.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "transfer/tcp_wire.h"

namespace {

using namespace antiphon::transfer;

void Check(bool promise) {
  if (!promise) std::abort();
}

template <size_t kBytes, typename Frame>
void SameBytes(const Frame& frame, const std::byte* in, size_t bytes = kBytes) {
  std::byte out[kBytes];
  Encode(frame, out);
  Check(std::memcmp(in, out, bytes) == 0);
}

void Hello(const std::byte* in) {
  const auto hello = DecodeHello(in);
  if (!hello.ok()) return Check(absl::IsInvalidArgument(hello.status()));
  Check(hello->version_min > 0 && hello->version_min <= hello->version_max);
  SameBytes<kHelloBytes>(*hello, in, 12);  // reserved bytes are not kept
  const auto version = ChooseVersion(*hello);
  if (!version.ok()) return Check(absl::IsFailedPrecondition(version.status()));
  Check(*version >= kPullVersionMin && *version <= kPullVersionMax);
  Check(*version >= hello->version_min && *version <= hello->version_max);
}

void Request(const std::byte* in) {
  const auto request = DecodeRequest(in);
  if (!request.ok()) return Check(absl::IsInvalidArgument(request.status()));
  Check(request->bytes > 0 && request->bytes <= kPullBytesMax);
  Check(request->offset + request->bytes > request->offset);
  SameBytes<kRequestBytes>(*request, in);
}

void Reply(const std::byte* in) {
  const auto reply = DecodeReply(in);
  if (!reply.ok()) return Check(absl::IsInvalidArgument(reply.status()));
  Check((reply->code == ReplyCode::kOk) == (reply->bytes > 0));
  Check(reply->bytes <= kPullBytesMax);
  SameBytes<kReplyBytes>(*reply, in);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  // Short inputs are zero-filled: frames have a fixed size.
  std::byte in[kRequestBytes] = {};
  std::memcpy(in, data + 1, std::min(size - 1, sizeof(in)));
  switch (data[0] % 3) {
    case 0:
      Hello(in);
      break;
    case 1:
      Request(in);
      break;
    default:
      Reply(in);
      break;
  }
  return 0;
}
