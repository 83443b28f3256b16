#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <deque>
#include <filesystem>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "common/thread.h"
#include "gateway/http/server.h"
#include "tests/gateway/http_client.h"

namespace antiphon::gateway::http {
namespace {

using ::testing::HasSubstr;

// Answers /echo/... at once; keeps the rest for the test. Refuses /refused by its head.
class ScriptedHandler final : public Handler {
 public:
  std::optional<Response> Screen(const Head& head) override {
    if (!head.path.starts_with("/refused")) return std::nullopt;
    return Response{.status = 403, .content_type = "text/plain", .body = "no"};
  }
  void Handle(std::shared_ptr<Exchange> exchange) override {
    ++handled;
    const Request& r = exchange->request();
    if (r.path.starts_with("/echo")) {
      return exchange->Respond({.content_type = "text/plain",
                                .body = r.method + " " + r.path + "?" + r.query + " " + r.body});
    }
    absl::MutexLock lock(&mu_);
    kept_.push_back(std::move(exchange));
  }
  Response OnProtocolError(const ApiError& error) override {
    ++errors;
    return {.status = error.status, .body = ErrorJson(error)};
  }

  // The next request that is not /echo.
  std::shared_ptr<Exchange> Next() {
    absl::MutexLock lock(&mu_);
    const auto any = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return !kept_.empty(); };
    if (!mu_.AwaitWithTimeout(absl::Condition(&any), kPatience)) {
      ADD_FAILURE() << "no request came";
      std::abort();
    }
    auto next = kept_.front();
    kept_.pop_front();
    return next;
  }

  std::atomic<int> handled{0};
  std::atomic<int> errors{0};

 private:
  absl::Mutex mu_;
  std::deque<std::shared_ptr<Exchange>> kept_ ABSL_GUARDED_BY(mu_);
};

// How often and why a client was reported gone.
class GoneWatch {
 public:
  void On(Exchange& exchange) {
    exchange.OnGone([state = state_](Gone why) {
      absl::MutexLock lock(&state->mu);
      ++state->times;
      state->why = why;
    });
  }
  // nullopt when nothing was reported.
  std::optional<Gone> Wait() {
    absl::MutexLock lock(&state_->mu);
    const auto gone = [s = state_.get()] { return s->times > 0; };
    if (!state_->mu.AwaitWithTimeout(absl::Condition(&gone), kPatience)) return std::nullopt;
    return state_->why;
  }
  int times() const {
    absl::MutexLock lock(&state_->mu);
    return state_->times;
  }

