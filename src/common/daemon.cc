#include "common/daemon.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spdlog/fmt/fmt.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <optional>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "antiphon/v1/config.pb.h"
#include "common/clock.h"
#include "common/config/flags.h"
#include "common/logging.h"
#include "common/memory.h"
#include "common/net.h"
#include "common/ops_server.h"
#include "common/status_macros.h"
#include "common/systemd.h"
#include "common/thread.h"

namespace antiphon {
namespace {

constexpr absl::Duration kTick = absl::Milliseconds(200);
// While it is ready. Every look takes a core from an engine on this host.
constexpr absl::Duration kReadyTick = absl::Seconds(1);
// Until it is ready for the first time: a restart takes less than a tick.
constexpr absl::Duration kStartTick = absl::Milliseconds(10);
// What starting has left of free memory goes back so long after a daemon is ready: by then the
// model's parts have gone from the workers to the gateway through all of them.
constexpr absl::Duration kSettled = absl::Seconds(5);
// What a service gets beyond its drain deadline before we stop waiting for it.
constexpr absl::Duration kDrainSlack = absl::Seconds(5);

std::string HostName() {
  char name[256] = {};
  if (gethostname(name, sizeof(name) - 1) != 0 || name[0] == 0) return "localhost";
  return name;
}

// JSON lines to the parent that asked for them. Thread-safe.
class Announcer {
 public:
  explicit Announcer(int fd) : fd_(fd) {
    if (fd_ >= 0) fcntl(fd_, F_SETFD, FD_CLOEXEC);
  }
  void Listening(std::string_view listener, std::string_view address) {
    Write(fmt::format(R"({{"event":"listening","listener":"{}","address":"{}"}})", listener,
                      EscapeForLog(address, true)));
  }
  void State(std::string_view not_ready) {
    Write(fmt::format(R"({{"event":"state","ready":{},"reason":"{}"}})", not_ready.empty(),
                      EscapeForLog(not_ready, true)));
  }
  void Failed(int code, std::string_view message) {
    Write(fmt::format(R"({{"event":"failed","code":{},"message":"{}"}})", code,
                      EscapeForLog(message, true)));
  }

 private:
  void Write(const std::string& line) {
    if (fd_ < 0) return;
    absl::MutexLock lock(&mu_);
    const std::string text = line + "\n";
    // A parent that is gone ends us by signal; a full pipe loses a line of progress.
    (void)!write(fd_, text.data(), text.size());
  }
  absl::Mutex mu_;
  const int fd_;
};

// What signals asked for; shared by the signal thread and main.
struct Requests {
  absl::Mutex mu;
  absl::CondVar changed;
  bool terminate ABSL_GUARDED_BY(mu) = false;
  bool reload ABSL_GUARDED_BY(mu) = false;
  bool drained ABSL_GUARDED_BY(mu) = false;
  bool serving ABSL_GUARDED_BY(mu) = false;
};

// The state that the operations listener shows while the daemon starts, runs and drains.
struct Health {
  absl::Mutex mu;
  Service* service ABSL_GUARDED_BY(mu) = nullptr;
  bool draining ABSL_GUARDED_BY(mu) = false;

