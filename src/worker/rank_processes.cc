#include "worker/rank_processes.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstdint>
#include <cstring>
#include <utility>

#include "antiphon/v1/config.pb.h"
#include "common/clock.h"
#include "common/daemon.h"
#include "common/fd_passing.h"
#include "common/logging.h"
#include "common/status_macros.h"
#include "engine/cpu/cpu_runner.h"
#include "engine/cuda/cuda_runner.h"
#include "engine/shm_comm.h"
#include "model/model_file.h"
#include "worker/host_blobs.h"
#include "worker/model_host.h"

namespace antiphon::worker {
namespace {

constexpr int kSocket = 3;  // of a rank
constexpr absl::Duration kJoin = absl::Seconds(60);
// What ranks get to end by themselves; their steps are over.
constexpr absl::Duration kGrace = absl::Seconds(2);
constexpr size_t kConfigBytesMax = 1 << 20;
constexpr int kHelloMillis = 30000;

// In the child of a process with threads: system calls only.
[[noreturn]] void Become(int socket, pid_t parent, char* const* arguments) {
  // SIGKILL: a rank has nothing to save, and may write to the pool until it is gone. SIGTERM and
  // its like stay blocked, as they are here: the leader drains, and its ranks with it.
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(kExitUnavailable);
  if (socket == kSocket) {
    fcntl(socket, F_SETFD, 0);
  } else {
    dup2(socket, kSocket);
  }
  syscall(SYS_close_range, kSocket + 1, ~0u, 0);
  execv("/proc/self/exe", arguments);
  _exit(kExitUnavailable);
}

// Length, role and configuration.
std::string Hello(const config::v1::Config& config, bool prefill_role) {
  const std::string body = (prefill_role ? "p" : "d") + config.SerializeAsString();
  const uint32_t length = static_cast<uint32_t>(body.size());
  std::string message(sizeof(length), '\0');
  std::memcpy(message.data(), &length, sizeof(length));
  return message + body;
}

// `size` bytes, and the descriptors that came with them.
absl::Status Receive(int socket, char* out, size_t size, std::vector<int>& fds) {
  while (size > 0) {
    pollfd poll_for{.fd = socket, .events = POLLIN};
    if (poll(&poll_for, 1, kHelloMillis) == 0)
      return absl::UnavailableError("the leader is silent");
    const ssize_t n = RecvWithFds(socket, out, size, fds);
    if (n == 0) return absl::UnavailableError("the leader is gone");
    if (n < 0 && errno != EAGAIN) return absl::UnavailableError(std::strerror(errno));
    if (n < 0) continue;
    out += n;
    size -= static_cast<size_t>(n);
  }
  return absl::OkStatus();
}

struct Orders {
  config::v1::Config config;
  bool prefill_role = false;
  int group_fd = -1;
};

absl::StatusOr<Orders> ReceiveHello() {
  std::vector<int> fds;
  uint32_t length = 0;
  RETURN_IF_ERROR(Receive(kSocket, reinterpret_cast<char*>(&length), sizeof(length), fds));
  if (length == 0 || length > kConfigBytesMax || fds.size() != 1) {
    return absl::InternalError("the leader's first message makes no sense");
  }
  std::string body(length, '\0');
  RETURN_IF_ERROR(Receive(kSocket, body.data(), body.size(), fds));
  Orders orders{.prefill_role = body[0] == 'p', .group_fd = fds[0]};
  if (!orders.config.ParseFromString(body.substr(1))) {
    return absl::InternalError("the leader's configuration cannot be read");
  }
  return orders;
}

absl::Status Serve(int rank) {
  ASSIGN_OR_RETURN(const Orders orders, ReceiveHello());
  const config::v1::Config& config = orders.config;
  InitLogging({.daemon = orders.prefill_role ? "prefill" : "decode",
               .node = fmt::format("rank {}", rank),
               .level = config.log().level(),
               .format = config.log().format()});
  // Nothing here needs an end in good order once the leader is gone.
  Thread leader("leader", [] {
    pollfd poll_for{.fd = kSocket, .events = POLLRDHUP};
    while (poll(&poll_for, 1, -1) < 0) {
    }
    _exit(0);
  });
  const auto serve = [&]() -> absl::Status {
    if (config.models_size() != 1) return absl::InternalError("the leader names no model");
    ASSIGN_OR_RETURN(const auto file, model::OpenModelFile(config.models(0).path()));
    ASSIGN_OR_RETURN(const auto comm, engine::ShmComm::Join(orders.group_fd, rank, kJoin));
    engine::TensorGroup group;
    group.comm = comm.get();
    group.sockets = {kSocket};
    ASSIGN_OR_RETURN(const bool cuda, UsesCuda(config.worker()));
    if (cuda) {
      engine::CudaRunnerOptions options = CudaOptions(config.worker());
      options.group = group;
      return engine::ServeCudaRank(file.get(), options);
    }
    engine::CpuRunnerOptions options = RunnerOptions(config.worker(), orders.prefill_role);
    options.group = group;
    HostBlobs blobs(StoreSocket(config),
                    {config.cluster().name(), NodeId(fmt::format("rank {}", rank)), 0},
                    file->identity());
    options.images = &blobs;
    return engine::ServeCpuRank(file.get(), options);
  };
  const absl::Status status = serve();
  if (!status.ok()) LogError("rank {} ends: {}", rank, std::string(status.message()));
  _exit(ExitCodeOf(status));  // the thread above waits for what may not come
}

}  // namespace

absl::StatusOr<std::unique_ptr<RankProcesses>> RankProcesses::Start(
    const config::v1::Config& config, bool prefill_role,
    absl::AnyInvocable<void(absl::Status)> on_death) {
  const int size = static_cast<int>(config.worker().tensor_parallel());
  ASSIGN_OR_RETURN(SharedMemory group, engine::ShmComm::MakeGroup({.size = size}));
  std::unique_ptr<RankProcesses> ranks(new RankProcesses(std::move(group), std::move(on_death)));
  const std::string message = Hello(config, prefill_role);
  for (int rank = 1; rank < size; ++rank) RETURN_IF_ERROR(ranks->Spawn(rank, message));
  ranks->watcher_ = Thread("ranks", [r = ranks.get()] { r->Watch(); });
  return ranks;
}

RankProcesses::RankProcesses(SharedMemory group, absl::AnyInvocable<void(absl::Status)> on_death)
    : group_(std::move(group)), stop_(eventfd(0, EFD_CLOEXEC)), on_death_(std::move(on_death)) {
  CHECK(stop_ >= 0);
}

void RankProcesses::StopWatching() {
  const uint64_t one = 1;
  CHECK(write(stop_, &one, sizeof(one)) == sizeof(one));
  watcher_.Join();
}

RankProcesses::~RankProcesses() {
  StopWatching();
  {
    absl::MutexLock lock(&mu_);
    const absl::Time deadline = Clock::Real().Now() + kGrace;
    for (const Process& process : processes_) {
      pollfd poll_for{.fd = process.pidfd, .events = POLLIN};
      const absl::Duration left = deadline - Clock::Real().Now();
      if (process.reaped || left <= absl::ZeroDuration()) continue;
      poll(&poll_for, 1, static_cast<int>(absl::ToInt64Milliseconds(left)));
    }
  }
  Kill();
  absl::MutexLock lock(&mu_);
  for (const Process& process : processes_) {
    close(process.socket);
    close(process.pidfd);
  }
  close(stop_);
}

std::vector<int> RankProcesses::sockets() const {
  absl::MutexLock lock(&mu_);
  std::vector<int> sockets;
  for (const Process& process : processes_) sockets.push_back(process.socket);
  return sockets;
}

absl::Status RankProcesses::Spawn(int rank, const std::string& message) {
  int sockets[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets) != 0) {
    return absl::ResourceExhaustedError(fmt::format("socketpair: {}", std::strerror(errno)));
  }
  std::string number = std::to_string(rank), flag = kRankFlag;
  std::string program = "/proc/self/exe";
  char name[4096];
  const ssize_t length = readlink("/proc/self/exe", name, sizeof(name));
  if (length > 0) program.assign(name, static_cast<size_t>(length));
  std::array<char*, 4> arguments = {program.data(), flag.data(), number.data(), nullptr};
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid == 0) Become(sockets[1], parent, arguments.data());
  close(sockets[1]);
  const int pidfd = pid < 0 ? -1 : static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
  if (pidfd < 0) {
    const absl::Status status = absl::ResourceExhaustedError(
        fmt::format("rank {} cannot be started: {}", rank, std::strerror(errno)));
    if (pid > 0) {
      kill(pid, SIGKILL);
      waitpid(pid, nullptr, 0);
    }
    close(sockets[0]);
    return status;
  }
  {
    absl::MutexLock lock(&mu_);
    processes_.push_back({.rank = rank, .pid = pid, .pidfd = pidfd, .socket = sockets[0]});
  }
  // A configuration is smaller than a socket's buffer.
  if (SendWithFd(sockets[0], message, group_.fd()) != static_cast<ssize_t>(message.size())) {
    return absl::ResourceExhaustedError(
        fmt::format("rank {} cannot be given its configuration: {}", rank, std::strerror(errno)));
  }
  LogInfo("rank {} is process {}", rank, pid);
  return absl::OkStatus();
}

