// render_main JOBS NOW: renders every template with every context of a JSON file
//   {"templates": {NAME: SOURCE}, "contexts": {NAME: {messages, tools, add_generation_prompt,
//   ...}}}
// at the time NOW (seconds since 1970) and prints one line of JSON for each pair:
//   {"template": NAME, "context": NAME, "text": TEXT} or "error" in place of "text".
#include <boost/json/parse.hpp>
#include <boost/json/serialize.hpp>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>

#include "absl/time/time.h"
#include "model/chat_template.h"

namespace {

using antiphon::model::ChatTemplate;
using antiphon::model::Json;
using antiphon::model::JsonObject;

absl::StatusOr<std::string> Render(const std::string& source, const JsonObject& context,
                                   absl::Time now) {
  const auto parsed = ChatTemplate::Parse(source);
  if (!parsed.ok()) return parsed.status();
  return (*parsed)->Render(context, now);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: render_main JOBS NOW\n");
    return 64;
  }
  std::ifstream file(argv[1]);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  boost::system::error_code error;
  const Json jobs = boost::json::parse(text, error);
  if (error || !jobs.is_object()) {
    std::fprintf(stderr, "%s: not a JSON object\n", argv[1]);
    return 65;
  }
  const absl::Time now = absl::FromUnixSeconds(std::atoll(argv[2]));
  for (const auto& job : jobs.at("templates").as_object()) {
    for (const auto& context : jobs.at("contexts").as_object()) {
      const std::string source(job.value().as_string());
      const auto rendered = Render(source, context.value().as_object(), now);
      JsonObject line;
      line["template"] = job.key();
      line["context"] = context.key();
      if (rendered.ok()) {
        line["text"] = *rendered;
      } else {
        const absl::string_view message = rendered.status().message();
        line["error"] = boost::json::string_view(message.data(), message.size());
      }
      std::cout << boost::json::serialize(line) << '\n';
    }
  }
  return 0;
}
