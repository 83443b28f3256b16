#include "model/gguf.h"
#include "model/model_file.h"

namespace antiphon::model {

absl::StatusOr<std::unique_ptr<ModelFile>> OpenModelFile(const std::string& path) {
  return OpenGguf(path);
}

}  // namespace antiphon::model
