#include "model/chat_template.h"

#include <utility>
#include <vector>

#include "common/status_macros.h"
#include "model/jinja_ast.h"
#include "model/jinja_interpreter.h"
#include "model/jinja_lexer.h"
#include "model/jinja_parser.h"
#include "model/jinja_value.h"

namespace antiphon::model {

struct ChatTemplate::State {
  std::unique_ptr<const jinja::Template> tree;
};

ChatTemplate::ChatTemplate() : state_(std::make_unique<State>()) {}
ChatTemplate::~ChatTemplate() = default;

absl::StatusOr<std::unique_ptr<ChatTemplate>> ChatTemplate::Parse(std::string_view source) {
  ASSIGN_OR_RETURN(std::vector<jinja::Token> tokens, jinja::Tokenize(source));
  std::unique_ptr<ChatTemplate> out(new ChatTemplate());
  ASSIGN_OR_RETURN(out->state_->tree, jinja::Parser(std::move(tokens)).Run());
  return out;
}

absl::StatusOr<std::string> ChatTemplate::Render(const JsonObject& context, absl::Time now,
                                                 const TemplateLimits& limits) const {
  jinja::Heap heap(limits.steps, limits.memory_bytes);
  return jinja::Interpreter(*state_->tree, heap, now, limits).Run(context);
}

}  // namespace antiphon::model
