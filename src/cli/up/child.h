// One child process of `antiphon up`: its start, its pipes, its log file.
#ifndef ANTIPHON_CLI_UP_CHILD_H_
#define ANTIPHON_CLI_UP_CHILD_H_

#include <sys/types.h>

#include <deque>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"

namespace antiphon::cli {

// Not thread-safe.
class Child {
 public:
  Child() = default;
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;
  ~Child();

  // Descriptor number under which the child finds its announcement pipe.
  static constexpr int kAnnounceFd = 3;

  // Starts `program` with `command_line` in a process group of its own, so that a terminal's Ctrl-C
  // reaches the parent alone. Output is appended to `log_file`. UNAVAILABLE with the reason.
  absl::Status Start(const std::string& program, const std::vector<std::string>& command_line,
                     const std::string& log_file);

  bool running() const { return pid_ > 0; }
  pid_t pid() const { return pid_; }
  int output_fd() const { return output_fd_; }
  int announce_fd() const { return announce_fd_; }

  // Reads what came without waiting; `line` runs for each whole line. False at the end of the pipe.
  bool ReadOutput(absl::FunctionRef<void(const std::string&)> line);
  bool ReadAnnouncements(absl::FunctionRef<void(const std::string&)> line);
  void CloseOutput();
  void CloseAnnouncements();

  // The process has been reaped.
  void OnExit() { pid_ = 0; }
  void Signal(int signal);

  // The last lines of output, oldest first.
  const std::deque<std::string>& last_lines() const { return last_lines_; }

 private:
  bool ReadLines(int fd, std::string& pending, absl::FunctionRef<void(const std::string&)> line);

  pid_t pid_ = 0;
  int output_fd_ = -1;
  int announce_fd_ = -1;
  int log_fd_ = -1;
  std::string pending_output_;
  std::string pending_announcement_;
  std::deque<std::string> last_lines_;
};

}  // namespace antiphon::cli

#endif  // ANTIPHON_CLI_UP_CHILD_H_
