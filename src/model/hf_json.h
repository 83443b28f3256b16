// The JSON files of a Hugging Face folder. Hostile input: nesting, size and UTF-8 are bounded.
#ifndef ANTIPHON_MODEL_HF_JSON_H_
#define ANTIPHON_MODEL_HF_JSON_H_

#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "model/json_value.h"

namespace antiphon::model {

inline constexpr size_t kHfJsonBytesMax = 64u << 20;  // the largest tokenizer.json have some 35 MB

// DATA_LOSS, naming the file, when `text` is too large or no JSON object. A key that appears twice
// counts the last time, as in Python.
absl::StatusOr<Json> ParseHfJson(const std::string& file, std::string_view text);

// The member of that name; nullptr when it is absent or null.
const Json* FindMember(const JsonObject& object, std::string_view name);
// Of that kind; nullptr when it is absent or of another.
const JsonObject* FindObject(const JsonObject& object, std::string_view name);
const JsonArray* FindArray(const JsonObject& object, std::string_view name);
// Empty when it is absent or no string.
std::string_view FindText(const JsonObject& object, std::string_view name);
// Whether it is there and true.
bool IsTrue(const JsonObject& object, std::string_view name);
// For messages: a short form of any value.
std::string Shown(const Json& value);

}  // namespace antiphon::model

#endif  // ANTIPHON_MODEL_HF_JSON_H_
