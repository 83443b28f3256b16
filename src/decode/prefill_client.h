// Calls of Prefill at other workers: one stream for each sequence, events on the handler's
// executor.
#ifndef ANTIPHON_DECODE_PREFILL_CLIENT_H_
#define ANTIPHON_DECODE_PREFILL_CLIENT_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "common/executor.h"
#include "common/wire.h"

namespace antiphon::internal::v1 {
class PrefillOpen;
class PrefillUp;
}  // namespace antiphon::internal::v1

namespace antiphon::decode {

// Called on the client's executor.
class PrefillHandler {
 public:
  virtual ~PrefillHandler() = default;
  virtual void OnPrefillUp(uint64_t prefill, const wire::PrefillUp& up) = 0;
  // Last event of a stream that was not cancelled.
  virtual void OnPrefillEnd(uint64_t prefill, const absl::Status& status) = 0;
};

// Thread-safe. Executor and handler outlive it. The next message of a stream is read when the
// handler has returned from the last. Destruction cancels what runs and waits for it.
class PrefillClient {
 public:
  static std::unique_ptr<PrefillClient> Make(const Identity& self, Executor* executor,
                                             PrefillHandler* handler);
  virtual ~PrefillClient() = default;
  // `prefill` is the caller's name of the stream, unique over the client's life.
  virtual void Open(uint64_t prefill, const std::string& address, wire::PrefillOpen open) = 0;
  virtual void HalfClose(uint64_t prefill) = 0;
  // No event of the stream follows, but for one that is on its way already.
  virtual void Cancel(uint64_t prefill) = 0;
};

}  // namespace antiphon::decode

#endif  // ANTIPHON_DECODE_PREFILL_CLIENT_H_
