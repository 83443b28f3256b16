#include "common/ops_server.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "common/thread.h"

namespace antiphon {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

class OpsServerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    OpsHandlers handlers;
    handlers.metrics = [] { return HttpAnswer{200, "text/plain", std::string(300'000, 'm')}; };
    handlers.livez = [] { return HttpAnswer{200, "application/json", "{}"}; };
    handlers.readyz = [] { return HttpAnswer{503, "application/json", "{\"status\":\"no\"}"}; };
    auto server = OpsServer::Start("127.0.0.1:0", std::move(handlers));
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }

  int Connect() {
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(server_->port());
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    return fd;
  }

  std::string Exchange(const std::string& request) {
    const int fd = Connect();
    (void)!send(fd, request.data(), request.size(), MSG_NOSIGNAL);
    std::string answer;
    char buffer[4096];
    ssize_t n;
    while ((n = recv(fd, buffer, sizeof(buffer), 0)) > 0) answer.append(buffer, n);
    close(fd);
    return answer;
  }

  std::unique_ptr<OpsServer> server_;
};

TEST_F(OpsServerTest, AnswersItsThreePages) {
  EXPECT_THAT(Exchange("GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"),
              StartsWith("HTTP/1.1 200 OK\r\n"));
  EXPECT_THAT(Exchange("GET /readyz?x=1 HTTP/1.1\r\n\r\n"),
              StartsWith("HTTP/1.1 503 Service Unavailable\r\n"));
  const std::string page = Exchange("GET /metrics HTTP/1.0\r\n\r\n");
  EXPECT_THAT(page, HasSubstr("Content-Length: 300000\r\n"));
  EXPECT_EQ(page.size() - page.find("\r\n\r\n") - 4, 300'000u);
}

TEST_F(OpsServerTest, HeadHasNoBody) {
  const std::string answer = Exchange("HEAD /livez HTTP/1.1\r\n\r\n");
  EXPECT_THAT(answer, HasSubstr("Content-Length: 2\r\n"));
  EXPECT_EQ(answer.find("{}"), std::string::npos);
}

TEST_F(OpsServerTest, RefusesOtherPathsAndMethods) {
  EXPECT_THAT(Exchange("GET / HTTP/1.1\r\n\r\n"), StartsWith("HTTP/1.1 404"));
  EXPECT_THAT(Exchange("GET /debug HTTP/1.1\r\n\r\n"), StartsWith("HTTP/1.1 404"));
  const std::string answer = Exchange("POST /livez HTTP/1.1\r\nContent-Length: 0\r\n\r\n");
  EXPECT_THAT(answer, StartsWith("HTTP/1.1 405"));
  EXPECT_THAT(answer, HasSubstr("Allow: GET, HEAD\r\n"));
}

TEST_F(OpsServerTest, SurvivesGarbage) {
  EXPECT_THAT(Exchange("\r\n\r\n"), StartsWith("HTTP/1.1 400"));
  EXPECT_THAT(Exchange("GET\r\n\r\n"), StartsWith("HTTP/1.1 400"));
  EXPECT_THAT(Exchange(" HTTP/1.1\r\n\r\n"), StartsWith("HTTP/1.1 400"));
  EXPECT_THAT(Exchange(std::string("\x16\x03\x01\0\xff", 5) + "\r\n\r\n"),
              StartsWith("HTTP/1.1 400"));
  EXPECT_THAT(Exchange(std::string(100'000, 'a')), StartsWith("HTTP/1.1 431"));
  EXPECT_THAT(Exchange("GET /livez HTTP/1.1\r\n\r\n"), StartsWith("HTTP/1.1 200"));
}

TEST_F(OpsServerTest, ServesOnWhileManyIdleConnectionsAreOpen) {
  std::vector<int> idle;
  for (int i = 0; i < 200; ++i) idle.push_back(Connect());
  EXPECT_THAT(Exchange("GET /livez HTTP/1.1\r\n\r\n"), StartsWith("HTTP/1.1 200"));
  for (int fd : idle) close(fd);
}

TEST_F(OpsServerTest, AClientThatLeavesIsForgotten) {
  for (int i = 0; i < 100; ++i) {
    const int fd = Connect();
    (void)!send(fd, "GET /metrics HTTP/1.1\r\n\r\n", 25, MSG_NOSIGNAL);
    close(fd);
  }
  EXPECT_THAT(Exchange("GET /livez HTTP/1.1\r\n\r\n"), StartsWith("HTTP/1.1 200"));
}

TEST_F(OpsServerTest, ATakenPortIsAnError) {
  const auto second = OpsServer::Start("127.0.0.1:" + std::to_string(server_->port()), {});
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace antiphon
