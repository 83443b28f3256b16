// What filters on collections share: attribute paths ("function.name", 0) and sorting.
#ifndef ANTIPHON_MODEL_JINJA_PATH_H_
#define ANTIPHON_MODEL_JINJA_PATH_H_

#include <vector>

#include "absl/status/status.h"
#include "model/jinja_interpreter.h"
#include "model/jinja_value.h"

namespace antiphon::model::jinja {

// `path` is an integer or a text of names and integers with dots between them.
Result FollowPath(Interpreter& in, const Value& item, const Value& path);

struct SortEntry {
  Value key;
  Value value;
};

// Strings in lower case unless `case_sensitive`, others as they are.
Value SortKey(Heap& heap, const Value& value, bool case_sensitive);
// Stable, also when reversed. INVALID_ARGUMENT when keys have no order.
absl::Status SortEntries(Heap& heap, bool reverse, std::vector<SortEntry>* entries);

}  // namespace antiphon::model::jinja

#endif  // ANTIPHON_MODEL_JINJA_PATH_H_