  std::string NotReady() {
    absl::MutexLock lock(&mu);
    if (draining) return "draining";
    return service == nullptr ? "starting" : service->NotReadyReason();
  }
  std::string Stuck() {
    absl::MutexLock lock(&mu);
    return service == nullptr ? "" : service->StuckReason();
  }
  std::string Details() {
    absl::MutexLock lock(&mu);
    return service == nullptr ? "" : service->ReadyDetails();
  }
};

HttpAnswer HealthAnswer(std::string_view good, std::string_view reason,
                        const std::string& details) {
  const std::string more = details.empty() ? "" : "," + details;
  if (reason.empty()) {
    return {200, "application/json", fmt::format("{{\"status\":\"{}\"{}}}\n", good, more)};
  }
  return {503, "application/json",
          fmt::format("{{\"status\":\"not {}\",\"reason\":\"{}\"{}}}\n", good,
                      EscapeForLog(reason, true), more)};
}

struct DaemonConfig {
  std::string ops_listener;  // configuration key
  const config::v1::Listener* ops = nullptr;
  const config::v1::Drain* drain = nullptr;
};

DaemonConfig PartOf(const std::string& name, const config::v1::Config& config) {
  if (name == "gateway") return {"gateway.ops", &config.gateway().ops(), &config.gateway().drain()};
  if (name == "conductor") {
    return {"conductor.ops", &config.conductor().ops(), &config.conductor().drain()};
  }
  if (name == "kvstore") return {"kvstore.ops", &config.kvstore().ops(), &config.kvstore().drain()};
  if (name == "prefill") {
    return {"worker.prefill_ops", &config.worker().prefill_ops(), &config.worker().drain()};
  }
  CHECK(name == "decode");
  return {"worker.decode_ops", &config.worker().decode_ops(), &config.worker().drain()};
}

// Before any thread exists: they all inherit the mask, so that only the signal thread sees these.
sigset_t BlockSignals() {
  sigset_t set;
  sigemptyset(&set);
  for (int s : {SIGTERM, SIGINT, SIGHUP}) sigaddset(&set, s);
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  signal(SIGPIPE, SIG_IGN);
  return set;
}

// Turns signals into requests until it is destroyed.
class SignalThread {
 public:
  SignalThread(const sigset_t& signals, Requests& requests)
      : signals_(signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK)),
        stop_(eventfd(0, EFD_CLOEXEC)) {
    CHECK(signals_ >= 0 && stop_ >= 0);
    thread_ = Thread("signals", [this, &requests] { Run(requests); });
  }
  ~SignalThread() {
    const uint64_t one = 1;
    CHECK(write(stop_, &one, sizeof(one)) == sizeof(one));
    thread_.Join();
    close(signals_);
    close(stop_);
  }

 private:
  void Run(Requests& requests) {
    while (true) {
      pollfd polls[] = {{signals_, POLLIN, 0}, {stop_, POLLIN, 0}};
      if (poll(polls, 2, -1) < 0) continue;
      if (polls[1].revents != 0) return;
      signalfd_siginfo info;
      while (read(signals_, &info, sizeof(info)) == sizeof(info)) Handle(info.ssi_signo, requests);
    }
  }

  void Handle(uint32_t signal, Requests& requests) {
    absl::MutexLock lock(&requests.mu);
    if (signal == SIGHUP) {
      requests.reload = true;
    } else if (requests.terminate) {
      LogWarning("second signal: ending at once");
      _exit(1);
    } else if (!requests.serving) {
      LogInfo("ended by a signal while starting");
      NotifySystemd("STOPPING=1");
      _exit(0);
    } else {
      requests.terminate = true;
    }
    requests.changed.Signal();
  }

  const int signals_;
  const int stop_;
  Thread thread_;
};

void FollowParent() {
  const long long parent = std::atoll(Environment("ANTIPHON_PARENT_PID", "0").c_str());
  if (parent <= 0) return;
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  if (getppid() != parent) _exit(1);  // it died before we asked
}

// Reports changes of readiness to everybody who wants to know.
class Watch {
 public:
  Watch(Health& health, Announcer& announcer)
      : health_(health), announcer_(announcer), watchdog_(SystemdWatchdogInterval() / 2) {}

