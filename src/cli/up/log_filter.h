// Which lines of its children `antiphon up` shows.
#ifndef ANTIPHON_CLI_UP_LOG_FILTER_H_
#define ANTIPHON_CLI_UP_LOG_FILTER_H_

#include <optional>
#include <string>
#include <string_view>

namespace antiphon::cli {

// The line as people see it, nothing when it stays in the log file: warnings, errors and access
// lines of our format (text or JSON), and what is in neither format (an abort, a library's
// complaint). Never control characters.
std::optional<std::string> ShownLine(std::string_view child, std::string_view line);

}  // namespace antiphon::cli

#endif  // ANTIPHON_CLI_UP_LOG_FILTER_H_
