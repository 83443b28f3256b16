#include "common/config/tree.h"

#include <spdlog/fmt/fmt.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/yaml.h>

#include <optional>
#include <sstream>

#include "common/logging.h"

namespace antiphon {
namespace {

constexpr size_t kDepthMax = 16;
constexpr size_t kNodesMax = 20'000;

// Builds the tree from the parser's events. After the first error the rest is ignored.
class Builder final : public YAML::EventHandler {
 public:
  void OnDocumentStart(const YAML::Mark&) override {}
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    Leaf(mark, anchor, "?", ConfigTree::Kind::kNull, "");
  }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override {
    Fail(mark, "aliases (*name) are not accepted; write the value out");
  }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    const bool quoted = tag == "!";
    const bool null = !quoted && (value == "~" || value == "null");
    Leaf(mark, anchor, quoted ? "?" : tag,
         null ? ConfigTree::Kind::kNull : ConfigTree::Kind::kScalar, value);
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    Open(mark, tag, anchor, ConfigTree::Kind::kList);
  }
  void OnSequenceEnd() override { Close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    Open(mark, tag, anchor, ConfigTree::Kind::kMap);
  }
  void OnMapEnd() override { Close(); }

  bool failed() const { return failed_; }
  const std::string& error() const { return error_; }
  int error_line() const { return error_line_; }
  ConfigTree Take() { return std::move(root_); }

 private:
  struct Frame {
    ConfigTree node;
    std::optional<ConfigTree::Entry> pending;  // of a map: the key that waits for its value
  };

  void Fail(const YAML::Mark& mark, std::string error) {
    if (failed_) return;
    failed_ = true;
    error_ = std::move(error);
    error_line_ = mark.line + 1;
  }

  bool Enter(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor) {
    if (failed_) return false;
    if (anchor != 0) {
      Fail(mark, "anchors (&name) are not accepted; write the value out");
    } else if (!tag.empty() && tag != "?" && tag != "!") {
      Fail(mark, fmt::format("tags ({}) are not accepted", EscapeForLog(tag, false)));
    } else if (++nodes_ > kNodesMax) {
      Fail(mark, fmt::format("there are more than {} values", kNodesMax));
    }
    return !failed_;
  }

  void Leaf(const YAML::Mark& mark, YAML::anchor_t anchor, const std::string& tag,
            ConfigTree::Kind kind, const std::string& value) {
    if (!Enter(mark, tag, anchor)) return;
    ConfigTree node;
    node.kind = kind;
    node.line = mark.line + 1;
    node.scalar = value;
    Add(std::move(node), mark);
  }

  void Open(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
            ConfigTree::Kind kind) {
    if (!Enter(mark, tag, anchor)) return;
    if (frames_.size() >= kDepthMax) {
      return Fail(mark, fmt::format("the nesting is deeper than {}", kDepthMax));
    }
    if (!frames_.empty() && frames_.back().node.kind == ConfigTree::Kind::kMap &&
        !frames_.back().pending) {
      return Fail(mark, "a key must be a plain word");
    }
    Frame frame;
    frame.node.kind = kind;
    frame.node.line = mark.line + 1;
    frames_.push_back(std::move(frame));
  }

  void Close() {
    if (failed_ || frames_.empty()) return;
    ConfigTree node = std::move(frames_.back().node);
    frames_.pop_back();
    YAML::Mark mark;
    mark.line = node.line - 1;
    Add(std::move(node), mark);
  }

  void Add(ConfigTree node, const YAML::Mark& mark) {
    if (frames_.empty()) {
      root_ = std::move(node);
      return;
    }
    Frame& frame = frames_.back();
    if (frame.node.kind == ConfigTree::Kind::kList) {
      frame.node.items.push_back(std::move(node));
      return;
    }
    if (!frame.pending) {
      for (const auto& entry : frame.node.entries) {
        if (entry.key == node.scalar) {
          return Fail(mark, fmt::format("key '{}' is there twice; the first is in line {}",
                                        EscapeForLog(node.scalar, false), entry.line));
        }
      }
      frame.pending = ConfigTree::Entry{.key = std::move(node.scalar), .line = node.line};
      return;
    }
    // The parser marks an absent value where the next key begins.
    if (node.kind == ConfigTree::Kind::kNull) node.line = frame.pending->line;
    frame.pending->value = std::move(node);
    frame.node.entries.push_back(std::move(*frame.pending));
    frame.pending.reset();
  }

  std::vector<Frame> frames_;
  ConfigTree root_;
  size_t nodes_ = 0;
  bool failed_ = false;
  std::string error_;
  int error_line_ = 1;
};

}  // namespace

absl::StatusOr<ConfigTree> ParseYaml(std::string_view text, std::string_view file_name) {
  const auto bad = [&](int line, std::string_view why) {
    return absl::InvalidArgumentError(fmt::format("{}:{}: {}", file_name, line, why));
  };
  if (text.size() > kConfigBytesMax) {
    return bad(1, fmt::format("the file is larger than {} KiB", kConfigBytesMax >> 10));
  }
  if (text.find('\0') != std::string_view::npos) return bad(1, "the file is not text");
  Builder builder;
  bool more = false;
  try {
    std::istringstream in{std::string(text)};
    YAML::Parser parser(in);
    parser.HandleNextDocument(builder);
    if (!builder.failed()) {
      Builder rest;
      more = parser.HandleNextDocument(rest);
    }
  } catch (const YAML::Exception& e) {
    return bad(e.mark.is_null() ? 1 : e.mark.line + 1,
               fmt::format("this is not YAML: {}", EscapeForLog(e.msg, false)));
  } catch (const std::exception& e) {
    return bad(1, fmt::format("this is not YAML: {}", EscapeForLog(e.what(), false)));
  }
  if (builder.failed()) return bad(builder.error_line(), builder.error());
  if (more) return bad(1, "there is a second document (---) in this file");
  return builder.Take();
}

}  // namespace antiphon
