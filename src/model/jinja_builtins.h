// The tables of filters, tests, methods and global functions.
#ifndef ANTIPHON_MODEL_JINJA_BUILTINS_H_
#define ANTIPHON_MODEL_JINJA_BUILTINS_H_

#include <string_view>

#include "absl/types/span.h"
#include "model/jinja_value.h"

namespace antiphon::model::jinja {

struct NamedNative {
  std::string_view name;
  Native native;
};

// Null when there is none. Tests return a boolean.
const NamedNative* FindFilter(std::string_view name);
const NamedNative* FindTest(std::string_view name);
const NamedNative* FindFunction(std::string_view name);
// Methods of strings, lists, tuples, dictionaries and cyclers.
const NamedNative* FindMethod(Kind kind, std::string_view name);

// The parts of those tables, one a file.
absl::Span<const NamedNative> TextFilters();
absl::Span<const NamedNative> NumberFilters();
absl::Span<const NamedNative> SequenceFilters();
absl::Span<const NamedNative> SelectionFilters();
absl::Span<const NamedNative> Tests();
absl::Span<const NamedNative> Functions();
absl::Span<const NamedNative> StringMethods();
absl::Span<const NamedNative> ListMethods();
absl::Span<const NamedNative> TupleMethods();
absl::Span<const NamedNative> DictMethods();
absl::Span<const NamedNative> CyclerMethods();
absl::Span<const NamedNative> LoopMethods();

}  // namespace antiphon::model::jinja

#endif  // ANTIPHON_MODEL_JINJA_BUILTINS_H_
