#include "gateway/json_fields.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <boost/json/stream_parser.hpp>
#include <cmath>

#include "model/tokenizer.h"

namespace antiphon::gateway {
namespace {

// An upper bound of the values in `text`, so that a body of a few megabytes cannot become
// gigabytes.
size_t CountValues(std::string_view text) {
  size_t count = 1;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') {
        ++i;
      } else if (c == '"') {
        in_string = false;
      }
    } else if (c == '"') {
      in_string = true;
    } else if (c == ',' || c == '[' || c == '{' || c == ':') {
      ++count;
    }
  }
  return count;
}

}  // namespace

MaybeError ParseJsonObject(std::string_view text, model::Json& out) {
  if (text.find_first_not_of(" \t\r\n") == std::string_view::npos) {
    return InvalidJson("The request body is empty; send a JSON object.");
  }
  if (const size_t bad = model::FindInvalidUtf8(text); bad != std::string_view::npos) {
    return InvalidJson(fmt::format("The request body is not valid UTF-8 at byte {}.", bad));
  }
  if (CountValues(text) > kJsonValuesMax) {
    return InvalidJson(
        fmt::format("The request body holds more than {} JSON values.", kJsonValuesMax));
  }
  boost::json::parse_options options;
  options.max_depth = kJsonDepthMax;
  boost::json::stream_parser parser({}, options);
  boost::system::error_code ec;
  const size_t used = parser.write_some(text.data(), text.size(), ec);
  if (ec == boost::json::error::too_deep) {
    return InvalidJson(fmt::format("The request body nests deeper than {} levels.", kJsonDepthMax));
  }
  if (!ec && text.find_first_not_of(" \t\r\n", used) != std::string_view::npos) {
    return InvalidJson(fmt::format("The request body goes on after its end, at byte {}.", used));
  }
  if (ec) {
    return InvalidJson(
        fmt::format("The request body is not valid JSON at byte {}: {}.", used, ec.message()));
  }
  parser.finish(ec);
  if (ec) return InvalidJson("The request body ends in the middle of the JSON text.");
  out = parser.release();
  if (!out.is_object()) {
    return InvalidJson(
        fmt::format("The request body must be a JSON object, not {}.", JsonKindName(out)));
  }
  return std::nullopt;
}

std::string_view JsonKindName(const model::Json& value) {
  switch (value.kind()) {
    case boost::json::kind::null:
      return "null";
    case boost::json::kind::bool_:
      return "a boolean";
    case boost::json::kind::int64:
    case boost::json::kind::uint64:
      return "an integer";
    case boost::json::kind::double_:
      return "a decimal";
    case boost::json::kind::string:
      return "a string";
    case boost::json::kind::array:
      return "an array";
    case boost::json::kind::object:
      return "an object";
  }
  return "something else";
}

void JsonFields::Fail(ApiError error) {
  if (!error_.has_value()) error_ = std::move(error);
}

const model::Json* JsonFields::Find(std::string_view name) {
  if (failed()) return nullptr;
  known_.push_back(name);
  const model::Json* value = object_.if_contains({name.data(), name.size()});
  return value == nullptr || value->is_null() ? nullptr : value;
}

namespace {

ApiError WrongType(const std::string& path, std::string_view expected, const model::Json& got) {
  return InvalidValue(path, fmt::format("Invalid type for '{}': expected {}, but got {} instead.",
                                        path, expected, JsonKindName(got)));
}

}  // namespace

std::optional<bool> JsonFields::Bool(std::string_view name) {
  const model::Json* value = Find(name);
  if (value == nullptr) return std::nullopt;
  if (value->is_bool()) return value->get_bool();
  Fail(WrongType(Path(name), "a boolean", *value));
  return std::nullopt;
}

std::optional<double> JsonFields::Number(std::string_view name, double low, double high) {
  const model::Json* value = Find(name);
  if (value == nullptr) return std::nullopt;
  double number = 0;
  if (value->is_double()) {
    number = value->get_double();
  } else if (value->is_int64()) {
    number = static_cast<double>(value->get_int64());
  } else if (value->is_uint64()) {
    number = static_cast<double>(value->get_uint64());
  } else {
    Fail(WrongType(Path(name), "a number", *value));
    return std::nullopt;
  }
  if (!std::isfinite(number) || number < low || number > high) {
    Fail(
        InvalidValue(Path(name), fmt::format("Invalid value for '{}': {} is not between {} and {}.",
                                             Path(name), number, low, high)));
    return std::nullopt;
  }
  return number;
}

std::optional<int64_t> JsonFields::Integer(std::string_view name, int64_t low, int64_t high) {
  const model::Json* value = Find(name);
  if (value == nullptr) return std::nullopt;
  const auto out_of_range = [&](const std::string& text) {
    Fail(
        InvalidValue(Path(name), fmt::format("Invalid value for '{}': {} is not between {} and {}.",
                                             Path(name), text, low, high)));
  };
  int64_t number = 0;
  if (value->is_int64()) {
    number = value->get_int64();
  } else if (value->is_uint64()) {
    out_of_range(std::to_string(value->get_uint64()));
    return std::nullopt;
  } else if (value->is_double()) {
    const double d = value->get_double();
    if (d != std::floor(d)) {
      Fail(WrongType(Path(name), "an integer", *value));
      return std::nullopt;
    }
    if (!(std::abs(d) < 9.0e15)) {
      out_of_range(fmt::format("{}", d));
      return std::nullopt;
    }
    number = static_cast<int64_t>(d);
  } else {
    Fail(WrongType(Path(name), "an integer", *value));
    return std::nullopt;
  }
  if (number < low || number > high) {
    out_of_range(std::to_string(number));
    return std::nullopt;
  }
  return number;
}

std::optional<std::string_view> JsonFields::String(std::string_view name) {
  const model::Json* value = Find(name);
  if (value == nullptr) return std::nullopt;
  if (value->is_string()) {
    const auto& s = value->get_string();
    return std::string_view(s.data(), s.size());
  }
  Fail(WrongType(Path(name), "a string", *value));
  return std::nullopt;
}

const model::JsonObject* JsonFields::Object(std::string_view name) {
  const model::Json* value = Find(name);
  if (value == nullptr) return nullptr;
  if (value->is_object()) return &value->get_object();
  Fail(WrongType(Path(name), "an object", *value));
  return nullptr;
}

const model::JsonArray* JsonFields::Array(std::string_view name) {
  const model::Json* value = Find(name);
  if (value == nullptr) return nullptr;
  if (value->is_array()) return &value->get_array();
  Fail(WrongType(Path(name), "an array", *value));
  return nullptr;
}

std::vector<std::string> JsonFields::Unknown() const {
  std::vector<std::string> names;
  for (const auto& member : object_) {
    const std::string_view name(member.key().data(), member.key().size());
    if (std::find(known_.begin(), known_.end(), name) != known_.end()) continue;
    names.emplace_back(name);
    if (names.size() == kUnknownNamesMax) break;
  }
  return names;
}

}  // namespace antiphon::gateway
