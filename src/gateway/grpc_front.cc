#include "gateway/grpc_front.h"

#include <atomic>
#include <deque>
#include <utility>

#include "absl/synchronization/mutex.h"
#include "antiphon/v1/inference.grpc.pb.h"
#include "antiphon/v1/inference.pb.h"
#include "common/rpc.h"
#include "common/status_macros.h"
#include "gateway/api_text.h"

namespace antiphon::gateway {
namespace {

// What a client may be behind before it is given up.
constexpr size_t kQueuedMessagesMax = 4096;
constexpr size_t kQueuedBytesMax = 1u << 20;
// How long complete answers may take to leave when the front ends.
constexpr absl::Duration kFlushMax = absl::Seconds(1);

std::string_view Metadata(const grpc::CallbackServerContext& context, const char* name) {
  const auto it = context.client_metadata().find(name);
  if (it == context.client_metadata().end()) return {};
  return {it->second.data(), it->second.size()};
}

// The meta of a call; an error when the key is wrong.
MaybeError Admit(Gateway& gateway, grpc::CallbackServerContext& context, Endpoint endpoint,
                 bool stream, RequestMeta& meta) {
  meta = gateway.NewRequest(endpoint, Metadata(context, "x-request-id"));
  meta.stream = stream;
  meta.request_class = Metadata(context, "x-antiphon-class");
  context.AddInitialMetadata("x-request-id", meta.label);
  const auto tenant = gateway.auth().TenantOf(Metadata(context, "authorization"));
  if (!tenant.ok()) return Unauthenticated(std::string(tenant.status().message()));
  meta.tenant = *tenant;
  if (MaybeError error = CheckClass("x-antiphon-class", meta.request_class)) return error;
  if (context.deadline() != std::chrono::system_clock::time_point::max()) {
    const absl::Duration left = absl::FromChrono(context.deadline()) - gateway.WallNow();
    meta.timeout = std::max(left, absl::Milliseconds(1));
  }
  return std::nullopt;
}

grpc::Status StatusOf(const ApiError& error) { return ToGrpc(ToStatus(error)); }

void FillUsage(const Usage& usage, api::Usage& out) {
  out.set_prompt_tokens(usage.prompt_tokens);
  out.set_completion_tokens(usage.completion_tokens);
  out.set_total_tokens(usage.prompt_tokens + usage.completion_tokens);
  out.mutable_prompt_tokens_details()->set_cached_tokens(usage.cached_tokens);
}

template <typename Message>
void FillTokens(const ServedModel& model, bool logprobs, const std::vector<OutputToken>& tokens,
                Message& out) {
  const model::Tokenizer& tokenizer = *model.tokenizer;
  for (const OutputToken& t : tokens) {
    out.add_token_ids(t.id);
    if (!logprobs || !t.shown) continue;
    api::TokenLogprob& entry = *out.add_logprobs();
    entry.set_token(TokenText(tokenizer, t.id));
    entry.set_logprob(t.logprobs.logprob());
    entry.set_bytes(std::string(tokenizer.TokenBytes(t.id)));
    entry.set_token_id(t.id);
    for (int i = 0; i < t.logprobs.top_ids_size(); ++i) {
      api::TopLogprob& top = *entry.add_top_logprobs();
      top.set_token(TokenText(tokenizer, t.logprobs.top_ids(i)));
      top.set_logprob(t.logprobs.top_logprobs(i));
      top.set_bytes(std::string(tokenizer.TokenBytes(t.logprobs.top_ids(i))));
    }
  }
}

template <typename Message>
void FillEnding(const Ending& ending, Message& out) {
  out.set_finish_reason(ending.reason == EndReason::kLength ? "length" : "stop");
  out.set_stop_reason(ending.stop_string);
}

// Chat and completions differ in where text goes, and in names.
struct ChatShape {
  using Request = api::ChatRequest;
  using Response = api::ChatResponse;
  using Chunk = api::ChatChunk;
  static constexpr Endpoint kEndpoint = Endpoint::kChat;
  static constexpr const char* kPrefix = "chatcmpl-";
  static void AppendText(api::ChatChoice& choice, const std::string& text) {
    choice.mutable_message()->set_role("assistant");
    choice.mutable_message()->mutable_content()->append(text);
  }
  static void SetText(Chunk& chunk, bool first, const std::string& text) {
    if (first) chunk.set_role("assistant");
    chunk.set_content(text);
  }
};
struct CompletionShape {
  using Request = api::CompletionRequest;
  using Response = api::CompletionResponse;
  using Chunk = api::CompletionChunk;
  static constexpr Endpoint kEndpoint = Endpoint::kCompletions;
  static constexpr const char* kPrefix = "cmpl-";
  static void AppendText(api::CompletionChoice& choice, const std::string& text) {
    choice.mutable_text()->append(text);
  }
  static void SetText(Chunk& chunk, bool, const std::string& text) { chunk.set_text(text); }
};

template <typename Message>
void FillHead(const RequestMeta& meta, const char* prefix, const ServedModel& model,
              int64_t created, Message& out) {
  out.set_id(prefix + meta.id.Hex());
  out.set_created(created);
  out.set_model(model.card.name());
  out.set_system_fingerprint(SystemFingerprint(model));
}

// One unary call. Lives until gRPC is done with it and the dispatcher has let go of its sink.
template <typename Shape>
class UnaryCall final : public grpc::ServerUnaryReactor {
 public:
  UnaryCall(Gateway* gateway, grpc::CallbackServerContext* context,
            const typename Shape::Request* request, typename Shape::Response* response)
      : gateway_(gateway) {
    if (auto error = Admit(*gateway, *context, Shape::kEndpoint, false, meta_)) {
      gateway->Account(meta_, error->status, ErrorTypeLabel(*error), error->code);
      Finish(StatusOf(*error));
      return;
    }
    submitted_ = true;
    gateway->Submit(meta_, std::make_shared<const typename Shape::Request>(*request),
                    std::make_shared<Sink>(this, response, request->options().logprobs()));
  }
  void OnCancel() override {
    if (submitted_) gateway_->Cancel(meta_, false);
  }
  void OnDone() override { delete this; }

