// Finds stop strings in a text that comes in pieces, also across their borders, and holds back no
// more than what may still become one.
#ifndef ANTIPHON_GATEWAY_STOP_TEXT_H_
#define ANTIPHON_GATEWAY_STOP_TEXT_H_

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace antiphon::gateway {

// Text in, text out; the sum of what comes out is the text before the first match (and the match
// itself when it is included), however the text was cut. Among matches the one that ends first
// counts, and of those the one that begins first. Not thread-safe.
class StopText {
 public:
  StopText(std::vector<std::string> stops, bool include)
      : stops_(std::move(stops)), include_(include) {}

  struct Result {
    std::string text;                  // to send on
    std::optional<std::string> match;  // the stop string; nothing comes out afterwards
  };
  // `armed` false: this piece cannot end a match (min_tokens), and what was held is let go.
  Result Push(std::string_view piece, bool armed = true);
  // The text ends here: what was held back.
  std::string Finish();

 private:
  std::vector<std::string> stops_;
  bool include_;
  bool matched_ = false;
  std::string held_;
};

}  // namespace antiphon::gateway

#endif  // ANTIPHON_GATEWAY_STOP_TEXT_H_
