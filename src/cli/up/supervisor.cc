#include "cli/up/supervisor.h"

#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <boost/json/parse.hpp>
#include <cstdio>
#include <map>
#include <optional>

#include "absl/strings/match.h"
#include "absl/time/time.h"
#include "cli/up/child.h"
#include "cli/up/log_filter.h"
#include "cli/up/progress.h"
#include "cli/up/restart_policy.h"
#include "common/clock.h"
#include "common/daemon.h"
#include "common/logging.h"
#include "common/net.h"
#include "common/status_macros.h"

namespace antiphon::cli {
namespace {

// Beyond the drain deadline of 10 s that the children were given.
constexpr absl::Duration kGatewayDrain = absl::Seconds(11);
constexpr absl::Duration kRestDrain = absl::Seconds(11);

struct Member {
  ChildSpec spec;
  Child child;
  RestartPolicy policy;
  std::map<std::string, std::string> kept;  // listener -> address
  absl::Time start_at = absl::InfiniteFuture();
  bool was_ready = false;
  std::string failure;  // what the child said before it ended
};

std::string ExitText(int status) {
  if (WIFSIGNALED(status)) {
    return fmt::format("was killed by signal {} ({})", WTERMSIG(status),
                       strsignal(WTERMSIG(status)));
  }
  return fmt::format("ended with code {}", WEXITSTATUS(status));
}

class Supervisor {
 public:
  explicit Supervisor(SupervisorOptions options)
      : options_(std::move(options)), progress_(options_.terminal) {
    for (ChildSpec& spec : options_.children) {
      members_.push_back(std::make_unique<Member>());
      members_.back()->spec = std::move(spec);
    }
  }

  int Run() {
    sigset_t signals;
    sigemptyset(&signals);
    for (int s : {SIGTERM, SIGINT, SIGHUP, SIGCHLD}) sigaddset(&signals, s);
    sigprocmask(SIG_BLOCK, &signals, nullptr);
    signal(SIGPIPE, SIG_IGN);
    signal_fd_ = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
    CHECK(signal_fd_ >= 0);
    members_[0]->start_at = Now();
    while (!Finished()) {
      StartDue();
      Enforce();
      Wait();
    }
    RemoveClusterFile(options_.runtime_folder);
    close(signal_fd_);
    Say(stderr, exit_code_ == 0 ? "stopped" : "the cluster ended");
    return exit_code_;
  }

 private:
  enum class Phase { kRunning, kDrainGateway, kDrainRest };

  static absl::Time Now() { return Clock::Real().Now(); }
  Member& gateway() { return *members_.back(); }

  void Say(FILE* to, const std::string& line) {
    std::fputs(progress_.Clear().c_str(), stderr);
    std::fflush(stderr);
    fmt::print(to, "{}\n", line);
    std::fflush(to);
  }

  bool Finished() const {
    if (phase_ == Phase::kRunning) return false;
    for (const auto& m : members_) {
      if (m->child.running() || m->child.output_fd() >= 0) return false;
    }
    return true;
  }

  void StartDue() {
    if (phase_ != Phase::kRunning) return;
    for (auto& m : members_) {
      if (m->start_at > Now()) continue;
      m->start_at = absl::InfiniteFuture();
      m->failure.clear();
      const std::string program = fmt::format("{}/{}", options_.program_folder, m->spec.program);
      const auto line =
          CommandLine(m->spec, options_.cluster.conductor, m->kept, Child::kAnnounceFd);
      const absl::Status started = m->child.Start(
          program, line, fmt::format("{}/{}.log", options_.log_folder, m->spec.name));
      if (!started.ok()) return GiveUp(*m, std::string(started.message()), kExitUnavailable);
    }
  }

  // Deadlines of draining.
  void Enforce() {
    if (phase_ == Phase::kRunning) return;
    if (phase_ == Phase::kDrainGateway &&
        (!gateway().child.running() || Now() >= phase_deadline_)) {
      phase_ = Phase::kDrainRest;
      phase_deadline_ = Now() + kRestDrain;
      for (auto& m : members_) {
        if (m.get() != &gateway()) m->child.Signal(SIGTERM);
      }
    } else if (phase_ == Phase::kDrainRest && Now() >= phase_deadline_) {
      for (auto& m : members_) m->child.Signal(SIGKILL);
      phase_deadline_ = absl::InfiniteFuture();
    }
  }

