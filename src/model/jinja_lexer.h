// Tokens of a template, with the white space control of Jinja2 under trim_blocks=True,
// lstrip_blocks=True and keep_trailing_newline=False (what Hugging Face sets).
#ifndef ANTIPHON_MODEL_JINJA_LEXER_H_
#define ANTIPHON_MODEL_JINJA_LEXER_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "model/jinja_value.h"

namespace antiphon::model::jinja {

struct Token {
  enum class Kind : uint8_t {
    kData,
    kVariableBegin,
    kVariableEnd,
    kBlockBegin,
    kBlockEnd,
    kName,
    kString,
    kInteger,
    kFloat,
    kOperator,
    kEnd,
  };
  Kind kind;
  int line;
  std::string text;  // data, name, decoded string or the operator
  Int integer = 0;
  double real = 0;

  bool IsOperator(std::string_view symbol) const {
    return kind == Kind::kOperator && text == symbol;
  }
  bool IsName(std::string_view name) const { return kind == Kind::kName && text == name; }
};

// "line 3: ..." as INVALID_ARGUMENT.
absl::Status SyntaxError(int line, std::string_view message);

// The last token is kEnd. INVALID_ARGUMENT with the line. The source must be UTF-8.
absl::StatusOr<std::vector<Token>> Tokenize(std::string_view source);

}  // namespace antiphon::model::jinja

#endif  // ANTIPHON_MODEL_JINJA_LEXER_H_