 private:
  // OnDone of the sink is the last that touches the call, and finishes it.
  class Sink final : public ResponseSink {
   public:
    Sink(UnaryCall* call, typename Shape::Response* out, bool logprobs)
        : call_(call), out_(out), logprobs_(logprobs) {}
    void OnPrepared(const ServedModelPtr& model) override { model_ = model; }
    void OnDelta(const ChoiceDelta& delta) override {
      auto& choice = ChoiceAt(delta.choice);
      Shape::AppendText(choice, delta.delta.text);
      FillTokens(*model_, logprobs_, delta.delta.tokens, choice);
    }
    void OnChoiceEnd(const ChoiceEnd& end) override {
      auto& choice = ChoiceAt(end.choice);
      Shape::AppendText(choice, "");
      FillEnding(end.ending, choice);
    }
    void OnDone(const RequestEnd& end, const Exchange*) override {
      if (end.cancelled) return call_->Finish(grpc::Status::CANCELLED);
      if (end.error) return call_->Finish(StatusOf(*end.error));
      FillHead(call_->meta_, Shape::kPrefix, *model_,
               absl::ToUnixSeconds(call_->gateway_->WallNow()), *out_);
      FillUsage(end.usage, *out_->mutable_usage());
      call_->Finish(grpc::Status::OK);
    }

   private:
    auto& ChoiceAt(uint32_t index) {
      while (out_->choices_size() <= static_cast<int>(index)) {
        const int next = out_->choices_size();
        out_->add_choices()->set_index(static_cast<uint32_t>(next));
      }
      return *out_->mutable_choices(static_cast<int>(index));
    }
    UnaryCall* const call_;
    typename Shape::Response* const out_;
    const bool logprobs_;
    ServedModelPtr model_;
  };

  Gateway* const gateway_;
  RequestMeta meta_;
  bool submitted_ = false;
};

// One streaming call.
template <typename Shape>
class StreamCall final : public grpc::ServerWriteReactor<typename Shape::Chunk> {
 public:
  using Chunk = typename Shape::Chunk;

