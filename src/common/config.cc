#include "common/config.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>
#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "absl/strings/match.h"
#include "antiphon/v1/config.pb.h"
#include "common/config/rules.h"
#include "common/config/spelling.h"
#include "common/config/tree.h"
#include "common/config/units.h"
#include "common/logging.h"
#include "common/status_macros.h"

namespace antiphon {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

constexpr size_t kProblemsMax = 10;
constexpr const char* kDefaultFile = "/etc/antiphon/antiphon.yaml";

bool IsDuration(const FieldDescriptor& f) {
  return f.message_type() != nullptr && f.message_type()->full_name() == "google.protobuf.Duration";
}
bool IsByteSize(const FieldDescriptor& f) {
  return f.message_type() != nullptr &&
         f.message_type()->full_name() == "antiphon.config.v1.ByteSize";
}
// A section: a message that is no leaf.
bool IsSection(const FieldDescriptor& f) {
  return f.message_type() != nullptr && !IsDuration(f) && !IsByteSize(f);
}

// "models[0].path" -> "models.path"
std::string WithoutIndices(std::string_view path) {
  std::string out;
  bool inside = false;
  for (char c : path) {
    if (c == '[') inside = true;
    if (!inside) out += c;
    if (c == ']') inside = false;
  }
  return out;
}

std::string Join(std::string_view parent, std::string_view key) {
  return parent.empty() ? std::string(key) : fmt::format("{}.{}", parent, key);
}

// Writes trees into a Config, collecting problems instead of stopping at the first.
class Applier {
 public:
  Applier(config::v1::Config& config, std::map<std::string, std::string>& origins)
      : config_(config), origins_(origins) {}

  void ApplyFile(const ConfigTree& root, const std::string& file, bool must_have_version) {
    where_ = [file](int line) { return fmt::format("{}:{}", file, line); };
    const bool empty = root.kind == ConfigTree::Kind::kNull;
    if (!empty && root.kind != ConfigTree::Kind::kMap) {
      return Problem(root.line, "", "the file must hold keys, e.g. version: 1");
    }
    if (must_have_version && (root.entries.empty() || root.entries[0].key != "version")) {
      return Problem(root.line, "version",
                     "the first key must be version: 1, so that later programs know how to read "
                     "this file");
    }
    Section(root, config_, "");
  }

  void ApplyFlag(const std::string& path, const std::string& text) {
    where_ = [path](int) { return "--" + path; };
    Message* message = &config_;
    std::string parent;
    std::string_view rest = path;
    while (true) {
      const size_t dot = rest.find('.');
      const std::string key(rest.substr(0, dot));
      const FieldDescriptor* field = Find(*message, key, parent, 0);
      if (field == nullptr) return;
      if (dot == std::string_view::npos) return FlagValue(*message, *field, parent, text);
      if (!IsSection(*field) || field->is_repeated()) {
        return Problem(0, Join(parent, key),
                       field->is_repeated()
                           ? fmt::format("is a list; write --{}='[{{...}}]'", Join(parent, key))
                           : std::string("has no keys below it"));
      }
      message = message->GetReflection()->MutableMessage(message, field);
      parent = Join(parent, key);
      rest.remove_prefix(dot + 1);
    }
  }

  void Problem(int line, std::string_view path, std::string_view text) {
    if (problems_.size() >= kProblemsMax) return;
    const std::string where = where_(line);
    const bool named = path.empty() || where == fmt::format("--{}", path);
    problems_.push_back(named ? fmt::format("{}: {}", where, text)
                              : fmt::format("{}: {}: {}", where, path, text));
  }
  void ProblemAt(const std::string& origin, std::string_view path, std::string_view text) {
    if (problems_.size() >= kProblemsMax) return;
    problems_.push_back(origin.empty() || origin == "default" || origin == fmt::format("--{}", path)
                            ? fmt::format("{}: {}", path, text)
                            : fmt::format("{}: {}: {}", origin, path, text));
  }

  absl::Status Result() const {
    if (problems_.empty()) return absl::OkStatus();
    return absl::InvalidArgumentError(fmt::format("{}", fmt::join(problems_, "\n")));
  }

