// A folder as Hugging Face has them: config.json, safetensors (one file, or shards and their
// index), tokenizer.json, tokenizer_config.json, generation_config.json, chat_template.jinja. Of
// the families llama (with Mistral) and qwen2. Hostile input, like GGUF.
#ifndef ANTIPHON_MODEL_HF_FOLDER_H_
#define ANTIPHON_MODEL_HF_FOLDER_H_

#include <map>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "model/model_file.h"

namespace antiphon::model {

// NOT_FOUND when there is no such folder, INVALID_ARGUMENT when it has no model of this kind (with
// what it has instead, where that helps) or a file cannot be read, DATA_LOSS when a file is cut
// short or inconsistent. A model that is sound and not served opens: LlamaShapeOf and
// TokenizerSpecOf say what is in the way.
absl::StatusOr<std::unique_ptr<ModelFile>> OpenHfFolder(const std::string& path);

// The same of files in memory, by name; for tests and fuzzing. `files` must outlive the result.
absl::StatusOr<std::unique_ptr<ModelFile>> ParseHfFolder(
    const std::map<std::string, std::string>& files);

}  // namespace antiphon::model

#endif  // ANTIPHON_MODEL_HF_FOLDER_H_