void RankProcesses::Watch() {
  std::vector<pollfd> polls = {{.fd = stop_, .events = POLLIN}};
  {
    absl::MutexLock lock(&mu_);
    for (const Process& process : processes_) polls.push_back({process.pidfd, POLLIN, 0});
  }
  while (poll(polls.data(), polls.size(), -1) < 0) {
  }
  if (polls[0].revents != 0) return;
  absl::Status status;
  {
    absl::MutexLock lock(&mu_);
    for (size_t i = 0; i < processes_.size(); ++i) {
      if (polls[i + 1].revents == 0) continue;
      status = absl::UnavailableError(fmt::format("rank {} (process {}) {}", processes_[i].rank,
                                                  processes_[i].pid, Reap(processes_[i])));
      break;
    }
  }
  Kill();
  on_death_(status);
}

std::string RankProcesses::Reap(Process& process) {
  int status = 0;
  if (process.reaped || waitpid(process.pid, &status, 0) != process.pid) return "ended";
  process.reaped = true;
  return WIFSIGNALED(status) ? fmt::format("died of signal {}", WTERMSIG(status))
                             : fmt::format("ended with code {}", WEXITSTATUS(status));
}

void RankProcesses::Kill() {
  absl::MutexLock lock(&mu_);
  for (const Process& process : processes_) {
    if (!process.reaped) kill(process.pid, SIGKILL);
  }
  for (Process& process : processes_) {
    if (!process.reaped) (void)Reap(process);
  }
}

int RunRank(const std::string& number) {
  int rank = 0;
  const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), rank);
  if (error != std::errc() || end != number.data() + number.size() || rank < 1) return kExitUsage;
  // As a daemon's: the leader's part. Inherited already where a leader started this.
  sigset_t signals;
  sigemptyset(&signals);
  for (int s : {SIGTERM, SIGINT, SIGHUP}) sigaddset(&signals, s);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);
  const absl::Status status = Serve(rank);
  LogError("rank {} cannot start: {}", rank, std::string(status.message()));
  return ExitCodeOf(status);
}

}  // namespace antiphon::worker
