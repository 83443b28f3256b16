// Any bytes as the files of a Hugging Face folder: opened, looked at and described, or refused. The
// input is cut at zeros: each piece begins with a letter for its file.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <string>
#include <string_view>

#include "antiphon/v1/model.pb.h"
#include "model/card.h"
#include "model/hf_folder.h"

namespace {

const char* NameOf(char letter) {
  switch (letter) {
    case 'c':
      return "config.json";
    case 'g':
      return "generation_config.json";
    case 't':
      return "tokenizer.json";
    case 'k':
      return "tokenizer_config.json";
    case 'j':
      return "chat_template.jinja";
    case 'i':
      return "model.safetensors.index.json";
    default:
      return nullptr;
  }
}

// One tensor of each shard, so that an index can be right.
std::string Shard(const std::string& tensor) {
  const std::string header =
      "{\"" + tensor + R"(":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})";
  return std::string(1, static_cast<char>(header.size())) + std::string(7, '\0') + header + "1234";
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace antiphon::model;
  std::map<std::string, std::string> files = {{"a.safetensors", Shard("a")},
                                              {"b.safetensors", Shard("model.norm.weight")}};
  std::string_view rest(reinterpret_cast<const char*>(data), size);
  while (!rest.empty()) {
    const std::string_view piece = rest.substr(0, rest.find('\0'));
    rest.remove_prefix(std::min(rest.size(), piece.size() + 1));
    if (piece.empty()) continue;
    if (const char* name = NameOf(piece[0])) files[name] = std::string(piece.substr(1));
  }
  if (!files.contains("model.safetensors.index.json")) files["model.safetensors"] = Shard("a");
  const auto file = ParseHfFolder(files);
  if (!file.ok()) return 0;
  if (Inspect(**file).empty()) std::abort();
  CardParts parts;
  static_cast<void>(CardOf(**file, "fuzz", parts));
  return 0;
}
