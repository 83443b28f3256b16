// tokenizer.json and what stands beside it as GGUF's tokenizer metadata.
#ifndef ANTIPHON_MODEL_HF_TOKENIZER_H_
#define ANTIPHON_MODEL_HF_TOKENIZER_H_

#include <optional>
#include <string_view>

#include "absl/status/status.h"
#include "model/json_value.h"
#include "model/model_file.h"

namespace antiphon::model {

// The files, as far as there are any; objects are empty where there is no file.
struct HfTokenizerFiles {
  const JsonObject* tokenizer = nullptr;  // tokenizer.json; nullptr: there is none
  const JsonObject* tokenizer_config = nullptr;
  const JsonObject* generation = nullptr;         // generation_config.json
  const JsonObject* config = nullptr;             // config.json
  std::optional<std::string_view> chat_template;  // chat_template.jinja
};

// Adds tokenizer.ggml.* and antiphon.end_token_ids. INVALID_ARGUMENT, naming the file and field,
// when the tokenizer is none that we compute exactly: the pre-tokenizer is recognised by its
// structure.
absl::Status ReadHfTokenizer(const HfTokenizerFiles& files, ModelContents& contents);

// Adds tokenizer.chat_template, if there is one.
void ReadHfChatTemplate(const HfTokenizerFiles& files, ModelContents& contents);

}  // namespace antiphon::model

#endif  // ANTIPHON_MODEL_HF_TOKENIZER_H_
