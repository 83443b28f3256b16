#include "model/hf_folder.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "common/status_macros.h"
#include "model/hf_config.h"
#include "model/hf_json.h"
#include "model/hf_names.h"
#include "model/hf_tokenizer.h"
#include "model/safetensors.h"

namespace antiphon::model {
namespace {

constexpr const char* kConfig = "config.json";
constexpr const char* kSingle = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";
constexpr size_t kShardsMax = 4096;
constexpr size_t kTemplateBytesMax = 16u << 20;

// nullopt when there is no file of that name.
using Lookup = std::function<absl::StatusOr<std::optional<ModelPart>>(const std::string& name)>;

absl::Status InFile(const std::string& name, const absl::Status& status) {
  return absl::Status(status.code(), fmt::format("{}: {}", name, std::string(status.message())));
}

// A name of a file in this folder, of what is said to be a shard.
bool IsShardName(std::string_view name) {
  constexpr std::string_view kEnd = ".safetensors";
  return name.size() > kEnd.size() && name.size() <= 255 && name[0] != '.' &&
         name.substr(name.size() - kEnd.size()) == kEnd &&
         name.find('/') == std::string_view::npos && name.find('\0') == std::string_view::npos;
}

class FolderReader {
 public:
  FolderReader(std::string name, Lookup lookup)
      : name_(std::move(name)), lookup_(std::move(lookup)) {}

  absl::StatusOr<std::unique_ptr<ModelFile>> Read() {
    ASSIGN_OR_RETURN(const auto config_text, Part(kConfig));
    if (!config_text.has_value()) {
      return absl::InvalidArgumentError("the folder has no config.json");
    }
    ASSIGN_OR_RETURN(const Json config, ParseHfJson(kConfig, *config_text));
    ASSIGN_OR_RETURN(const Json generation, Object("generation_config.json"));
    RETURN_IF_ERROR(ReadTensors());
    contents_.metadata["general.name"] = Value{name_};
    contents_.model_obstacle = ReadHfConfig(config.get_object(), contents_);
    ReadHfSampling(generation.get_object(), contents_);
    RETURN_IF_ERROR(ReadTokenizer(config.get_object(), generation.get_object()));
    std::sort(contents_.parts.begin(), contents_.parts.end(),
              [](const ModelPart& a, const ModelPart& b) { return a.name < b.name; });
    contents_.wording = &HfWording();
    return ModelFile::Create(std::move(contents_));
  }

 private:
  // Every file that is read becomes a part of the model.
  absl::StatusOr<std::optional<std::string_view>> Part(const std::string& name) {
    ASSIGN_OR_RETURN(std::optional<ModelPart> part, lookup_(name));
    if (!part.has_value()) return std::nullopt;
    contents_.parts.push_back(*std::move(part));
    return contents_.parts.back().bytes;
  }

  // Empty when there is no file.
  absl::StatusOr<Json> Object(const std::string& name) {
    ASSIGN_OR_RETURN(const auto text, Part(name));
    if (!text.has_value()) return Json(JsonObject());
    return ParseHfJson(name, *text);
  }

  absl::StatusOr<std::vector<Tensor>> Shard(const std::string& name, std::string_view bytes) {
    auto tensors = ParseSafetensors(bytes);
    if (!tensors.ok()) return InFile(name, tensors.status());
    return tensors;
  }

  void Add(std::vector<Tensor> tensors) {
    for (Tensor& tensor : tensors) {
      tensor.name = GgufTensorName(tensor.name);
      contents_.tensors.push_back(std::move(tensor));
    }
  }

  absl::Status ReadTensors() {
    ASSIGN_OR_RETURN(const auto single, Part(kSingle));
    if (single.has_value()) {
      ASSIGN_OR_RETURN(std::vector<Tensor> tensors, Shard(kSingle, *single));
      Add(std::move(tensors));
      contents_.format = "Hugging Face folder with one safetensors file";
      return absl::OkStatus();
    }
    ASSIGN_OR_RETURN(const auto index_text, Part(kIndex));
    if (!index_text.has_value()) {
      return absl::InvalidArgumentError(
          fmt::format("the folder has neither {} nor {}", kSingle, kIndex));
    }
    ASSIGN_OR_RETURN(const Json index, ParseHfJson(kIndex, *index_text));
    return ReadShards(index.get_object());
  }

  absl::Status ReadShards(const JsonObject& index) {
    const JsonObject* map = FindObject(index, "weight_map");
    if (map == nullptr) return Inconsistent("has no weight_map");
    std::map<std::string, size_t> shards;  // and how many tensors each is to have
    for (const auto& [tensor, shard] : *map) {
      const std::string_view name =
          shard.is_string() ? std::string_view(shard.get_string().data(), shard.get_string().size())
                            : std::string_view();
      if (!IsShardName(name)) {
        return Inconsistent(
            fmt::format("puts a tensor into {}, which is no name of a safetensors "
                        "file of the folder",
                        Shown(shard)));
      }
      ++shards[std::string(name)];
      if (shards.size() > kShardsMax) {
        return Inconsistent(fmt::format("names more than {} files", kShardsMax));
      }
    }
    for (const auto& [name, count] : shards) RETURN_IF_ERROR(ReadShard(name, count, *map));
    contents_.format = fmt::format("Hugging Face folder with {} safetensors files", shards.size());
    return absl::OkStatus();
  }

