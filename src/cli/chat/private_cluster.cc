#include "cli/chat/private_cluster.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <spdlog/fmt/fmt.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <vector>

extern char** environ;

namespace antiphon::cli {
namespace {

// Reads up to the end of a line; empty at the end of the stream.
std::string ReadLine(int fd) {
  std::string line;
  char c;
  while (true) {
    const ssize_t n = read(fd, &c, 1);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return line;
    line += c;
    if (c == '\n') return line;
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<PrivateCluster>> PrivateCluster::Start(const std::string& model) {
  int fds[2];
  if (pipe2(fds, O_CLOEXEC) != 0) return absl::UnavailableError("cannot make a pipe");
  std::vector<std::string> arguments = {
      "antiphon", "up", "--name", fmt::format("chat-{}", getpid()), "--listen", "127.0.0.1:0"};
  if (!model.empty()) arguments.insert(arguments.end(), {"--model", model});
  std::vector<char*> argv;
  for (std::string& a : arguments) argv.push_back(a.data());
  argv.push_back(nullptr);
  std::vector<std::string> variables;
  for (char** e = environ; *e != nullptr; ++e) variables.emplace_back(*e);
  variables.push_back(fmt::format("ANTIPHON_PARENT_PID={}", getpid()));
  std::vector<char*> environment;
  for (std::string& v : variables) environment.push_back(v.data());
  environment.push_back(nullptr);

  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, fds[1], 1);
  // A process group of its own: Ctrl-C in the conversation stops an answer, not the cluster.
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  posix_spawnattr_setpgroup(&attributes, 0);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP);
  std::unique_ptr<PrivateCluster> cluster(new PrivateCluster);
  const int error = posix_spawn(&cluster->pid_, "/proc/self/exe", &actions, &attributes,
                                argv.data(), environment.data());
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&actions);
  close(fds[1]);
  cluster->output_fd_ = fds[0];
  if (error != 0) {
    cluster->pid_ = 0;
    return absl::UnavailableError(
        fmt::format("cannot start antiphon up: {}", std::strerror(error)));
  }
  constexpr std::string_view kReady = "ready http://";
  for (std::string line; !(line = ReadLine(fds[0])).empty();) {
    if (line.rfind(kReady, 0) != 0) continue;
    cluster->http_ = line.substr(kReady.size());
    while (!cluster->http_.empty() && cluster->http_.back() <= ' ') cluster->http_.pop_back();
    return cluster;
  }
  return absl::UnavailableError("no cluster could be started");
}

PrivateCluster::~PrivateCluster() {
  if (pid_ > 0) {
    kill(pid_, SIGTERM);
    // It writes its last words into the pipe: read them, or it would wait for us.
    while (!ReadLine(output_fd_).empty()) {
    }
    waitpid(pid_, nullptr, 0);
  }
  if (output_fd_ >= 0) close(output_fd_);
}

}  // namespace antiphon::cli
