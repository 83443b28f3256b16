// Python's operators on values. Everything that can walk a structure spends steps and gives up with
// RESOURCE_EXHAUSTED; type errors are INVALID_ARGUMENT with Python's wording.
#ifndef ANTIPHON_MODEL_JINJA_OPERATIONS_H_
#define ANTIPHON_MODEL_JINJA_OPERATIONS_H_

#include <compare>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/jinja_ast.h"
#include "model/jinja_value.h"

namespace antiphon::model::jinja {

// Deepest structure that is compared or printed.
inline constexpr int kDataDepthMax = 200;

// "TYPE" errors of ours: INVALID_ARGUMENT.
absl::Status Error(std::string message);
// The error of using an undefined value.
absl::Status UndefinedError(const Value& undefined);

bool Truthy(const Value& value);
absl::StatusOr<bool> Equal(Heap& heap, const Value& a, const Value& b, int depth = 0);
// `symbol` names the operator in the error.
absl::StatusOr<std::partial_ordering> Compare(Heap& heap, const Value& a, const Value& b,
                                              std::string_view symbol = "<", int depth = 0);
absl::StatusOr<bool> Contains(Heap& heap, const Value& container, const Value& item);

// All items in order; consumes a one-shot iterator.
absl::StatusOr<std::vector<Value>> Items(Heap& heap, const Value& iterable);
bool IsIterable(const Value& value);
// Nothing for values without len().
std::optional<Int> Length(const Value& value);
std::string_view Slice(const String& text, size_t from, size_t to);  // in code points

Result Arithmetic(Heap& heap, Operator op, const Value& a, const Value& b);
Result Negate(const Value& value);

// value[key]: item first, then attribute; undefined when there is neither.
Result Subscript(Heap& heap, const Value& value, const Value& key);
// value[start:stop:step]; none or undefined bounds are open.
Result SliceOf(Heap& heap, const Value& value, const Value& start, const Value& stop,
               const Value& step);

}  // namespace antiphon::model::jinja

#endif  // ANTIPHON_MODEL_JINJA_OPERATIONS_H_