  absl::Status ReadShard(const std::string& name, size_t count, const JsonObject& map) {
    ASSIGN_OR_RETURN(const auto bytes, Part(name));
    if (!bytes.has_value()) {
      return absl::DataLossError(fmt::format("{} names {}, which is not there", kIndex, name));
    }
    ASSIGN_OR_RETURN(std::vector<Tensor> tensors, Shard(name, *bytes));
    for (const Tensor& tensor : tensors) {
      if (FindText(map, tensor.name) != name) {
        return Inconsistent(fmt::format("does not say that tensor {} is in {}", tensor.name, name));
      }
    }
    // All of them are the map's, and each once: fewer are lacking some.
    if (tensors.size() != count) {
      return Inconsistent(fmt::format("says that {} tensors are in {}, which has {} of them", count,
                                      name, tensors.size()));
    }
    Add(std::move(tensors));
    return absl::OkStatus();
  }

  static absl::Status Inconsistent(std::string_view what) {
    return absl::DataLossError(fmt::format("{} {}", kIndex, what));
  }

  absl::Status ReadTokenizer(const JsonObject& config, const JsonObject& generation) {
    ASSIGN_OR_RETURN(const auto text, Part("tokenizer.json"));
    std::optional<Json> tokenizer;
    if (text.has_value()) {
      ASSIGN_OR_RETURN(Json json, ParseHfJson("tokenizer.json", *text));
      tokenizer.emplace(std::move(json));
    }
    ASSIGN_OR_RETURN(const Json tokenizer_config, Object("tokenizer_config.json"));
    ASSIGN_OR_RETURN(const auto chat_template, Part("chat_template.jinja"));
    if (chat_template.has_value() && chat_template->size() > kTemplateBytesMax) {
      return absl::DataLossError(
          fmt::format("chat_template.jinja has {} bytes, at most {} are "
                      "accepted",
                      chat_template->size(), kTemplateBytesMax));
    }
    const HfTokenizerFiles files{
        .tokenizer = tokenizer.has_value() ? &tokenizer->get_object() : nullptr,
        .tokenizer_config = &tokenizer_config.get_object(),
        .generation = &generation,
        .config = &config,
        .chat_template = chat_template};
    contents_.tokenizer_obstacle = ReadHfTokenizer(files, contents_);
    ReadHfChatTemplate(files, contents_);
    return absl::OkStatus();
  }

  const std::string name_;
  const Lookup lookup_;
  ModelContents contents_;
};

// What a folder without a model of this kind has instead.
std::string Instead(const std::filesystem::path& folder) {
  std::error_code error;
  std::string pickle;
  for (std::filesystem::directory_iterator it(folder, error), end; !error && it != end;
       it.increment(error)) {
    const std::string name = it->path().filename().string();
    if (it->path().extension() == ".gguf") {
      return fmt::format("; it has {}: name that file", it->path().string());
    }
    if (name == "pytorch_model.bin" || name == "pytorch_model.bin.index.json") pickle = name;
  }
  if (pickle.empty()) return "";
  return fmt::format("; it has {}: PyTorch's pickles are not read, save the model as safetensors",
                     pickle);
}

}  // namespace

absl::StatusOr<std::unique_ptr<ModelFile>> OpenHfFolder(const std::string& path) {
  const std::filesystem::path folder(path);
  const auto lookup = [&](const std::string& name) -> absl::StatusOr<std::optional<ModelPart>> {
    const std::string file = (folder / name).string();
    auto mapping = MappedFile::Map(file);
    if (!mapping.ok()) {
      // A file that is there and cannot be read must not count as one that is not there.
      std::error_code error;
      const auto type = std::filesystem::symlink_status(file, error).type();
      if (type == std::filesystem::file_type::not_found) return std::nullopt;
      return absl::InvalidArgumentError(mapping.status().message());
    }
    ModelPart part{.name = name, .bytes = mapping->bytes(), .mapping = {}};
    part.mapping = *std::move(mapping);
    return part;
  };
  std::filesystem::path named = std::filesystem::absolute(folder).lexically_normal();
  if (!named.has_filename()) named = named.parent_path();  // "folder/"
  auto file = FolderReader(named.filename().string(), lookup).Read();
  if (file.ok()) return file;
  std::string message = fmt::format("{}: {}", path, std::string(file.status().message()));
  if (absl::IsInvalidArgument(file.status())) message += Instead(folder);
  return absl::Status(file.status().code(), message);
}

absl::StatusOr<std::unique_ptr<ModelFile>> ParseHfFolder(
    const std::map<std::string, std::string>& files) {
  const auto lookup = [&](const std::string& name) -> absl::StatusOr<std::optional<ModelPart>> {
    const auto it = files.find(name);
    if (it == files.end()) return std::nullopt;
    return ModelPart{.name = name, .bytes = it->second, .mapping = {}};
  };
  return FolderReader("memory", lookup).Read();
}

}  // namespace antiphon::model