  void Tick(absl::Time now) {
    const std::string reason = health_.NotReady();
    const bool due = !last_ || reason.empty() || now >= next_state_;
    if (due && (!last_ || *last_ != reason)) {
      next_state_ = now + kTick;
      announcer_.State(reason);
      NotifySystemd(fmt::format("{}STATUS={}", reason.empty() && !was_ready_ ? "READY=1\n" : "",
                                reason.empty() ? "ready" : EscapeForLog(reason, false)));
      if (reason.empty()) {
        LogInfo("ready");
      } else {
        LogDebug("not ready: {}", reason);
      }
      if (!was_ready_ && reason.empty()) {
        was_ready_ = true;
        settled_ = now + kSettled;
      }
      last_ = reason;
    }
    if (now >= settled_) {
      ReturnFreeMemory();
      settled_ = absl::InfiniteFuture();
    }
    if (!was_ready_ && now >= next_extension_) {
      NotifySystemd("EXTEND_TIMEOUT_USEC=15000000");
      next_extension_ = now + absl::Seconds(5);
    }
    if (now >= next_kick_ && health_.Stuck().empty()) {
      NotifySystemd("WATCHDOG=1");
      next_kick_ = now + watchdog_;
    }
  }

  absl::Duration interval() const {
    if (!was_ready_) return kStartTick;
    return last_->empty() ? std::min(kReadyTick, watchdog_ / 2) : kTick;
  }

 private:
  Health& health_;
  Announcer& announcer_;
  const absl::Duration watchdog_;
  std::optional<std::string> last_;
  bool was_ready_ = false;
  absl::Time settled_ = absl::InfiniteFuture();
  absl::Time next_extension_ = absl::InfinitePast();
  absl::Time next_state_ = absl::InfinitePast();
  absl::Time next_kick_ = absl::InfinitePast();
};

void Reload(const DaemonFlags& flags, Service& service) {
  NotifySystemd(
      fmt::format("RELOADING=1\nMONOTONIC_USEC={}", absl::ToUnixMicros(Clock::Real().Now())));
  auto config = LoadConfig(flags.source);
  if (!config.ok()) {
    LogError("reload: the configuration stays as it was: {}",
             std::string(config.status().message()));
  } else {
    SetLogLevel((*config)->log().level());
    service.Reload();
    LogInfo("reloaded");
  }
  NotifySystemd("READY=1");
}

void DrainService(Service& service, Health& health, Watch& watch, const config::v1::Drain& drain,
                  Requests& requests) {
  const absl::Duration delay = ToDuration(drain.delay());
  const absl::Duration deadline = ToDuration(drain.deadline());
  LogInfo("draining: no new work after {}, the rest ends within {}", absl::FormatDuration(delay),
          absl::FormatDuration(deadline));
  NotifySystemd("STOPPING=1\nSTATUS=draining");
  {
    absl::MutexLock lock(&health.mu);
    health.draining = true;
  }
  const absl::Time last = Clock::Real().Now() + delay + deadline + kDrainSlack;
  service.Drain(delay, deadline, [&requests] {
    absl::MutexLock lock(&requests.mu);
    requests.drained = true;
    requests.changed.Signal();
  });
  while (Clock::Real().Now() < last) {
    watch.Tick(Clock::Real().Now());
    absl::MutexLock lock(&requests.mu);
    if (requests.drained) return;
    requests.changed.WaitWithTimeout(&requests.mu, kTick);
  }
  // `done` may still run: it must not find this frame gone.
  LogError("draining did not end in time; ending at once");
  _exit(1);
}

int Serve(const DaemonFlags& flags, const DaemonOptions& options, LoadedConfig config,
          const sigset_t& signals, Announcer& announcer, ServiceFactory& factory) {
  DaemonContext context;
  context.self.cluster = config->cluster().name();
  context.self.node =
      NodeId(flags.node.empty() ? fmt::format("{}@{}", options.name, HostName()) : flags.node);
  do {
    context.self.incarnation = RandomSeed();
  } while (context.self.incarnation == 0);
  context.random_seed = RandomSeed();
  const std::string log_level = config->log().level(), log_format = config->log().format();
  InitLogging({.daemon = options.name,
               .node = context.self.node.value(),
               .level = log_level,
               .format = log_format});
  LogInfo("antiphon {} starts, cluster {}", kVersion, context.self.cluster);

  Registry registry(Labels{{"daemon", options.metrics_name}});
  context.registry = &registry;
  context.announce = [&announcer](std::string_view listener, std::string_view address) {
    LogInfo("{} listens on {}", listener, address);
    announcer.Listening(listener, address);
  };
  const DaemonConfig part = PartOf(options.name, *config);
  const config::v1::Drain drain = *part.drain;
  Health health;
  Requests requests;
  OpsHandlers handlers;
  handlers.metrics = [&registry] {
    return HttpAnswer{200, "text/plain; version=0.0.4; charset=utf-8", registry.Render()};
  };
  handlers.livez = [&health] { return HealthAnswer("alive", health.Stuck(), ""); };
  handlers.readyz = [&health] {
    return HealthAnswer("ready", health.NotReady(), health.Details());
  };
  const auto fail = [&announcer](const absl::Status& status) {
    const int code = ExitCodeOf(status);
    LogError("cannot start: {}", std::string(status.message()));
    announcer.Failed(code, std::string(status.message()));
    return code;
  };
  auto ops = OpsServer::Start(part.ops->listen(), std::move(handlers));
  if (!ops.ok()) {
    return fail(absl::Status(
        ops.status().code(),
        fmt::format("{}.listen: {}", part.ops_listener, std::string(ops.status().message()))));
  }
  context.announce(part.ops_listener, AdvertisedAddress(*part.ops, (*ops)->port()));

  SignalThread signal_thread(signals, requests);
  context.config = std::move(config);
  auto service = factory(context);
  if (!service.ok()) return fail(service.status());
  {
    absl::MutexLock lock(&health.mu);
    health.service = service->get();
  }
  Watch watch(health, announcer);
  {
    absl::MutexLock lock(&requests.mu);
    requests.serving = true;
  }
  while (true) {
    watch.Tick(Clock::Real().Now());
    bool reload = false, terminate = false;
    {
      absl::MutexLock lock(&requests.mu);
      if (!requests.terminate && !requests.reload) {
        requests.changed.WaitWithTimeout(&requests.mu, watch.interval());
      }
      reload = requests.reload;
      terminate = requests.terminate;
      requests.reload = false;
    }
    if (reload) Reload(flags, **service);
    if (terminate) break;
  }
  DrainService(**service, health, watch, drain, requests);
  {
    absl::MutexLock lock(&health.mu);
    health.service = nullptr;
  }
  service->reset();
  ops->reset();
  LogInfo("ended");
  return 0;
}

}  // namespace

