// The real antiphon-conductor with fake nodes that speak gRPC to it.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <regex>

#include <grpcpp/generic/generic_stub.h>

#include "absl/synchronization/notification.h"
#include "absl/synchronization/mutex.h"
#include "antiphon/v1/admin.grpc.pb.h"
#include "antiphon/v1/control.grpc.pb.h"
#include "common/clock.h"
#include "common/conductor_link.h"
#include "common/rpc.h"
#include "tests/conductor/harness.h"

namespace antiphon::conductor {
namespace {

using ::testing::HasSubstr;

constexpr absl::Duration kPatience = absl::Seconds(20);

// True as soon as `condition` holds, false after kPatience. The condition asks the other process,
// so there is nothing to be notified by.
template <typename Condition>
bool Eventually(Condition condition) {
  absl::Mutex mu;
  absl::CondVar never;
  const absl::Time until = Clock::Real().Now() + kPatience;
  while (!condition()) {
    if (Clock::Real().Now() > until) return false;
    absl::MutexLock lock(&mu);
    never.WaitWithTimeout(&mu, absl::Milliseconds(5));
  }
  return true;
}

class Process {
 public:
  explicit Process(const std::string& folder) : folder_(folder) {}
  ~Process() { Kill(SIGKILL); }

  // Returns the RPC address.
  std::string Start(const std::string& listen, std::vector<std::string> more = {}) {
    int fds[2];
    if (pipe2(fds, O_CLOEXEC) != 0) return "";
    std::vector<std::string> args = {ANTIPHON_CONDUCTOR,
                                     "--conductor.rpc.listen=" + listen,
                                     "--conductor.ops.listen=127.0.0.1:0",
                                     "--conductor.drain.delay=0s",
                                     "--cluster.name=test",
                                     "--cluster.runtime_dir=" + folder_,
                                     "--node=conductor",
                                     "--announce-fd=" + std::to_string(fds[1])};
    args.insert(args.end(), more.begin(), more.end());
    child_ = fork();
    if (child_ == 0) {
      fcntl(fds[1], F_SETFD, 0);
      std::vector<char*> argv;
      for (std::string& a : args) argv.push_back(a.data());
      argv.push_back(nullptr);
      execv(argv[0], argv.data());
      _exit(127);
    }
    close(fds[1]);
    std::string text;
    std::smatch match;
    const std::regex address(R"("listener":"conductor.rpc","address":"([^"]+)\")");
    char byte;
    while (!std::regex_search(text, match, address) && read(fds[0], &byte, 1) == 1) text += byte;
    close(fds[0]);
    return match.empty() ? "" : match[1].str();
  }
  // The exit status.
  int Kill(int signal) {
    if (child_ <= 0) return -1;
    kill(child_, signal);
    int status = 0;
    waitpid(child_, &status, 0);
    child_ = -1;
    return status;
  }

 private:
  const std::string folder_;
  pid_t child_ = -1;
};

// A worker or store that answers as a real one does.
class FakeNode {
 public:
  FakeNode(const std::string& conductor, const wire::NodeReport& hello,
           std::vector<BlockKey> blocks = {})
      : executor_("fake"), blocks_(std::move(blocks)) {
    ConductorLinkOptions options;
    options.conductors = {conductor};
    options.self = {.cluster = "test",
                    .node = NodeId(hello.hello().hello().node()),
                    .incarnation = hello.hello().hello().incarnation()};
    options.executor = &executor_;
    options.hello = [hello] { return hello.hello(); };
    options.blob = [](const std::string& digest) {
      for (const char* content : {"tokenizer", "template"}) {
        if (Sha256Hex(content) == digest) return std::string(content);
      }
      return std::string();
    };
    options.on_need_snapshot = [this, kind = hello.hello().kind()](const std::string& address) {
      if (kind != wire::NODE_KIND_STORE) return;
      link_->Send(address, EventsReport(0, blocks_, {}, true));
    };
    executor_.Post([this, options = std::move(options)]() mutable {
      link_ = ConductorLink::Start(std::move(options));
    });
    // A load every 100 ms keeps it from being lost.
    executor_.Post([this, kind = hello.hello().kind()] { Heartbeat(kind); });
  }
  ~FakeNode() {
    absl::Notification done;
    executor_.Post([&] {
      link_.reset();
      done.Notify();
    });
    done.WaitForNotification();
  }
  std::string error() {
    std::string out;
    absl::Notification done;
    executor_.Post([&] {
      out = link_->last_error();
      done.Notify();
    });
    done.WaitForNotification();
    return out;
  }

 private:
  void Heartbeat(wire::NodeKind kind) {
    if (link_ == nullptr) return;
    link_->Broadcast(kind == wire::NODE_KIND_STORE ? StoreLoadReport(10'000) : LoadReport(0));
    executor_.PostAfter(absl::Milliseconds(100), [this, kind] { Heartbeat(kind); });
  }

  SerialExecutor executor_;
  std::vector<BlockKey> blocks_;
  std::unique_ptr<ConductorLink> link_;  // on the executor
};

class ConductorDaemonTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "antiphon-cond-XXXXXX").string();
    folder_ = mkdtemp(name.data());
    process_ = std::make_unique<Process>(folder_);
    address_ = process_->Start("127.0.0.1:0");
    ASSERT_FALSE(address_.empty());
    stub_ = wire::Conductor::NewStub(MakeChannel(address_));
  }
  void TearDown() override {
    process_.reset();
    std::filesystem::remove_all(folder_);
  }

  static std::unique_ptr<grpc::ClientContext> Context() {
    auto context = std::make_unique<grpc::ClientContext>();
    context->set_wait_for_ready(true);
    context->set_deadline(absl::ToChronoTime(absl::Now() + kPatience));
    return context;
  }
  static wire::AdmitRequest Request(uint32_t tokens, const std::vector<BlockKey>& keys = {}) {
    static int count = 0;
    wire::AdmitRequest request;
    *request.mutable_hello() = TestHello("gateway", 9);
    request.set_id(Sha256Hex(std::to_string(++count)).substr(0, 16));
    request.set_epoch(1);
    request.set_model("small");
    request.set_prompt_count(tokens);
    for (const BlockKey& key : keys) request.add_block_keys(key.ToBytes());
    return request;
  }
  wire::AdmitReply Admit(const wire::AdmitRequest& request) {
    wire::AdmitReply reply;
    last_ = stub_->Admit(Context().get(), request, &reply);
    return reply;
  }
  wire::ClusterView View() {
    wire::ClusterView view;
    last_ = stub_->GetView(Context().get(), wire::GetViewRequest(), &view);
    return view;
  }
  bool HasNodes(int ready, uint64_t blocks) {
    const wire::ClusterView view = View();
    int n = 0;
    for (const wire::NodeView& node : view.nodes()) n += node.state() == "ready";
    return n == ready && view.indexed_blocks() == blocks;
  }

  std::string folder_, address_;
  std::unique_ptr<Process> process_;
  std::unique_ptr<wire::Conductor::Stub> stub_;
  grpc::Status last_;
};

TEST_F(ConductorDaemonTest, PlacesARequestOnTheNodesThatRegistered) {
  const auto keys = Chain(1, 10);
  FakeNode store(address_, StoreHello("s", 100), keys);
  FakeNode prefill(address_, WorkerHello("p", wire::ROLE_PREFILL, 100));
  FakeNode decode(address_, WorkerHello("d", wire::ROLE_DECODE, 100));
  ASSERT_TRUE(Eventually([&] { return HasNodes(3, 10); }));
  const wire::AdmitReply reply = Admit(Request(200, keys));
  ASSERT_TRUE(last_.ok()) << last_.error_message();
  EXPECT_EQ(reply.placement().prefill_node(), "p");
  EXPECT_EQ(reply.placement().decode_node(), "d");
  EXPECT_NEAR(reply.placement().predicted_ttft_s(), 0.04, 1e-9);
  wire::FinishReport finish;
  *finish.mutable_hello() = TestHello("gateway", 9);
  finish.set_id(std::string(16, 'x'));
  finish.set_finished(true);
  wire::FinishReply finished;
  EXPECT_TRUE(stub_->Finish(Context().get(), finish, &finished).ok()) << "unknown ids are no error";
}

TEST_F(ConductorDaemonTest, AfterKillAndRestartTheViewIsBackFromTheStreams) {
  const auto keys = Chain(1, 1000);
  FakeNode store(address_, StoreHello("s", 100), keys);
  FakeNode prefill(address_, WorkerHello("p", wire::ROLE_PREFILL, 100));
  FakeNode decode(address_, WorkerHello("d", wire::ROLE_DECODE, 100));
  ASSERT_TRUE(Eventually([&] { return HasNodes(3, 1000); }));
  process_->Kill(SIGKILL);
  ASSERT_EQ(process_->Start(address_), address_);
  const absl::Time begin = Clock::Real().Now();
  // A gateway that asks at once is not told that there is nobody.
  stub_ = wire::Conductor::NewStub(MakeChannel(address_));
  const wire::AdmitReply reply = Admit(Request(200, {keys.begin(), keys.begin() + 10}));
  EXPECT_EQ(reply.placement().prefill_node(), "p") << reply.ShortDebugString();
  ASSERT_TRUE(Eventually([&] { return HasNodes(3, 1000); }));
  EXPECT_LT(Clock::Real().Now() - begin, absl::Seconds(2));
}

TEST_F(ConductorDaemonTest, ARefusedWorkerLearnsWhy) {
  FakeNode prefill(address_, WorkerHello("p", wire::ROLE_PREFILL));
  ASSERT_TRUE(Eventually([&] { return HasNodes(1, 0); }));
  wire::NodeReport hello = WorkerHello("d", wire::ROLE_DECODE);
  hello.mutable_hello()->mutable_fingerprint()->set_kv_dtype("f32");
  FakeNode decode(address_, hello);
  ASSERT_TRUE(Eventually([&] { return !decode.error().empty(); }));
  EXPECT_THAT(decode.error(), HasSubstr("kv_dtype bf16 != f32"));
}

TEST_F(ConductorDaemonTest, GatewaysWatchModelsAndFetchBlobs) {
  wire::WatchModelsRequest request;
  *request.mutable_hello() = TestHello("gateway", 9);
  auto context = Context();
  auto reader = stub_->WatchModels(context.get(), request);
  wire::ModelSet models;
  ASSERT_TRUE(reader->Read(&models));
  EXPECT_EQ(models.cards_size(), 0);
  auto prefill = std::make_unique<FakeNode>(address_, WorkerHello("p", wire::ROLE_PREFILL));
  while (models.prefill_ready() != 1) ASSERT_TRUE(reader->Read(&models));
  ASSERT_EQ(models.cards_size(), 1);
  for (const char* content : {"tokenizer", "template"}) {
    wire::GetBlobRequest get;
    *get.mutable_hello() = TestHello("gateway", 9);
    get.set_digest(Sha256Hex(content));
    wire::Blob blob;
    const grpc::Status status = stub_->GetBlob(Context().get(), get, &blob);
    ASSERT_TRUE(status.ok()) << status.error_message();
    EXPECT_EQ(blob.content(), content);
  }
  prefill.reset();
  while (models.prefill_ready() != 0) ASSERT_TRUE(reader->Read(&models));
  context->TryCancel();
  reader->Finish();
}

TEST_F(ConductorDaemonTest, SurvivesMalformedMessages) {
  wire::AdmitRequest bad = Request(10);
  bad.set_id("short");
  Admit(bad);
  EXPECT_EQ(last_.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(last_.error_message(), "id has 5 bytes; it must have 16");
  bad = Request(10);
  bad.mutable_hello()->set_cluster("other");
  Admit(bad);
  EXPECT_EQ(last_.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  {
    // A load before the hello.
    auto context = Context();
    auto stream = stub_->Join(context.get());
    stream->Write(LoadReport(1));
    wire::NodeDirective directive;
    while (stream->Read(&directive)) {
    }
    const grpc::Status status = stream->Finish();
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_EQ(status.error_message(), "the first message must be hello");
  }
  {
    // Bytes that are no message at all.
    auto channel = MakeChannel(address_);
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + kPatience));
    grpc::CompletionQueue queue;
    grpc::GenericStub generic(channel);
    grpc::Slice slice(std::string(1000, '\xff'));
    grpc::ByteBuffer garbage(&slice, 1), answer;
    auto call = generic.PrepareUnaryCall(&context, "/antiphon.internal.v1.Conductor/Admit", garbage,
                                         &queue);
    call->StartCall();
    grpc::Status status;
    call->Finish(&answer, &status, nullptr);
    void* tag = nullptr;
    bool ok = false;
    ASSERT_TRUE(queue.Next(&tag, &ok));
    EXPECT_FALSE(status.ok());
    queue.Shutdown();
    while (queue.Next(&tag, &ok)) {
    }
  }
  EXPECT_TRUE(HasNodes(0, 0)) << "it serves on";
}

TEST_F(ConductorDaemonTest, AStreamThatBreaksIsALostNode) {
  auto prefill = std::make_unique<FakeNode>(address_, WorkerHello("p", wire::ROLE_PREFILL));
  ASSERT_TRUE(Eventually([&] { return HasNodes(1, 0); }));
  prefill.reset();
  ASSERT_TRUE(Eventually([&] {
    const wire::ClusterView view = View();
    return view.nodes_size() == 1 && view.nodes(0).state() == "lost";
  }));
}

TEST_F(ConductorDaemonTest, TheLocalSocketTellsTheStatus) {
  auto admin = admin::v1::Admin::NewStub(grpc::CreateChannel("unix:" + folder_ + "/conductor.sock",
                                                             grpc::InsecureChannelCredentials()));
  admin::v1::GetStatusResponse status;
  grpc::Status rpc = admin->GetStatus(Context().get(), admin::v1::GetStatusRequest(), &status);
  ASSERT_TRUE(rpc.ok()) << rpc.error_message();
  EXPECT_EQ(status.cluster(), "test");
  EXPECT_EQ(status.state(), "down");
  admin::v1::SetLogLevelRequest level;
  admin::v1::SetLogLevelResponse done;
  level.set_level("loud");
  rpc = admin->SetLogLevel(Context().get(), level, &done);
  EXPECT_EQ(rpc.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(ConductorDaemonTest, EndsCleanlyWhileNodesAndGatewaysAreConnected) {
  FakeNode prefill(address_, WorkerHello("p", wire::ROLE_PREFILL));
  ASSERT_TRUE(Eventually([&] { return HasNodes(1, 0); }));
  auto context = Context();
  wire::WatchModelsRequest request;
  *request.mutable_hello() = TestHello("gateway", 9);
  auto reader = stub_->WatchModels(context.get(), request);
  wire::ModelSet models;
  ASSERT_TRUE(reader->Read(&models));
  EXPECT_EQ(process_->Kill(SIGTERM), 0);
  while (reader->Read(&models)) {
  }
  EXPECT_FALSE(reader->Finish().ok());
}

TEST_F(ConductorDaemonTest, ATakenPortIsToldAndEndsTheStart) {
  Process second(folder_ + "/second");
  EXPECT_EQ(second.Start(address_), "");
}

}  // namespace
}  // namespace antiphon::conductor
