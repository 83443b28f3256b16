#include <signal.h>
#include <unistd.h>

#include <boost/json/parse.hpp>
#include <boost/json/serialize.hpp>
#include <cstdio>
#include <iostream>
#include <optional>

#include "cli/arguments.h"
#include "cli/chat/http_client.h"
#include "cli/chat/private_cluster.h"
#include "cli/chat/terminal_text.h"
#include "cli/cluster_file.h"
#include "cli/commands.h"
#include "common/daemon.h"
#include "common/logging.h"
#include "common/net.h"
#include "common/status_macros.h"

namespace antiphon::cli {
namespace {

constexpr double kTemperature = 0.2;
// Small models sometimes go round in circles until the context is full.
constexpr int kMaxTokens = 1024;

constexpr const char* kHelp =
    "usage: antiphon chat [PROMPT] [--target NAME|HOST:PORT] [--model FILE] [--system TEXT]\n"
    "                     [--temperature 0.2] [--max-tokens 1024] [--api-key KEY]\n\n"
    "Talks to the cluster that runs here, to --target, or to a private cluster that it starts and\n"
    "stops. With PROMPT it answers once. In the conversation: /reset forgets it, /exit or Ctrl-D\n"
    "ends it, Ctrl-C stops an answer. The key may also be in $ANTIPHON_API_KEY.\n";

std::string ErrorOf(const std::string& body) {
  boost::json::error_code error;
  const auto json = boost::json::parse(body, error);
  if (!error && json.is_object()) {
    const auto* inner = json.get_object().if_contains("error");
    if (inner != nullptr && inner->is_object()) {
      const auto* message = inner->get_object().if_contains("message");
      if (message != nullptr && message->is_string()) return std::string(message->get_string());
    }
  }
  return body.substr(0, 500);
}

class Conversation {
 public:
  Conversation(std::string address, const Arguments& arguments)
      : address_(std::move(address)),
        api_key_(arguments.Get("api-key", Environment("ANTIPHON_API_KEY", ""))),
        system_(arguments.Get("system")) {
    Reset();
  }

  absl::Status Configure(const Arguments& arguments) {
    if (arguments.Has("temperature")) {
      char* end = nullptr;
      const std::string text = arguments.Get("temperature");
      temperature_ = std::strtod(text.c_str(), &end);
      if (text.empty() || *end != 0 || !(temperature_ >= 0 && temperature_ <= 2)) {
        return absl::InvalidArgumentError("--temperature must be a number from 0 to 2");
      }
    }
    ASSIGN_OR_RETURN(max_tokens_, IntFlag(arguments, "max-tokens", kMaxTokens, 1, 1 << 24));
    return absl::OkStatus();
  }

  // The name that requests carry.
  absl::Status FindModel() {
    std::string body;
    ASSIGN_OR_RETURN(const int status,
                     Fetch({.address = address_, .path = "/v1/models", .api_key = api_key_},
                           [&body](std::string_view piece) { body += piece; }));
    if (status != 200) {
      return absl::UnavailableError(
          fmt::format("{} answered {}: {}", address_, status, EscapeForLog(ErrorOf(body), false)));
    }
    boost::json::error_code error;
    const auto json = boost::json::parse(body, error);
    const auto* data = !error && json.is_object() ? json.get_object().if_contains("data") : nullptr;
    if (data == nullptr || !data->is_array() || data->get_array().empty() ||
        !data->get_array()[0].is_object()) {
      return absl::UnavailableError(fmt::format("{} serves no model", address_));
    }
    const auto* id = data->get_array()[0].get_object().if_contains("id");
    if (id != nullptr && id->is_string()) model_ = std::string(id->get_string());
    return absl::OkStatus();
  }

  void Reset() {
    messages_.clear();
    if (!system_.empty()) messages_.push_back({{"role", "system"}, {"content", system_}});
  }

  // Prints the answer as it comes. A question that failed is forgotten.
  absl::Status Ask(const std::string& prompt) {
    messages_.push_back({{"role", "user"}, {"content", prompt}});
    boost::json::object body = {{"model", model_},
                                {"messages", messages_},
                                {"stream", true},
                                {"temperature", temperature_},
                                {"max_tokens", max_tokens_}};
    std::string raw, answer, problem;
    bool cut = false;
    EventStreamParser events;
    TerminalText terminal;
    const auto status = Fetch({.address = address_,
                               .method = "POST",
                               .path = "/v1/chat/completions",
                               .body = boost::json::serialize(body),
                               .api_key = api_key_},
                              [&](std::string_view piece) {
                                if (raw.size() < 64 << 10) raw += piece;
                                events.Push(piece, [&](std::string_view data) {
                                  OnEvent(data, terminal, answer, problem, cut);
                                });
                              });
    if (cut) {
      fmt::print(stderr, "\n(cut: --max-tokens is {}, or the context is full)", max_tokens_);
    }
    if (status.ok() && *status == 200 && problem.empty()) {
      messages_.push_back({{"role", "assistant"}, {"content", answer}});
      return absl::OkStatus();
    }
    if (absl::IsCancelled(status.status()) && !answer.empty()) {  // Ctrl-C keeps what was said
      messages_.push_back({{"role", "assistant"}, {"content", answer}});
      return absl::OkStatus();
    }
    messages_.pop_back();
    if (!status.ok()) return status.status();
    if (problem.empty()) problem = fmt::format("{}: {}", *status, ErrorOf(raw));
    return absl::UnknownError(EscapeForLog(problem, false));
  }

