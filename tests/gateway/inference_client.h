// The gRPC front's client, without gRPC's headers.
#ifndef ANTIPHON_TESTS_GATEWAY_INFERENCE_CLIENT_H_
#define ANTIPHON_TESTS_GATEWAY_INFERENCE_CLIENT_H_

#include <map>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "antiphon/v1/inference.pb.h"

namespace antiphon::gateway {

struct CallOptions {
  std::map<std::string, std::string> metadata;
  absl::Duration timeout = absl::Seconds(30);
};

class InferenceClient {
 public:
  explicit InferenceClient(int port);
  ~InferenceClient();

  absl::StatusOr<inference::v1::ChatResponse> Chat(const inference::v1::ChatRequest& request,
                                                   const CallOptions& options = {});
  absl::StatusOr<inference::v1::CompletionResponse> Complete(
      const inference::v1::CompletionRequest& request, const CallOptions& options = {});
  absl::StatusOr<inference::v1::ListModelsResponse> ListModels(const CallOptions& options = {});

  // One stream at a time on it; from one thread, but for Cancel.
  class Stream {
   public:
    virtual ~Stream() = default;  // cancels what still runs
    // nullopt at the end.
    virtual std::optional<inference::v1::CompletionChunk> Read() = 0;
    virtual void Cancel() = 0;
    // After Read gave nullopt.
    virtual absl::Status Finish() = 0;
  };
  std::unique_ptr<Stream> CompleteStream(const inference::v1::CompletionRequest& request,
                                         const CallOptions& options = {});

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace antiphon::gateway

#endif  // ANTIPHON_TESTS_GATEWAY_INFERENCE_CLIENT_H_
