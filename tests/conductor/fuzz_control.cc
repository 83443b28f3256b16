// Hostile control messages against a core that has nodes: input is a sequence of (kind byte, length
// byte, message).
#include <cstddef>
#include <cstdint>
#include <string>

#include "tests/conductor/harness.h"

using namespace antiphon;
using namespace antiphon::conductor;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Harness h;
  h.Store("s", 100, Chain(1, 4));
  h.Worker("p", wire::ROLE_PREFILL, 100);
  h.Worker("d", wire::ROLE_DECODE, 100);
  for (int steps = 0; size >= 2 && steps < 64; ++steps) {
    const uint8_t kind = data[0];
    const size_t length = std::min<size_t>(data[1], size - 2);
    const std::string bytes(reinterpret_cast<const char*>(data + 2), length);
    data += 2 + length;
    size -= 2 + length;
    h.Advance(absl::Milliseconds(kind));
    if (wire::AdmitRequest admit; kind % 4 == 0 && admit.ParseFromString(bytes)) {
      if (auto request = RequestFromProto(admit); request.ok()) (void)h.core.Admit(*request, h.now);
    } else if (wire::FinishReport finish; kind % 4 == 1 && finish.ParseFromString(bytes)) {
      if (auto parsed = FinishFromProto(finish); parsed.ok()) h.core.OnFinish(*parsed, h.now);
    } else if (wire::NodeReport report; report.ParseFromString(bytes)) {
      const SessionId session = kind % 8 == 2   ? h.sessions["s"]
                                : kind % 8 == 3 ? h.sessions["p"]
                                                : 1000 + kind;
      if (!h.core.OnReport(session, report, h.now, h.actions).ok()) {
        h.core.OnSessionEnd(session, h.now, h.actions);
      }
    }
    h.Tick();
    (void)h.Admit(70, Chain(1, 4));
    wire::ClusterView view;
    h.core.FillView(view);
  }
  return 0;
}
