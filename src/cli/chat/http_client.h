// A small blocking HTTP/1.1 client: one request a connection, plain or chunked answers, streamed.
#ifndef ANTIPHON_CLI_CHAT_HTTP_CLIENT_H_
#define ANTIPHON_CLI_CHAT_HTTP_CLIENT_H_

#include <string>
#include <string_view>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace antiphon::cli {

struct HttpRequest {
  std::string address;  // host:port
  std::string method = "GET";
  std::string path;
  std::string body;                             // JSON; sent when not empty
  std::string api_key;                          // sent as a bearer when not empty
  absl::Duration silence = absl::Seconds(120);  // the longest wait for more bytes
};

// Turns the bytes of an answer into its status and the pieces of its body. Pure.
class HttpAnswerParser {
 public:
  // INVALID_ARGUMENT when this is not HTTP. `piece` runs for what is body.
  absl::Status Push(std::string_view bytes, absl::FunctionRef<void(std::string_view)> piece);
  bool done() const { return state_ == State::kDone; }
  // The connection ended. UNAVAILABLE when the answer was not complete.
  absl::Status Finish() const;
  int status() const { return status_; }

 private:
  enum class State { kHead, kPlain, kUntilClose, kChunkSize, kChunk, kChunkEnd, kTrailer, kDone };
  absl::Status ParseHead(std::string_view head);

  State state_ = State::kHead;
  int status_ = 0;
  uint64_t left_ = 0;  // of the plain body or of the chunk
  std::string buffer_;
};

// Splits an event stream into the values of its `data:` lines. Pure.
class EventStreamParser {
 public:
  void Push(std::string_view bytes, absl::FunctionRef<void(std::string_view)> data);

 private:
  std::string buffer_;
};

// Runs `piece` for the body as it comes; returns the HTTP status. UNAVAILABLE when the server
// cannot be reached or breaks off, DEADLINE_EXCEEDED when it is silent.
absl::StatusOr<int> Fetch(const HttpRequest& request,
                          absl::FunctionRef<void(std::string_view)> piece);

}  // namespace antiphon::cli

#endif  // ANTIPHON_CLI_CHAT_HTTP_CLIENT_H_
