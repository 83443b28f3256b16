// Logging through spdlog, to stderr; the keys of a line are ts level daemon node req msg.
//
//   LogInfo("listening on {}", address);
//   LogWarning(Req(label), "prefill {} gave up: {}", node, status.message());
//
// Never prompt text. Control characters of what clients sent are escaped by the formatter.
#ifndef ANTIPHON_COMMON_LOGGING_H_
#define ANTIPHON_COMMON_LOGGING_H_

#include <spdlog/fmt/fmt.h>

#include <string>
#include <string_view>
#include <utility>

#include "absl/time/time.h"

namespace antiphon {

enum class LogLevel { kDebug, kInfo, kWarning, kError };

struct LogOptions {
  std::string daemon;
  std::string node;
  std::string level = "info";   // debug | info | warning | error
  std::string format = "text";  // text | json
};

// Once, at the start of main. Without it, text at level info.
void InitLogging(const LogOptions& options);
// False when the name is none of debug, info, warning, error.
bool SetLogLevel(std::string_view level);
bool LogEnabled(LogLevel level);

// Tags a line with a request's label.
struct Req {
  explicit Req(std::string_view label) : label(label) {}
  std::string_view label;
};

// The one way a line leaves the process. `request` may be empty.
void LogLine(LogLevel level, std::string_view request, std::string_view message);

// The message of an access line begins with this word; `antiphon up` shows such lines.
inline constexpr std::string_view kAccessWord = "access ";

// `text` without control characters, invalid UTF-8 and characters that reorder a line; quotes and
// backslashes too when it goes into JSON.
std::string EscapeForLog(std::string_view text, bool json);
// One line without its end: "TS LEVEL DAEMON NODE REQ MSG" (REQ is "-" when there is none) or a
// JSON object. For the journal: "<N>" before it, and no TS in text.
std::string FormatLogLine(const LogOptions& options, bool journal, absl::Time now, LogLevel level,
                          std::string_view request, std::string_view message);

template <typename... Args>
void Log(LogLevel level, Req req, fmt::format_string<Args...> format, Args&&... args) {
  if (!LogEnabled(level)) return;
  LogLine(level, req.label, fmt::format(format, std::forward<Args>(args)...));
}

#define ANTIPHON_DEFINE_LOG_(Name, level)                                  \
  template <typename... Args>                                              \
  void Name(fmt::format_string<Args...> format, Args&&... args) {          \
    Log(level, Req(""), format, std::forward<Args>(args)...);              \
  }                                                                        \
  template <typename... Args>                                              \
  void Name(Req req, fmt::format_string<Args...> format, Args&&... args) { \
    Log(level, req, format, std::forward<Args>(args)...);                  \
  }
ANTIPHON_DEFINE_LOG_(LogDebug, LogLevel::kDebug)
ANTIPHON_DEFINE_LOG_(LogInfo, LogLevel::kInfo)
ANTIPHON_DEFINE_LOG_(LogWarning, LogLevel::kWarning)
ANTIPHON_DEFINE_LOG_(LogError, LogLevel::kError)
#undef ANTIPHON_DEFINE_LOG_

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_LOGGING_H_