  StreamCall(Gateway* gateway, grpc::CallbackServerContext* context,
             const typename Shape::Request* request)
      : gateway_(gateway), context_(context) {
    if (auto error = Admit(*gateway, *context, Shape::kEndpoint, true, meta_)) {
      gateway->Account(meta_, error->status, ErrorTypeLabel(*error), error->code);
      this->Finish(StatusOf(*error));
      return;
    }
    submitted_ = true;
    created_ = absl::ToUnixSeconds(gateway->WallNow());
    gateway->Submit(meta_, std::make_shared<const typename Shape::Request>(*request),
                    std::make_shared<Sink>(this, request->options().logprobs()));
  }
  void OnCancel() override {
    if (submitted_ && !slow_) gateway_->Cancel(meta_, false);
  }
  void OnWriteDone(bool ok) override {
    {
      absl::MutexLock lock(&mu_);
      writing_ = false;
      queued_bytes_ -= queue_.front().ByteSizeLong();
      queue_.pop_front();
      if (!ok) broken_ = true;
    }
    Pump();
  }
  void OnDone() override { delete this; }

 private:
  class Sink final : public ResponseSink {
   public:
    Sink(StreamCall* call, bool logprobs) : call_(call), logprobs_(logprobs) {}
    void OnPrepared(const ServedModelPtr& model) override {
      model_ = model;
      FillHead(call_->meta_, Shape::kPrefix, *model_, call_->created_, head_);
    }
    void OnDelta(const ChoiceDelta& delta) override {
      Chunk chunk = NewChunk(delta.choice);
      Shape::SetText(chunk, delta.first, delta.delta.text);
      FillTokens(*model_, logprobs_, delta.delta.tokens, chunk);
      call_->Push(std::move(chunk));
    }
    void OnChoiceEnd(const ChoiceEnd& end) override {
      Chunk chunk = NewChunk(end.choice);
      FillEnding(end.ending, chunk);
      call_->Push(std::move(chunk));
    }
    void OnDone(const RequestEnd& end, const Exchange*) override {
      if (end.cancelled) return call_->End(grpc::Status::CANCELLED);
      if (end.error) return call_->End(StatusOf(*end.error));
      Chunk chunk = NewChunk(0);
      FillUsage(end.usage, *chunk.mutable_usage());
      call_->Push(std::move(chunk));
      call_->End(grpc::Status::OK);
    }

   private:
    Chunk NewChunk(uint32_t index) {
      Chunk chunk = head_;
      chunk.set_index(index);
      return chunk;
    }
    StreamCall* const call_;
    const bool logprobs_;
    ServedModelPtr model_;
    Chunk head_;  // what every chunk begins with
  };

  void Push(Chunk chunk) {
    bool slow = false;
    {
      absl::MutexLock lock(&mu_);
      if (broken_) return;
      const size_t bytes = chunk.ByteSizeLong();
      slow = queue_.size() >= kQueuedMessagesMax || queued_bytes_ + bytes > kQueuedBytesMax;
      broken_ = slow;
      if (!slow) {
        queued_bytes_ += bytes;
        queue_.push_back(std::move(chunk));
      }
    }
    if (slow) {
      slow_ = true;
      gateway_->Cancel(meta_, true);
      // The write that is under way ends no other way when the client does not read.
      context_->TryCancel();
      return;
    }
    Pump();
  }
  // The sink's last call.
  void End(grpc::Status status) {
    {
      absl::MutexLock lock(&mu_);
      end_ = std::move(status);
    }
    Pump();
  }
  // Starts what comes next. gRPC may end this object as soon as Finish is called, so nothing is
  // locked or touched by then; a deque keeps its front in place while others are added.
  void Pump() {
    const Chunk* next = nullptr;
    std::optional<grpc::Status> end;
    {
      absl::MutexLock lock(&mu_);
      if (writing_ || finished_) return;
      if (!queue_.empty() && !broken_) {
        writing_ = true;
        next = &queue_.front();
      } else if (end_) {
        finished_ = true;
        end = end_;
      }
    }
    if (next != nullptr) this->StartWrite(next);
    if (end) this->Finish(*end);
  }