 private:
  const FieldDescriptor* Find(const Message& message, const std::string& key,
                              std::string_view parent, int line) {
    const Descriptor* type = message.GetDescriptor();
    if (const FieldDescriptor* field = type->FindFieldByName(key)) return field;
    const std::string nearest = NearestKey(*config_.GetDescriptor(), *type, parent, key);
    Problem(
        line, Join(parent, EscapeForLog(key.substr(0, 60), false)),
        nearest.empty() ? "unknown key" : fmt::format("unknown key; did you mean {}?", nearest));
    return nullptr;
  }

  void Section(const ConfigTree& tree, Message& message, const std::string& path) {
    if (tree.kind == ConfigTree::Kind::kNull) return;  // "gateway:" and nothing below it
    if (tree.kind != ConfigTree::Kind::kMap) {
      return Problem(tree.line, path, "must be a section with keys below it");
    }
    for (const auto& entry : tree.entries) {
      const FieldDescriptor* field = Find(message, entry.key, path, entry.line);
      if (field != nullptr) Field(entry.value, message, *field, Join(path, entry.key));
    }
  }

  void Field(const ConfigTree& tree, Message& message, const FieldDescriptor& field,
             const std::string& path) {
    const Reflection& reflection = *message.GetReflection();
    if (!field.is_repeated()) {
      if (IsSection(field))
        return Section(tree, *reflection.MutableMessage(&message, &field), path);
      return Leaf(tree, message, field, path);
    }
    // A list replaces what an earlier source said.
    if (tree.kind != ConfigTree::Kind::kList) {
      return Problem(tree.line, path,
                     IsSection(field) ? "must be a list; write \"- path: model.gguf\" below it"
                                      : "must be a list, e.g. [one, two]");
    }
    reflection.ClearField(&message, &field);
    std::erase_if(origins_, [&](const auto& o) { return o.first.rfind(path + "[", 0) == 0; });
    for (size_t i = 0; i < tree.items.size(); ++i) {
      const std::string item = fmt::format("{}[{}]", path, i);
      if (IsSection(field)) {
        Message* element = reflection.AddMessage(&message, &field);
        if (tree.items[i].kind == ConfigTree::Kind::kNull) {
          Problem(tree.items[i].line, item, "is empty");
        }
        Section(tree.items[i], *element, item);
      } else {
        Leaf(tree.items[i], message, field, item);
      }
    }
    if (!IsSection(field)) origins_[path] = where_(tree.line);
  }

  void Leaf(const ConfigTree& tree, Message& message, const FieldDescriptor& field,
            const std::string& path) {
    if (tree.kind == ConfigTree::Kind::kNull) {
      return Problem(tree.line, path, "has no value");
    }
    if (tree.kind != ConfigTree::Kind::kScalar) {
      return Problem(tree.line, path, "must be one value, not a list or section");
    }
    const absl::Status status = Assign(tree.scalar, message, field, WithoutIndices(path));
    if (!status.ok()) {
      return Problem(tree.line, path, std::string(status.message()));
    }
    if (!field.is_repeated()) origins_[path] = where_(tree.line);
  }

  void FlagValue(Message& message, const FieldDescriptor& field, const std::string& parent,
                 const std::string& text) {
    const std::string path = Join(parent, field.name());
    const bool yaml = !text.empty() && (text[0] == '[' || text[0] == '{');
    if (IsSection(field) || (field.is_repeated() && yaml)) {
      auto tree = ParseYaml(text, "--" + path);
      if (!tree.ok()) {
        problems_.push_back(std::string(tree.status().message()));
        return;
      }
      return Field(*tree, message, field, path);
    }
    ConfigTree tree;
    if (!field.is_repeated()) {
      tree.kind = ConfigTree::Kind::kScalar;
      tree.scalar = text;
      return Leaf(tree, message, field, path);
    }
    tree.kind = ConfigTree::Kind::kList;
    for (size_t begin = 0; begin <= text.size();) {
      const size_t comma = std::min(text.find(',', begin), text.size());
      ConfigTree item;
      item.kind = ConfigTree::Kind::kScalar;
      item.scalar = text.substr(begin, comma - begin);
      tree.items.push_back(std::move(item));
      begin = comma + 1;
    }
    Field(tree, message, field, path);
  }

