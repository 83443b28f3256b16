#include "common/logging.h"

#include <spdlog/logger.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "absl/time/time.h"
#include "common/clock.h"

namespace antiphon {
namespace {

constexpr size_t kMessageBytesMax = 16 << 10;
constexpr const char* kLevelNames[] = {"debug", "info", "warning", "error"};

// Where lines go and how they look. Replaced by InitLogging before there are threads that log.
struct Output {
  std::string daemon = "-";
  std::string node = "-";
  bool json = false;
  bool journal = false;
  std::shared_ptr<spdlog::logger> logger;
};

std::atomic<LogLevel> g_level{LogLevel::kInfo};

// systemd sets JOURNAL_STREAM to device:inode of the stream it gave us; a redirected stderr
// differs.
bool StderrIsJournal() {
  const char* stream = std::getenv("JOURNAL_STREAM");
  if (stream == nullptr) return false;
  unsigned long long device = 0, inode = 0;
  if (std::sscanf(stream, "%llu:%llu", &device, &inode) != 2) return false;
  struct stat st;
  return fstat(STDERR_FILENO, &st) == 0 && st.st_dev == device && st.st_ino == inode;
}

Output MakeOutput(const LogOptions& options) {
  Output output;
  if (!options.daemon.empty()) output.daemon = options.daemon;
  if (!options.node.empty()) output.node = options.node;
  output.json = options.format == "json";
  output.journal = StderrIsJournal();
  output.logger = std::make_shared<spdlog::logger>(
      "antiphon", std::make_shared<spdlog::sinks::stderr_sink_mt>());
  output.logger->set_pattern("%v");
  output.logger->set_level(spdlog::level::trace);
  return output;
}

Output& TheOutput() {
  static Output* output = new Output(MakeOutput({}));
  return *output;
}

// Length of the valid UTF-8 sequence at the start of `s`, 0 when there is none; `code` gets it.
size_t DecodeUtf8(std::string_view s, uint32_t& code) {
  const auto byte = [&s](size_t i) { return static_cast<uint8_t>(s[i]); };
  const uint8_t lead = byte(0);
  if (lead < 0x80) {
    code = lead;
    return 1;
  }
  const size_t length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
  if (lead < 0xC2 || lead > 0xF4 || s.size() < length) return 0;
  code = lead & (0xFF >> (length + 1));
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return 0;
    code = code << 6 | (byte(i) & 0x3F);
  }
  static constexpr uint32_t kFirst[] = {0, 0, 0x80, 0x800, 0x10000};
  if (code < kFirst[length] || code > 0x10FFFF || (code >= 0xD800 && code <= 0xDFFF)) return 0;
  return length;
}

// Code points that break lines or reorder what a terminal shows.
bool IsUnsafe(uint32_t code) {
  return code < 0x20 || (code >= 0x7F && code < 0xA0) || (code >= 0x2028 && code <= 0x202E) ||
         (code >= 0x2066 && code <= 0x2069) || code == 0xFEFF;
}

}  // namespace

std::string EscapeForLog(std::string_view text, bool json) {
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    uint32_t code = 0;
    const size_t length = DecodeUtf8(text, code);
    if (length == 0) {
      out +=
          json ? std::string("\\ufffd") : fmt::format("\\x{:02x}", static_cast<uint8_t>(text[0]));
      text.remove_prefix(1);
      continue;
    }
    if (code == '\n') {
      out += "\\n";
    } else if (code == '\t') {
      out += "\\t";
    } else if (code == '\r') {
      out += "\\r";
    } else if (json && (code == '"' || code == '\\')) {
      out += '\\';
      out += static_cast<char>(code);
    } else if (IsUnsafe(code)) {
      out += fmt::format("\\u{:04x}", code);
    } else {
      out.append(text.substr(0, length));
    }
    text.remove_prefix(length);
  }
  return out;
}

void InitLogging(const LogOptions& options) {
  TheOutput() = MakeOutput(options);
  SetLogLevel(options.level);
}

bool SetLogLevel(std::string_view level) {
  for (int i = 0; i < 4; ++i) {
    if (level == kLevelNames[i]) {
      g_level.store(static_cast<LogLevel>(i), std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

bool LogEnabled(LogLevel level) { return level >= g_level.load(std::memory_order_relaxed); }

std::string FormatLogLine(const LogOptions& options, bool journal, absl::Time now, LogLevel level,
                          std::string_view request, std::string_view message) {
  // syslog priorities: 7 debug, 6 info, 4 warning, 3 error.
  static constexpr int kPriority[] = {7, 6, 4, 3};
  const int index = static_cast<int>(level);
  const std::string ts = absl::FormatTime("%Y-%m-%dT%H:%M:%E3SZ", now, absl::UTCTimeZone());
  std::string_view body = message.substr(0, kMessageBytesMax);
  const bool json = options.format == "json";
  std::string text = EscapeForLog(body, json);
  if (body.size() < message.size()) text += "...";
  std::string line = journal ? fmt::format("<{}>", kPriority[index]) : std::string();
  if (json) {
    line +=
        fmt::format(R"({{"ts":"{}","level":"{}","daemon":"{}","node":"{}")", ts, kLevelNames[index],
                    EscapeForLog(options.daemon, true), EscapeForLog(options.node, true));
    if (!request.empty()) line += fmt::format(R"(,"req":"{}")", EscapeForLog(request, true));
    line += fmt::format(R"(,"msg":"{}"}})", text);
    return line;
  }
  if (!journal) line += ts + " ";
  line += fmt::format("{} {} {} {} {}", kLevelNames[index], options.daemon, options.node,
                      request.empty() ? "-" : EscapeForLog(request, false), text);
  return line;
}

void LogLine(LogLevel level, std::string_view request, std::string_view message) {
  const Output& output = TheOutput();
  const LogOptions options{
      .daemon = output.daemon, .node = output.node, .format = output.json ? "json" : "text"};
  const std::string line =
      FormatLogLine(options, output.journal, Clock::Real().WallNow(), level, request, message);
  output.logger->log(spdlog::level::info, spdlog::string_view_t(line.data(), line.size()));
}

}  // namespace antiphon
