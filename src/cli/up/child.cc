#include "cli/up/child.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <spdlog/fmt/fmt.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

extern char** environ;

namespace antiphon::cli {
namespace {

constexpr size_t kLineBytesMax = 32 << 10;
constexpr size_t kLastLines = 20;

void CloseFd(int& fd) {
  if (fd >= 0) close(fd);
  fd = -1;
}

// Both ends close on exec; ours does not block.
bool MakePipe(int& ours, int& theirs) {
  int fds[2];
  if (pipe2(fds, O_CLOEXEC) != 0) return false;
  ours = fds[0];
  theirs = fds[1];
  fcntl(ours, F_SETFL, O_NONBLOCK);
  return true;
}

// Our environment with ANTIPHON_PARENT_PID naming us.
std::vector<std::string> ChildEnvironment() {
  std::vector<std::string> variables;
  for (char** e = environ; *e != nullptr; ++e) {
    // These name streams of ours that the child does not have.
    if (std::strncmp(*e, "ANTIPHON_PARENT_PID=", 20) != 0 &&
        std::strncmp(*e, "NOTIFY_SOCKET=", 14) != 0 && std::strncmp(*e, "WATCHDOG_", 9) != 0 &&
        std::strncmp(*e, "JOURNAL_STREAM=", 15) != 0) {
      variables.emplace_back(*e);
    }
  }
  variables.push_back(fmt::format("ANTIPHON_PARENT_PID={}", getpid()));
  return variables;
}

std::vector<char*> Pointers(std::vector<std::string>& strings) {
  std::vector<char*> pointers;
  for (std::string& s : strings) pointers.push_back(s.data());
  pointers.push_back(nullptr);
  return pointers;
}

}  // namespace

Child::~Child() {
  CloseFd(output_fd_);
  CloseFd(announce_fd_);
  CloseFd(log_fd_);
}

absl::Status Child::Start(const std::string& program, const std::vector<std::string>& command_line,
                          const std::string& log_file) {
  CloseOutput();
  CloseAnnouncements();
  if (log_fd_ < 0) {
    log_fd_ = open(log_file.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (log_fd_ < 0) {
      return absl::UnavailableError(
          fmt::format("cannot write {}: {}", log_file, std::strerror(errno)));
    }
  }
  int their_output = -1, their_announce = -1;
  if (!MakePipe(output_fd_, their_output) || !MakePipe(announce_fd_, their_announce)) {
    CloseFd(their_output);
    return absl::UnavailableError(fmt::format("cannot make a pipe: {}", std::strerror(errno)));
  }
  // dup2 onto itself would keep the close-on-exec flag; above the target it cannot happen.
  if (their_announce <= kAnnounceFd || their_output <= kAnnounceFd) {
    const int announce = fcntl(their_announce, F_DUPFD_CLOEXEC, kAnnounceFd + 1);
    const int output = fcntl(their_output, F_DUPFD_CLOEXEC, kAnnounceFd + 1);
    CloseFd(their_announce);
    CloseFd(their_output);
    their_announce = announce;
    their_output = output;
  }
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, their_output, 1);
  posix_spawn_file_actions_adddup2(&actions, their_output, 2);
  posix_spawn_file_actions_adddup2(&actions, their_announce, kAnnounceFd);
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  sigset_t none, all;
  sigemptyset(&none);
  sigfillset(&all);
  posix_spawnattr_setsigmask(&attributes, &none);
  posix_spawnattr_setsigdefault(&attributes, &all);
  posix_spawnattr_setpgroup(&attributes, 0);
  posix_spawnattr_setflags(&attributes,
                           POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
  std::vector<std::string> arguments = command_line;
  std::vector<std::string> environment = ChildEnvironment();
  const int error = posix_spawn(&pid_, program.c_str(), &actions, &attributes,
                                Pointers(arguments).data(), Pointers(environment).data());
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&actions);
  CloseFd(their_output);
  CloseFd(their_announce);
  if (error != 0) {
    pid_ = 0;
    CloseOutput();
    CloseAnnouncements();
    return absl::UnavailableError(
        fmt::format("cannot start {}: {}", program, std::strerror(error)));
  }
  return absl::OkStatus();
}

bool Child::ReadLines(int fd, std::string& pending,
                      absl::FunctionRef<void(const std::string&)> line) {
  char buffer[16 << 10];
  // Bounded, so that one child that floods does not starve the others.
  for (int i = 0; i < 16; ++i) {
    const ssize_t n = read(fd, buffer, sizeof(buffer));
    if (n < 0) return errno == EAGAIN || errno == EINTR;
    if (n == 0) {
      if (!pending.empty()) line(pending);
      pending.clear();
      return false;
    }
    pending.append(buffer, static_cast<size_t>(n));
    size_t begin = 0;
    for (size_t end; (end = pending.find('\n', begin)) != std::string::npos; begin = end + 1) {
      line(pending.substr(begin, end - begin));
    }
    pending.erase(0, begin);
    if (pending.size() > kLineBytesMax) {
      line(pending);
      pending.clear();
    }
  }
  return true;
}

bool Child::ReadOutput(absl::FunctionRef<void(const std::string&)> line) {
  return ReadLines(output_fd_, pending_output_, [&](const std::string& text) {
    const std::string whole = text + "\n";
    // A full disk must not stop the cluster.
    (void)!write(log_fd_, whole.data(), whole.size());
    last_lines_.push_back(text);
    if (last_lines_.size() > kLastLines) last_lines_.pop_front();
    line(text);
  });
}

bool Child::ReadAnnouncements(absl::FunctionRef<void(const std::string&)> line) {
  return ReadLines(announce_fd_, pending_announcement_, line);
}

void Child::CloseOutput() { CloseFd(output_fd_); }
void Child::CloseAnnouncements() { CloseFd(announce_fd_); }

void Child::Signal(int signal) {
  if (pid_ > 0) kill(pid_, signal);
}

}  // namespace antiphon::cli