  // `path` has no indices. Repeated fields are appended to.
  absl::Status Assign(const std::string& text, Message& message, const FieldDescriptor& field,
                      const std::string& path) {
    const Reflection& reflection = *message.GetReflection();
    const std::string shown = EscapeForLog(text.substr(0, 40), false);
    if (IsDuration(field)) {
      ASSIGN_OR_RETURN(const absl::Duration value, ParseDuration(text));
      RETURN_IF_ERROR(CheckDuration(path, value));
      FromDuration(value, static_cast<google::protobuf::Duration&>(
                              *reflection.MutableMessage(&message, &field)));
      return absl::OkStatus();
    }
    if (IsByteSize(field)) {
      ASSIGN_OR_RETURN(const uint64_t bytes, ParseByteSize(text));
      RETURN_IF_ERROR(CheckByteSize(path, bytes));
      static_cast<config::v1::ByteSize&>(*reflection.MutableMessage(&message, &field))
          .set_bytes(bytes);
      return absl::OkStatus();
    }
    const auto number = [&]<typename T>(T& value, const char* what) -> absl::Status {
      const char* end = text.data() + text.size();
      const auto [stop, error] = std::from_chars(text.data(), end, value);
      if (error != std::errc() || stop != end) {
        return absl::InvalidArgumentError(fmt::format("'{}' is not {}", shown, what));
      }
      if constexpr (std::is_floating_point_v<T>) {
        if (!std::isfinite(value)) {
          return absl::InvalidArgumentError(fmt::format("'{}' is not {}", shown, what));
        }
      }
      return CheckNumber(path, static_cast<double>(value));
    };
    switch (field.cpp_type()) {
      case FieldDescriptor::CPPTYPE_BOOL:
        if (text != "true" && text != "false") {
          return absl::InvalidArgumentError(fmt::format("'{}' is neither true nor false", shown));
        }
        reflection.SetBool(&message, &field, text == "true");
        return absl::OkStatus();
      case FieldDescriptor::CPPTYPE_UINT32: {
        uint32_t value = 0;
        RETURN_IF_ERROR(number(value, "a whole number from 0 to 4294967295"));
        reflection.SetUInt32(&message, &field, value);
        return absl::OkStatus();
      }
      case FieldDescriptor::CPPTYPE_INT32: {
        int32_t value = 0;
        RETURN_IF_ERROR(number(value, "a whole number"));
        reflection.SetInt32(&message, &field, value);
        return absl::OkStatus();
      }
      case FieldDescriptor::CPPTYPE_DOUBLE: {
        double value = 0;
        RETURN_IF_ERROR(number(value, "a number, e.g. 0.5"));
        reflection.SetDouble(&message, &field, value);
        return absl::OkStatus();
      }
      case FieldDescriptor::CPPTYPE_STRING:
        RETURN_IF_ERROR(CheckText(path, text));
        if (field.is_repeated()) {
          reflection.AddString(&message, &field, text);
        } else {
          reflection.SetString(&message, &field, text);
        }
        return absl::OkStatus();
      default:
        return absl::InternalError(
            fmt::format("has a type that configuration does not know ({})", field.cpp_type_name()));
    }
  }

