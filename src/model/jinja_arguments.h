// Arguments of a call, and their binding to the parameters of a builtin.
#ifndef ANTIPHON_MODEL_JINJA_ARGUMENTS_H_
#define ANTIPHON_MODEL_JINJA_ARGUMENTS_H_

#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/jinja_value.h"

namespace antiphon::model::jinja {

struct Args {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> named;
};

// The values of a builtin's parameters. Integers of Python fit any width; ours are cut to
// +-2^62, which no length or width reaches.
class Bound {
 public:
  // INVALID_ARGUMENT on too many, unknown, repeated or missing arguments. `required` parameters
  // come first.
  static absl::StatusOr<Bound> Of(std::string_view callee, const Args& args,
                                  std::initializer_list<std::string_view> names,
                                  size_t required = 0);

  // Passed and not none.
  bool has(size_t i) const { return values_[i].has_value() && !values_[i]->is(Kind::kNone); }
  bool passed(size_t i) const { return values_[i].has_value(); }
  // Of a passed parameter.
  const Value& operator[](size_t i) const { return *values_[i]; }
  bool Flag(size_t i, bool fallback) const;
  absl::StatusOr<int64_t> Integer(size_t i, int64_t fallback) const;
  absl::StatusOr<std::string> Text(size_t i, std::string_view fallback) const;

 private:
  std::string callee_;
  std::vector<std::string> names_;
  std::vector<std::optional<Value>> values_;
};

}  // namespace antiphon::model::jinja

#endif  // ANTIPHON_MODEL_JINJA_ARGUMENTS_H_
