#include "model/jinja_arguments.h"

#include <algorithm>

#include "fmt/format.h"
#include "model/jinja_operations.h"

namespace antiphon::model::jinja {

absl::StatusOr<Bound> Bound::Of(std::string_view callee, const Args& args,
                                std::initializer_list<std::string_view> names, size_t required) {
  Bound out;
  out.callee_ = callee;
  out.names_.assign(names.begin(), names.end());
  out.values_.resize(names.size());
  if (args.positional.size() > names.size()) {
    return Error(fmt::format("{}() takes at most {} argument(s), got {}", callee, names.size(),
                             args.positional.size()));
  }
  std::copy(args.positional.begin(), args.positional.end(), out.values_.begin());
  for (const auto& [name, value] : args.named) {
    const auto at = std::find(names.begin(), names.end(), name);
    if (at == names.end()) {
      return Error(fmt::format("{}() got an unexpected keyword argument '{}'", callee, name));
    }
    std::optional<Value>& slot = out.values_[static_cast<size_t>(at - names.begin())];
    if (slot.has_value()) {
      return Error(fmt::format("{}() got multiple values for argument '{}'", callee, name));
    }
    slot = value;
  }
  for (size_t i = 0; i < required; ++i) {
    if (!out.values_[i].has_value()) {
      return Error(fmt::format("{}() needs the argument '{}'", callee, out.names_[i]));
    }
  }
  return out;
}

bool Bound::Flag(size_t i, bool fallback) const {
  return values_[i].has_value() ? Truthy(*values_[i]) : fallback;
}

absl::StatusOr<int64_t> Bound::Integer(size_t i, int64_t fallback) const {
  if (!values_[i].has_value()) return fallback;
  const Value& value = *values_[i];
  if (!value.integral()) {
    return Error(fmt::format("{}(): '{}' must be an integer, not '{}'", callee_, names_[i],
                             TypeName(value)));
  }
  constexpr Int kFar = Int{1} << 62;
  return static_cast<int64_t>(std::clamp<Int>(value.integer(), -kFar, kFar));
}

absl::StatusOr<std::string> Bound::Text(size_t i, std::string_view fallback) const {
  if (!values_[i].has_value()) return std::string(fallback);
  const Value& value = *values_[i];
  if (!value.is(Kind::kString)) {
    return Error(
        fmt::format("{}(): '{}' must be a string, not '{}'", callee_, names_[i], TypeName(value)));
  }
  return value.text();
}

}  // namespace antiphon::model::jinja