  const std::string& model() const { return model_; }

 private:
  static void OnEvent(std::string_view data, TerminalText& terminal, std::string& answer,
                      std::string& problem, bool& cut) {
    if (data == "[DONE]") return;
    boost::json::error_code error;
    const auto json = boost::json::parse(boost::json::string_view(data.data(), data.size()), error);
    if (error || !json.is_object()) return;
    const auto& object = json.get_object();
    if (object.contains("error")) {
      problem = ErrorOf(std::string(data));
      return;
    }
    const auto* choices = object.if_contains("choices");
    if (choices == nullptr || !choices->is_array()) return;
    for (const auto& choice : choices->get_array()) {
      const auto* reason =
          choice.is_object() ? choice.get_object().if_contains("finish_reason") : nullptr;
      cut |= reason != nullptr && reason->is_string() && reason->get_string() == "length";
      const auto* delta = choice.is_object() ? choice.get_object().if_contains("delta") : nullptr;
      const auto* content = delta != nullptr && delta->is_object()
                                ? delta->get_object().if_contains("content")
                                : nullptr;
      if (content == nullptr || !content->is_string()) continue;
      const std::string_view text(content->get_string().data(), content->get_string().size());
      answer += text;
      const std::string shown = terminal.Push(text);
      std::fwrite(shown.data(), 1, shown.size(), stdout);
      std::fflush(stdout);
    }
  }

  const std::string address_;
  const std::string api_key_;
  const std::string system_;
  std::string model_;
  double temperature_ = kTemperature;
  int max_tokens_ = kMaxTokens;
  boost::json::array messages_;
};

// Ctrl-C must break the wait for an answer, not end the program.
void OnInterrupt(int) {}

int Talk(Conversation& conversation, bool terminal) {
  if (terminal) {
    fmt::print("{}. /reset forgets, /exit ends.\n", conversation.model());
  }
  int code = 0;
  for (std::string line;;) {
    if (terminal) {
      fmt::print("> ");
      std::fflush(stdout);
    }
    if (!std::getline(std::cin, line)) {
      if (terminal) fmt::print("\n");
      return code;
    }
    if (line.empty()) continue;
    if (line == "/exit" || line == "/quit") return code;
    if (line == "/reset") {
      conversation.Reset();
      continue;
    }
    const absl::Status status = conversation.Ask(line);
    fmt::print("\n");
    std::fflush(stdout);
    if (!status.ok() && !absl::IsCancelled(status)) {
      fmt::print(stderr, "error: {}\n", std::string(status.message()));
      code = 1;
      if (absl::IsUnavailable(status)) return kExitUnavailable;
    }
  }
}

// host:port of the gateway; starts a private cluster when nothing runs and none was named.
absl::StatusOr<std::string> AddressOf(const Arguments& arguments,
                                      std::unique_ptr<PrivateCluster>& cluster) {
  const std::string target = arguments.Get("target");
  if (target.find(':') != std::string::npos) {
    std::string address = target;
    if (address.rfind("http://", 0) == 0) address = address.substr(7);
    while (!address.empty() && address.back() == '/') address.pop_back();
    RETURN_IF_ERROR(ParseHostPort(address).status());
    return address;
  }
  // A model that was named is asked for even when another one runs.
  if (!arguments.Has("model")) {
    const auto running = FindCluster(target);
    if (running.ok() && running->ready) return running->http;
    if (!target.empty()) {
      return running.ok() ? absl::UnavailableError(target + " does not serve yet")
                          : running.status();
    }
  }
  ASSIGN_OR_RETURN(cluster, PrivateCluster::Start(arguments.Get("model")));
  return cluster->http();
}

}  // namespace

int RunChat(const CommandArguments& arguments) {
  const auto parsed = ParseArguments(
      arguments, {.values = {"target", "model", "system", "temperature", "max-tokens", "api-key"},
                  .switches = {"help"},
                  .positional_max = 1});
  if (!parsed.ok()) return UsageError("chat", parsed.status());
  if (parsed->switches.count("help") > 0) {
    fmt::print("{}", kHelp);
    return 0;
  }
  if (parsed->Has("target") && parsed->Has("model")) {
    return UsageError("chat",
                      absl::InvalidArgumentError("--model starts a private cluster; --target names "
                                                 "one that runs: give one of them"));
  }
  std::unique_ptr<PrivateCluster> cluster;
  const auto address = AddressOf(*parsed, cluster);
  if (!address.ok()) return Failure("chat", address.status());
  Conversation conversation(*address, *parsed);
  if (const auto s = conversation.Configure(*parsed); !s.ok()) return UsageError("chat", s);
  if (const auto s = conversation.FindModel(); !s.ok()) return Failure("chat", s);
  if (!parsed->positional.empty()) {
    const absl::Status status = conversation.Ask(parsed->positional[0]);
    fmt::print("\n");
    return status.ok() ? 0 : Failure("chat", status);
  }
  struct sigaction action {};
  action.sa_handler = OnInterrupt;  // without SA_RESTART: recv returns EINTR
  sigaction(SIGINT, &action, nullptr);
  return Talk(conversation, isatty(STDIN_FILENO) != 0);
}

}  // namespace antiphon::cli
