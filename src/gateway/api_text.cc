#include "gateway/api_text.h"

#include <spdlog/fmt/fmt.h>

#include <set>
#include <utility>

#include "common/block_key.h"
#include "common/wire.h"
#include "gateway/json_text.h"

namespace antiphon::gateway {
namespace {

void AppendBytes(std::string& out, std::string_view bytes) {
  out += '[';
  for (size_t i = 0; i < bytes.size(); ++i) {
    if (i > 0) out += ',';
    AppendUint(out, static_cast<uint8_t>(bytes[i]));
  }
  out += ']';
}

void AppendTokenMembers(std::string& out, const model::Tokenizer& tokenizer, uint32_t id,
                        float logprob) {
  out += R"("token":)";
  AppendJsonString(out, TokenText(tokenizer, id));
  out += R"(,"logprob":)";
  AppendJsonFloat(out, logprob);
  out += R"(,"bytes":)";
  AppendBytes(out, tokenizer.TokenBytes(id));
}

// {"content":[...],"refusal":null}
void AppendChatLogprobs(std::string& out, const model::Tokenizer& tokenizer,
                        const std::vector<OutputToken>& tokens) {
  out += R"({"content":[)";
  bool first = true;
  for (const OutputToken& t : tokens) {
    if (!t.shown) continue;
    if (!std::exchange(first, false)) out += ',';
    out += '{';
    AppendTokenMembers(out, tokenizer, t.id, t.logprobs.logprob());
    out += R"(,"top_logprobs":[)";
    for (int i = 0; i < t.logprobs.top_ids_size(); ++i) {
      out += i > 0 ? ",{" : "{";
      AppendTokenMembers(out, tokenizer, t.logprobs.top_ids(i), t.logprobs.top_logprobs(i));
      out += '}';
    }
    out += "]}";
  }
  out += R"(],"refusal":null})";
}

// Characters that begin in `bytes`: clients index text by character, and a character's bytes may
// be spread over tokens.
size_t CountCharacters(std::string_view bytes) {
  size_t count = 0;
  for (char c : bytes) count += (static_cast<uint8_t>(c) & 0xc0) != 0x80;
  return count;
}

// {"tokens":[],"token_logprobs":[],"top_logprobs":[],"text_offset":[]}
void AppendLegacyLogprobs(std::string& out, const model::Tokenizer& tokenizer,
                          const std::vector<OutputToken>& tokens, size_t& offset) {
  std::string names, values, tops, offsets;
  for (const OutputToken& t : tokens) {
    if (!t.shown) continue;
    const char* comma = names.empty() ? "" : ",";
    names += comma;
    AppendJsonString(names, TokenText(tokenizer, t.id));
    values += comma;
    AppendJsonFloat(values, t.logprobs.logprob());
    offsets += comma;
    AppendUint(offsets, offset);
    offset += CountCharacters(tokenizer.TokenBytes(t.id));
    tops += comma;
    tops += '{';
    // Parts of characters all read U+FFFD: an object has each name once, for the likeliest.
    std::set<std::string> named;
    for (int i = 0; i < t.logprobs.top_ids_size(); ++i) {
      const std::string text = TokenText(tokenizer, t.logprobs.top_ids(i));
      if (!named.insert(text).second) continue;
      if (named.size() > 1) tops += ',';
      AppendJsonString(tops, text);
      tops += ':';
      AppendJsonFloat(tops, t.logprobs.top_logprobs(i));
    }
    tops += '}';
  }
  out += fmt::format(R"({{"tokens":[{}],"token_logprobs":[{}],"top_logprobs":[{}],)"
                     R"("text_offset":[{}]}})",
                     names, values, tops, offsets);
}

void AppendTokenIds(std::string& out, const std::vector<OutputToken>& tokens) {
  out += R"(,"token_ids":[)";
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (i > 0) out += ',';
    AppendUint(out, tokens[i].id);
  }
  out += ']';
}

std::string_view FinishReason(const Ending& ending) {
  return ending.reason == EndReason::kLength ? "length" : "stop";
}

void AppendStopReason(std::string& out, const Ending& ending) {
  out += R"("stop_reason":)";
  if (ending.stop_token) {
    AppendUint(out, *ending.stop_token);
  } else if (!ending.stop_string.empty()) {
    AppendJsonString(out, ending.stop_string);
  } else {
    out += "null";
  }
}

void AppendHead(std::string& out, const AnswerHead& head, std::string_view object) {
  out += R"({"id":)";
  AppendJsonString(out, head.id);
  out += R"(,"object":")";
  out += object;
  out += R"(","created":)";
  AppendUint(out, static_cast<uint64_t>(head.created));
  out += R"(,"model":)";
  AppendJsonString(out, head.model->card.name());
  out += R"(,"system_fingerprint":)";
  AppendJsonString(out, SystemFingerprint(*head.model));
}

}  // namespace

std::string TokenText(const model::Tokenizer& tokenizer, uint32_t id) {
  return tokenizer.Decode({id}, /*skip_special=*/false);
}

std::string SystemFingerprint(const ServedModel& model) {
  return fmt::format("fp_{}", Sha256Hex(model.card.weights_digest() + kVersion).substr(0, 12));
}

std::string UsageJson(const Usage& usage) {
  return fmt::format(R"({{"prompt_tokens":{},"completion_tokens":{},"total_tokens":{},)"
                     R"("prompt_tokens_details":{{"cached_tokens":{}}}}})",
                     usage.prompt_tokens, usage.completion_tokens,
                     usage.prompt_tokens + usage.completion_tokens, usage.cached_tokens);
}