  void Wait() {
    std::vector<pollfd> polls = {{signal_fd_, POLLIN, 0}};
    absl::Time next = phase_deadline_;
    for (auto& m : members_) {
      polls.push_back({m->child.output_fd(), POLLIN, 0});  // a negative one is passed over
      polls.push_back({m->child.announce_fd(), POLLIN, 0});
      next = std::min(next, m->start_at);
    }
    int timeout_ms = -1;
    if (next != absl::InfiniteFuture()) {
      timeout_ms = static_cast<int>(
          absl::ToInt64Milliseconds(std::max(next - Now(), absl::ZeroDuration())) + 1);
    }
    if (poll(polls.data(), polls.size(), timeout_ms) <= 0) return;
    for (size_t i = 0; i < members_.size(); ++i) {
      Member& m = *members_[i];
      if (polls[2 + 2 * i].revents != 0 &&
          !m.child.ReadAnnouncements([&](const std::string& line) { OnAnnouncement(m, line); })) {
        m.child.CloseAnnouncements();
      }
      if (polls[1 + 2 * i].revents != 0 &&
          !m.child.ReadOutput([&](const std::string& line) { OnOutput(m, line); })) {
        m.child.CloseOutput();
      }
    }
    if (polls[0].revents != 0) OnSignals();
  }

  void OnSignals() {
    signalfd_siginfo info;
    while (read(signal_fd_, &info, sizeof(info)) == sizeof(info)) {
      if (info.ssi_signo != SIGCHLD) {
        OnStopSignal();
        continue;
      }
      int status = 0;
      for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
        for (auto& m : members_) {
          if (m->child.pid() == pid) OnDeath(*m, status);
        }
      }
    }
  }

  void OnStopSignal() {
    if (phase_ == Phase::kRunning) {
      Say(stderr, "stopping: running requests have 10 s; again to stop at once");
      StartDraining();
      return;
    }
    // A second signal to a draining daemon ends it at once.
    for (auto& m : members_) m->child.Signal(SIGKILL);
  }

  void StartDraining() {
    phase_ = Phase::kDrainGateway;
    phase_deadline_ = Now() + kGatewayDrain;
    for (auto& m : members_) m->start_at = absl::InfiniteFuture();
    gateway().child.Signal(SIGTERM);
  }

  void OnDeath(Member& m, int status) {
    // Its last words are in the pipes.
    if (m.child.announce_fd() >= 0) {
      m.child.ReadAnnouncements([&](const std::string& line) { OnAnnouncement(m, line); });
      m.child.CloseAnnouncements();
    }
    if (m.child.output_fd() >= 0) {
      m.child.ReadOutput([&](const std::string& line) { OnOutput(m, line); });
      m.child.CloseOutput();
    }
    m.child.OnExit();
    if (phase_ != Phase::kRunning) return;
    const int code = WIFEXITED(status) ? WEXITSTATUS(status) : 0;
    // What a file or the configuration says will not change by trying again; neither will a port
    // that is taken while the cluster starts.
    const bool hopeless =
        code == kExitUsage || code == kExitConfig || code == kExitData ||
        (code == kExitUnavailable && !m.was_ready && !m.failure.empty() && !options_.cluster.ready);
    if (hopeless) {
      return GiveUp(m, m.failure.empty() ? ExitText(status) : m.failure, code);
    }
    const auto delay = m.policy.OnDeath(Now());
    if (!delay) {
      return GiveUp(m,
                    fmt::format("{}, the {}th time within a minute", ExitText(status),
                                RestartPolicy::kDeathsMax),
                    1);
    }
    Say(stderr, fmt::format("warning {}: {}; its successor starts in {}", m.spec.name,
                            ExitText(status), absl::FormatDuration(*delay)));
    m.start_at = Now() + *delay;
  }

  void GiveUp(Member& m, const std::string& why, int code) {
    if (exit_code_ != 0) return;
    exit_code_ = code == 0 ? 1 : code;
    if (m.failure.empty()) {
      Say(stderr, fmt::format("the last lines of {}:", m.spec.name));
      for (const std::string& line : m.child.last_lines()) {
        Say(stderr, "    " + EscapeForLog(line, false));
      }
    }
    Say(stderr, fmt::format("error {}: {}", m.spec.name, EscapeForLog(why, false)));
    Say(stderr, fmt::format("logs: {}", options_.log_folder));
    if (phase_ == Phase::kRunning) StartDraining();
  }

