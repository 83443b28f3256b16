#include "model/hf_json.h"

#include <spdlog/fmt/fmt.h>

#include <boost/json/monotonic_resource.hpp>
#include <boost/json/parse.hpp>
#include <boost/json/serialize.hpp>

#include "model/tokenizer.h"

namespace antiphon::model {

absl::StatusOr<Json> ParseHfJson(const std::string& file, std::string_view text) {
  if (text.size() > kHfJsonBytesMax) {
    return absl::DataLossError(fmt::format("{} has {} bytes, at most {} are accepted", file,
                                           text.size(), kHfJsonBytesMax));
  }
  boost::json::parse_options options;
  options.max_depth = 32;
  boost::json::error_code error;
  Json json = boost::json::parse(
      text, error, boost::json::make_shared_resource<boost::json::monotonic_resource>(), options);
  if (error) return absl::DataLossError(fmt::format("{} is no JSON: {}", file, error.message()));
  if (!json.is_object()) return absl::DataLossError(file + " is no JSON object");
  return json;
}

const Json* FindMember(const JsonObject& object, std::string_view name) {
  const Json* member = object.if_contains(name);
  return member == nullptr || member->is_null() ? nullptr : member;
}

const JsonObject* FindObject(const JsonObject& object, std::string_view name) {
  const Json* member = object.if_contains(name);
  return member == nullptr ? nullptr : member->if_object();
}

const JsonArray* FindArray(const JsonObject& object, std::string_view name) {
  const Json* member = object.if_contains(name);
  return member == nullptr ? nullptr : member->if_array();
}

std::string_view FindText(const JsonObject& object, std::string_view name) {
  const Json* member = object.if_contains(name);
  if (member == nullptr || !member->is_string()) return {};
  return {member->get_string().data(), member->get_string().size()};
}

bool IsTrue(const JsonObject& object, std::string_view name) {
  const Json* member = object.if_contains(name);
  return member != nullptr && member->is_bool() && member->get_bool();
}

std::string Shown(const Json& value) {
  if (value.is_object()) return "an object";
  if (value.is_array()) return fmt::format("a list of {}", value.get_array().size());
  std::string text = boost::json::serialize(value);
  if (text.size() <= 60) return text;
  text.resize(60);
  text.resize(std::min(FindInvalidUtf8(text), text.size()));
  return text + "...";
}

}  // namespace antiphon::model