  config::v1::Config& config_;
  std::map<std::string, std::string>& origins_;
  std::function<std::string(int)> where_ = [](int) { return std::string(); };
  std::vector<std::string> problems_;
};

// Calls leaf(path, message, field, index) for what is set; index is -1 but in repeated sections'
// names, which are part of the path already. Repeated scalars are one leaf.
template <typename F>
void ForEachLeaf(const Message& message, const std::string& path, const F& leaf) {
  const Descriptor& type = *message.GetDescriptor();
  const Reflection& reflection = *message.GetReflection();
  for (int i = 0; i < type.field_count(); ++i) {
    const FieldDescriptor& field = *type.field(i);
    const std::string name = Join(path, field.name());
    if (field.is_repeated()) {
      const int size = reflection.FieldSize(message, &field);
      if (!IsSection(field)) {
        if (size > 0) leaf(name, message, field);
        continue;
      }
      for (int k = 0; k < size; ++k) {
        ForEachLeaf(reflection.GetRepeatedMessage(message, &field, k),
                    fmt::format("{}[{}]", name, k), leaf);
      }
    } else if (reflection.HasField(message, &field)) {
      if (IsSection(field)) {
        ForEachLeaf(reflection.GetMessage(message, &field), name, leaf);
      } else {
        leaf(name, message, field);
      }
    }
  }
}

std::string QuoteYaml(const std::string& text) {
  const bool plain = !text.empty() && text != "~" && !absl::EqualsIgnoreCase(text, "null") &&
                     text[0] != '-' && text.back() != ':' &&
                     std::all_of(text.begin(), text.end(),
                                 [](char c) {
                                   return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                                          (c >= '0' && c <= '9') || c == '.' || c == '_' ||
                                          c == '-' || c == '/' || c == ':' || c == '@' || c == '+';
                                 }) &&
                     text[0] != ':' && text[0] != '@';
  if (plain) return text;
  return fmt::format("\"{}\"", EscapeForLog(text, true));
}

std::string LeafText(const Message& message, const FieldDescriptor& field) {
  const Reflection& reflection = *message.GetReflection();
  if (field.is_repeated()) {
    std::vector<std::string> items;
    for (int i = 0; i < reflection.FieldSize(message, &field); ++i) {
      // Inside [..] a comma-free plain word needs no quotes either.
      items.push_back(QuoteYaml(reflection.GetRepeatedString(message, &field, i)));
    }
    return fmt::format("[{}]", fmt::join(items, ", "));
  }
  if (IsDuration(field)) {
    return DurationText(
        static_cast<const google::protobuf::Duration&>(reflection.GetMessage(message, &field)));
  }
  if (IsByteSize(field)) {
    return ByteSizeText(
        static_cast<const config::v1::ByteSize&>(reflection.GetMessage(message, &field)).bytes());
  }
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_BOOL:
      return reflection.GetBool(message, &field) ? "true" : "false";
    case FieldDescriptor::CPPTYPE_UINT32:
      return fmt::format("{}", reflection.GetUInt32(message, &field));
    case FieldDescriptor::CPPTYPE_INT32:
      return fmt::format("{}", reflection.GetInt32(message, &field));
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return fmt::format("{}", reflection.GetDouble(message, &field));
    default:
      return QuoteYaml(reflection.GetString(message, &field));
  }
}

void PrintMessage(const Message& message, const std::string& path, int indent,
                  const std::map<std::string, std::string>& origins, std::string& out) {
  const Descriptor& type = *message.GetDescriptor();
  const Reflection& reflection = *message.GetReflection();
  for (int i = 0; i < type.field_count(); ++i) {
    const FieldDescriptor& field = *type.field(i);
    const std::string name = Join(path, field.name());
    const bool set = field.is_repeated() ? reflection.FieldSize(message, &field) > 0
                                         : reflection.HasField(message, &field);
    if (!set) continue;
    if (!IsSection(field)) {
      const std::string line =
          fmt::format("{:{}}{}: {}", "", indent, field.name(), LeafText(message, field));
      const auto origin = origins.find(name);
      out += fmt::format("{:<40}  # {}\n", line,
                         origin == origins.end() ? "default" : EscapeForLog(origin->second, false));
    } else if (field.is_repeated()) {
      out += fmt::format("{:{}}{}:\n", "", indent, field.name());
      for (int k = 0; k < reflection.FieldSize(message, &field); ++k) {
        out += fmt::format("{:{}}-\n", "", indent + 2);
        PrintMessage(reflection.GetRepeatedMessage(message, &field, k),
                     fmt::format("{}[{}]", name, k), indent + 4, origins, out);
      }
    } else {
      std::string below;
      PrintMessage(reflection.GetMessage(message, &field), name, indent + 2, origins, below);
      if (!below.empty()) out += fmt::format("{:{}}{}:\n{}", "", indent, field.name(), below);
    }
  }
}

