#include "tests/fakes/fake_cluster.h"

#include <gtest/gtest.h>

#include <deque>
#include <set>
#include <utility>

#include "absl/synchronization/mutex.h"
#include "antiphon/v1/control.grpc.pb.h"
#include "antiphon/v1/worker.grpc.pb.h"
#include "common/rpc.h"
#include "common/wire.h"

namespace antiphon::fakes {
namespace {

std::string Loopback(int port) { return "127.0.0.1:" + std::to_string(port); }

// Things that come one by one and are waited for.
template <typename T>
class Inbox {
 public:
  void Put(T item) {
    absl::MutexLock lock(&mu_);
    items_.push_back(std::move(item));
  }
  std::optional<T> Next() {
    absl::MutexLock lock(&mu_);
    const auto any = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return !items_.empty(); };
    if (!mu_.AwaitWithTimeout(absl::Condition(&any), kPatience)) return std::nullopt;
    T item = std::move(items_.front());
    items_.pop_front();
    return item;
  }

 private:
  absl::Mutex mu_;
  std::deque<T> items_ ABSL_GUARDED_BY(mu_);
};

}  // namespace

// ---- conductor ----

struct FakeConductor::State final : wire::Conductor::CallbackService {
  // The models, now and at every change. Deletes itself.
  class Watcher final : public grpc::ServerWriteReactor<wire::ModelSet> {
   public:
    explicit Watcher(State* state) : state_(state) {
      absl::MutexLock lock(&state_->mu);
      state_->watchers.insert(this);
      Push();
    }
    // With state's mutex held.
    void Push() ABSL_NO_THREAD_SAFETY_ANALYSIS {
      if (writing_ || finished_) {
        again_ = true;
        return;
      }
      writing_ = true;
      set_ = state_->models;
      StartWrite(&set_);
    }
    void OnWriteDone(bool ok) override {
      absl::MutexLock lock(&state_->mu);
      writing_ = false;
      if (ok && std::exchange(again_, false)) Push();
    }
    void OnCancel() override {
      {
        absl::MutexLock lock(&state_->mu);
        finished_ = true;
      }
      Finish(grpc::Status::CANCELLED);
    }
    void OnDone() override {
      {
        absl::MutexLock lock(&state_->mu);
        state_->watchers.erase(this);
      }
      delete this;
    }

   private:
    State* const state_;
    wire::ModelSet set_;
    bool writing_ = false;
    bool again_ = false;
    bool finished_ = false;
  };
  // Open until its caller leaves. Deletes itself.
  class OpenAdmit final : public grpc::ServerUnaryReactor {
   public:
    explicit OpenAdmit(State* state) : state_(state) {}
    void OnCancel() override {
      state_->abandoned.Put(true);
      Finish(grpc::Status::CANCELLED);
    }
    void OnDone() override { delete this; }

   private:
    State* const state_;
  };

  grpc::ServerUnaryReactor* Admit(grpc::CallbackServerContext* context,
                                  const wire::AdmitRequest* request,
                                  wire::AdmitReply* reply) override {
    Script answer;
    {
      absl::MutexLock lock(&mu);
      answer = script;
    }
    auto said = answer(*request);
    admits.Put(*request);
    if (!said) return new OpenAdmit(this);
    *reply = *std::move(said);
    return Done(context);
  }
  grpc::ServerUnaryReactor* Finish(grpc::CallbackServerContext* context,
                                   const wire::FinishReport* request, wire::FinishReply*) override {
    finishes.Put(*request);
    return Done(context);
  }
  grpc::ServerUnaryReactor* GetBlob(grpc::CallbackServerContext* context,
                                    const wire::GetBlobRequest* request,
                                    wire::Blob* reply) override {
    reply->set_digest(request->digest());
    const auto it = blobs.find(request->digest());
    if (it == blobs.end()) {
      auto* reactor = context->DefaultReactor();
      reactor->Finish(grpc::Status(grpc::StatusCode::NOT_FOUND, "no such blob"));
      return reactor;
    }
    reply->set_content(it->second);
    return Done(context);
  }
  grpc::ServerWriteReactor<wire::ModelSet>* WatchModels(grpc::CallbackServerContext*,
                                                        const wire::WatchModelsRequest*) override {
    return new Watcher(this);
  }
  static grpc::ServerUnaryReactor* Done(grpc::CallbackServerContext* context) {
    auto* reactor = context->DefaultReactor();
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }

  std::map<std::string, std::string> blobs;
  std::string address;
  Inbox<wire::AdmitRequest> admits;
  Inbox<wire::FinishReport> finishes;
  Inbox<bool> abandoned;
  absl::Mutex mu;
  wire::ModelSet models;
  std::set<Watcher*> watchers;
  Script script;
  std::unique_ptr<RpcServer> server;
};

FakeConductor::FakeConductor(std::map<std::string, std::string> blobs)
    : state_(std::make_unique<State>()) {
  state_->blobs = std::move(blobs);
  state_->address = "127.0.0.1:0";
  Start();
}

FakeConductor::~FakeConductor() { Stop(); }

const std::string& FakeConductor::address() const { return state_->address; }

void FakeConductor::Stop() { state_->server.reset(); }

