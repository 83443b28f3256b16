// Internal messages from hostile bytes: parsing, the handshake and the conversions behind it.
#include <cstdlib>
#include <string>

#include "antiphon/v1/control.pb.h"
#include "antiphon/v1/store.pb.h"
#include "antiphon/v1/worker.pb.h"
#include "common/ids.h"
#include "common/kv_layout.h"
#include "common/wire.h"

namespace {

void Handshake(const antiphon::wire::Hello& hello) {
  const antiphon::Identity self{.cluster = "c", .node = antiphon::NodeId("n"), .incarnation = 1};
  const auto version = antiphon::Negotiate(self, hello);
  if (version.ok() && (*version < antiphon::kWireMin || *version > antiphon::kWireMax))
    std::abort();
}

void Layout(const antiphon::wire::KvLayout& proto) {
  const auto layout = antiphon::LayoutFromProto(proto);
  if (!layout.ok()) return;
  if (layout->slot_bytes() > (size_t{3} << 30) * 1024) std::abort();
  const auto again = antiphon::LayoutFromProto(antiphon::LayoutToProto(*layout));
  if (!again.ok() || !(*again == *layout)) std::abort();
}

template <typename Message>
bool Parse(Message& message, const uint8_t* data, size_t size) {
  return message.ParseFromArray(data, static_cast<int>(size));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0 || size > (1 << 16)) return 0;
  const uint8_t kind = data[0];
  ++data;
  --size;
  switch (kind % 5) {
    case 0: {
      antiphon::wire::Hello hello;
      if (Parse(hello, data, size)) Handshake(hello);
      break;
    }
    case 1: {
      antiphon::wire::KvLayout layout;
      if (Parse(layout, data, size)) Layout(layout);
      break;
    }
    case 2: {
      antiphon::wire::StoreRequest request;
      if (!Parse(request, data, size)) break;
      if (request.has_attach()) {
        Handshake(request.attach().hello());
        Layout(request.attach().layout());
        antiphon::IdOf(request.attach().fingerprint());
      }
      for (const auto& slot : request.pin_slots().slots()) {
        if (antiphon::SlotToProto(antiphon::SlotFromProto(slot)).slot() != slot.slot())
          std::abort();
      }
      for (const auto& key : request.pin_prefix().keys()) antiphon::BlockKey::FromBytes(key);
      break;
    }
    case 3: {
      antiphon::wire::NodeReport report;
      if (!Parse(report, data, size)) break;
      Handshake(report.hello().hello());
      antiphon::DescribeDifference(report.hello().fingerprint(), antiphon::wire::Fingerprint());
      break;
    }
    default: {
      antiphon::wire::AdmitRequest request;
      if (!Parse(request, data, size)) break;
      Handshake(request.hello());
      antiphon::RequestId::FromBytes(request.id());
      for (const auto& key : request.block_keys()) antiphon::BlockKey::FromBytes(key);
      break;
    }
  }
  return 0;
}
