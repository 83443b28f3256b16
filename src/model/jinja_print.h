// Values as text: str(), repr() and json.dumps() of Python.
#ifndef ANTIPHON_MODEL_JINJA_PRINT_H_
#define ANTIPHON_MODEL_JINJA_PRINT_H_

#include <optional>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/jinja_value.h"

namespace antiphon::model::jinja {

// Fail with RESOURCE_EXHAUSTED when the text outgrows the heap's limit.
absl::Status AppendStr(Heap& heap, const Value& value, std::string* out);
absl::Status AppendRepr(Heap& heap, const Value& value, std::string* out, int depth = 0);
absl::StatusOr<std::string> ToStr(Heap& heap, const Value& value);

// The arguments of Hugging Face's `tojson`.
struct JsonStyle {
  bool ensure_ascii = false;
  bool sort_keys = false;
  std::optional<std::string> indent;  // of one level
  std::string item_separator = ", ";
  std::string key_separator = ": ";
};
absl::StatusOr<std::string> ToJson(Heap& heap, const Value& value, const JsonStyle& style);

}  // namespace antiphon::model::jinja

#endif  // ANTIPHON_MODEL_JINJA_PRINT_H_
