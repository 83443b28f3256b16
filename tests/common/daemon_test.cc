// RunDaemon in a child process, watched through its announcements, its operations port and
// systemd's socket.
#include "common/daemon.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>

#include "antiphon/v1/config.pb.h"

namespace antiphon {
namespace {

using ::testing::HasSubstr;

// Ready at once; ends a drain at once, or never.
class FakeService final : public Service {
 public:
  explicit FakeService(bool drains) : drains_(drains) {}
  std::string NotReadyReason() const override { return ""; }
  void Drain(absl::Duration, absl::Duration, absl::AnyInvocable<void()> done) override {
    if (drains_) done();
  }
  void Reload() override { std::fprintf(stderr, "reload ran\n"); }

 private:
  const bool drains_;
};

class DaemonTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "antiphon-daemon-XXXXXX").string();
    folder_ = mkdtemp(name.data());
    notify_ = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::snprintf(address.sun_path, sizeof(address.sun_path), "%s/notify", folder_.c_str());
    ASSERT_EQ(bind(notify_, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    const timeval timeout{.tv_sec = 20};
    setsockopt(notify_, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
  }
  void TearDown() override {
    if (child_ > 0) {
      kill(child_, SIGKILL);
      waitpid(child_, nullptr, 0);
    }
    close(notify_);
    close(announce_);
    std::filesystem::remove_all(folder_);
  }

  void Start(std::vector<std::string> arguments, bool drains = true,
             absl::Status start = absl::OkStatus()) {
    int fds[2];
    ASSERT_EQ(pipe(fds), 0);
    announce_ = fds[0];
    child_ = fork();
    if (child_ == 0) {
      setenv("NOTIFY_SOCKET", (folder_ + "/notify").c_str(), 1);
      unsetenv("JOURNAL_STREAM");
      arguments.insert(arguments.begin(), "antiphon-conductor");
      arguments.push_back("--announce-fd=" + std::to_string(fds[1]));
      std::vector<char*> argv;
      for (auto& a : arguments) argv.push_back(a.data());
      const int rc =
          RunDaemon(static_cast<int>(argv.size()), argv.data(),
                    {.name = "conductor", .metrics_name = "conductor"},
                    [&](DaemonContext& context) -> absl::StatusOr<std::unique_ptr<Service>> {
                      if (!start.ok()) return start;
                      context.announce("conductor.rpc", "127.0.0.1:1");
                      return std::make_unique<FakeService>(drains);
                    });
      _exit(rc);
    }
    close(fds[1]);
  }

  std::string AnnouncedLine() {
    std::string line;
    char c;
    while (read(announce_, &c, 1) == 1 && c != '\n') line += c;
    return line;
  }
  // Waits for a datagram that contains `text`.
  bool Notified(std::string_view text) {
    char buffer[1024];
    ssize_t n;
    while ((n = recv(notify_, buffer, sizeof(buffer), 0)) > 0) {
      if (std::string_view(buffer, n).find(text) != std::string_view::npos) return true;
    }
    return false;
  }
  int ExitCode() {
    int status = 0;
    waitpid(child_, &status, 0);
    child_ = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }

  std::string folder_;
  int notify_ = -1;
  int announce_ = -1;
  pid_t child_ = 0;
};

const std::vector<std::string> kFlags = {"--conductor.ops.listen=127.0.0.1:0",
                                         "--conductor.drain.delay=0s"};

TEST_F(DaemonTest, AnnouncesItsAddressesAndReadinessAndDrainsOnSigterm) {
  Start(kFlags);
  EXPECT_THAT(AnnouncedLine(), HasSubstr(R"("listener":"conductor.ops","address":"127.0.0.1:)"));
  EXPECT_THAT(AnnouncedLine(), HasSubstr(R"("listener":"conductor.rpc","address":"127.0.0.1:1")"));
  EXPECT_EQ(AnnouncedLine(), R"({"event":"state","ready":true,"reason":""})");
  EXPECT_TRUE(Notified("READY=1"));
  kill(child_, SIGTERM);
  EXPECT_TRUE(Notified("STOPPING=1"));
  EXPECT_EQ(ExitCode(), 0);
}

TEST_F(DaemonTest, ASecondSignalEndsItAtOnce) {
  Start(kFlags, /*drains=*/false);
  ASSERT_TRUE(Notified("READY=1"));
  kill(child_, SIGTERM);
  ASSERT_TRUE(Notified("STOPPING=1"));
  kill(child_, SIGINT);
  EXPECT_EQ(ExitCode(), 1);
}

TEST_F(DaemonTest, SighupReloads) {
  Start(kFlags);
  ASSERT_TRUE(Notified("READY=1"));
  kill(child_, SIGHUP);
  EXPECT_TRUE(Notified("RELOADING=1"));
  EXPECT_TRUE(Notified("READY=1"));
}

TEST_F(DaemonTest, AFactoryThatFailsEndsItWithTheCodeOfTheReason) {
  Start(kFlags, true, absl::DataLossError("model.gguf is cut short"));
  std::string line;
  do {
    line = AnnouncedLine();
  } while (line.find("failed") == std::string::npos && !line.empty());
  EXPECT_EQ(line, R"({"event":"failed","code":65,"message":"model.gguf is cut short"})");
  EXPECT_EQ(ExitCode(), 65);
}

TEST_F(DaemonTest, BadConfigurationIs78AndBadUsageIs64) {
  Start({"--conductor.max_queue=0"});
  EXPECT_EQ(ExitCode(), 78);
  close(announce_);
  Start({"now"});
  EXPECT_EQ(ExitCode(), 64);
  close(announce_);
  Start({"--check-config"});
  EXPECT_EQ(ExitCode(), 0);
}

TEST_F(DaemonTest, EndsWhenItsParentIsGone) {
  int fds[2];
  ASSERT_EQ(pipe(fds), 0);
  const pid_t parent = fork();
  if (parent == 0) {
    setenv("ANTIPHON_PARENT_PID", std::to_string(getpid()).c_str(), 1);
    Start(kFlags);
    pause();  // until the test kills us
    _exit(0);
  }
  close(fds[1]);
  ASSERT_TRUE(Notified("READY=1"));
  kill(parent, SIGKILL);
  waitpid(parent, nullptr, 0);
  EXPECT_TRUE(Notified("STOPPING=1"));
  // Our end of the pipe sees the last holder of the other end leave.
  char c;
  EXPECT_EQ(read(fds[0], &c, 1), 0);
  close(fds[0]);
}

TEST(ExitCodeTest, FollowsSysexits) {
  EXPECT_EQ(ExitCodeOf(absl::OkStatus()), 0);
  EXPECT_EQ(ExitCodeOf(absl::InvalidArgumentError("")), kExitConfig);
  EXPECT_EQ(ExitCodeOf(absl::DataLossError("")), kExitData);
  EXPECT_EQ(ExitCodeOf(absl::UnavailableError("")), kExitUnavailable);
  EXPECT_EQ(ExitCodeOf(absl::InternalError("")), 70);
}

}  // namespace
}  // namespace antiphon