absl::StatusOr<std::string> ReadConfigFile(const std::string& file) {
  std::error_code error;
  if (std::filesystem::is_directory(file, error)) {
    return absl::InvalidArgumentError(fmt::format("{} is a folder, not a file", file));
  }
  std::ifstream in(file, std::ios::binary);
  if (!in) {
    return absl::NotFoundError(
        fmt::format("cannot read {}: {}", file,
                    std::filesystem::exists(file, error) ? "permission denied" : "no such file"));
  }
  std::string text(kConfigBytesMax + 1, 0);
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(in.gcount()));
  return text;
}

absl::Status Finish(Applier& applier, LoadedConfig& config) {
  RETURN_IF_ERROR(applier.Result());
  SetDependentDefaults(config.mutable_config());
  for (const ConfigProblem& problem : CheckTogether(*config)) {
    const auto origin = config.origins().find(problem.path);
    applier.ProblemAt(origin == config.origins().end() ? "" : origin->second, problem.path,
                      problem.text);
  }
  RETURN_IF_ERROR(applier.Result());
  ForEachLeaf(*config, "", [&](const std::string& path, const Message&, const FieldDescriptor&) {
    config.mutable_origins().try_emplace(path, "default");
  });
  return absl::OkStatus();
}

}  // namespace

LoadedConfig::LoadedConfig() : config_(std::make_unique<config::v1::Config>()) {
  SetDefaults(*config_);
  SetDependentDefaults(*config_);
}
LoadedConfig::LoadedConfig(LoadedConfig&&) noexcept = default;
LoadedConfig& LoadedConfig::operator=(LoadedConfig&&) noexcept = default;
LoadedConfig::~LoadedConfig() = default;

std::string LoadedConfig::Print() const {
  std::string out;
  PrintMessage(*config_, "", 0, origins_, out);
  return out;
}

absl::StatusOr<LoadedConfig> ParseConfig(std::string_view yaml, std::string_view file_name) {
  LoadedConfig config;
  config.mutable_config().mutable_cluster()->clear_runtime_dir();
  Applier applier(config.mutable_config(), config.mutable_origins());
  ASSIGN_OR_RETURN(const ConfigTree tree, ParseYaml(yaml, file_name));
  applier.ApplyFile(tree, std::string(file_name), /*must_have_version=*/true);
  RETURN_IF_ERROR(Finish(applier, config));
  return config;
}

absl::StatusOr<LoadedConfig> LoadConfig(const ConfigSource& source) {
  namespace fs = std::filesystem;
  LoadedConfig config;
  config.mutable_config().mutable_cluster()->clear_runtime_dir();
  Applier applier(config.mutable_config(), config.mutable_origins());
  std::error_code error;
  const std::string file = source.file.empty() ? kDefaultFile : source.file;
  if (source.file_required || !source.file.empty() || fs::exists(file, error)) {
    ASSIGN_OR_RETURN(const std::string text, ReadConfigFile(file));
    ASSIGN_OR_RETURN(const ConfigTree tree, ParseYaml(text, file));
    applier.ApplyFile(tree, file, /*must_have_version=*/true);
    std::vector<std::string> parts;
    for (const auto& entry :
         fs::directory_iterator(fs::path(file).parent_path() / "conf.d", error)) {
      if (entry.path().extension() == ".yaml") parts.push_back(entry.path().string());
    }
    std::sort(parts.begin(), parts.end());
    for (const std::string& part : parts) {
      ASSIGN_OR_RETURN(const std::string part_text, ReadConfigFile(part));
      ASSIGN_OR_RETURN(const ConfigTree part_tree, ParseYaml(part_text, part));
      applier.ApplyFile(part_tree, part, /*must_have_version=*/false);
    }
  }
  for (const auto& [path, value] : source.flags) applier.ApplyFlag(path, value);
  RETURN_IF_ERROR(Finish(applier, config));
  return config;
}

}  // namespace antiphon
