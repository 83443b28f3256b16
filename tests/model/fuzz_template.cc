// Parses the input as a chat template and renders it under small limits.
#include <boost/json/parse.hpp>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "common/status_macros.h"
#include "model/chat_template.h"

namespace {

antiphon::model::JsonObject Context() {
  return boost::json::parse(R"({
    "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hé"},
                 {"role": "assistant", "content": null, "tool_calls": [{"type": "function", "id": "1",
                  "function": {"name": "f", "arguments": {"a": [1, 2.5, true, null]}}}]}],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "add_generation_prompt": true, "bos_token": "<s>", "x": 18446744073709551615})")
      .as_object();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto* const context = new antiphon::model::JsonObject(Context());
  const auto parsed = antiphon::model::ChatTemplate::Parse(
      std::string_view(reinterpret_cast<const char*>(data), size));
  if (!parsed.ok()) return 0;
  const antiphon::model::TemplateLimits limits{
      .steps = 20'000, .output_bytes = 1 << 16, .memory_bytes = 1 << 20, .depth = 16};
  const auto text = (*parsed)->Render(*context, absl::FromUnixSeconds(1'700'000'000), limits);
  CHECK(!text.ok() || text->size() <= limits.output_bytes);
  return 0;
}
