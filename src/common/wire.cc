#include "common/wire.h"

#include <openssl/sha.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "antiphon/v1/model.pb.h"
#include "antiphon/v1/store.pb.h"
#include "common/kv_layout.h"
#include "common/status_macros.h"

namespace antiphon {

wire::Hello MakeHello(const Identity& self) {
  wire::Hello hello;
  hello.set_wire_min(kWireMin);
  hello.set_wire_max(kWireMax);
  hello.set_cluster(self.cluster);
  hello.set_node(self.node.value());
  hello.set_incarnation(self.incarnation);
  hello.set_version(kVersion);
  return hello;
}

absl::StatusOr<uint32_t> Negotiate(const Identity& self, const wire::Hello& peer) {
  if (peer.cluster() != self.cluster) {
    return absl::FailedPreconditionError(absl::StrCat("cluster.name differs: this node is of '",
                                                      self.cluster, "', ", peer.node(), " is of '",
                                                      peer.cluster(), "'"));
  }
  const uint32_t version = std::min(kWireMax, peer.wire_max());
  if (version < std::max(kWireMin, peer.wire_min()) || version == 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("no wire version in common: this node (", kVersion, ") speaks ", kWireMin, "-",
                     kWireMax, ", ", peer.node(), " (", peer.version(), ") speaks ",
                     peer.wire_min(), "-", peer.wire_max()));
  }
  return version;
}

wire::KvLayout LayoutToProto(const KvLayout& layout) {
  wire::KvLayout proto;
  proto.set_block_tokens(layout.block_tokens);
  proto.set_layers(layout.layers);
  proto.set_kv_heads(layout.kv_heads);
  proto.set_head_dim(layout.head_dim);
  proto.set_dtype(layout.dtype == KvDtype::kBf16 ? "bf16" : "f32");
  proto.set_layer_align(layout.layer_align);
  proto.set_checksum("xxh3-4k");
  return proto;
}

absl::StatusOr<KvLayout> LayoutFromProto(const wire::KvLayout& proto) {
  KvLayout layout{.block_tokens = proto.block_tokens(),
                  .layers = proto.layers(),
                  .kv_heads = proto.kv_heads(),
                  .head_dim = proto.head_dim(),
                  .layer_align = proto.layer_align()};
  if (proto.dtype() == "bf16") {
    layout.dtype = KvDtype::kBf16;
  } else if (proto.dtype() == "f32") {
    layout.dtype = KvDtype::kF32;
  } else {
    return absl::InvalidArgumentError(
        absl::StrCat("layout.dtype is '", proto.dtype(), "'; known are bf16 and f32"));
  }
  if (proto.checksum() != "xxh3-4k") {
    return absl::InvalidArgumentError(
        absl::StrCat("layout.checksum is '", proto.checksum(), "'; known is xxh3-4k"));
  }
  RETURN_IF_ERROR(layout.Validate());
  return layout;
}

FingerprintId IdOf(const wire::Fingerprint& f) {
  std::string bytes = "antiphon-fingerprint-1";
  const auto field = [&bytes](const std::string& v) { absl::StrAppend(&bytes, v.size(), ":", v); };
  field(f.weights_digest());
  field(f.kv_dtype());
  field(f.rope());
  field(f.layout());
  field(absl::StrCat(f.tp_degree()));
  field(f.kernel_class());
  uint8_t digest[SHA256_DIGEST_LENGTH];
  SHA256(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size(), digest);
  return FingerprintId::Truncate(digest);
}

std::string DescribeDifference(const wire::Fingerprint& a, const wire::Fingerprint& b) {
  std::string out;
  const auto compare = [&out](const char* name, const auto& x, const auto& y) {
    if (x != y) absl::StrAppend(&out, out.empty() ? "" : "; ", name, " ", x, " != ", y);
  };
  compare("weights_digest", a.weights_digest(), b.weights_digest());
  compare("kv_dtype", a.kv_dtype(), b.kv_dtype());
  compare("rope", a.rope(), b.rope());
  compare("layout", a.layout(), b.layout());
  compare("tp_degree", a.tp_degree(), b.tp_degree());
  compare("kernel_class", a.kernel_class(), b.kernel_class());
  return out;
}

SlotId SlotFromProto(const wire::SlotRef& ref) { return {ref.slot(), ref.generation()}; }

wire::SlotRef SlotToProto(const SlotId& slot) {
  wire::SlotRef ref;
  ref.set_slot(slot.slot);
  ref.set_generation(slot.generation);
  return ref;
}

}  // namespace antiphon
