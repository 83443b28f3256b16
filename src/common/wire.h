// The handshake of every internal conversation.
#ifndef ANTIPHON_COMMON_WIRE_H_
#define ANTIPHON_COMMON_WIRE_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "common/ids.h"

namespace antiphon::internal::v1 {
class Hello;
class KvLayout;
class Fingerprint;
class SlotRef;
}  // namespace antiphon::internal::v1

namespace antiphon {

struct KvLayout;
namespace wire = ::antiphon::internal::v1;

inline constexpr uint32_t kWireMin = 1;
inline constexpr uint32_t kWireMax = 1;
inline constexpr char kVersion[] = "0.1.0";

// Who this process is.
struct Identity {
  std::string cluster;
  NodeId node;
  uint64_t incarnation = 0;  // random, new at every start
};

wire::Hello MakeHello(const Identity& self);

// The version both speak. FAILED_PRECONDITION when there is none (both ranges in the text) or when
// the cluster names differ (both names in the text).
absl::StatusOr<uint32_t> Negotiate(const Identity& self, const wire::Hello& peer);

wire::KvLayout LayoutToProto(const KvLayout& layout);
// INVALID_ARGUMENT naming the field.
absl::StatusOr<KvLayout> LayoutFromProto(const wire::KvLayout& proto);

// SHA-256 over the fields, truncated.
FingerprintId IdOf(const wire::Fingerprint& fingerprint);
// The fields that differ, "kv_dtype bf16 != f32; ..."; empty when equal.
std::string DescribeDifference(const wire::Fingerprint& a, const wire::Fingerprint& b);

SlotId SlotFromProto(const wire::SlotRef& ref);
wire::SlotRef SlotToProto(const SlotId& slot);

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_WIRE_H_
