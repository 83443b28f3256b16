// The value type of chat templates: what JSON has, plus order of keys.
#ifndef ANTIPHON_MODEL_JSON_VALUE_H_
#define ANTIPHON_MODEL_JSON_VALUE_H_

#include <boost/json/value.hpp>

namespace antiphon::model {
// boost::json keeps the insertion order of object keys as long as nothing is erased.
using Json = boost::json::value;
using JsonObject = boost::json::object;
using JsonArray = boost::json::array;
}  // namespace antiphon::model

#endif  // ANTIPHON_MODEL_JSON_VALUE_H_
