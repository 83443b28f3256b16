#include "tests/gateway/inference_client.h"

#include "antiphon/v1/inference.grpc.pb.h"
#include "common/rpc.h"

namespace antiphon::gateway {
namespace {

namespace api = ::antiphon::inference::v1;

void Prepare(const CallOptions& options, grpc::ClientContext& context) {
  for (const auto& [name, value] : options.metadata) context.AddMetadata(name, value);
  context.set_deadline(std::chrono::system_clock::now() +
                       absl::ToChronoMilliseconds(options.timeout));
}

class GrpcStream final : public InferenceClient::Stream {
 public:
  GrpcStream(api::Inference::Stub& stub, const api::CompletionRequest& request,
             const CallOptions& options) {
    Prepare(options, context_);
    reader_ = stub.CompleteStream(&context_, request);
  }
  ~GrpcStream() override {
    context_.TryCancel();
    if (!finished_) reader_->Finish();
  }
  std::optional<api::CompletionChunk> Read() override {
    api::CompletionChunk chunk;
    if (!reader_->Read(&chunk)) return std::nullopt;
    return chunk;
  }
  void Cancel() override { context_.TryCancel(); }
  absl::Status Finish() override {
    finished_ = true;
    return FromGrpc(reader_->Finish());
  }

 private:
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReader<api::CompletionChunk>> reader_;
  bool finished_ = false;
};

}  // namespace

struct InferenceClient::State {
  std::unique_ptr<api::Inference::Stub> stub;
};

InferenceClient::InferenceClient(int port) : state_(std::make_unique<State>()) {
  state_->stub = api::Inference::NewStub(MakeChannel("127.0.0.1:" + std::to_string(port)));
}
InferenceClient::~InferenceClient() = default;

absl::StatusOr<api::ChatResponse> InferenceClient::Chat(const api::ChatRequest& request,
                                                        const CallOptions& options) {
  grpc::ClientContext context;
  Prepare(options, context);
  api::ChatResponse response;
  const grpc::Status status = state_->stub->Chat(&context, request, &response);
  if (!status.ok()) return FromGrpc(status);
  return response;
}

absl::StatusOr<api::CompletionResponse> InferenceClient::Complete(
    const api::CompletionRequest& request, const CallOptions& options) {
  grpc::ClientContext context;
  Prepare(options, context);
  api::CompletionResponse response;
  const grpc::Status status = state_->stub->Complete(&context, request, &response);
  if (!status.ok()) return FromGrpc(status);
  return response;
}

absl::StatusOr<api::ListModelsResponse> InferenceClient::ListModels(const CallOptions& options) {
  grpc::ClientContext context;
  Prepare(options, context);
  api::ListModelsResponse response;
  const grpc::Status status = state_->stub->ListModels(&context, {}, &response);
  if (!status.ok()) return FromGrpc(status);
  return response;
}

std::unique_ptr<InferenceClient::Stream> InferenceClient::CompleteStream(
    const api::CompletionRequest& request, const CallOptions& options) {
  return std::make_unique<GrpcStream>(*state_->stub, request, options);
}

}  // namespace antiphon::gateway
