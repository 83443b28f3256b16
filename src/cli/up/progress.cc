#include "cli/up/progress.h"

#include <algorithm>

#include "common/logging.h"

namespace antiphon::cli {
namespace {

constexpr int kBarWidth = 24;
constexpr size_t kColumnsMax = 78;

// "loading weights 43%" -> "loading weights 40%"
std::string Rounded(const std::string& reason) {
  const int percent = PercentOf(reason);
  if (percent < 0) return reason;
  const size_t sign = reason.find('%');
  size_t begin = sign;
  while (begin > 0 && reason[begin - 1] >= '0' && reason[begin - 1] <= '9') --begin;
  return fmt::format("{}{}{}", reason.substr(0, begin), percent / 10 * 10, reason.substr(sign));
}

}  // namespace

int PercentOf(std::string_view reason) {
  const size_t sign = reason.find('%');
  if (sign == std::string_view::npos) return -1;
  int value = 0, scale = 1, digits = 0;
  for (size_t i = sign; i > 0 && reason[i - 1] >= '0' && reason[i - 1] <= '9'; --i) {
    if (++digits > 3) return -1;
    value += (reason[i - 1] - '0') * scale;
    scale *= 10;
  }
  return digits == 0 ? -1 : std::min(value, 100);
}

std::string Progress::OnState(const std::string& child, const std::string& reason) {
  const std::string safe = EscapeForLog(reason, false);
  if (safe.empty()) {
    reasons_.erase(child);
  } else {
    reasons_[child] = safe;
  }
  if (terminal_) {
    const std::string line = TerminalLine();
    std::string out = Clear();
    if (!line.empty()) {
      out += line;
      line_is_open_ = true;
    }
    return out;
  }
  const std::string shown = safe.empty() ? "ready" : Rounded(safe);
  std::string& last = printed_[child];
  if (last == shown) return "";
  last = shown;
  return fmt::format("{}: {}\n", child, shown);
}

std::string Progress::Clear() {
  if (!line_is_open_) return "";
  line_is_open_ = false;
  return "\r\x1b[K";
}

std::string Progress::TerminalLine() const {
  // The slowest child is what everybody waits for.
  const std::pair<const std::string, std::string>* slowest = nullptr;
  int least = 101;
  for (const auto& entry : reasons_) {
    const int percent = PercentOf(entry.second);
    if (percent >= 0 && percent < least) {
      least = percent;
      slowest = &entry;
    }
  }
  std::string line;
  if (slowest != nullptr) {
    const int filled = kBarWidth * least / 100;
    line = fmt::format("[{:#<{}}{:.<{}}] {}: {}", "", filled, "", kBarWidth - filled,
                       slowest->first, slowest->second);
  } else if (!reasons_.empty()) {
    line = fmt::format("{}: {}", reasons_.begin()->first, reasons_.begin()->second);
  }
  return line.substr(0, kColumnsMax);
}

}  // namespace antiphon::cli
