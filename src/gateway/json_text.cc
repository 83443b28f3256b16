#include "gateway/json_text.h"

#include <charconv>
#include <cmath>

namespace antiphon::gateway {

void AppendJsonString(std::string& out, std::string_view text) {
  static constexpr char kDigits[] = "0123456789abcdef";
  out += '"';
  size_t plain = 0;
  const auto flush = [&](size_t end) { out.append(text.substr(plain, end - plain)); };
  for (size_t i = 0; i < text.size(); ++i) {
    const uint8_t c = static_cast<uint8_t>(text[i]);
    if (c >= 0x20 && c != '"' && c != '\\' && c != 0x7f && c != 0xe2) continue;
    if (c == 0xe2) {
      // U+2028 and U+2029 end a line for some readers of events.
      if (i + 2 >= text.size() || text[i + 1] != '\x80' ||
          (text[i + 2] != '\xa8' && text[i + 2] != '\xa9')) {
        continue;
      }
      flush(i);
      out += text[i + 2] == '\xa8' ? "\\u2028" : "\\u2029";
      i += 2;
      plain = i + 1;
      continue;
    }
    flush(i);
    plain = i + 1;
    switch (c) {
      case '"':
        out += "\\\"";
        break;
      case '\\':
        out += "\\\\";
        break;
      case '\n':
        out += "\\n";
        break;
      case '\r':
        out += "\\r";
        break;
      case '\t':
        out += "\\t";
        break;
      default:
        out += "\\u00";
        out += kDigits[c >> 4];
        out += kDigits[c & 15];
    }
  }
  flush(text.size());
  out += '"';
}

std::string JsonString(std::string_view text) {
  std::string out;
  AppendJsonString(out, text);
  return out;
}

void AppendJsonFloat(std::string& out, float value) {
  if (!std::isfinite(value)) {
    out += "-9999.0";
    return;
  }
  char buffer[32];
  const auto end = std::to_chars(buffer, buffer + sizeof(buffer), value).ptr;
  const std::string_view text(buffer, end - buffer);
  out += text;
  if (text.find_first_of(".e") == std::string_view::npos) out += ".0";
}

void AppendUint(std::string& out, uint64_t value) {
  char buffer[24];
  out.append(buffer, std::to_chars(buffer, buffer + sizeof(buffer), value).ptr - buffer);
}

}  // namespace antiphon::gateway
