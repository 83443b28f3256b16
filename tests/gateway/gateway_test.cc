// The whole gateway between real clients and a scripted cluster.
#include "gateway/gateway.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <boost/json.hpp>
#include <filesystem>
#include <fstream>

#include "absl/synchronization/notification.h"
#include "common/block_key.h"
#include "common/thread.h"
#include "gateway/grpc_front.h"
#include "gateway/http_front.h"
#include "tests/fakes/fake_cluster.h"
#include "tests/gateway/http_client.h"
#include "tests/gateway/inference_client.h"
#include "tests/gateway/model_fixture.h"

namespace antiphon::gateway {
namespace {

namespace json = boost::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

json::value Parse(std::string_view text) {
  json::error_code ec;
  json::value value = json::parse(json::string_view(text.data(), text.size()), ec);
  EXPECT_FALSE(ec) << ec.message() << " in " << text;
  return value;
}

std::string Text(const json::value& value) {
  return {value.as_string().data(), value.as_string().size()};
}

// Server-sent events of one answer, as they come.
class Events {
 public:
  explicit Events(HttpClient& client) : client_(client) {}
  // The next payload; nullopt after the stream's orderly end.
  std::optional<std::string> Next() {
    size_t end;
    while ((end = text_.find("\n\n")) == std::string::npos) {
      const auto piece = client_.ReadChunk();
      if (!piece) {
        EXPECT_FALSE(client_.cut()) << "the stream was cut";
        EXPECT_EQ(text_, "");
        return std::nullopt;
      }
      text_ += *piece;
    }
    EXPECT_EQ(text_.substr(0, 6), "data: ");
    std::string payload = text_.substr(6, end - 6);
    text_.erase(0, end + 2);
    return payload;
  }
  // Reads on until that much of the completion's text is there.
  std::string TextUntil(size_t bytes) {
    std::string out;
    while (out.size() < bytes) {
      const auto event = Next();
      if (!event) {
        ADD_FAILURE() << "the stream ended after: " << out;
        break;
      }
      out += Text(Parse(*event).at("choices").at(0).at("text"));
    }
    return out;
  }

 private:
  HttpClient& client_;
  std::string text_;
};

constexpr char kCompletion[] = R"({"model":"tiny","prompt":"abc","max_tokens":64})";
constexpr char kStream[] = R"({"model":"tiny","prompt":"abc","max_tokens":64,"stream":true})";

// Is refused only after it was counted in.
constexpr char kUnknown[] = R"({"model":"huge","prompt":"abc"})";

wire::AdmitReply Rejected(wire::Rejected::Reason reason, double retry_after_s,
                          const std::string& message = "") {
  wire::AdmitReply reply;
  reply.mutable_rejected()->set_reason(reason);
  reply.mutable_rejected()->set_retry_after_s(retry_after_s);
  reply.mutable_rejected()->set_message(message);
  return reply;
}

struct TestGatewayOptions {
  std::string keys_file;
  std::vector<std::string> conductors;  // empty: the fake one
  uint32_t max_inflight = 4096;
  http::Limits limits;
};

class GatewayTest : public testing::Test {
 protected:
  GatewayTest()
      : conductor_({{TestCard().tokenizer_digest(), TestTokenizerSpec().SerializeAsString()},
                    {TestCard().chat_template_digest(), kTestTemplate}}) {
    wire::ModelSet models;
    *models.add_cards() = TestCard();
    models.set_prefill_ready(1);
    models.set_decode_ready(2);
    conductor_.SetModels(models);
    conductor_.PlaceOn(a_.node(), a_.address());
  }
  ~GatewayTest() override { StopGateway(); }

  void StartGateway(TestGatewayOptions options = {}) {
    if (options.conductors.empty()) options.conductors = {conductor_.address()};
    registry_ = std::make_unique<Registry>(Labels{{"daemon", "gateway"}});
    auto auth = Auth::Create(options.keys_file);
    ASSERT_TRUE(auth.ok()) << auth.status();
    auth_ = *std::move(auth);
    gateway_ = std::make_unique<Gateway>(
        Gateway::Options{.self = {.cluster = "test", .node = NodeId("gateway"), .incarnation = 5},
                         .conductors = options.conductors,
                         .registry = registry_.get(),
                         .clock = &Clock::Real(),
                         .auth = auth_.get(),
                         .seed = 42,
                         .max_inflight = options.max_inflight});
    HttpFrontOptions front;
    front.gateway = gateway_.get();
    front.metrics = [this] { return registry_->Render(); };
    front.not_ready = [this] { return gateway_->NotReadyReason(); };
    front_ = std::make_unique<HttpFront>(std::move(front));
    auto server = http::Server::Start("127.0.0.1:0", options.limits, 2, front_.get());
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    auto grpc = GrpcFront::Start("127.0.0.1:0", gateway_.get());
    ASSERT_TRUE(grpc.ok()) << grpc.status();
    grpc_ = *std::move(grpc);
    AwaitReady();
  }
  void StopGateway() {
    grpc_.reset();
    server_.reset();
    front_.reset();
    gateway_.reset();
  }
  void AwaitReady() {
    HttpClient client(server_->port());
    const absl::Time last = absl::Now() + kPatience;
    HttpAnswer answer;
    while ((answer = client.Request(Get("/readyz"))).status != 200 && absl::Now() < last) {
    }
    ASSERT_EQ(answer.status, 200) << answer.body;
  }
  HttpClient Connect(int receive_buffer = 0) { return HttpClient(server_->port(), receive_buffer); }
  double Metric(const std::string& line_start) {
    const std::string text = registry_->Render();
    double sum = 0;
    for (size_t at = 0; (at = text.find("\n" + line_start, at)) != std::string::npos; ++at) {
      const size_t end = text.find('\n', at + 1);
      const size_t space = text.rfind(' ', end);
      sum += std::strtod(text.c_str() + space, nullptr);
    }
    return sum;
  }
  // Nothing runs any more: a request's end is told to the cluster first, then to the books.
  void ExpectNothingRuns() {
    const absl::Time last = absl::Now() + kPatience;
    while (Metric("antiphon_requests_inflight") != 0 && absl::Now() < last) {
    }
    EXPECT_EQ(Metric("antiphon_requests_inflight"), 0);
  }
  // What the conductor was told at a generation's end.
  wire::FinishReport AwaitFinished() {
    while (auto report = conductor_.NextFinish()) {
      if (report->finished()) return *report;
    }
    ADD_FAILURE() << "no final report";
    return {};
  }

