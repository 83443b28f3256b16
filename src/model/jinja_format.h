// Python's formatting languages: "%s" % ..., str.format and strftime.
#ifndef ANTIPHON_MODEL_JINJA_FORMAT_H_
#define ANTIPHON_MODEL_JINJA_FORMAT_H_

#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "model/jinja_arguments.h"
#include "model/jinja_value.h"

namespace antiphon::model::jinja {

// `named` holds what "%(name)s" refers to.
absl::StatusOr<std::string> PercentFormat(Interpreter& in, std::string_view format,
                                          const Args& args);

// Fields with indices, names, attributes, subscripts, conversions and format specifications.
// Fields nested in a specification are refused.
absl::StatusOr<std::string> StrFormat(Interpreter& in, std::string_view format, const Args& args);

// The directives of C's strftime in the C locale, and glibc's '-' flag (no padding). Unknown ones
// stay as they are. In the machine's time zone.
std::string Strftime(std::string_view format, absl::Time time);

}  // namespace antiphon::model::jinja

#endif  // ANTIPHON_MODEL_JINJA_FORMAT_H_
