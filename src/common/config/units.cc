#include "common/config/units.h"

#include <google/protobuf/duration.pb.h>
#include <spdlog/fmt/fmt.h>

#include <cmath>
#include <cstdlib>

#include "common/config.h"
#include "common/status_macros.h"

namespace antiphon {
namespace {

// Splits "12.5GiB" behind the number. False when there is no number in front.
bool TakeNumber(std::string_view& text, double& number) {
  size_t end = 0;
  int dots = 0;
  while (end < text.size() && ((text[end] >= '0' && text[end] <= '9') || text[end] == '.')) {
    dots += text[end] == '.';
    ++end;
  }
  if (end == 0 || end > 20 || dots > 1 || end == static_cast<size_t>(dots)) return false;
  number = std::strtod(std::string(text.substr(0, end)).c_str(), nullptr);
  text.remove_prefix(end);
  return true;
}

std::string_view TakeUnit(std::string_view& text) {
  size_t end = 0;
  while (end < text.size() && text[end] != '.' && (text[end] < '0' || text[end] > '9')) ++end;
  const std::string_view unit = text.substr(0, end);
  text.remove_prefix(end);
  return unit;
}

std::string Shorten(std::string_view text) {
  return text.size() <= 40 ? std::string(text) : std::string(text.substr(0, 40)) + "...";
}

}  // namespace

absl::StatusOr<absl::Duration> ParseDuration(std::string_view text) {
  const auto bad = [&](std::string_view why) {
    return absl::InvalidArgumentError(fmt::format(
        "'{}' is no duration: {}; write e.g. 30s, 250ms, 1m30s or off", Shorten(text), why));
  };
  if (text == "off") return absl::InfiniteDuration();
  if (text.empty()) return bad("it is empty");
  absl::Duration total;
  for (std::string_view rest = text; !rest.empty();) {
    double number = 0;
    if (!TakeNumber(rest, number)) return bad("a number is missing");
    const std::string_view unit = TakeUnit(rest);
    if (unit == "us") {
      total += absl::Microseconds(number);
    } else if (unit == "ms") {
      total += absl::Milliseconds(number);
    } else if (unit == "s") {
      total += absl::Seconds(number);
    } else if (unit == "m") {
      total += absl::Minutes(number);
    } else if (unit == "h") {
      total += absl::Hours(number);
    } else {
      return bad(unit.empty() ? "it has no unit"
                              : fmt::format("unit '{}' is none of us, ms, s, m, h", Shorten(unit)));
    }
  }
  if (total > absl::Hours(24 * 365)) return bad("it is longer than a year");
  return total;
}

absl::StatusOr<uint64_t> ParseByteSize(std::string_view text) {
  const auto bad = [&](std::string_view why) {
    return absl::InvalidArgumentError(fmt::format(
        "'{}' is no size: {}; write e.g. 8GiB, 512MiB, 64KiB or 4096B", Shorten(text), why));
  };
  double number = 0;
  std::string_view rest = text;
  if (!TakeNumber(rest, number)) return bad("a number is missing");
  const std::string_view unit = TakeUnit(rest);
  double scale = 0;
  if (unit == "B") scale = 1;
  if (unit == "KiB") scale = 1024;
  if (unit == "MiB") scale = 1024.0 * 1024;
  if (unit == "GiB") scale = 1024.0 * 1024 * 1024;
  if (unit == "TiB") scale = 1024.0 * 1024 * 1024 * 1024;
  if (scale == 0 || !rest.empty()) {
    return bad(unit.empty()
                   ? "it has no unit"
                   : fmt::format("unit '{}' is none of B, KiB, MiB, GiB, TiB", Shorten(unit)));
  }
  const double bytes = number * scale;
  if (bytes > 0x1p60) return bad("it is larger than 1024 PiB");
  return static_cast<uint64_t>(std::llround(bytes));
}

absl::Duration ToDuration(const google::protobuf::Duration& d) {
  if (d.seconds() >= kOffSeconds) return absl::InfiniteDuration();
  return absl::Seconds(d.seconds()) + absl::Nanoseconds(d.nanos());
}

void FromDuration(absl::Duration d, google::protobuf::Duration& out) {
  if (d == absl::InfiniteDuration()) {
    out.set_seconds(kOffSeconds);
    out.set_nanos(0);
    return;
  }
  out.set_seconds(absl::IDivDuration(d, absl::Seconds(1), &d));
  out.set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(d)));
}

std::string DurationText(const google::protobuf::Duration& d) {
  const absl::Duration duration = ToDuration(d);
  if (duration == absl::InfiniteDuration()) return "off";
  const int64_t us = absl::ToInt64Microseconds(duration);
  if (us % 1'000'000 == 0) return fmt::format("{}s", us / 1'000'000);
  if (us % 1'000 == 0) return fmt::format("{}ms", us / 1'000);
  return fmt::format("{}us", us);
}

std::string ByteSizeText(uint64_t bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  while (unit < 4 && bytes != 0 && bytes % 1024 == 0) {
    bytes /= 1024;
    ++unit;
  }
  return fmt::format("{}{}", bytes, kUnits[unit]);
}

}  // namespace antiphon