 private:
  struct State {
    absl::Mutex mu;
    int times = 0;
    Gone why = Gone::kDisconnected;
  };
  std::shared_ptr<State> state_ = std::make_shared<State>();
};

class HttpServerTest : public testing::Test {
 protected:
  void StartServer(const Limits& limits = {}) {
    auto server = Server::Start("127.0.0.1:0", limits, 2, &handler_);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    port_ = server_->port();
  }
  // The server still answers, on a new connection.
  void ExpectHealthy() {
    HttpClient client(port_);
    EXPECT_EQ(client.Request(Get("/echo/health")).body, "GET /echo/health? ");
  }
  ScriptedHandler handler_;
  std::unique_ptr<Server> server_;
  uint16_t port_ = 0;
};

TEST_F(HttpServerTest, KeepsAConnectionForManyRequests) {
  StartServer();
  HttpClient client(port_);
  for (int i = 0; i < 100; ++i) {
    const std::string body(static_cast<size_t>(i * 997), 'x');
    const HttpAnswer answer = client.Request(Post("/echo/a?q=" + std::to_string(i), body));
    ASSERT_EQ(answer.status, 200);
    ASSERT_EQ(answer.body, "POST /echo/a?q=" + std::to_string(i) + " " + body);
    ASSERT_EQ(answer.Header("connection"), "");
  }
  EXPECT_EQ(server_->connections(), 1);
}

TEST_F(HttpServerTest, ClosesWhenTheClientAsksForThat) {
  StartServer();
  HttpClient client(port_);
  const HttpAnswer answer = client.Request(Get("/echo/a", "Connection: close\r\n"));
  EXPECT_EQ(answer.status, 200);
  EXPECT_EQ(answer.Header("connection"), "close");
  EXPECT_TRUE(client.AtEnd());
}

TEST_F(HttpServerTest, AnswersPipelinedRequestsInOrder) {
  StartServer();
  HttpClient client(port_);
  std::string all;
  for (int i = 0; i < 200; ++i) {
    all += i % 2 == 0 ? Get("/echo/" + std::to_string(i))
                      : Post("/echo/" + std::to_string(i), "body " + std::to_string(i));
  }
  ASSERT_TRUE(client.Send(all));
  for (int i = 0; i < 200; ++i) {
    ASSERT_EQ(client.Read().body,
              i % 2 == 0 ? "GET /echo/" + std::to_string(i) + "? "
                         : "POST /echo/" + std::to_string(i) + "? body " + std::to_string(i));
  }
}

TEST_F(HttpServerTest, HandlesAPipelinedRequestWhenTheOneBeforeItIsAnswered) {
  StartServer();
  HttpClient client(port_);
  client.Send(Get("/held") + Get("/held/too"));
  const auto first = handler_.Next();
  ExpectHealthy();
  EXPECT_EQ(handler_.handled, 2);  // the second one waits
  first->Respond({.body = "1"});
  EXPECT_EQ(client.Read().body, "1");
  handler_.Next()->Respond({.body = "2"});
  EXPECT_EQ(client.Read().body, "2");
}

// While the first request is handled nothing is read or written: the connection lives all the same.
TEST_F(HttpServerTest, StopsReadingWhatIsPipelinedBeyondTheLimitAndServesItLater) {
  StartServer({.pipelined_bytes = 4096});
  std::string all;
  for (int i = 0; i < 1000; ++i) all += Get("/echo/" + std::to_string(i));  // 40 kB
  for (int round = 0; round < 10; ++round) {
    HttpClient client(port_);
    client.Send(Get("/held"));
    const auto first = handler_.Next();
    ASSERT_TRUE(client.Send(all));
    ExpectHealthy();
    first->Respond({.body = "first"});
    ASSERT_EQ(client.Read().body, "first");
    for (int i = 0; i < 1000; ++i) {
      ASSERT_EQ(client.Read().body, "GET /echo/" + std::to_string(i) + "? ");
    }
  }
}

TEST_F(HttpServerTest, DrainsARequestWhoseConnectionIsNotRead) {
  for (int round = 0; round < 10; ++round) {
    StartServer({.pipelined_bytes = 1024});
    HttpClient client(port_);
    client.Send(Get("/held"));
    const auto first = handler_.Next();
    ASSERT_TRUE(client.Send(Get("/echo/" + std::string(8192, 'x'))));
    ExpectHealthy();
    HttpClient idle(port_);
    EXPECT_EQ(idle.Request(Get("/echo/1")).status, 200);
    server_->Drain();
    EXPECT_TRUE(idle.AtEnd());
    first->Respond({.body = "first"});
    EXPECT_EQ(client.Read().body, "first");
  }
}

TEST_F(HttpServerTest, ReadsChunkedBodiesHoweverTheyAreCut) {
  StartServer();
  const std::string request =
      "POST /echo/c HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"
      "5\r\nhello\r\n1;ext=\"v\"\r\n,\r\n00A\r\n 0123456\r\n\r\n0\r\n\r\n";
  HttpClient client(port_);
  for (size_t cut = 1; cut < request.size(); cut += 7) {
    client.Send(request.substr(0, cut));
    client.Send(request.substr(cut));
    ASSERT_EQ(client.Read().body, "POST /echo/c? hello, 0123456\r\n") << cut;
  }
  for (char c : request) client.Send(std::string(1, c));
  EXPECT_EQ(client.Read().body, "POST /echo/c? hello, 0123456\r\n");
}

TEST_F(HttpServerTest, TrailersAreNotHeaders) {
  StartServer();
  HttpClient client(port_);
  client.Send(
      "POST /held HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"
      "2\r\n{}\r\n0\r\nAuthorization: Bearer stolen\r\nX-Late: 1\r\n\r\n");
  const auto exchange = handler_.Next();
  EXPECT_EQ(exchange->request().body, "{}");
  EXPECT_EQ(Find(exchange->request().headers, "authorization"), "");
  EXPECT_EQ(Find(exchange->request().headers, "x-late"), "");
  exchange->Respond({});
  EXPECT_EQ(client.Read().status, 200);
}

TEST_F(HttpServerTest, AsksForABodyThatIsHeldBack) {
  StartServer();
  HttpClient client(port_);
  const std::string head =
      "POST /echo/e HTTP/1.1\r\nHost: test\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n";
  for (int i = 0; i < 2; ++i) {
    client.Send(head);
    ASSERT_EQ(client.Read().status, 100);
    client.Send("{}");
    ASSERT_EQ(client.Read().body, "POST /echo/e? {}");
  }
  // With a body that came along the answer is still in step.
  client.Send(head + "[]");
  EXPECT_EQ(client.Read().status, 100);
  EXPECT_EQ(client.Read().body, "POST /echo/e? []");
}

TEST_F(HttpServerTest, RefusesByTheHeadBeforeItAsksForTheBody) {
  StartServer();
  HttpClient client(port_);
  const HttpAnswer answer = client.Request(
      "POST /refused HTTP/1.1\r\nHost: test\r\nContent-Length: 100\r\n"
      "Expect: 100-continue\r\n\r\n");
  EXPECT_EQ(answer.status, 403);
  EXPECT_EQ(answer.Header("connection"), "close");
  EXPECT_TRUE(client.AtEnd());
  // Without a body the connection is in step and stays.
  HttpClient other(port_);
  EXPECT_EQ(other.Request(Get("/refused")).body, "no");
  EXPECT_EQ(other.Request(Get("/echo/1")).status, 200);
  EXPECT_EQ(handler_.handled, 1);
}

TEST_F(HttpServerTest, ARefusedClientThatSendsOnStillGetsTheAnswer) {
  StartServer();
  HttpClient client(port_);
  const std::string body(4u << 20, 'x');
  client.Send(Post("/refused", body));  // may end early: that is the point
  EXPECT_EQ(client.Read().status, 403);
}

TEST_F(HttpServerTest, UnderstandsNoOtherExpectation) {
  StartServer();
  HttpClient client(port_);
  EXPECT_EQ(client.Request(Get("/echo/1", "Expect: tea\r\n")).status, 417);
  EXPECT_TRUE(client.AtEnd());
}

TEST_F(HttpServerTest, BoundsHeadersAndBodies) {
  StartServer({.body_bytes = 1000, .header_bytes = 4096});
  const struct {
    const char* what;
    std::string bytes;
    int status;
  } kCases[] = {
      {"one long header", Get("/echo/1", "X: " + std::string(8000, 'x') + "\r\n"), 431},
      {"a long target", Get("/echo/" + std::string(8000, 'x')), 431},
      {"an endless header", "GET /echo/1 HTTP/1.1\r\nX: " + std::string(8000, 'x'), 431},
      {"a long body, by its length", Post("/echo/1", std::string(1001, 'x')), 413},
      {"a length beyond all bounds",
       "POST /echo/1 HTTP/1.1\r\nHost: a\r\nContent-Length: 18446744073709551615\r\n\r\n", 413},
      {"a long body, by its chunk",
       "POST /echo/1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3E9\r\n", 413},
      {"a long body, by many chunks",
       "POST /echo/1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1F4\r\n" +
           std::string(500, 'x') + "\r\n1F4\r\n" + std::string(500, 'x') +
           "\r\n1\r\nx\r\n0\r\n\r\n",
       413},
  };
  for (const auto& c : kCases) {
    HttpClient client(port_);
    const HttpAnswer answer = client.Request(c.bytes);
    EXPECT_EQ(answer.status, c.status) << c.what;
    EXPECT_EQ(answer.Header("connection"), "close") << c.what;
    EXPECT_TRUE(client.AtEnd()) << c.what;
  }
  EXPECT_EQ(handler_.handled, 0);
  HttpClient client(port_);
  EXPECT_EQ(client.Request(Post("/echo/1", std::string(1000, 'x'))).status, 200);
}

TEST_F(HttpServerTest, BoundsAChunkHeaderThatNeverEnds) {
  StartServer();
  HttpClient client(port_);
  client.Send(
      "POST /echo/1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
      "1;");
  const std::string more(64u << 10, 'x');
  size_t sent = 0;
  while (sent < (64u << 20) && client.Send(more)) {
    sent += more.size();
    if (handler_.errors > 0) break;
  }
  EXPECT_LT(sent, 8u << 20);
  EXPECT_EQ(client.Read().status, 431);
}

TEST_F(HttpServerTest, BoundsTheBodiesOfAllConnections) {
  StartServer({.all_bodies_bytes = 200'000});
  HttpClient first(port_);
  first.Send(Post("/held", std::string(150'000, 'x')));
  const auto held = handler_.Next();
  {
    HttpClient second(port_);
    second.Send(Post("/echo/2", std::string(150'000, 'x')));
    EXPECT_EQ(second.Read().status, 503);
    HttpClient small(port_);
    EXPECT_EQ(small.Request(Post("/echo/3", std::string(10'000, 'x'))).status, 200);
  }
  held->Respond({});
  EXPECT_EQ(first.Read().status, 200);
  // The answer is out a little before its request's memory is free.
  int status = 503;
  for (int i = 0; i < 10'000 && status == 503; ++i) {
    status = HttpClient(port_).Request(Post("/echo/4", std::string(150'000, 'x'))).status;
  }
  EXPECT_EQ(status, 200);
}

// What one reader takes for the end of a request and another does not lets a client hide a request
// behind a proxy.
TEST_F(HttpServerTest, RefusesWhatHasTwoLengths) {
  StartServer();
  const std::string post = "POST /echo/1 HTTP/1.1\r\nHost: a\r\n";
  const std::string hidden = "GET /echo/hidden HTTP/1.1\r\nHost: a\r\n\r\n";
  const std::string kCases[] = {
      post + "Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}" + hidden,
      post + "Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}" + hidden,
      post + "Content-Length: 2, 2\r\n\r\n{}" + hidden,
      post + "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden,
      post + "Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n" + hidden,
      post + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden,
      post + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n" + hidden,
      post + "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + hidden,
      post + "Transfer-Encoding: identity\r\n\r\n" + hidden,
      post + "Transfer-Encoding: xchunked\r\n\r\n" + hidden,
      post + "Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden,
      post + "Transfer-Encoding:\r\n\r\n" + hidden,
      post + "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + hidden,
      post + "Content-Length : 2\r\n\r\n{}" + hidden,
      post + "Content-Length: +2\r\n\r\n{}" + hidden,
      post + "Content-Length: 0x2\r\n\r\n{}" + hidden,
      post + "Content-Length: -1\r\n\r\n" + hidden,
      post + "Content-Length:\r\n\r\n" + hidden,
      post + "Content-Length: 18446744073709551618\r\n\r\n{}" + hidden,
      post + "Transfer-Encoding: chunked\r\n\r\nx\r\n\r\n" + hidden,
      post + "Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n" + hidden,
      post + "Transfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n" + hidden,
      post + "Transfer-Encoding: chunked\r\n\r\n10000000000000002\r\nab\r\n0\r\n\r\n" + hidden,
      post + "Transfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n0\r\n\r\n" + hidden,
      post + "Transfer-Encoding: chunked\r\n\r\n2\nab\n0\n\n" + hidden,
      "POST /echo/1 HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden,
      "GET /echo/1 HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n" + hidden,
      "GET /echo/1 HTTP/1.1\r\n\r\n" + hidden,
  };
  for (const std::string& bytes : kCases) {
    HttpClient client(port_);
    const HttpAnswer answer = client.Request(bytes);
    EXPECT_EQ(answer.status, 400) << bytes;
    EXPECT_EQ(answer.Header("connection"), "close") << bytes;
    EXPECT_TRUE(client.AtEnd()) << bytes;
  }
  EXPECT_EQ(handler_.handled, 0);
  ExpectHealthy();
}

TEST_F(HttpServerTest, RefusesWhatIsNotHttp) {
  StartServer();
  const struct {
    std::string bytes;
    int status;
  } kCases[] = {
      {"hello\r\n\r\n", 400},
      {"GET\r\n\r\n", 400},
      {"GET /echo/1\r\n\r\n", 400},
      {" GET /echo/1 HTTP/1.1\r\nHost: a\r\n\r\n", 400},
      {"GET  /echo/1 HTTP/1.1\r\nHost: a\r\n\r\n", 400},
      {"GET /echo/1  HTTP/1.1\r\nHost: a\r\n\r\n", 505},
      {"GET /echo 1 HTTP/1.1\r\nHost: a\r\n\r\n", 505},
      {"GET /echo/1 HTTP/1.1\nHost: a\n\n\r\n\r\n", 505},
      {"GET /echo/\x01 HTTP/1.1\r\nHost: a\r\n\r\n", 400},
      {"G(T /echo/1 HTTP/1.1\r\nHost: a\r\n\r\n", 400},
      {"GET /echo/1 HTTP/2.0\r\nHost: a\r\n\r\n", 505},
      {"GET /echo/1 HTTP/1.2\r\nHost: a\r\n\r\n", 505},
      {"GET /echo/1 http/1.1\r\nHost: a\r\n\r\n", 505},
      {"GET /echo/1 HTTP/1.1 x\r\nHost: a\r\n\r\n", 505},
      {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505},
      {std::string("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 11) + "\r\n\r\n", 400},
      {"GET /echo/1 HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n", 400},
      {"GET /echo/1 HTTP/1.1\r\nHost: a\r\n: nothing\r\n\r\n", 400},
      {"GET /echo/1 HTTP/1.1\r\nHost: a\r\nX: a" + std::string(1, '\0') + "b\r\n\r\n", 400},
      {"GET /echo/1 HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n", 400},
  };
  for (const auto& c : kCases) {
    HttpClient client(port_);
    const HttpAnswer answer = client.Request(c.bytes);
    EXPECT_EQ(answer.status, c.status) << c.bytes;
    EXPECT_TRUE(client.AtEnd()) << c.bytes;
  }
  EXPECT_EQ(handler_.handled, 0);
  ExpectHealthy();
}

TEST_F(HttpServerTest, TakesWhatAProxyOrAnOldClientSends) {
  StartServer();
  HttpClient client(port_);
  EXPECT_EQ(client.Request("GET http://name:80/echo/1?a=b HTTP/1.1\r\nHost: name\r\n\r\n").body,
            "GET /echo/1?a=b ");
  // Java's client offers HTTP/2 like this; we go on as we are.
  EXPECT_EQ(
      client
          .Request(Post("/echo/h2", "[]",
                        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
                        "HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA\r\n"))
          .body,
      "POST /echo/h2? []");
  client.Send(Post("/echo/2", "{}") + "\r\n");  // a line end too much
  EXPECT_EQ(client.Read().body, "POST /echo/2? {}");
  EXPECT_EQ(client.Request(Get("/echo/3")).body, "GET /echo/3? ");
}

TEST_F(HttpServerTest, Http10GetsNoChunksAndAnEnd) {
  StartServer();
  {
    HttpClient client(port_);
    const HttpAnswer answer =
        client.Request("GET /echo/1 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
    EXPECT_EQ(answer.body, "GET /echo/1? ");
    EXPECT_TRUE(client.AtEnd());
  }
  HttpClient client(port_);
  client.Send("GET /held HTTP/1.0\r\n\r\n");
  const auto exchange = handler_.Next();
  exchange->BeginStream({.content_type = "text/event-stream"});
  exchange->Write("data: 1\n\n");
  exchange->Write("data: 2\n\n");
  exchange->EndStream();
  const HttpAnswer answer = client.Read();
  EXPECT_EQ(answer.headers.count("transfer-encoding"), 0u);
  EXPECT_EQ(answer.body, "data: 1\n\ndata: 2\n\n");
}

TEST_F(HttpServerTest, HeadGetsTheHeadersOnly) {
  StartServer();
  HttpClient client(port_);
  client.Send("HEAD /echo/1 HTTP/1.1\r\nHost: a\r\n\r\n" + Get("/echo/2"));
  const HttpAnswer head = client.Read(/*head=*/true);
  EXPECT_EQ(head.Header("content-length"), std::to_string(std::string("HEAD /echo/1? ").size()));
  EXPECT_EQ(client.Read().body, "GET /echo/2? ");
}

TEST_F(HttpServerTest, StreamsPiecesAsTheyCome) {
  StartServer();
  HttpClient client(port_);
  client.Send(Get("/held") + Get("/echo/next"));
  const auto exchange = handler_.Next();
  exchange->BeginStream({.content_type = "text/event-stream", .headers = {{"X-One", "1"}}});
  const HttpAnswer head = client.ReadHead();
  EXPECT_EQ(head.status, 200);
  EXPECT_EQ(head.Header("transfer-encoding"), "chunked");
  EXPECT_EQ(head.Header("x-one"), "1");
  for (int i = 0; i < 50; ++i) {
    const std::string piece = "data: " + std::string(static_cast<size_t>(i), 'x') + "\n\n";
    exchange->Write(piece);
    ASSERT_EQ(client.ReadChunk(), piece);
  }
  exchange->Write("");  // would be the end
  exchange->Write("last");
  exchange->EndStream();
  EXPECT_EQ(client.ReadChunk(), "last");
  EXPECT_EQ(client.ReadChunk(), std::nullopt);
  EXPECT_FALSE(client.cut());
  EXPECT_EQ(client.Read().body, "GET /echo/next? ");
}

TEST_F(HttpServerTest, CallsPastTheEndHaveNoEffect) {
  StartServer();
  HttpClient client(port_);
  client.Send(Get("/held"));
  const auto exchange = handler_.Next();
  exchange->Write("before");
  exchange->EndStream();
  exchange->Respond({.body = "answer"});
  exchange->Respond({.body = "another"});
  exchange->BeginStream({});
  exchange->Write("more");
  exchange->EndStream();
  EXPECT_EQ(client.Read().body, "answer");
  EXPECT_EQ(client.Request(Get("/echo/1")).body, "GET /echo/1? ");
}

TEST_F(HttpServerTest, GivesUpOnSlowHeads) {
  StartServer({.idle_timeout = absl::Seconds(60), .header_timeout = absl::Milliseconds(100)});
  HttpClient client(port_);
  client.Send("GET /echo/1 HTTP/1.1\r\nHo");
  const HttpAnswer answer = client.Read();
  EXPECT_EQ(answer.status, 408);
  EXPECT_EQ(answer.Header("connection"), "close");
  EXPECT_TRUE(client.AtEnd());
  // The second request of a connection too, though the first one was quick.
  HttpClient other(port_);
  EXPECT_EQ(other.Request(Get("/echo/1") + "GET /").status, 200);
  EXPECT_EQ(other.Read().status, 408);
}

TEST_F(HttpServerTest, BytesNowAndThenDoNotKeepASlowHeadAlive) {
  StartServer({.header_timeout = absl::Milliseconds(200)});
  HttpClient client(port_);
  client.Send("GET /echo/1 HTTP/1.1\r\n");
  // Until the answer is there; each wait is one header's.
  int headers = 0;
  while (handler_.errors == 0 && headers < 1'000'000 && client.Send("X: y\r\n")) ++headers;
  const int status = client.Read().status;
  EXPECT_TRUE(status == 408 || status == 431) << status;
  ExpectHealthy();
}

TEST_F(HttpServerTest, GivesUpOnSlowBodies) {
  StartServer({.body_timeout = absl::Milliseconds(100), .body_rate = 1u << 20});
  HttpClient client(port_);
  client.Send("POST /echo/1 HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n12345");
  EXPECT_EQ(client.Read().status, 408);
  EXPECT_TRUE(client.AtEnd());
  HttpClient waiting(port_);
  waiting.Send(
      "POST /echo/1 HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\nExpect: 100-continue\r\n\r\n");
  EXPECT_EQ(waiting.Read().status, 100);
  EXPECT_EQ(waiting.Read().status, 408);
  EXPECT_EQ(handler_.handled, 0);
}

TEST_F(HttpServerTest, EndsIdleConnectionsWithoutAWord) {
  StartServer({.idle_timeout = absl::Milliseconds(100)});
  HttpClient fresh(port_);
  EXPECT_TRUE(fresh.AtEnd());
  HttpClient used(port_);
  EXPECT_EQ(used.Request(Get("/echo/1")).status, 200);
  EXPECT_TRUE(used.AtEnd());
  // Whoever waits for an answer is not idle.
  HttpClient patient(port_);
  patient.Send(Get("/held"));
  const auto exchange = handler_.Next();
  HttpClient clock(port_);
  EXPECT_TRUE(clock.AtEnd());  // an idle time has passed
  exchange->Respond({.body = "late"});
  EXPECT_EQ(patient.Read().body, "late");
  EXPECT_EQ(handler_.errors, 0);
}

TEST_F(HttpServerTest, AClientThatReadsTooSlowlyIsGoneOnce) {
  StartServer({.stream_buffer_bytes = 64u << 10});
  HttpClient client(port_, /*receive_buffer=*/4096);
  client.Send(Get("/held"));
  const auto exchange = handler_.Next();
  GoneWatch gone;
  gone.On(*exchange);
  exchange->BeginStream({.content_type = "text/event-stream"});
  const std::string piece(4096, 'x');
  for (int i = 0; i < 2000; ++i) exchange->Write(piece);  // 8 MB: more than all buffers
  EXPECT_EQ(gone.Wait(), Gone::kSlow);
  exchange->EndStream();
  if (client.ReadHead().status == 200) {
    while (client.ReadChunk()) {
    }
    EXPECT_TRUE(client.cut()) << "a stream that lacks its middle must not look whole";
  }
  EXPECT_EQ(gone.times(), 1);
  ExpectHealthy();
}

TEST_F(HttpServerTest, AClientThatReadsNothingIsGoneAfterTheWriteTimeout) {
  StartServer({.stream_buffer_bytes = 64u << 20, .write_timeout = absl::Milliseconds(200)});
  HttpClient client(port_, /*receive_buffer=*/4096);
  client.Send(Get("/held"));
  const auto exchange = handler_.Next();
  GoneWatch gone;
  gone.On(*exchange);
  exchange->BeginStream({});
  exchange->Write(std::string(16u << 20, 'x'));
  EXPECT_EQ(gone.Wait(), Gone::kSlow);
  EXPECT_EQ(gone.times(), 1);
}

TEST_F(HttpServerTest, AClientThatReadsSlowlyGetsEverything) {
  StartServer({.write_timeout = absl::Milliseconds(2000)});
  HttpClient client(port_, /*receive_buffer=*/4096);
  const std::string body(2u << 20, 'y');
  client.Send(Get("/held"));
  handler_.Next()->Respond({.body = body});
  EXPECT_EQ(client.Read().body, body);
}

TEST_F(HttpServerTest, NoticesWhoeverLeavesBeforeTheAnswer) {
  StartServer();
  for (const bool hard : {false, true}) {
    HttpClient client(port_);
    client.Send(Post("/held", "{}"));
    const auto exchange = handler_.Next();
    GoneWatch gone;
    gone.On(*exchange);
    hard ? client.Reset() : client.Close();
    EXPECT_EQ(gone.Wait(), Gone::kDisconnected);
    exchange->Respond({.body = "for nobody"});
    exchange->BeginStream({});
    exchange->Write("x");
    exchange->EndStream();
    EXPECT_EQ(gone.times(), 1);
    // Whoever asks later is told at once.
    GoneWatch late;
    late.On(*exchange);
    EXPECT_EQ(late.times(), 1);
  }
}

TEST_F(HttpServerTest, NoticesWhoeverLeavesDuringAStream) {
  StartServer();
  for (const bool hard : {false, true}) {
    HttpClient client(port_);
    client.Send(Get("/held"));
    const auto exchange = handler_.Next();
    GoneWatch gone;
    gone.On(*exchange);
    exchange->BeginStream({});
    exchange->Write("data: 1\n\n");
    EXPECT_EQ(client.ReadHead().status, 200);
    EXPECT_EQ(client.ReadChunk(), "data: 1\n\n");
    hard ? client.Reset() : client.Close();
    EXPECT_EQ(gone.Wait(), Gone::kDisconnected);
    for (int i = 0; i < 10; ++i) exchange->Write("data: 2\n\n");
    exchange->EndStream();
    EXPECT_EQ(gone.times(), 1);
  }
}

TEST_F(HttpServerTest, WhoeverLeavesAfterTheAnswerIsNotGone) {
  StartServer();
  GoneWatch gone;
  {
    HttpClient client(port_);
    client.Send(Get("/held"));
    const auto exchange = handler_.Next();
    gone.On(*exchange);
    exchange->Respond({.body = "done"});
    EXPECT_EQ(client.Read().body, "done");
    client.Send(Get("/held"));
    handler_.Next()->Respond({});  // the first exchange's connection is in use
    EXPECT_EQ(client.Read().status, 200);
  }
  server_.reset();
  EXPECT_EQ(gone.times(), 0);
}

TEST_F(HttpServerTest, ServesManyConnectionsAtOnce) {
  StartServer();
  constexpr int kConnections = 400;
  std::vector<HttpClient> clients;
  for (int i = 0; i < kConnections; ++i) {
    clients.emplace_back(port_);
    ASSERT_TRUE(clients.back().connected());
  }
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < kConnections; ++i) {
      ASSERT_TRUE(clients[i].Send(Post("/echo/" + std::to_string(i), std::to_string(round))));
    }
    for (int i = 0; i < kConnections; ++i) {
      ASSERT_EQ(clients[i].Read().body,
                "POST /echo/" + std::to_string(i) + "? " + std::to_string(round));
    }
  }
  EXPECT_EQ(server_->connections(), kConnections);
}

// As a message with a token of each stream does it: one thread writes to all, faster than they go
// out.
TEST_F(HttpServerTest, StreamsToManyConnectionsAtOnce) {
  StartServer();
  constexpr int kStreams = 100, kPieces = 40;
  std::vector<HttpClient> clients;
  std::vector<std::shared_ptr<Exchange>> exchanges;
  for (int i = 0; i < kStreams; ++i) {
    clients.emplace_back(port_);
    clients.back().Send(Get("/held"));
    exchanges.push_back(handler_.Next());
    exchanges.back()->BeginStream({.content_type = "text/event-stream"});
  }
  const auto piece = [](int stream, int i) {
    return "data: " + std::to_string(stream) + " " + std::to_string(i) + "\n\n";
  };
  for (int i = 0; i < kPieces; ++i) {
    for (int stream = 0; stream < kStreams; ++stream) exchanges[stream]->Write(piece(stream, i));
  }
  for (const auto& exchange : exchanges) exchange->EndStream();
  for (int stream = 0; stream < kStreams; ++stream) {
    ASSERT_EQ(clients[stream].ReadHead().status, 200);
    for (int i = 0; i < kPieces; ++i) ASSERT_EQ(clients[stream].ReadChunk(), piece(stream, i));
    EXPECT_EQ(clients[stream].ReadChunk(), std::nullopt);
    EXPECT_FALSE(clients[stream].cut());
  }
}

TEST_F(HttpServerTest, HasRoomForSoManyConnectionsOnly) {
  StartServer({.connections = 8});
  std::vector<HttpClient> clients;
  for (int i = 0; i < 8; ++i) {
    clients.emplace_back(port_);
    ASSERT_EQ(clients.back().Request(Get("/echo/1")).status, 200);
  }
  HttpClient ninth(port_);
  ninth.Send(Get("/echo/1"));
  EXPECT_EQ(ninth.Read().status, 0);
  for (HttpClient& client : clients) EXPECT_EQ(client.Request(Get("/echo/2")).status, 200);
  clients.pop_back();
  // Its end and the next connection race; it is accepted in the end.
  int status = 0;
  for (int i = 0; i < 100'000 && status == 0; ++i) {
    status = HttpClient(port_).Request(Get("/echo/1")).status;
  }
  EXPECT_EQ(status, 200);
}

TEST_F(HttpServerTest, DrainsBetweenRequests) {
  StartServer();
  HttpClient idle(port_), busy(port_), streaming(port_);
  EXPECT_EQ(idle.Request(Get("/echo/1")).status, 200);
  busy.Send(Get("/held"));
  const auto exchange = handler_.Next();
  streaming.Send(Get("/held"));
  const auto stream = handler_.Next();
  stream->BeginStream({});
  EXPECT_EQ(streaming.ReadHead().status, 200);
  server_->Drain();
  EXPECT_TRUE(idle.AtEnd());
  EXPECT_FALSE(HttpClient(port_).connected());
  exchange->Respond({.body = "whole"});
  const HttpAnswer answer = busy.Read();
  EXPECT_EQ(answer.body, "whole");
  EXPECT_EQ(answer.Header("connection"), "close");
  EXPECT_TRUE(busy.AtEnd());
  stream->Write("all of it");
  stream->EndStream();
  EXPECT_EQ(streaming.ReadChunk(), "all of it");
  EXPECT_EQ(streaming.ReadChunk(), std::nullopt);
  EXPECT_FALSE(streaming.cut());
  EXPECT_TRUE(streaming.AtEnd());
}

TEST_F(HttpServerTest, ItsEndCutsStreamsAndTellsTheirExchanges) {
  StartServer();
  HttpClient client(port_), waiting(port_);
  client.Send(Get("/held"));
  const auto stream = handler_.Next();
  waiting.Send(Get("/held"));
  const auto unanswered = handler_.Next();
  GoneWatch gone, also_gone;
  gone.On(*stream);
  also_gone.On(*unanswered);
  stream->BeginStream({});
  stream->Write("one");
  EXPECT_EQ(client.ReadHead().status, 200);
  EXPECT_EQ(client.ReadChunk(), "one");
  server_.reset();
  EXPECT_EQ(gone.times(), 1);
  EXPECT_EQ(also_gone.times(), 1);
  stream->Write("two");
  stream->EndStream();
  unanswered->Respond({});
  EXPECT_EQ(client.ReadChunk(), std::nullopt);
  EXPECT_TRUE(client.cut());
  EXPECT_EQ(waiting.Read().status, 0);
}

TEST_F(HttpServerTest, ItsEndLetsCompleteAnswersLeave) {
  StartServer();
  const std::string body(2u << 20, 'z');  // more than the sockets hold
  HttpClient client(port_);
  client.Send(Get("/held"));
  handler_.Next()->Respond({.body = body});
  Thread end("end", [this] { server_.reset(); });
  EXPECT_EQ(client.Read().body, body);
  EXPECT_TRUE(client.AtEnd());
}

TEST_F(HttpServerTest, ItsEndDoesNotWaitForAClientThatDoesNotRead) {
  StartServer({.stream_buffer_bytes = 64u << 20});
  HttpClient client(port_, 4096);
  client.Send(Get("/held"));
  const auto exchange = handler_.Next();
  exchange->Respond({.body = std::string(8u << 20, 'z')});
  server_.reset();
  SUCCEED();
}

// The exchange is used on other threads while the server goes: for the sanitizers.
TEST_F(HttpServerTest, ItsEndRacesWithWriters) {
  for (int round = 0; round < 20; ++round) {
    StartServer();
    std::vector<HttpClient> clients;
    std::vector<std::shared_ptr<Exchange>> exchanges;
    for (int i = 0; i < 4; ++i) {
      clients.emplace_back(port_);
      clients.back().Send(Get("/held"));
      exchanges.push_back(handler_.Next());
      exchanges.back()->BeginStream({});
    }
    std::atomic<bool> stop{false};
    absl::Notification writing;
    Thread writer("writer", [&] {
      for (int i = 0; !stop; ++i) {
        for (auto& exchange : exchanges) exchange->Write("data: x\n\n");
        if (i == 3) writing.Notify();
      }
      for (auto& exchange : exchanges) exchange->EndStream();
    });
    ASSERT_TRUE(writing.WaitForNotificationWithTimeout(kPatience));
    server_.reset();
    stop = true;
  }
}

size_t OpenDescriptors() {
  size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    ++count;
  }
  return count;
}

TEST_F(HttpServerTest, LeavesNoDescriptorsBehind) {
  const size_t before = OpenDescriptors();
  StartServer({.stream_buffer_bytes = 16u << 10, .header_timeout = absl::Milliseconds(100)});
  for (int i = 0; i < 30; ++i) {
    HttpClient ok(port_), broken(port_), leaves(port_), slow(port_, 4096), lazy(port_);
    EXPECT_EQ(ok.Request(Get("/echo/1")).status, 200);
    EXPECT_EQ(broken.Request("nonsense\r\n\r\n").status, 400);
    lazy.Send("GET /");
    leaves.Send(Get("/held"));
    GoneWatch gone;
    gone.On(*handler_.Next());
    leaves.Close();
    EXPECT_EQ(gone.Wait(), Gone::kDisconnected);
    slow.Send(Get("/held"));
    const auto exchange = handler_.Next();
    GoneWatch too_slow;
    too_slow.On(*exchange);
    exchange->BeginStream({});
    for (int j = 0; j < 64; ++j) exchange->Write(std::string(16000, 'x'));
    EXPECT_EQ(too_slow.Wait(), Gone::kSlow);
  }
  server_.reset();
  EXPECT_EQ(OpenDescriptors(), before);
}

TEST_F(HttpServerTest, NamesTheTakenPort) {
  StartServer();
  const auto second = Server::Start("127.0.0.1:" + std::to_string(port_), Limits{}, 1, &handler_);
  ASSERT_FALSE(second.ok());
  EXPECT_THAT(std::string(second.status().message()), HasSubstr(std::to_string(port_)));
}

}  // namespace
}  // namespace antiphon::gateway::http
