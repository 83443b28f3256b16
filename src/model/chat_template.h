// Jinja chat templates (the subset that model files use, semantics of Jinja2 with trim_blocks and
// lstrip_blocks as Hugging Face sets them), in a bounded interpreter: no attribute access beyond
// data, no I/O, limits on steps, depth, memory and output.
#ifndef ANTIPHON_MODEL_CHAT_TEMPLATE_H_
#define ANTIPHON_MODEL_CHAT_TEMPLATE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "model/json_value.h"

namespace antiphon::model {

struct TemplateLimits {
  uint64_t steps = 5'000'000;
  size_t output_bytes = 32u << 20;
  size_t memory_bytes = 128u << 20;
  int depth = 64;
};

// Immutable, thread-safe.
class ChatTemplate {
 public:
  // INVALID_ARGUMENT with line number and what was expected.
  static absl::StatusOr<std::unique_ptr<ChatTemplate>> Parse(std::string_view source);
  ~ChatTemplate();

  // `context` holds the variables: messages, tools, add_generation_prompt, bos_token, eos_token and
  // whatever chat_template_kwargs adds. `now` feeds strftime_now.
  // INVALID_ARGUMENT: raise_exception (its message) or an error of evaluation (with the line);
  // RESOURCE_EXHAUSTED: a limit.
  absl::StatusOr<std::string> Render(const JsonObject& context, absl::Time now,
                                     const TemplateLimits& limits = {}) const;

 private:
  ChatTemplate();
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace antiphon::model

#endif  // ANTIPHON_MODEL_CHAT_TEMPLATE_H_
