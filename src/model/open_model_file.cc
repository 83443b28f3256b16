#include <filesystem>

#include "model/gguf.h"
#include "model/hf_folder.h"
#include "model/model_file.h"

namespace antiphon::model {

absl::StatusOr<std::unique_ptr<ModelFile>> OpenModelFile(const std::string& path) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) return OpenHfFolder(path);
  return OpenGguf(path);
}

}  // namespace antiphon::model
