// A conductor and decode workers as a gateway meets them: over real gRPC, saying what a test tells
// them to. Thread-safe; what does not come within kPatience is nullopt.
#ifndef ANTIPHON_TESTS_FAKES_FAKE_CLUSTER_H_
#define ANTIPHON_TESTS_FAKES_FAKE_CLUSTER_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/time/time.h"
#include "antiphon/v1/control.pb.h"
#include "antiphon/v1/worker.pb.h"

namespace antiphon::fakes {

namespace wire = ::antiphon::internal::v1;

inline constexpr absl::Duration kPatience = absl::Seconds(30);

class FakeConductor {
 public:
  // Content by digest.
  explicit FakeConductor(std::map<std::string, std::string> blobs);
  ~FakeConductor();  // ends all calls

  const std::string& address() const;
  // It dies, and comes back at the same address.
  void Stop();
  void Start();

  // What is served, for those who watch now or later.
  void SetModels(wire::ModelSet models);
  // How it answers Admit from now on; nullopt leaves the call open.
  using Script = std::function<std::optional<wire::AdmitReply>(const wire::AdmitRequest&)>;
  void Answer(Script script);
  // All requests go there from now on.
  void PlaceOn(const std::string& node, const std::string& address);

  std::optional<wire::AdmitRequest> NextAdmit();
  std::optional<wire::FinishReport> NextFinish();
  // Waits for the end of an open Admit by its caller.
  bool AwaitAbandoned();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

class FakeDecode {
 public:
  explicit FakeDecode(std::string node);
  ~FakeDecode();  // ends all streams

  const std::string& node() const;
  const std::string& address() const;
  void Stop();
  // Ends the streams that there are; new ones are welcome.
  void BreakStreams();

  std::optional<wire::Start> NextStart();
  std::optional<wire::Cancel> NextCancel();
  // To whoever is connected; false when nobody is.
  bool Send(const wire::SequenceUpdate& update);
  // The next tokens of `start`: one for each byte. `index`: of the first, over all epochs.
  bool Say(const wire::Start& start, uint32_t index, std::string_view bytes,
           wire::FinishReason finish = wire::FINISH_REASON_UNSPECIFIED);
  bool Fail(const wire::Start& start, int code, const std::string& message,
            const std::string& failed_node = "");

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace antiphon::fakes

#endif  // ANTIPHON_TESTS_FAKES_FAKE_CLUSTER_H_
