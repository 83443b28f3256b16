// The parts of `antiphon up` that decide without doing: restarts, shown lines, progress, checks.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "cli/up/checks.h"
#include "cli/up/log_filter.h"
#include "cli/up/progress.h"
#include "cli/up/restart_policy.h"
#include "common/net.h"

namespace antiphon::cli {
namespace {

using ::testing::HasSubstr;

TEST(RestartPolicyTest, TheFifthDeathWithinAMinuteEndsIt) {
  RestartPolicy policy;
  absl::Time now = absl::UnixEpoch();
  absl::Duration last;
  for (int i = 0; i < 4; ++i) {
    const auto delay = policy.OnDeath(now += absl::Seconds(10));
    ASSERT_TRUE(delay.has_value());
    EXPECT_GT(*delay, last);
    last = *delay;
  }
  EXPECT_FALSE(policy.OnDeath(now + absl::Seconds(10)).has_value());
}

TEST(RestartPolicyTest, DeathsFarApartAreEachAFirst) {
  RestartPolicy policy;
  absl::Time now = absl::UnixEpoch();
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(policy.OnDeath(now += absl::Seconds(61)), absl::Milliseconds(100));
  }
}

constexpr char kTime[] = "2026-11-25T01:34:06.123Z ";

TEST(LogFilterTest, ShowsWarningsErrorsAndAccessLines) {
  const auto shown = [](const std::string& line) { return ShownLine("prefill-0", kTime + line); };
  EXPECT_EQ(shown("info prefill p@h - loading"), std::nullopt);
  EXPECT_EQ(shown("debug prefill p@h - x"), std::nullopt);
  EXPECT_EQ(shown("warning prefill p@h - slow disk"), "warning prefill-0: slow disk");
  EXPECT_EQ(shown("error prefill p@h r-1 gone"), "error prefill-0: r-1 gone");
  EXPECT_EQ(shown("info gateway g@h r-1 access status=200"), "prefill-0: r-1 access status=200");
}

TEST(LogFilterTest, ReadsJsonLinesToo) {
  EXPECT_EQ(ShownLine("g", R"({"ts":"t","level":"info","msg":"x"})"), std::nullopt);
  EXPECT_EQ(ShownLine("g", R"({"ts":"t","level":"warning","msg":"a\u001bb"})"),
            "warning g: a\\u001bb");
}

TEST(LogFilterTest, ShowsWhatIsNoLogLineWithoutItsControlCharacters) {
  EXPECT_EQ(ShownLine("g", "x.cc:1: CHECK failed: a\x1b[2J"),
            "g: x.cc:1: CHECK failed: a\\u001b[2J");
  EXPECT_EQ(ShownLine("g", ""), std::nullopt);
  EXPECT_EQ(ShownLine("g", "E1125 01:02:03.4 connection refused"), std::nullopt);
}

TEST(ProgressTest, WithoutATerminalALineForEveryTenth) {
  Progress progress(false);
  EXPECT_EQ(progress.OnState("p", "loading weights 3%"), "p: loading weights 0%\n");
  EXPECT_EQ(progress.OnState("p", "loading weights 9%"), "");
  EXPECT_EQ(progress.OnState("p", "loading weights 11%"), "p: loading weights 10%\n");
  EXPECT_EQ(progress.OnState("p", ""), "p: ready\n");
  EXPECT_EQ(progress.Clear(), "");
}

TEST(ProgressTest, ATerminalGetsOneLineWithABar) {
  Progress progress(true);
  EXPECT_THAT(progress.OnState("p", "loading weights 50%"), HasSubstr("[############......"));
  EXPECT_THAT(progress.OnState("d", "loading weights 20%"), HasSubstr("d: loading weights 20%"));
  EXPECT_EQ(progress.Clear(), "\r\x1b[K");
  EXPECT_EQ(progress.Clear(), "");
  EXPECT_THAT(progress.OnState("d", ""), HasSubstr("p: loading weights 50%"));
  EXPECT_EQ(progress.OnState("p", ""), "\r\x1b[K");
}

TEST(ProgressTest, FindsThePercentage) {
  EXPECT_EQ(PercentOf("loading weights 43%"), 43);
  EXPECT_EQ(PercentOf("100% of it"), 100);
  EXPECT_EQ(PercentOf("starting"), -1);
  EXPECT_EQ(PercentOf("%"), -1);
  EXPECT_EQ(PercentOf("99999999999999%"), -1);
}

TEST(ChecksTest, TheDefaultPoolShrinksAndAChosenOneIsRefused) {
  MemoryNeed need = {.pool_bytes = 4ull << 30,
                     .weights_bytes = 100 << 20,
                     .workers = 2,
                     .available_bytes = 16ull << 30};
  EXPECT_EQ(*FitPool(need), 4ull << 30);
  need.available_bytes = 2ull << 30;
  const auto fitted = FitPool(need);
  ASSERT_TRUE(fitted.ok()) << fitted.status();
  EXPECT_LT(*fitted, 1ull << 30);
  EXPECT_GE(*fitted, 64u << 20);
  need.pool_was_chosen = true;
  const std::string message(FitPool(need).status().message());
  EXPECT_THAT(message, HasSubstr("too little memory: 4096 MiB for the KV pool"));
  EXPECT_THAT(message, HasSubstr("--kvstore.pool="));
  need.pool_was_chosen = false;
  need.available_bytes = 300 << 20;
  EXPECT_EQ(FitPool(need).status().code(), absl::StatusCode::kResourceExhausted);
}

TEST(ChecksTest, ATakenPortNamesItselfTheFlagAndAnother) {
  uint16_t port = 0;
  const auto fd = ListenTcp({"127.0.0.1", 0}, port);
  ASSERT_TRUE(fd.ok());
  const std::string listen = HostPort{"127.0.0.1", port}.Text();
  const std::string message(CheckListen(listen, "--listen").message());
  EXPECT_THAT(message, HasSubstr("port " + std::to_string(port)));
  EXPECT_THAT(message, HasSubstr("e.g. --listen 127.0.0.1:"));
  EXPECT_FALSE(PortIsFree("127.0.0.1", port));
  close(*fd);
  EXPECT_TRUE(CheckListen(listen, "--listen").ok());
  EXPECT_THAT(std::string(CheckListen("nowhere", "--listen").message()),
              HasSubstr("--listen: 'nowhere' has no port"));
}

TEST(ChecksTest, AMissingModelTellsHowToGetOne) {
  uint64_t bytes = 0;
  EXPECT_THAT(std::string(CheckModel("/nowhere.gguf", true, bytes).message()),
              HasSubstr("scripts/quickstart"));
  EXPECT_EQ(CheckModel("/nowhere.gguf", false, bytes).message(), "no such model: /nowhere.gguf");
  EXPECT_THAT(std::string(CheckModel("/tmp", false, bytes).message()), HasSubstr("config.json"));
  EXPECT_THAT(std::string(CheckModel("/proc/self/exe", false, bytes).message()), HasSubstr("GGUF"));
}

}  // namespace
}  // namespace antiphon::cli
