#include "cli/chat/http_client.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "cli/chat/terminal_text.h"

namespace antiphon::cli {
namespace {

struct Parsed {
  absl::Status status;
  int code = 0;
  std::string body;
  bool done = false;
};

// Pushed `step` bytes at a time.
Parsed Parse(const std::string& bytes, size_t step) {
  Parsed out;
  HttpAnswerParser parser;
  for (size_t i = 0; i < bytes.size() && out.status.ok(); i += step) {
    out.status = parser.Push(std::string_view(bytes).substr(i, step),
                             [&out](std::string_view piece) { out.body += piece; });
  }
  if (out.status.ok()) out.status = parser.Finish();
  out.code = parser.status();
  out.done = parser.done();
  return out;
}

TEST(HttpAnswerParserTest, ReadsPlainAndChunkedBodiesHoweverTheyAreCut) {
  const std::string plain = "HTTP/1.1 429 Too Many\r\ncontent-length: 5\r\n\r\nhello";
  const std::string chunked =
      "HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n3;x=y\r\nhel\r\n2\r\nlo\r\n0\r\nT: "
      "1\r\n\r\n";
  for (size_t step : {1, 2, 3, 7, 1000}) {
    const Parsed a = Parse(plain, step);
    EXPECT_TRUE(a.status.ok() && a.done);
    EXPECT_EQ(a.code, 429);
    EXPECT_EQ(a.body, "hello");
    const Parsed b = Parse(chunked, step);
    EXPECT_TRUE(b.status.ok() && b.done) << b.status;
    EXPECT_EQ(b.code, 200);
    EXPECT_EQ(b.body, "hello");
  }
}

TEST(HttpAnswerParserTest, WithoutALengthTheEndIsTheEnd) {
  const Parsed p = Parse("HTTP/1.0 200 OK\r\n\r\nabc", 2);
  EXPECT_TRUE(p.status.ok());
  EXPECT_EQ(p.body, "abc");
}

TEST(HttpAnswerParserTest, ACutAnswerIsNoAnswer) {
  EXPECT_EQ(Parse("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhel", 9).status.code(),
            absl::StatusCode::kUnavailable);
  EXPECT_EQ(
      Parse("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n", 9).status.code(),
      absl::StatusCode::kUnavailable);
  EXPECT_EQ(Parse("HTTP/1.1 2", 9).status.code(), absl::StatusCode::kUnavailable);
}

TEST(HttpAnswerParserTest, GarbageIsRefused) {
  for (const char* bad : {"SSH-2.0-OpenSSH_9.2\r\n\r\n", "HTTP/1.1 xyz\r\n\r\n",
                          "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
                          "HTTP/1.1 200 OK\r\nContent-Length: -4\r\n\r\n"}) {
    EXPECT_EQ(Parse(bad, 5).status.code(), absl::StatusCode::kInvalidArgument) << bad;
  }
  EXPECT_EQ(Parse(std::string(100'000, 'x'), 1000).status.code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(EventStreamParserTest, GivesTheDataLinesAndPassesOverTheRest) {
  const std::string stream = ": ping\n\ndata: one\r\n\r\nevent: x\ndata:two\n\ndata: [DONE]\n\n";
  for (size_t step : {1, 4, 100}) {
    EventStreamParser parser;
    std::vector<std::string> seen;
    for (size_t i = 0; i < stream.size(); i += step) {
      parser.Push(std::string_view(stream).substr(i, step),
                  [&seen](std::string_view data) { seen.emplace_back(data); });
    }
    EXPECT_EQ(seen, (std::vector<std::string>{"one", "two", "[DONE]"}));
  }
}

TEST(TerminalTextTest, WhatAModelSaysCannotCommandTheTerminal) {
  TerminalText text;
  EXPECT_EQ(text.Push("a\x1b[2Jb\r\n\tc\x07\x7f\xc2\x9bz é 日"), "a[2Jb\n\tcz é 日");
}

}  // namespace
}  // namespace antiphon::cli