int RunDaemon(int argc, char** argv, const DaemonOptions& options, ServiceFactory factory) {
  const sigset_t signals = BlockSignals();
  FollowParent();
  // Debian builds Abseil so that every lock is entered into a graph and searched for cycles. Tests
  // want that; a daemon locks on the path of every token.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  FreeLargeBuffersAtOnce();
  const std::string program = fmt::format("antiphon-{}", options.name);
  auto flags = ParseDaemonFlags(argc, argv);
  if (!flags.ok()) {
    std::fprintf(stderr, "%s: %s\n", program.c_str(),
                 std::string(flags.status().message()).c_str());
    return kExitUsage;
  }
  if (flags->help) {
    std::printf("%s", DaemonUsage(program).c_str());
    return 0;
  }
  if (flags->version) {
    std::printf("%s %s\n", program.c_str(), kVersion);
    return 0;
  }
  Announcer announcer(flags->announce_fd);
  auto config = LoadConfig(flags->source);
  if (!config.ok()) {
    std::fprintf(stderr, "%s\n", std::string(config.status().message()).c_str());
    announcer.Failed(kExitConfig, std::string(config.status().message()));
    return kExitConfig;
  }
  if (flags->print_config) {
    std::printf("%s", config->Print().c_str());
    return 0;
  }
  if (flags->check_config) {
    std::printf("the configuration is good\n");
    return 0;
  }
  return Serve(*flags, options, *std::move(config), signals, announcer, factory);
}

}  // namespace antiphon