  Gateway* const gateway_;
  grpc::CallbackServerContext* const context_;
  RequestMeta meta_;
  bool submitted_ = false;
  std::atomic<bool> slow_{false};
  int64_t created_ = 0;
  absl::Mutex mu_;
  std::deque<Chunk> queue_ ABSL_GUARDED_BY(mu_);
  size_t queued_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  std::optional<grpc::Status> end_ ABSL_GUARDED_BY(mu_);
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  bool broken_ ABSL_GUARDED_BY(mu_) = false;
  bool finished_ ABSL_GUARDED_BY(mu_) = false;
};

class InferenceService final : public api::Inference::CallbackService {
 public:
  explicit InferenceService(Gateway* gateway) : gateway_(gateway) {}

  grpc::ServerUnaryReactor* Chat(grpc::CallbackServerContext* context,
                                 const api::ChatRequest* request,
                                 api::ChatResponse* response) override {
    return new UnaryCall<ChatShape>(gateway_, context, request, response);
  }
  grpc::ServerWriteReactor<api::ChatChunk>* ChatStream(grpc::CallbackServerContext* context,
                                                       const api::ChatRequest* request) override {
    return new StreamCall<ChatShape>(gateway_, context, request);
  }
  grpc::ServerUnaryReactor* Complete(grpc::CallbackServerContext* context,
                                     const api::CompletionRequest* request,
                                     api::CompletionResponse* response) override {
    return new UnaryCall<CompletionShape>(gateway_, context, request, response);
  }
  grpc::ServerWriteReactor<api::CompletionChunk>* CompleteStream(
      grpc::CallbackServerContext* context, const api::CompletionRequest* request) override {
    return new StreamCall<CompletionShape>(gateway_, context, request);
  }

  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* context,
                                       const api::ListModelsRequest*,
                                       api::ListModelsResponse* response) override {
    return Simple(context, Endpoint::kModels, [&]() -> MaybeError {
      for (const ServedModelPtr& m : gateway_->catalog()->models) {
        api::Model& out = *response->add_models();
        out.set_id(m->card.name());
        out.set_created(m->card.created_unix_s());
        out.set_owned_by("antiphon");
        out.set_max_model_len(m->card.context_length());
        *out.mutable_aliases() = m->card.aliases();
      }
      return std::nullopt;
    });
  }
  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context,
                                     const api::TokenizeRequest* request,
                                     api::TokenizeResponse* response) override {
    return Simple(context, Endpoint::kTokenize,
                  [&] { return gateway_->Tokenize(*request, *response); });
  }
  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context,
                                       const api::DetokenizeRequest* request,
                                       api::DetokenizeResponse* response) override {
    return Simple(context, Endpoint::kDetokenize,
                  [&] { return gateway_->Detokenize(*request, *response); });
  }

 private:
  template <typename Body>
  grpc::ServerUnaryReactor* Simple(grpc::CallbackServerContext* context, Endpoint endpoint,
                                   Body body) {
    RequestMeta meta;
    MaybeError error = Admit(*gateway_, *context, endpoint, false, meta);
    if (!error) error = body();
    gateway_->Account(meta, error ? error->status : 200, error ? ErrorTypeLabel(*error) : "none",
                      error ? error->code : "");
    auto* reactor = context->DefaultReactor();
    reactor->Finish(error ? StatusOf(*error) : grpc::Status::OK);
    return reactor;
  }

  Gateway* const gateway_;
};

class GrpcFrontServer final : public GrpcFront {
 public:
  explicit GrpcFrontServer(Gateway* gateway) : service_(gateway) {}
  // What is complete still leaves.
  ~GrpcFrontServer() override {
    if (server_ != nullptr) server_->Shutdown(kFlushMax);
  }
  absl::Status Listen(const std::string& listen) {
    ASSIGN_OR_RETURN(server_, RpcServer::Start(listen, {&service_}, /*reflection=*/true,
                                               {api::Inference::service_full_name()}));
    server_->SetServing(false);
    return absl::OkStatus();
  }
  int port() const override { return server_->port(); }
  void SetServing(bool serving) override { server_->SetServing(serving); }

 private:
  InferenceService service_;
  std::unique_ptr<RpcServer> server_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<GrpcFront>> GrpcFront::Start(const std::string& listen,
                                                            Gateway* gateway) {
  auto front = std::make_unique<GrpcFrontServer>(gateway);
  RETURN_IF_ERROR(front->Listen(listen));
  return front;
}

}  // namespace antiphon::gateway
