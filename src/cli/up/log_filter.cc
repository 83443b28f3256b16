#include "cli/up/log_filter.h"

#include <boost/json/parse.hpp>

#include "common/logging.h"

namespace antiphon::cli {
namespace {

struct Line {
  std::string level, request, message;
};

std::string_view TakeWord(std::string_view& text) {
  const size_t space = text.find(' ');
  const std::string_view word = text.substr(0, space);
  text.remove_prefix(space == std::string_view::npos ? text.size() : space + 1);
  return word;
}

// "TS LEVEL DAEMON NODE REQ MSG"
std::optional<Line> FromText(std::string_view text) {
  const std::string_view ts = TakeWord(text);
  if (ts.size() != 24 || ts[10] != 'T' || ts.back() != 'Z') return std::nullopt;
  Line line;
  line.level = std::string(TakeWord(text));
  TakeWord(text);
  TakeWord(text);
  line.request = std::string(TakeWord(text));
  if (line.request == "-") line.request.clear();
  line.message = std::string(text);
  return line;
}

std::optional<Line> FromJson(std::string_view text) {
  if (text.empty() || text[0] != '{') return std::nullopt;
  boost::json::error_code error;
  const auto json = boost::json::parse(boost::json::string_view(text.data(), text.size()), error);
  if (error || !json.is_object()) return std::nullopt;
  const auto get = [&json](const char* key) {
    const auto* value = json.get_object().if_contains(key);
    return value != nullptr && value->is_string() ? std::string(value->get_string()) : "";
  };
  if (get("level").empty()) return std::nullopt;
  return Line{get("level"), get("req"), get("msg")};
}

// gRPC's own lines, "E1125 01:02:03.4 ...": they repeat what our lines say.
bool IsLibraryNoise(std::string_view text) {
  return text.size() > 5 && (text[0] == 'E' || text[0] == 'I' || text[0] == 'D') &&
         text[1] >= '0' && text[1] <= '9' && text[2] >= '0' && text[2] <= '9';
}

}  // namespace

std::optional<std::string> ShownLine(std::string_view child, std::string_view text) {
  std::optional<Line> line = FromText(text);
  if (!line) line = FromJson(text);
  if (!line) {
    if (text.empty() || IsLibraryNoise(text)) return std::nullopt;
    return fmt::format("{}: {}", child, EscapeForLog(text.substr(0, 2000), false));
  }
  const bool access = line->message.rfind(kAccessWord, 0) == 0;
  if (!access && line->level != "warning" && line->level != "error") return std::nullopt;
  return fmt::format("{}{}: {}{}", access ? "" : line->level + " ", child,
                     line->request.empty() ? "" : EscapeForLog(line->request, false) + " ",
                     EscapeForLog(line->message, false));
}

}  // namespace antiphon::cli
