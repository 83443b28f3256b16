// GGUF v2 and v3 model files (format: ggml/docs/gguf.md of the ggml project). Hostile input: every
// count and offset is checked against what remains of the file before it is used.
#ifndef ANTIPHON_MODEL_GGUF_H_
#define ANTIPHON_MODEL_GGUF_H_

#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "model/model_file.h"

namespace antiphon::model {

// NOT_FOUND when the file cannot be opened, INVALID_ARGUMENT when it is not a GGUF (with what it
// looks like instead, where that helps), DATA_LOSS when it is cut short or inconsistent.
absl::StatusOr<std::unique_ptr<ModelFile>> OpenGguf(const std::string& path);
// For tests and fuzzing: `bytes` must outlive the result.
absl::StatusOr<std::unique_ptr<ModelFile>> ParseGguf(std::string_view bytes);

}  // namespace antiphon::model

#endif  // ANTIPHON_MODEL_GGUF_H_
