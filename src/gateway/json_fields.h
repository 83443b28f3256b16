// Reads the members of one JSON object: knows which were asked for, so that the rest can be named
// as ignored, and keeps the first error. null is absent everywhere.
#ifndef ANTIPHON_GATEWAY_JSON_FIELDS_H_
#define ANTIPHON_GATEWAY_JSON_FIELDS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "gateway/api_error.h"
#include "model/json_value.h"

namespace antiphon::gateway {

// Limits of a request body.
inline constexpr int kJsonDepthMax = 64;
inline constexpr size_t kJsonValuesMax = 4'000'000;
inline constexpr size_t kUnknownNamesMax = 32;

// Strict: valid UTF-8, no duplicates of syntax, depth and number of values bounded. The error says
// at which byte. `out` must be an object in the end.
MaybeError ParseJsonObject(std::string_view text, model::Json& out);

// Not thread-safe; the object outlives the reader. After the first error all reads give nothing.
class JsonFields {
 public:
  // `path` precedes names in errors: "" or "messages[0].".
  JsonFields(const model::JsonObject& object, std::string path, MaybeError& error)
      : object_(object), path_(std::move(path)), error_(error) {}

  // nullptr when absent, null, or after an error.
  const model::Json* Find(std::string_view name);
  std::optional<bool> Bool(std::string_view name);
  std::optional<double> Number(std::string_view name, double low, double high);
  // 16.0 is an integer as well.
  std::optional<int64_t> Integer(std::string_view name, int64_t low, int64_t high);
  std::optional<std::string_view> String(std::string_view name);
  const model::JsonObject* Object(std::string_view name);
  const model::JsonArray* Array(std::string_view name);
  // Known, without effect on the answer.
  void Accept(std::string_view name) { Find(name); }

  void Fail(ApiError error);
  bool failed() const { return error_.has_value(); }
  std::string Path(std::string_view name) const { return path_ + std::string(name); }
  // Members nobody asked for, in the client's order; at most kUnknownNamesMax.
  std::vector<std::string> Unknown() const;

 private:
  const model::JsonObject& object_;
  std::string path_;
  MaybeError& error_;
  std::vector<std::string_view> known_;
};

// "an integer", "a string", ... for messages.
std::string_view JsonKindName(const model::Json& value);

}  // namespace antiphon::gateway

#endif  // ANTIPHON_GATEWAY_JSON_FIELDS_H_
