#include <boost/json/parse.hpp>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>

#include "antiphon/v1/model.pb.h"
#include "cli/arguments.h"
#include "cli/commands.h"
#include "common/clock.h"
#include "common/daemon.h"
#include "common/logging.h"
#include "common/status_macros.h"
#include "model/card.h"
#include "model/chat_template.h"
#include "model/model_file.h"
#include "model/tokenizer.h"

namespace antiphon::cli {
namespace {

constexpr size_t kTextBytesMax = 256 << 20;

constexpr const char* kHelp =
    "usage: antiphon model inspect MODEL\n"
    "       antiphon model render --model MODEL|--template FILE --messages FILE\n"
    "       antiphon model tokenize --model MODEL\n\n"
    "MODEL is a GGUF file, or a folder of Hugging Face with safetensors. inspect prints what it\n"
    "holds; its last line is \"servable: yes\" or names what prevents it (exit 65). render prints\n"
    "the prompt that a chat template makes of a JSON file {messages, tools, "
    "add_generation_prompt,\n"
    "...} (\"-\" is standard input). tokenize turns standard input into token ids on one line.\n";

absl::StatusOr<std::string> ReadStream(std::istream& in, const std::string& name) {
  std::string text;
  char buffer[64 << 10];
  while (in.read(buffer, sizeof(buffer)) || in.gcount() > 0) {
    text.append(buffer, static_cast<size_t>(in.gcount()));
    if (text.size() > kTextBytesMax) {
      return absl::InvalidArgumentError(fmt::format("{} is larger than 256 MiB", name));
    }
  }
  return text;
}

absl::StatusOr<std::string> ReadText(const std::string& file) {
  if (file == "-") return ReadStream(std::cin, "standard input");
  std::ifstream in(file, std::ios::binary);
  if (!in) return absl::NotFoundError(fmt::format("cannot read {}", file));
  return ReadStream(in, file);
}

absl::StatusOr<std::unique_ptr<model::Tokenizer>> TokenizerOf(const model::ModelFile& file) {
  ASSIGN_OR_RETURN(const internal::v1::TokenizerSpec spec, model::TokenizerSpecOf(file));
  return model::Tokenizer::Create(spec);
}

// What a template says wrong with a conversation is the reader's to mend, whatever its code.
absl::Status Inspect(const std::string& path, bool& servable) {
  ASSIGN_OR_RETURN(const auto file, model::OpenModelFile(path));
  const std::string text = model::Inspect(*file);
  fmt::print("{}{}", text, text.empty() || text.back() != '\n' ? "\n" : "");
  servable = text.find("servable: yes") != std::string::npos;
  return absl::OkStatus();
}

absl::Status Render(const Arguments& arguments) {
  std::string source;
  model::JsonObject context;
  ASSIGN_OR_RETURN(const std::string text, ReadText(arguments.Get("messages")));
  boost::json::error_code error;
  model::Json json = boost::json::parse(text, error);
  if (error) {
    return absl::InvalidArgumentError(
        fmt::format("{} is not JSON: {}", arguments.Get("messages"), error.message()));
  }
  if (json.is_array()) {
    context["messages"] = std::move(json);
  } else if (json.is_object()) {
    context = std::move(json.as_object());
  } else {
    return absl::InvalidArgumentError("the messages file must hold {\"messages\": [...]}");
  }
  if (arguments.Has("template")) {
    ASSIGN_OR_RETURN(source, ReadText(arguments.Get("template")));
  } else {
    ASSIGN_OR_RETURN(const auto file, model::OpenModelFile(arguments.Get("model")));
    ASSIGN_OR_RETURN(source, file->GetStringOr("tokenizer.chat_template", ""));
    if (source.empty()) {
      return absl::FailedPreconditionError(
          fmt::format("{} has no chat template; give one with --template", arguments.Get("model")));
    }
    ASSIGN_OR_RETURN(const auto tokenizer, TokenizerOf(*file));
    const auto token = [&context](const char* name, std::string_view value) {
      if (context.if_contains(name) == nullptr) {
        context[name] = boost::json::string(value.begin(), value.end());
      }
    };
    token("bos_token", tokenizer->bos_text());
    token("eos_token", tokenizer->eos_text());
  }
  ASSIGN_OR_RETURN(const auto chat_template, model::ChatTemplate::Parse(source));
  ASSIGN_OR_RETURN(const std::string prompt,
                   chat_template->Render(context, Clock::Real().WallNow()));
  std::fwrite(prompt.data(), 1, prompt.size(), stdout);
  return absl::OkStatus();
}

absl::Status Tokenize(const std::string& path) {
  ASSIGN_OR_RETURN(const auto file, model::OpenModelFile(path));
  ASSIGN_OR_RETURN(const auto tokenizer, TokenizerOf(*file));
  ASSIGN_OR_RETURN(const std::string text, ReadText("-"));
  ASSIGN_OR_RETURN(const std::vector<uint32_t> ids, tokenizer->Encode(text, {}));
  fmt::print("{}\n", fmt::join(ids, " "));
  return absl::OkStatus();
}

}  // namespace

int RunModel(const CommandArguments& arguments) {
  const auto parsed = ParseArguments(
      arguments,
      {.values = {"model", "template", "messages"}, .switches = {"help"}, .positional_max = 2});
  if (!parsed.ok()) return UsageError("model", parsed.status());
  if (parsed->switches.count("help") > 0) {
    fmt::print("{}", kHelp);
    return 0;
  }
  const auto usage = [](std::string_view message) {
    return UsageError("model", absl::InvalidArgumentError(std::string(message)));
  };
  const std::string verb = parsed->positional.empty() ? "" : parsed->positional[0];
  absl::Status status;
  bool servable = true;
  if (verb == "inspect") {
    const std::string file =
        parsed->positional.size() > 1 ? parsed->positional[1] : parsed->Get("model");
    if (file.empty()) return usage("inspect needs a model");
    status = Inspect(file, servable);
  } else if (verb == "render") {
    if (parsed->Has("model") == parsed->Has("template")) {
      return usage("render needs either --model or --template");
    }
    if (!parsed->Has("messages")) return usage("render needs --messages FILE");
    status = Render(*parsed);
  } else if (verb == "tokenize") {
    if (!parsed->Has("model")) return usage("tokenize needs --model MODEL");
    status = Tokenize(parsed->Get("model"));
  } else {
    return usage("say inspect, render or tokenize");
  }
  if (!status.ok()) return Failure("model", status);
  return servable ? 0 : kExitData;
}

}  // namespace antiphon::cli