  fakes::FakeDecode a_{"decode-a"}, b_{"decode-b"};
  fakes::FakeConductor conductor_;
  std::unique_ptr<Registry> registry_;
  std::unique_ptr<Auth> auth_;
  std::unique_ptr<Gateway> gateway_;
  std::unique_ptr<HttpFront> front_;
  std::unique_ptr<http::Server> server_;
  std::unique_ptr<GrpcFront> grpc_;
};

TEST_F(GatewayTest, AnswersAChatWhole) {
  StartGateway();
  HttpClient client = Connect();
  client.Send(Post("/v1/chat/completions",
                   R"({"messages":[{"role":"user","content":"hi"}],"seed":7,"surprise":1})",
                   "X-Request-Id: my-label\r\nX-Antiphon-Class: batch\r\n"));
  const auto admit = conductor_.NextAdmit();
  ASSERT_TRUE(admit);
  EXPECT_EQ(admit->model(), "tiny");
  EXPECT_EQ(admit->tenant(), "default");
  EXPECT_EQ(admit->class_(), "batch");
  EXPECT_EQ(admit->epoch(), 1u);
  EXPECT_EQ(admit->hello().cluster(), "test");
  const auto start = a_.NextStart();
  ASSERT_TRUE(start);
  EXPECT_EQ(start->id(), admit->id());
  EXPECT_EQ(start->request_label(), "my-label");
  EXPECT_EQ(start->sampling().seed(), 7u);
  EXPECT_EQ(admit->prompt_count(), static_cast<uint32_t>(start->prompt_ids_size()));
  const std::vector<uint32_t> prompt(start->prompt_ids().begin(), start->prompt_ids().end());
  EXPECT_EQ(TestModel()->tokenizer->Decode(prompt, /*skip_special=*/false),
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
  a_.Say(*start, 0, "Good ");
  a_.Say(*start, 5, "day", wire::FINISH_REASON_LENGTH);
  const HttpAnswer answer = client.Read();
  ASSERT_EQ(answer.status, 200) << answer.body;
  EXPECT_EQ(answer.Header("x-request-id"), "my-label");
  EXPECT_EQ(answer.Header("x-antiphon-ignored-fields"), "surprise");
  EXPECT_EQ(answer.Header("content-type"), "application/json");
  const json::value body = Parse(answer.body);
  EXPECT_EQ(Text(body.at("id")).substr(0, 9), "chatcmpl-");
  EXPECT_EQ(Text(body.at("choices").at(0).at("message").at("content")), "Good day");
  EXPECT_EQ(Text(body.at("choices").at(0).at("finish_reason")), "length");
  EXPECT_EQ(body.at("usage").at("completion_tokens"), 8);
  EXPECT_EQ(body.at("usage").at("prompt_tokens"), start->prompt_ids_size());
  // Two calls, which may overtake each other.
  auto first = conductor_.NextFinish(), second = conductor_.NextFinish();
  ASSERT_TRUE(first && second);
  if (first->finished()) std::swap(first, second);
  EXPECT_TRUE(first->first_token_seen() && !first->finished());
  EXPECT_EQ(first->output_tokens(), 1u);
  const wire::FinishReport& last = *second;
  EXPECT_TRUE(last.first_token_seen() && last.finished());
  EXPECT_EQ(last.id(), admit->id());
  EXPECT_EQ(last.output_tokens(), 8u);
  ExpectNothingRuns();
  EXPECT_EQ(Metric("antiphon_output_tokens_total"), 8);
}

TEST_F(GatewayTest, StreamsWhatComes) {
  StartGateway();
  HttpClient client = Connect();
  client.Send(Post("/v1/completions",
                   R"({"prompt":"abc","stream":true,"stream_options":{"include_usage":true}})"));
  const auto start = a_.NextStart();
  ASSERT_TRUE(start);
  a_.Say(*start, 0, "o");
  const HttpAnswer head = client.ReadHead();
  EXPECT_EQ(head.status, 200);
  EXPECT_EQ(head.Header("content-type"), "text/event-stream; charset=utf-8");
  EXPECT_EQ(head.Header("cache-control"), "no-cache");
  EXPECT_NE(head.Header("x-request-id"), "");
  Events events(client);
  EXPECT_EQ(events.TextUntil(1), "o");
  a_.Say(*start, 1, "ne");
  EXPECT_EQ(events.TextUntil(2), "ne");
  a_.Say(*start, 3, " two", wire::FINISH_REASON_LENGTH);
  EXPECT_EQ(events.TextUntil(4), " two");
  const auto finish = events.Next();
  ASSERT_TRUE(finish);
  EXPECT_EQ(Text(Parse(*finish).at("choices").at(0).at("finish_reason")), "length");
  const auto usage = events.Next();
  ASSERT_TRUE(usage);
  EXPECT_EQ(Parse(*usage).at("usage").at("completion_tokens"), 7);
  EXPECT_EQ(Parse(*usage).at("choices").as_array().size(), 0u);
  EXPECT_EQ(events.Next(), "[DONE]");
  EXPECT_EQ(events.Next(), std::nullopt);
  // The connection is in step.
  EXPECT_EQ(client.Request(Get("/health")).status, 200);
}

TEST_F(GatewayTest, AllChoicesOfARequestComeOnOneStream) {
  StartGateway();
  HttpClient client = Connect();
  client.Send(Post("/v1/completions", R"({"prompt":"abc","n":2,"stream":true})"));
  const auto first = a_.NextStart();
  ASSERT_TRUE(first);
  a_.Say(*first, 0, "A", wire::FINISH_REASON_LENGTH);
  const auto second = a_.NextStart();
  ASSERT_TRUE(second);
  EXPECT_NE(second->id(), first->id());
  EXPECT_NE(second->sampling().seed(), first->sampling().seed());
  a_.Say(*second, 0, "B", wire::FINISH_REASON_LENGTH);
  client.ReadHead();
  Events events(client);
  std::map<int64_t, std::string> texts;
  std::map<int64_t, int> ends;
  while (const auto event = events.Next()) {
    if (*event == "[DONE]") continue;
    const json::value parsed = Parse(*event);
    const json::value& choice = parsed.at("choices").at(0);
    texts[choice.at("index").as_int64()] += Text(choice.at("text"));
    ends[choice.at("index").as_int64()] += !choice.at("finish_reason").is_null();
  }
  EXPECT_EQ(texts[0], "A");
  EXPECT_EQ(texts[1], "B");
  EXPECT_EQ(ends[0], 1);
  EXPECT_EQ(ends[1], 1);
}

TEST_F(GatewayTest, ARejectionIs429WithWhenToComeBack) {
  StartGateway();
  conductor_.Answer([](const wire::AdmitRequest&) {
    return Rejected(wire::Rejected::PREDICTED_TTFT, 10, "Too much to do.");
  });
  HttpClient client = Connect();
  for (const char* body : {kCompletion, kStream}) {
    const HttpAnswer answer = client.Request(Post("/v1/completions", body));
    EXPECT_EQ(answer.status, 429);
    EXPECT_EQ(answer.Header("content-type"), "application/json");
    const int seconds = std::atoi(answer.Header("retry-after").c_str());
    EXPECT_GE(seconds, 8);
    EXPECT_LE(seconds, 12);
    const int ms = std::atoi(answer.Header("retry-after-ms").c_str());
    EXPECT_GE(ms, 8000);
    EXPECT_LE(ms, 12000);
    EXPECT_EQ((ms + 999) / 1000, seconds);
    EXPECT_EQ(answer.Header("x-antiphon-rejected-reason"), "predicted-ttft");
    EXPECT_EQ(answer.Header("x-should-retry"), "");
    EXPECT_NE(answer.Header("x-request-id"), "");
    const json::value error = Parse(answer.body).at("error");
    EXPECT_EQ(Text(error.at("type")), "rate_limit_error");
    EXPECT_EQ(Text(error.at("message")), "Too much to do.");
  }
  conductor_.Answer([](const wire::AdmitRequest&) {
    wire::AdmitReply reply = Rejected(wire::Rejected::QUEUE_FULL, 2);
    reply.mutable_rejected()->set_retry_is_useless(true);
    return reply;
  });
  const HttpAnswer useless = client.Request(Post("/v1/completions", kCompletion));
  EXPECT_EQ(useless.Header("x-should-retry"), "false");
  EXPECT_EQ(useless.Header("x-antiphon-rejected-reason"), "queue-full");
  conductor_.Answer(
      [](const wire::AdmitRequest&) { return Rejected(wire::Rejected::NO_WORKERS, 2); });
  const HttpAnswer nobody = client.Request(Post("/v1/completions", kCompletion));
  EXPECT_EQ(nobody.status, 503);
  EXPECT_EQ(Text(Parse(nobody.body).at("error").at("code")), "no_workers");
  EXPECT_NE(nobody.Header("retry-after"), "");
  conductor_.Answer(
      [](const wire::AdmitRequest&) { return Rejected(wire::Rejected::UNKNOWN_MODEL, 0); });
  EXPECT_EQ(client.Request(Post("/v1/completions", kCompletion)).status, 404);
  ExpectNothingRuns();
}

TEST_F(GatewayTest, RunsSoManyRequestsOnly) {
  StartGateway({.max_inflight = 1});
  HttpClient first = Connect(), second = Connect();
  first.Send(Post("/v1/completions", kCompletion));
  const auto start = a_.NextStart();
  ASSERT_TRUE(start);
  const HttpAnswer full = second.Request(Post("/v1/completions", kCompletion));
  EXPECT_EQ(full.status, 429);
  EXPECT_EQ(full.Header("x-antiphon-rejected-reason"), "queue-full");
  EXPECT_EQ(full.Header("retry-after"), "1");
  a_.Say(*start, 0, "x", wire::FINISH_REASON_LENGTH);
  EXPECT_EQ(first.Read().status, 200);
  AwaitFinished();
  // The place is free when the answer is out; its count follows at once.
  int status = 429;
  for (int i = 0; i < 10'000 && status == 429; ++i) {
    status = second.Request(Post("/v1/completions", kUnknown)).status;
  }
  EXPECT_EQ(status, 404);
}

TEST_F(GatewayTest, WithoutAConductorItIs503UntilThatIsBack) {
  StartGateway();
  HttpClient client = Connect();
  conductor_.Stop();
  const HttpAnswer answer = client.Request(Post("/v1/completions", kCompletion));
  EXPECT_EQ(answer.status, 503);
  EXPECT_EQ(Text(Parse(answer.body).at("error").at("code")), "no_conductor");
  EXPECT_EQ(answer.Header("retry-after"), "1");
  // It stays ready: a Service must keep its gateways.
  EXPECT_EQ(client.Request(Get("/readyz")).status, 200);
  conductor_.Start();
  const absl::Time last = absl::Now() + kPatience;
  while (!gateway_->catalog()->connected && absl::Now() < last) client.Request(Get("/health"));
  client.Send(Post("/v1/completions", kCompletion));
  const auto start = a_.NextStart();
  ASSERT_TRUE(start);
  a_.Say(*start, 0, "x", wire::FINISH_REASON_LENGTH);
  EXPECT_EQ(client.Read().status, 200);
}

TEST_F(GatewayTest, AsksTheNextConductorWhenOneIsDead) {
  std::string dead;
  {
    fakes::FakeConductor gone({});
    dead = gone.address();
  }
  StartGateway({.conductors = {dead, conductor_.address()}});
  HttpClient client = Connect();
  client.Send(Post("/v1/completions", kCompletion));
  const auto start = a_.NextStart();
  ASSERT_TRUE(start);
  a_.Say(*start, 0, "x", wire::FINISH_REASON_LENGTH);
  EXPECT_EQ(client.Read().status, 200);
}

TEST_F(GatewayTest, AWorkersDeathIsAPauseAndNoMore) {
  StartGateway();
  HttpClient client = Connect();
  client.Send(Post("/v1/completions", kStream));
  const auto first = a_.NextStart();
  ASSERT_TRUE(first);
  a_.Say(*first, 0, "one ");
  client.ReadHead();
  Events events(client);
  EXPECT_EQ(events.TextUntil(4), "one ");
  conductor_.NextAdmit();
  conductor_.PlaceOn(b_.node(), b_.address());
  a_.BreakStreams();
  const auto again = conductor_.NextAdmit();
  ASSERT_TRUE(again);
  EXPECT_EQ(again->epoch(), 2u);
  EXPECT_EQ(again->emitted_count(), 4u);
  EXPECT_THAT(again->excluded(), ElementsAre("decode-a"));
  const auto second = b_.NextStart();
  ASSERT_TRUE(second);
  EXPECT_EQ(second->id(), first->id());
  EXPECT_EQ(second->epoch(), 2u);
  EXPECT_THAT(second->emitted_ids(), ElementsAre('o', 'n', 'e', ' '));
  EXPECT_EQ(second->prompt_ids_size(), first->prompt_ids_size());
  EXPECT_EQ(second->sampling().seed(), first->sampling().seed());
  // Some of what it sends is known already.
  b_.Say(*second, 2, "e two", wire::FINISH_REASON_LENGTH);
  EXPECT_EQ(events.TextUntil(3), "two");
  EXPECT_EQ(Text(Parse(*events.Next()).at("choices").at(0).at("finish_reason")), "length");
  EXPECT_EQ(events.Next(), "[DONE]");
  EXPECT_EQ(events.Next(), std::nullopt);
  EXPECT_EQ(Metric("antiphon_replacements_total"), 1);
  EXPECT_EQ(AwaitFinished().output_tokens(), 7u);
}

TEST_F(GatewayTest, AWorkerThatIsTakenForDeadCannotSpeakAnyMore) {
  StartGateway();
  HttpClient client = Connect();
  client.Send(Post("/v1/completions", kStream));
  const auto first = a_.NextStart();
  ASSERT_TRUE(first);
  a_.Say(*first, 0, "one ");
  client.ReadHead();
  Events events(client);
  EXPECT_EQ(events.TextUntil(4), "one ");
  conductor_.PlaceOn(b_.node(), b_.address());
  a_.Fail(*first, static_cast<int>(absl::StatusCode::kUnavailable), "prefill died", "prefill-x");
  const auto second = b_.NextStart();
  ASSERT_TRUE(second);
  const auto cancel = a_.NextCancel();  // whatever still runs there
  ASSERT_TRUE(cancel);
  EXPECT_EQ(cancel->epoch(), 1u);
  a_.Say(*first, 4, "WRONG", wire::FINISH_REASON_LENGTH);
  b_.Say(*second, 4, "two", wire::FINISH_REASON_LENGTH);
  EXPECT_EQ(events.TextUntil(3), "two");
}

TEST_F(GatewayTest, AnotherTokenThanTheClientHasIsNeverSent) {
  StartGateway();
  HttpClient client = Connect();
  client.Send(Post("/v1/completions", kStream));
  const auto first = a_.NextStart();
  ASSERT_TRUE(first);
  a_.Say(*first, 0, "abc");
  client.ReadHead();
  Events events(client);
  EXPECT_EQ(events.TextUntil(3), "abc");
  conductor_.PlaceOn(b_.node(), b_.address());
  a_.BreakStreams();
  const auto second = b_.NextStart();
  ASSERT_TRUE(second);
  b_.Say(*second, 1, "Xcd");  // says that the client's second token was another
  const auto third = b_.NextStart();
  ASSERT_TRUE(third);
  EXPECT_EQ(third->epoch(), 3u);
  EXPECT_THAT(third->emitted_ids(), ElementsAre('a', 'b', 'c'));
  const auto cancel = b_.NextCancel();
  ASSERT_TRUE(cancel);
  EXPECT_EQ(cancel->epoch(), 2u);
  b_.Say(*third, 3, "d", wire::FINISH_REASON_LENGTH);
  EXPECT_EQ(events.TextUntil(1), "d");
  EXPECT_EQ(Text(Parse(*events.Next()).at("choices").at(0).at("finish_reason")), "length");
  EXPECT_EQ(events.Next(), "[DONE]");
  EXPECT_EQ(Metric("antiphon_token_divergence_total"), 1);
}

TEST_F(GatewayTest, AStreamThatCannotGoOnEndsInOneError) {
  StartGateway();
  HttpClient client = Connect();
  client.Send(Post("/v1/completions", kStream));
  auto start = a_.NextStart();
  ASSERT_TRUE(start);
  a_.Say(*start, 0, "abc");
  client.ReadHead();
  Events events(client);
  EXPECT_EQ(events.TextUntil(3), "abc");
  for (int i = 0; i < 4; ++i) {
    a_.Fail(*start, static_cast<int>(absl::StatusCode::kUnavailable), "no luck");
    if (i < 3) {
      start = a_.NextStart();
      ASSERT_TRUE(start);
    }
  }
  const auto error = events.Next();
  ASSERT_TRUE(error);
  EXPECT_EQ(Text(Parse(*error).at("error").at("code")), "upstream_failed");
  EXPECT_EQ(events.Next(), "[DONE]");
  EXPECT_EQ(events.Next(), std::nullopt);
}

TEST_F(GatewayTest, AClientThatLeavesStopsItsDecode) {
  StartGateway();
  HttpClient client = Connect();
  client.Send(Post("/v1/completions", kStream));
  const auto start = a_.NextStart();
  ASSERT_TRUE(start);
  a_.Say(*start, 0, "abc");
  client.ReadHead();
  client.Close();
  const auto cancel = a_.NextCancel();
  ASSERT_TRUE(cancel);
  EXPECT_EQ(cancel->id(), start->id());
  EXPECT_EQ(cancel->epoch(), 1u);
  EXPECT_EQ(AwaitFinished().id(), start->id());
  ExpectNothingRuns();
  EXPECT_EQ(Metric("antiphon_disconnects_total"), 1);
}

TEST_F(GatewayTest, AClientThatLeavesTheQueueLeavesNothingThere) {
  StartGateway();
  conductor_.Answer([](const wire::AdmitRequest&) { return std::nullopt; });
  for (const char* body : {kCompletion, kStream}) {
    HttpClient client = Connect();
    client.Send(Post("/v1/completions", body));
    const auto admit = conductor_.NextAdmit();
    ASSERT_TRUE(admit);
    client.Close();
    EXPECT_TRUE(conductor_.AwaitAbandoned());
    EXPECT_EQ(AwaitFinished().id(), admit->id());
  }
  ExpectNothingRuns();
}

TEST_F(GatewayTest, AClientThatDoesNotReadIsGivenUp) {
  StartGateway({.limits = {.stream_buffer_bytes = 64u << 10}});
  HttpClient client = Connect(/*receive_buffer=*/4096);
  client.Send(Post("/v1/completions", R"({"prompt":"abc","max_tokens":500,"stream":true,"n":4})"));
  for (int i = 0; i < 4; ++i) {
    const auto start = a_.NextStart();
    ASSERT_TRUE(start);
    for (uint32_t t = 0; t < 490; ++t) a_.Say(*start, t, "x");
  }
  const auto cancel = a_.NextCancel();
  ASSERT_TRUE(cancel);
  AwaitFinished();
  EXPECT_EQ(Metric("antiphon_stream_backpressure_cancels_total"), 1);
}

TEST_F(GatewayTest, TheClientsDeadlineEndsARequest) {
  StartGateway();
  HttpClient client = Connect();
  client.Send(Post("/v1/completions", kCompletion, "X-Antiphon-Timeout-Ms: 200\r\n"));
  const auto start = a_.NextStart();
  ASSERT_TRUE(start);
  EXPECT_GT(start->deadline_ms(), 0u);
  EXPECT_LE(start->deadline_ms(), 200u);
  const HttpAnswer answer = client.Read();
  EXPECT_EQ(answer.status, 504);
  EXPECT_TRUE(a_.NextCancel());
  for (const char* wrong : {"0", "-1", "1s", "99999999999"}) {
    const std::string header = std::string("X-Antiphon-Timeout-Ms: ") + wrong + "\r\n";
    EXPECT_EQ(client.Request(Post("/v1/completions", kCompletion, header)).status, 400) << wrong;
  }
}

TEST_F(GatewayTest, DrainsWithoutLosingARequest) {
  StartGateway();
  HttpClient client = Connect();
  client.Send(Post("/v1/completions", kStream));
  const auto start = a_.NextStart();
  ASSERT_TRUE(start);
  a_.Say(*start, 0, "abc");
  client.ReadHead();
  absl::Notification done;
  gateway_->Drain(absl::ZeroDuration(), absl::Hours(1), [&] { done.Notify(); });
  HttpClient late = Connect();
  HttpAnswer refused;
  for (int i = 0; i < 10'000; ++i) {  // until it has begun
    refused = late.Request(Post("/v1/completions", kUnknown));
    if (refused.status != 404) break;
  }
  EXPECT_EQ(refused.status, 503);
  EXPECT_EQ(Text(Parse(refused.body).at("error").at("code")), "draining");
  EXPECT_FALSE(done.HasBeenNotified());
  a_.Say(*start, 3, "def", wire::FINISH_REASON_LENGTH);
  ASSERT_TRUE(done.WaitForNotificationWithTimeout(kPatience));
  // As the daemon does: what is complete still leaves.
  server_->Drain();
  StopGateway();
  Events events(client);
  EXPECT_EQ(events.TextUntil(6), "abcdef");
  EXPECT_TRUE(events.Next());
  EXPECT_EQ(events.Next(), "[DONE]");
  EXPECT_EQ(events.Next(), std::nullopt);
}

TEST_F(GatewayTest, TheDrainsDeadlineEndsWhatStillRuns) {
  StartGateway();
  HttpClient client = Connect(), whole = Connect();
  client.Send(Post("/v1/completions", kStream));
  const auto start = a_.NextStart();
  ASSERT_TRUE(start);
  a_.Say(*start, 0, "abc");
  client.ReadHead();
  Events events(client);
  EXPECT_EQ(events.TextUntil(3), "abc");
  whole.Send(Post("/v1/completions", kCompletion));
  ASSERT_TRUE(a_.NextStart());
  absl::Notification done;
  gateway_->Drain(absl::ZeroDuration(), absl::Milliseconds(50), [&] { done.Notify(); });
  ASSERT_TRUE(done.WaitForNotificationWithTimeout(kPatience));
  const auto error = events.Next();
  ASSERT_TRUE(error);
  EXPECT_EQ(Text(Parse(*error).at("error").at("code")), "draining");
  EXPECT_EQ(events.Next(), "[DONE]");
  EXPECT_EQ(events.Next(), std::nullopt);
  EXPECT_EQ(whole.Read().status, 503);
  EXPECT_TRUE(a_.NextCancel());
  EXPECT_TRUE(a_.NextCancel());
}

TEST_F(GatewayTest, ItsEndWithRequestsUnderWayIsQuiet) {
  for (int round = 0; round < 5; ++round) {
    StartGateway();
    std::vector<HttpClient> clients;
    for (int i = 0; i < 4; ++i) {
      clients.push_back(Connect());
      clients.back().Send(Post("/v1/completions", kStream));
      ASSERT_TRUE(a_.NextStart());
    }
    // The streams break while it goes.
    if (round % 2 == 1) a_.BreakStreams();
    StopGateway();
  }
}

inference::v1::CompletionRequest GrpcRequest() {
  inference::v1::CompletionRequest request;
  request.set_model("tiny");
  request.add_prompts()->set_text("abc");
  request.mutable_options()->set_max_tokens(64);
  return request;
}

TEST_F(GatewayTest, BothFrontsGiveTheSameTokens) {
  StartGateway();
  InferenceClient grpc(grpc_->port());
  const std::string said = "caf\xc3\xa9 \xe2\x82\xac!";
  const auto answer = [&] {
    const auto start = a_.NextStart();
    ASSERT_TRUE(start);
    // One token at a time: characters in pieces.
    for (uint32_t i = 0; i < said.size(); ++i) {
      a_.Say(*start, i, said.substr(i, 1),
             i + 1 == said.size() ? wire::FINISH_REASON_LENGTH : wire::FINISH_REASON_UNSPECIFIED);
    }
  };
  std::vector<uint32_t> ids;
  for (char c : said) ids.push_back(static_cast<uint8_t>(c));

  HttpClient http = Connect();
  http.Send(Post("/v1/completions",
                 R"({"prompt":"abc","max_tokens":64,"logprobs":1,"return_token_ids":true})"));
  answer();
  const HttpAnswer from_http = http.Read();
  ASSERT_EQ(from_http.status, 200) << from_http.body;
  const json::value body = Parse(from_http.body);
  EXPECT_EQ(Text(body.at("choices").at(0).at("text")), said);
  std::vector<uint32_t> http_ids;
  for (const json::value& id : body.at("choices").at(0).at("token_ids").as_array()) {
    http_ids.push_back(static_cast<uint32_t>(id.as_int64()));
  }
  EXPECT_EQ(http_ids, ids);

  auto stream = grpc.CompleteStream(GrpcRequest());
  answer();
  std::string text, reason;
  std::vector<uint32_t> stream_ids;
  uint32_t total = 0;
  while (const auto chunk = stream->Read()) {
    text += chunk->text();
    stream_ids.insert(stream_ids.end(), chunk->token_ids().begin(), chunk->token_ids().end());
    if (!chunk->finish_reason().empty()) reason = chunk->finish_reason();
    if (chunk->has_usage()) total = chunk->usage().total_tokens();
    EXPECT_EQ(chunk->model(), "tiny");
    EXPECT_EQ(chunk->id().substr(0, 5), "cmpl-");
  }
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_EQ(text, said);
  EXPECT_EQ(stream_ids, ids);
  EXPECT_EQ(reason, "length");
  EXPECT_EQ(total, 3 + said.size());

  Thread worker("answers", answer);
  inference::v1::CompletionRequest with_logprobs = GrpcRequest();
  with_logprobs.mutable_options()->set_logprobs(true);
  const auto whole = grpc.Complete(with_logprobs);
  worker.Join();
  ASSERT_TRUE(whole.ok()) << whole.status();
  ASSERT_EQ(whole->choices_size(), 1);
  EXPECT_EQ(whole->choices(0).text(), said);
  EXPECT_EQ(whole->choices(0).logprobs_size(), static_cast<int>(said.size()));
  EXPECT_EQ(whole->usage().completion_tokens(), said.size());
}

TEST_F(GatewayTest, GrpcErrorsAreStatuses) {
  StartGateway();
  InferenceClient grpc(grpc_->port());
  conductor_.Answer([](const wire::AdmitRequest&) {
    return Rejected(wire::Rejected::PREDICTED_TBT, 1, "Too slow now.");
  });
  const auto rejected = grpc.Complete(GrpcRequest());
  EXPECT_EQ(rejected.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(rejected.status().message()), HasSubstr("Too slow now."));
  auto wrong = GrpcRequest();
  wrong.mutable_options()->set_temperature(-1);
  const auto invalid = grpc.Complete(wrong);
  EXPECT_EQ(invalid.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(invalid.status().message()), HasSubstr("temperature"));
  auto unknown = GrpcRequest();
  unknown.set_model("huge");
  EXPECT_EQ(grpc.Complete(unknown).status().code(), absl::StatusCode::kNotFound);
  auto stream = grpc.CompleteStream(unknown);
  EXPECT_EQ(stream->Read(), std::nullopt);
  EXPECT_EQ(stream->Finish().code(), absl::StatusCode::kNotFound);
  const auto odd_class = grpc.Complete(GrpcRequest(), {.metadata = {{"x-antiphon-class", "a b"}}});
  EXPECT_EQ(odd_class.status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(GatewayTest, AGrpcClientThatLeavesStopsItsDecode) {
  StartGateway();
  InferenceClient grpc(grpc_->port());
  auto stream = grpc.CompleteStream(GrpcRequest());
  auto start = a_.NextStart();
  ASSERT_TRUE(start);
  a_.Say(*start, 0, "abc");
  ASSERT_TRUE(stream->Read());
  stream->Cancel();
  auto cancel = a_.NextCancel();
  ASSERT_TRUE(cancel);
  EXPECT_EQ(cancel->id(), start->id());
  // A deadline is kept here or there, whoever is first.
  const auto late = grpc.Complete(GrpcRequest(), {.timeout = absl::Milliseconds(200)});
  EXPECT_EQ(late.status().code(), absl::StatusCode::kDeadlineExceeded);
  start = a_.NextStart();
  ASSERT_TRUE(start);
  EXPECT_LE(start->deadline_ms(), 200u);
  cancel = a_.NextCancel();
  ASSERT_TRUE(cancel);
  EXPECT_EQ(cancel->id(), start->id());
}

// More than the gateway and the transport keep for one client.
TEST_F(GatewayTest, AGrpcClientThatDoesNotReadIsGivenUp) {
  StartGateway();
  InferenceClient grpc(grpc_->port());
  auto request = GrpcRequest();
  request.add_prompts()->set_text("def");
  request.mutable_options()->set_max_tokens(500);
  request.mutable_options()->set_n(16);
  request.mutable_options()->set_logprobs(true);
  request.mutable_options()->set_top_logprobs(20);
  auto stream = grpc.CompleteStream(request);
  std::vector<wire::Start> starts;
  for (int i = 0; i < 32; ++i) {
    const auto start = a_.NextStart();
    ASSERT_TRUE(start);
    starts.push_back(*start);
    a_.Say(*start, 0, "x");  // the first of a prompt lets its others begin
  }
  for (uint32_t t = 1; t < 490; ++t) {
    for (const wire::Start& start : starts) a_.Say(start, t, "x");
  }
  ASSERT_TRUE(a_.NextCancel());
  AwaitFinished();
  EXPECT_EQ(Metric("antiphon_stream_backpressure_cancels_total"), 1);
  EXPECT_EQ(Metric("antiphon_disconnects_total"), 0);
  // The call is over for gRPC too, though nobody read.
  int messages = 0;
  while (stream->Read()) ++messages;
  EXPECT_LT(messages, 32 * 490);
  EXPECT_FALSE(stream->Finish().ok());
}

std::string KeyEntry(const std::string& name, const std::string& tenant, const std::string& key) {
  return "- {name: " + name + ", tenant: " + tenant + ", sha256: " + Sha256Hex(key) + "}\n";
}

class GatewayKeysTest : public GatewayTest {
 protected:
  GatewayKeysTest() {
    std::string pattern = testing::TempDir() + "/antiphon-keys-XXXXXX";
    close(mkstemp(pattern.data()));
    path_ = pattern;
    std::ofstream(path_) << KeyEntry("ann", "red", "key-a") << KeyEntry("bob", "blue", "key-b");
  }
  ~GatewayKeysTest() override {
    StopGateway();
    std::filesystem::remove(path_);
  }
  std::string path_;
};

TEST_F(GatewayKeysTest, KeysGuardEverythingButHealth) {
  StartGateway({.keys_file = path_});
  HttpClient client = Connect();
  for (const char* path : {"/", "/health", "/livez", "/readyz", "/version"}) {
    EXPECT_EQ(client.Request(Get(path)).status, 200) << path;
  }
  for (const char* path : {"/v1/models", "/models/tiny", "/metrics"}) {
    const HttpAnswer refused = client.Request(Get(path));
    EXPECT_EQ(refused.status, 401) << path;
    EXPECT_EQ(refused.Header("www-authenticate"), "Bearer");
    EXPECT_EQ(Text(Parse(refused.body).at("error").at("code")), "invalid_api_key");
    EXPECT_EQ(client.Request(Get(path, "Authorization: Bearer key-a\r\n")).status, 200) << path;
  }
  for (const char* path : {"/v1/chat/completions", "/v1/completions", "/tokenize"}) {
    HttpClient other = Connect();
    EXPECT_EQ(other.Request(Post(path, "{}")).status, 401) << path;
  }
  InferenceClient grpc(grpc_->port());
  EXPECT_EQ(grpc.ListModels().status().code(), absl::StatusCode::kUnauthenticated);
  EXPECT_EQ(grpc.Complete(GrpcRequest()).status().code(), absl::StatusCode::kUnauthenticated);
  auto stream = grpc.CompleteStream(GrpcRequest(), {.metadata = {{"authorization", "Bearer no"}}});
  EXPECT_EQ(stream->Read(), std::nullopt);
  EXPECT_EQ(stream->Finish().code(), absl::StatusCode::kUnauthenticated);
  const auto models = grpc.ListModels({.metadata = {{"authorization", "Bearer key-b"}}});
  ASSERT_TRUE(models.ok()) << models.status();
  EXPECT_EQ(models->models(0).id(), "tiny");
}

TEST_F(GatewayKeysTest, TenantsShareNoBlockKeys) {
  StartGateway({.keys_file = path_});
  conductor_.Answer(
      [](const wire::AdmitRequest&) { return Rejected(wire::Rejected::QUEUE_FULL, 1); });
  HttpClient client = Connect();
  const auto admit = [&](const std::string& key) {
    client.Request(Post("/v1/completions",
                        R"({"prompt":"the same text for all, longer than one block"})",
                        "Authorization: Bearer " + key + "\r\n"));
    return *conductor_.NextAdmit();
  };
  const wire::AdmitRequest red = admit("key-a"), blue = admit("key-b"), red_again = admit("key-a");
  EXPECT_EQ(red.tenant(), "red");
  EXPECT_EQ(blue.tenant(), "blue");
  ASSERT_GE(red.block_keys_size(), 2);
  ASSERT_EQ(red.block_keys_size(), blue.block_keys_size());
  for (int i = 0; i < red.block_keys_size(); ++i) {
    EXPECT_EQ(red.block_keys(i), red_again.block_keys(i));
    EXPECT_NE(red.block_keys(i), blue.block_keys(i));
  }
}

TEST_F(GatewayKeysTest, AKeyThatIsWithdrawnWhileTheBodyComesIsRefused) {
  StartGateway({.keys_file = path_});
  HttpClient client = Connect();
  const std::string request = Post("/v1/completions", kCompletion,
                                   "Authorization: Bearer key-a\r\nExpect: 100-continue\r\n");
  const size_t head = request.find("\r\n\r\n") + 4;
  client.Send(request.substr(0, head));
  ASSERT_EQ(client.Read().status, 100);
  std::ofstream(path_) << KeyEntry("bob", "blue", "key-b");
  ASSERT_TRUE(auth_->Reload().ok());
  client.Send(request.substr(head));
  EXPECT_EQ(client.Read().status, 401) << "it must not run as another tenant";
}

TEST_F(GatewayTest, SaysWhatItServes) {
  StartGateway();
  HttpClient client = Connect();
  for (const char* path : {"/v1/models", "/models", "/v1/models/"}) {
    const HttpAnswer list = client.Request(Get(path));
    EXPECT_EQ(Text(Parse(list.body).at("data").at(0).at("id")), "tiny") << path;
  }
  for (const char* path : {"/v1/models/tiny", "/models/alias", "/v1/models/t%69ny"}) {
    const HttpAnswer one = client.Request(Get(path));
    ASSERT_EQ(one.status, 200) << path;
    EXPECT_EQ(Text(Parse(one.body).at("id")), "tiny") << path;
  }
  const HttpAnswer unknown = client.Request(Get("/v1/models/huge"));
  EXPECT_EQ(unknown.status, 404);
  EXPECT_THAT(Text(Parse(unknown.body).at("error").at("message")), HasSubstr("tiny"));
  client.Send("HEAD /v1/models HTTP/1.1\r\nHost: a\r\n\r\n");
  EXPECT_EQ(client.Read(/*head=*/true).status, 200);
  const HttpAnswer tokens = client.Request(Post("/tokenize", R"({"prompt":"abc"})"));
  EXPECT_EQ(Parse(tokens.body).at("count"), 3);
  const HttpAnswer text = client.Request(Post("/detokenize", R"({"tokens":[97,98]})"));
  EXPECT_EQ(Text(Parse(text.body).at("prompt")), "ab");
}

TEST_F(GatewayTest, RefusesInJsonWithARequestId) {
  StartGateway();
  const struct {
    std::string bytes;
    int status;
    const char* code;
  } kCases[] = {
      {Get("/nothing"), 404, "route_not_found"},
      {Get("/a\xff\xc3\xe2\x80"), 404, "route_not_found"},
      {Get("/v1/models/a\xff\xc3"), 404, "model_not_found"},
      {Get("/v1/models/%ff%00%zz%"), 404, "model_not_found"},
      {Get("/v1/completions"), 405, "method_not_allowed"},
      {Post("/v1/models", "{}"), 405, "method_not_allowed"},
      {Post("/v1/embeddings", "{}"), 501, "not_supported"},
      {"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain\r\n"
       "Content-Length: 2\r\n\r\n{}",
       415, "unsupported_media_type"},
      {Post("/v1/completions", "{"), 400, "invalid_json"},
      {Post("/v1/completions", R"({"prompt":"a","model":"huge"})"), 404, "model_not_found"},
      {Post("/v1/completions", kCompletion, "X-Antiphon-Class: \xff\xfe\r\n"), 400,
       "invalid_value"},
      {Post("/v1/completions", kCompletion, "X-Antiphon-Class: a b\r\n"), 400, "invalid_value"},
      {"nonsense\r\n\r\n", 400, "bad_request"},
  };
  for (const auto& c : kCases) {
    HttpClient client = Connect();
    const HttpAnswer answer = client.Request(c.bytes);
    EXPECT_EQ(answer.status, c.status) << c.bytes;
    EXPECT_NE(answer.Header("x-request-id"), "") << c.bytes;
    EXPECT_EQ(Text(Parse(answer.body).at("error").at("code")), c.code) << c.bytes;
  }
  HttpClient client = Connect();
  EXPECT_EQ(client.Request(Get("/nothing", "X-Request-Id: good-1.2_3\r\n")).Header("x-request-id"),
            "good-1.2_3");
  for (const std::string& bad :
       {std::string("a b"), std::string("a\xff"), std::string(129, 'x'), std::string("a;b")}) {
    const std::string id =
        client.Request(Get("/nothing", "X-Request-Id: " + bad + "\r\n")).Header("x-request-id");
    EXPECT_EQ(id.size(), 32u) << id;
  }
}

}  // namespace
}  // namespace antiphon::gateway
