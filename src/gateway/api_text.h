// Answers as JSON text, in OpenAI's shapes: whole ones, and the events of a stream.
#ifndef ANTIPHON_GATEWAY_API_TEXT_H_
#define ANTIPHON_GATEWAY_API_TEXT_H_

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "gateway/exchange.h"
#include "gateway/served_model.h"

namespace antiphon::gateway {

// "{prompt_tokens, completion_tokens, total_tokens, prompt_tokens_details}".
std::string UsageJson(const Usage& usage);
// {"object":"list","data":[...]}
std::string ModelListJson(const Catalog& catalog);
std::string ModelJson(const ServedModel& model);
// "fp_" and a digest of what decides the tokens.
std::string SystemFingerprint(const ServedModel& model);
// The text of a token alone; bytes that are no UTF-8 become U+FFFD.
std::string TokenText(const model::Tokenizer& tokenizer, uint32_t id);

// What is the same in every part of one answer.
struct AnswerHead {
  bool chat = false;
  std::string id;  // "chatcmpl-..." or "cmpl-..."
  int64_t created = 0;
  ServedModelPtr model;
  bool logprobs = false;
  bool return_token_ids = false;
};

// Collects an answer and renders it whole.
class WholeAnswer {
 public:
  void Add(const ChoiceDelta& delta);
  void Add(const ChoiceEnd& end);
  std::string Render(const AnswerHead& head, const Usage& usage) const;

 private:
  struct Choice {
    std::string text;
    std::vector<OutputToken> tokens;
    Ending ending;
  };
  std::map<uint32_t, Choice> choices_;
};

// Server-sent events, framed: "data: {...}\n\n". One for each instance and choice keeps its
// offsets.
class EventStream {
 public:
  EventStream(AnswerHead head, bool include_usage, bool continuous_usage);

  // Empty when there is nothing to say.
  std::string Render(const ChoiceDelta& delta);
  std::string Render(const ChoiceEnd& end);
  // The last events: usage when asked for, then [DONE].
  std::string RenderDone(const Usage& usage);
  static std::string RenderError(const ApiError& error);

 private:
  std::string Event(std::string_view choice, const Usage& usage) const;

  const AnswerHead head_;
  const bool include_usage_;
  const bool continuous_usage_;
  std::string begin_;                       // of every event, up to its choices
  std::map<uint32_t, size_t> text_offset_;  // of completions' logprobs, by choice
};

}  // namespace antiphon::gateway

#endif  // ANTIPHON_GATEWAY_API_TEXT_H_