std::string ModelJson(const ServedModel& model) {
  const auto& card = model.card;
  std::string aliases;
  for (const std::string& alias : card.aliases()) {
    if (!aliases.empty()) aliases += ',';
    AppendJsonString(aliases, alias);
  }
  return fmt::format(R"({{"id":{},"object":"model","created":{},"owned_by":"antiphon",)"
                     R"("root":{},"parent":null,"max_model_len":{},"aliases":[{}]}})",
                     JsonString(card.name()), card.created_unix_s(), JsonString(card.name()),
                     card.context_length(), aliases);
}

std::string ModelListJson(const Catalog& catalog) {
  std::string out = R"({"object":"list","data":[)";
  for (size_t i = 0; i < catalog.models.size(); ++i) {
    if (i > 0) out += ',';
    out += ModelJson(*catalog.models[i]);
  }
  return out + "]}";
}

void WholeAnswer::Add(const ChoiceDelta& delta) {
  Choice& c = choices_[delta.choice];
  c.text += delta.delta.text;
  c.tokens.insert(c.tokens.end(), delta.delta.tokens.begin(), delta.delta.tokens.end());
}

void WholeAnswer::Add(const ChoiceEnd& end) { choices_[end.choice].ending = end.ending; }

std::string WholeAnswer::Render(const AnswerHead& head, const Usage& usage) const {
  std::string out;
  AppendHead(out, head, head.chat ? "chat.completion" : "text_completion");
  out += R"(,"choices":[)";
  bool first = true;
  for (const auto& [index, c] : choices_) {
    if (!std::exchange(first, false)) out += ',';
    out += R"({"index":)";
    AppendUint(out, index);
    if (head.chat) {
      out += R"(,"message":{"role":"assistant","content":)";
      AppendJsonString(out, c.text);
      out += R"(,"refusal":null})";
    } else {
      out += R"(,"text":)";
      AppendJsonString(out, c.text);
    }
    out += R"(,"logprobs":)";
    size_t offset = 0;
    if (!head.logprobs) {
      out += "null";
    } else if (head.chat) {
      AppendChatLogprobs(out, *head.model->tokenizer, c.tokens);
    } else {
      AppendLegacyLogprobs(out, *head.model->tokenizer, c.tokens, offset);
    }
    out += fmt::format(R"(,"finish_reason":"{}",)", FinishReason(c.ending));
    AppendStopReason(out, c.ending);
    if (head.return_token_ids) AppendTokenIds(out, c.tokens);
    out += '}';
  }
  out += R"(],"usage":)";
  out += UsageJson(usage);
  out += '}';
  return out;
}

EventStream::EventStream(AnswerHead head, bool include_usage, bool continuous_usage)
    : head_(std::move(head)), include_usage_(include_usage), continuous_usage_(continuous_usage) {
  begin_ = "data: ";
  AppendHead(begin_, head_, head_.chat ? "chat.completion.chunk" : "text_completion");
  begin_ += R"(,"choices":[)";
}

std::string EventStream::Event(std::string_view choice, const Usage& usage) const {
  std::string out;
  out.reserve(begin_.size() + choice.size() + 16);
  out += begin_;
  out += choice;
  out += ']';
  if (continuous_usage_) {
    out += R"(,"usage":)";
    out += UsageJson(usage);
  }
  out += "}\n\n";
  return out;
}

std::string EventStream::Render(const ChoiceDelta& delta) {
  std::string out;
  if (delta.first && head_.chat) {
    out += Event(fmt::format(R"({{"index":{},"delta":{{"role":"assistant","content":""}},)"
                             R"("logprobs":null,"finish_reason":null}})",
                             delta.choice),
                 delta.usage);
  }
  const bool logprobs = head_.logprobs && !delta.delta.tokens.empty();
  if (delta.delta.text.empty() && !logprobs && !head_.return_token_ids) {
    // A first token without text still opens a completion's stream: it is what TTFT measures.
    if (!delta.first || head_.chat) return out;
  }
  std::string choice = R"({"index":)";
  AppendUint(choice, delta.choice);
  choice += head_.chat ? R"(,"delta":{"content":)" : R"(,"text":)";
  AppendJsonString(choice, delta.delta.text);
  if (head_.chat) choice += '}';
  choice += R"(,"logprobs":)";
  if (!logprobs) {
    choice += "null";
  } else if (head_.chat) {
    AppendChatLogprobs(choice, *head_.model->tokenizer, delta.delta.tokens);
  } else {
    AppendLegacyLogprobs(choice, *head_.model->tokenizer, delta.delta.tokens,
                         text_offset_[delta.choice]);
  }
  choice += R"(,"finish_reason":null)";
  if (head_.return_token_ids) AppendTokenIds(choice, delta.delta.tokens);
  choice += '}';
  out += Event(choice, delta.usage);
  return out;
}

std::string EventStream::Render(const ChoiceEnd& end) {
  std::string choice = R"({"index":)";
  AppendUint(choice, end.choice);
  choice += head_.chat ? R"(,"delta":{})" : R"(,"text":"")";
  choice += fmt::format(R"(,"logprobs":null,"finish_reason":"{}",)", FinishReason(end.ending));
  AppendStopReason(choice, end.ending);
  choice += '}';
  return Event(choice, end.usage);
}

std::string EventStream::RenderDone(const Usage& usage) {
  std::string out;
  if (include_usage_) {
    out = begin_;
    out += R"(],"usage":)";
    out += UsageJson(usage);
    out += "}\n\n";
  }
  return out + "data: [DONE]\n\n";
}

std::string EventStream::RenderError(const ApiError& error) {
  return "data: " + ErrorJson(error) + "\n\ndata: [DONE]\n\n";
}

}  // namespace antiphon::gateway