void FakeConductor::Start() {
  auto server = RpcServer::Start(state_->address, {state_.get()});
  ASSERT_TRUE(server.ok()) << server.status();
  state_->server = *std::move(server);
  state_->address = Loopback(state_->server->port());
}

void FakeConductor::SetModels(wire::ModelSet models) {
  absl::MutexLock lock(&state_->mu);
  state_->models = std::move(models);
  for (State::Watcher* watcher : state_->watchers) watcher->Push();
}

void FakeConductor::Answer(Script script) {
  absl::MutexLock lock(&state_->mu);
  state_->script = std::move(script);
}

void FakeConductor::PlaceOn(const std::string& node, const std::string& address) {
  Answer([node, address](const wire::AdmitRequest&) {
    wire::AdmitReply reply;
    wire::Placement& placement = *reply.mutable_placement();
    placement.set_prefill_node("prefill");
    placement.set_prefill_address("127.0.0.1:1");
    placement.set_decode_node(node);
    placement.set_decode_address(address);
    return reply;
  });
}

std::optional<wire::AdmitRequest> FakeConductor::NextAdmit() { return state_->admits.Next(); }
std::optional<wire::FinishReport> FakeConductor::NextFinish() { return state_->finishes.Next(); }
bool FakeConductor::AwaitAbandoned() { return state_->abandoned.Next().has_value(); }

// ---- decode ----

struct FakeDecode::State final : wire::Decode::Service {
  using Stream = grpc::ServerReaderWriter<wire::GenerateUp, wire::GenerateDown>;

  grpc::Status Generate(grpc::ServerContext* context, Stream* stream) override {
    wire::GenerateDown down;
    if (!stream->Read(&down) || !down.has_hello()) {
      return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "hello comes first");
    }
    wire::GenerateUp up;
    *up.mutable_hello() =
        MakeHello({.cluster = down.hello().cluster(), .node = NodeId(node), .incarnation = 9});
    {
      absl::MutexLock lock(&mu);
      stream->Write(up);
      streams[stream] = context;
    }
    while (stream->Read(&down)) {
      if (down.has_start()) starts.Put(down.start());
      if (down.has_cancel()) cancels.Put(down.cancel());
    }
    absl::MutexLock lock(&mu);
    streams.erase(stream);
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "broken");
  }

  std::string node;
  std::string address;
  Inbox<wire::Start> starts;
  Inbox<wire::Cancel> cancels;
  absl::Mutex mu;
  std::map<Stream*, grpc::ServerContext*> streams;
  std::unique_ptr<RpcServer> server;
};

FakeDecode::FakeDecode(std::string node) : state_(std::make_unique<State>()) {
  state_->node = std::move(node);
  auto server = RpcServer::Start("127.0.0.1:0", {state_.get()});
  if (!server.ok()) std::abort();
  state_->server = *std::move(server);
  state_->address = Loopback(state_->server->port());
}

FakeDecode::~FakeDecode() { Stop(); }

const std::string& FakeDecode::node() const { return state_->node; }
const std::string& FakeDecode::address() const { return state_->address; }
void FakeDecode::Stop() { state_->server.reset(); }

void FakeDecode::BreakStreams() {
  absl::MutexLock lock(&state_->mu);
  for (auto& [stream, context] : state_->streams) context->TryCancel();
}

std::optional<wire::Start> FakeDecode::NextStart() { return state_->starts.Next(); }
std::optional<wire::Cancel> FakeDecode::NextCancel() { return state_->cancels.Next(); }

bool FakeDecode::Send(const wire::SequenceUpdate& update) {
  wire::GenerateUp up;
  *up.mutable_tokens()->add_updates() = update;
  absl::MutexLock lock(&state_->mu);
  bool sent = false;
  for (auto& [stream, context] : state_->streams) sent |= stream->Write(up);
  return sent;
}

bool FakeDecode::Say(const wire::Start& start, uint32_t index, std::string_view bytes,
                     wire::FinishReason finish) {
  wire::SequenceUpdate update;
  update.set_id(start.id());
  update.set_epoch(start.epoch());
  update.set_first_index(index);
  for (char c : bytes) {
    update.add_ids(static_cast<uint8_t>(c));
    if (!start.sampling().logprobs()) continue;
    wire::TokenLogprobs& logprobs = *update.add_logprobs();
    logprobs.set_logprob(-0.5f);
    for (uint32_t i = 0; i < start.sampling().top_logprobs(); ++i) {
      logprobs.add_top_ids('a' + i);
      logprobs.add_top_logprobs(-0.5f - static_cast<float>(i));
    }
  }
  if (index == static_cast<uint32_t>(start.emitted_ids_size())) {
    update.mutable_prompt_source()->set_computed(static_cast<uint32_t>(start.prompt_ids_size()));
  }
  if (finish != wire::FINISH_REASON_UNSPECIFIED) update.set_finish(finish);
  return Send(update);
}

bool FakeDecode::Fail(const wire::Start& start, int code, const std::string& message,
                      const std::string& failed_node) {
  wire::SequenceUpdate update;
  update.set_id(start.id());
  update.set_epoch(start.epoch());
  update.set_first_index(static_cast<uint32_t>(start.emitted_ids_size()));
  update.mutable_error()->set_code(code);
  update.mutable_error()->set_message(message);
  update.set_failed_node(failed_node);
  return Send(update);
}

}  // namespace antiphon::fakes
