// Writes JSON into a string. For values that are few and known: answers and SSE events.
#ifndef ANTIPHON_GATEWAY_JSON_TEXT_H_
#define ANTIPHON_GATEWAY_JSON_TEXT_H_

#include <cstdint>
#include <string>
#include <string_view>

namespace antiphon::gateway {

// A quoted JSON string on one line. `text` must be valid UTF-8; U+2028 and U+2029 are escaped too.
void AppendJsonString(std::string& out, std::string_view text);
std::string JsonString(std::string_view text);
// Shortest text that reads back as the same float; not finite becomes -9999.0.
void AppendJsonFloat(std::string& out, float value);
void AppendUint(std::string& out, uint64_t value);

}  // namespace antiphon::gateway

#endif  // ANTIPHON_GATEWAY_JSON_TEXT_H_
