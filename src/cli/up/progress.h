// What `antiphon up` says while its children start.
#ifndef ANTIPHON_CLI_UP_PROGRESS_H_
#define ANTIPHON_CLI_UP_PROGRESS_H_

#include <map>
#include <string>
#include <string_view>

namespace antiphon::cli {

// Not thread-safe. Terminal: one line that is rewritten, with a bar for what has a percentage.
// Otherwise a line whenever a child's reason changes in words or by ten percent.
class Progress {
 public:
  explicit Progress(bool terminal) : terminal_(terminal) {}

  // A child is not ready for `reason` (empty: it is). What to print now, possibly nothing.
  std::string OnState(const std::string& child, const std::string& reason);
  // Makes room for another line; to be printed before it.
  std::string Clear();

 private:
  std::string TerminalLine() const;

  const bool terminal_;
  std::map<std::string, std::string> reasons_;
  std::map<std::string, std::string> printed_;
  bool line_is_open_ = false;
};

// The number before the first '%', or -1.
int PercentOf(std::string_view reason);

}  // namespace antiphon::cli

#endif  // ANTIPHON_CLI_UP_PROGRESS_H_
