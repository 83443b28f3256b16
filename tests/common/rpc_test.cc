#include "common/rpc.h"

#include <gmock/gmock.h>
#include <grpc/support/log.h>
#include <grpcpp/generic/generic_stub.h>
#include <gtest/gtest.h>

#include "absl/synchronization/notification.h"
#include "antiphon/v1/admin.grpc.pb.h"
#include "common/daemon.h"

namespace antiphon {
namespace {

using ::testing::HasSubstr;

class FakeAdmin final : public admin::v1::Admin::Service {
  grpc::Status SetLogLevel(grpc::ServerContext*, const admin::v1::SetLogLevelRequest* request,
                           admin::v1::SetLogLevelResponse*) override {
    return ToGrpc(request->level() == "debug" ? absl::OkStatus()
                                              : absl::ResourceExhaustedError("no such level"));
  }
};

absl::Status Call(int port, const std::string& level) {
  auto stub = admin::v1::Admin::NewStub(MakeChannel("127.0.0.1:" + std::to_string(port)));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
  context.set_wait_for_ready(true);
  admin::v1::SetLogLevelRequest request;
  request.set_level(level);
  admin::v1::SetLogLevelResponse response;
  return FromGrpc(stub->SetLogLevel(&context, request, &response));
}

TEST(RpcTest, ServesOnAnAutomaticPortAndCarriesStatus) {
  FakeAdmin admin;
  auto server = RpcServer::Start("127.0.0.1:0", {&admin}, /*reflection=*/true);
  ASSERT_TRUE(server.ok()) << server.status();
  ASSERT_GT((*server)->port(), 0);
  EXPECT_TRUE(Call((*server)->port(), "debug").ok());
  const absl::Status refused = Call((*server)->port(), "loud");
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(refused.message(), "no such level");
}

TEST(RpcTest, ASecondServerOnThePortIsRefusedWithTheReason) {
  gpr_set_log_verbosity(GPR_LOG_SEVERITY_ERROR);
  FakeAdmin admin;
  auto first = RpcServer::Start("127.0.0.1:0", {&admin});
  ASSERT_TRUE(first.ok());
  const std::string port = std::to_string((*first)->port());
  auto second = RpcServer::Start("127.0.0.1:" + port, {&admin});
  ASSERT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(second.status().message()), HasSubstr("port " + port));
  EXPECT_THAT(std::string(second.status().message()), HasSubstr("is taken"));
}

// Its callback drops all that it holds, the channel's last reference too.
struct LoneCall {
  std::shared_ptr<grpc::Channel> channel = MakeChannel("127.0.0.1:1");
  grpc::GenericStub stub{channel};
  grpc::ClientContext context;
  grpc::Slice nothing;
  grpc::ByteBuffer request{&nothing, 1}, reply;
};

TEST(RpcTest, AChannelMayEndInACallback) {
  for (int i = 0; i < 20; ++i) {
    absl::Notification done;
    auto* call = new LoneCall;
    call->stub.UnaryCall(&call->context, "/antiphon.Nobody/Call", {}, &call->request, &call->reply,
                         [call, &done](const grpc::Status& status) {
                           EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
                           delete call;
                           done.Notify();
                         });
    ASSERT_TRUE(done.WaitForNotificationWithTimeout(absl::Seconds(30)));
  }
}

TEST(RpcTest, EveryCodeSurvivesTheWay) {
  for (int code = 1; code <= 16; ++code) {
    const absl::Status status(static_cast<absl::StatusCode>(code), "m");
    EXPECT_EQ(FromGrpc(ToGrpc(status)), status);
  }
  EXPECT_TRUE(ToGrpc(absl::OkStatus()).ok());
}

}  // namespace
}  // namespace antiphon
