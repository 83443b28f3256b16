// What a model says, made fit for a terminal.
#ifndef ANTIPHON_CLI_CHAT_TERMINAL_TEXT_H_
#define ANTIPHON_CLI_CHAT_TERMINAL_TEXT_H_

#include <string>
#include <string_view>

namespace antiphon::cli {

// Passes text through without what would command the terminal: control characters other than line
// feed and tab, in ASCII and as C1 (U+0080 to U+009F). The input is valid UTF-8, as JSON is.
class TerminalText {
 public:
  std::string Push(std::string_view text) {
    std::string out;
    for (size_t i = 0; i < text.size(); ++i) {
      const auto c = static_cast<unsigned char>(text[i]);
      if (c == 0xC2 && i + 1 < text.size() && static_cast<unsigned char>(text[i + 1]) < 0xA0) {
        ++i;
      } else if ((c >= 0x20 && c != 0x7F) || c == '\n' || c == '\t') {
        out += text[i];
      }
    }
    return out;
  }
};

}  // namespace antiphon::cli

#endif  // ANTIPHON_CLI_CHAT_TERMINAL_TEXT_H_