  void OnOutput(Member& m, const std::string& line) {
    // Before the cluster serves, a failure is told once, by the announcement.
    if (const auto shown = ShownLine(m.spec.name, line)) Say(stderr, *shown);
  }

  void OnAnnouncement(Member& m, const std::string& line) {
    boost::json::error_code error;
    const auto json = boost::json::parse(line, error);
    if (error || !json.is_object()) return;
    const auto& object = json.get_object();
    const auto text = [&object](const char* key) {
      const auto* value = object.if_contains(key);
      return value != nullptr && value->is_string() ? std::string(value->get_string()) : "";
    };
    const std::string event = text("event");
    if (event == "listening") {
      OnListening(m, text("listener"), text("address"));
    } else if (event == "failed") {
      m.failure = text("message");
    } else if (event == "state") {
      const std::string reason = text("reason");
      m.was_ready |= reason.empty();
      if (!options_.cluster.ready) {
        std::fputs(progress_.OnState(m.spec.name, reason).c_str(), stderr);
        std::fflush(stderr);
      }
      if (reason.empty() && &m == &gateway() && phase_ == Phase::kRunning) OnServing();
    }
  }

  void OnListening(Member& m, const std::string& listener, const std::string& address) {
    for (const std::string& kept : m.spec.kept_listeners) {
      if (kept == listener) m.kept[listener] = ListenAddress(m, listener, address);
    }
    if (listener == "gateway.http") options_.cluster.http = address;
    if (listener == "gateway.grpc") options_.cluster.grpc = address;
    if (absl::EndsWith(listener, "ops")) OnOperations(m, address);
    if (listener != "conductor.rpc") return;
    const bool first = options_.cluster.conductor.empty();
    options_.cluster.conductor = address;
    if (!first) return;
    Publish();
    for (auto& other : members_) {
      if (other.get() != &m) other->start_at = Now();
    }
  }

  void OnOperations(const Member& m, const std::string& address) {
    auto& children = options_.cluster.children;
    auto child = std::find_if(children.begin(), children.end(),
                              [&m](const auto& c) { return c.name == m.spec.name; });
    if (child == children.end()) {
      const std::string daemon = m.spec.program.substr(std::string("antiphon-").size());
      child = children.insert(child, {m.spec.name, daemon, ""});
    }
    child->ops = address;
    Publish();
  }

  // The host that the child was told to listen on, with the port that it got: what it advertises
  // may be another name.
  std::string ListenAddress(const Member& m, const std::string& listener,
                            const std::string& advertised) {
    const std::string prefix = fmt::format("--{}.listen=", listener);
    auto address = ParseHostPort(advertised);
    if (!address.ok()) return advertised;
    for (const std::string& flag : m.spec.flags) {
      if (flag.rfind(prefix, 0) != 0) continue;
      if (const auto told = ParseHostPort(flag.substr(prefix.size())); told.ok()) {
        address->host = told->host;
      }
    }
    return address->Text();
  }

  void OnServing() {
    if (options_.cluster.ready) return;
    options_.cluster.ready = true;
    Publish();
    const std::string url = "http://" + options_.cluster.http;
    Say(stdout, "ready " + url);
    Say(stdout,
        fmt::format("\n  curl {}/v1/chat/completions -H 'Content-Type: application/json' {}-d "
                    "'{{\"model\": \"{}\", \"stream\": true, \"messages\": [{{\"role\": \"user\", "
                    "\"content\": \"Why is the sky blue?\"}}]}}'\n\n"
                    "  antiphon chat     antiphon status     logs: {}     Ctrl-C stops",
                    url, options_.with_keys ? "-H \"Authorization: Bearer $KEY\" " : "",
                    options_.cluster.model, options_.log_folder));
  }

  void Publish() {
    const absl::Status written = WriteClusterFile(options_.runtime_folder, options_.cluster);
    if (!written.ok()) Say(stderr, "warning: " + std::string(written.message()));
  }

  SupervisorOptions options_;
  Progress progress_;
  std::vector<std::unique_ptr<Member>> members_;
  int signal_fd_ = -1;
  Phase phase_ = Phase::kRunning;
  absl::Time phase_deadline_ = absl::InfiniteFuture();
  int exit_code_ = 0;
};

}  // namespace

int Supervise(SupervisorOptions options) { return Supervisor(std::move(options)).Run(); }

}  // namespace antiphon::cli
