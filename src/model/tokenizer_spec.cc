#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <array>
#include <limits>
#include <set>
#include <utility>

#include "antiphon/v1/model.pb.h"
#include "common/status_macros.h"
#include "model/model_file.h"
#include "model/pre_tokenizer.h"
#include "model/tokenizer.h"

namespace antiphon::model {
namespace {

constexpr int64_t kControl = 3;
// More ids that end an answer. No key of GGUF: what readers of other formats know of eos lists.
constexpr const char* kEndIds = "antiphon.end_token_ids";

// Control tokens that end an answer in the families we know, whatever the file says of eos.
constexpr std::array<std::string_view, 9> kEndTexts = {
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>",      "<|endoftext|>", "<|end_of_text|>",
    "<|end|>",    "<|return|>", "<|end_of_turn|>", "<end_of_turn>"};

absl::Status Bad(std::string message) { return absl::InvalidArgumentError(std::move(message)); }

// nullptr when the key is absent.
absl::StatusOr<const Array*> FindArray(const ModelFile& file, const std::string& key) {
  const auto it = file.metadata().find(key);
  if (it == file.metadata().end()) return nullptr;
  const Array* array = std::get_if<Array>(&it->second.v);
  if (array == nullptr) return Bad(file.wording().Key(key) + " is not an array");
  return array;
}

absl::Status CopyStrings(const ModelFile& file, const std::string& key,
                         google::protobuf::RepeatedPtrField<std::string>& out) {
  ASSIGN_OR_RETURN(const Array* array, FindArray(file, key));
  if (array == nullptr || SizeOf(*array) == 0) {
    return Bad(file.wording().Key(key) + " is missing or empty");
  }
  const Texts* texts = std::get_if<Texts>(array);
  if (texts == nullptr) return Bad(file.wording().Key(key) + " is not an array of strings");
  out.Reserve(static_cast<int>(texts->size()));
  for (size_t i = 0; i < texts->size(); ++i) out.Add()->assign((*texts)[i]);
  return absl::OkStatus();
}

absl::Status CopyTypes(const ModelFile& file, internal::v1::TokenizerSpec& spec) {
  const std::string key = "tokenizer.ggml.token_type";
  ASSIGN_OR_RETURN(const Array* array, FindArray(file, key));
  if (array == nullptr) return absl::OkStatus();
  const size_t size = SizeOf(*array);
  if (size != static_cast<size_t>(spec.tokens_size())) {
    return Bad(fmt::format("{} has {} entries for {} tokens", file.wording().Key(key), size,
                           spec.tokens_size()));
  }
  for (size_t i = 0; i < size; ++i) {
    int64_t type = -1;
    if (const auto* s = std::get_if<std::vector<int64_t>>(array)) type = (*s)[i];
    if (const auto* u = std::get_if<std::vector<uint64_t>>(array)) {
      type = static_cast<int64_t>((*u)[i]);
    }
    if (type < 0 || type > 6) {
      return Bad(file.wording().Key(key) + " has an entry that is not 0 to 6");
    }
    spec.add_token_types(static_cast<int32_t>(type));
  }
  return absl::OkStatus();
}

// -1 when the key is absent.
absl::StatusOr<int32_t> TokenId(const ModelFile& file, const std::string& name, int tokens) {
  const std::string key = "tokenizer.ggml." + name;
  const auto id = file.GetUint(key);
  if (absl::IsNotFound(id.status())) return -1;
  RETURN_IF_ERROR(id.status());
  if (*id == std::numeric_limits<uint32_t>::max()) return -1;  // how converters write "none"
  if (*id >= static_cast<uint64_t>(tokens)) {
    return Bad(fmt::format("{} is {}, outside the vocabulary of {} tokens", file.wording().Key(key),
                           *id, tokens));
  }
  return static_cast<int32_t>(*id);
}

absl::Status FillIds(const ModelFile& file, internal::v1::TokenizerSpec& spec) {
  const int tokens = spec.tokens_size();
  ASSIGN_OR_RETURN(const int32_t bos, TokenId(file, "bos_token_id", tokens));
  ASSIGN_OR_RETURN(const int32_t eos, TokenId(file, "eos_token_id", tokens));
  ASSIGN_OR_RETURN(const int32_t eot, TokenId(file, "eot_token_id", tokens));
  ASSIGN_OR_RETURN(const int32_t eom, TokenId(file, "eom_token_id", tokens));
  ASSIGN_OR_RETURN(const int32_t unknown, TokenId(file, "unknown_token_id", tokens));
  ASSIGN_OR_RETURN(const int32_t padding, TokenId(file, "padding_token_id", tokens));
  if (bos >= 0) spec.set_bos_id(bos);
  if (eos >= 0) spec.set_eos_id(eos);
  if (eot >= 0) spec.set_eot_id(eot);
  if (unknown >= 0) spec.set_unknown_id(unknown);
  if (padding >= 0) spec.set_padding_id(padding);
  std::set<int32_t> ends;
  for (const int32_t id : {eos, eot, eom}) {
    if (id >= 0) ends.insert(id);
  }
  ASSIGN_OR_RETURN(const Array* more, FindArray(file, kEndIds));
  for (size_t i = 0; more != nullptr && i < SizeOf(*more); ++i) {
    const auto* ids = std::get_if<std::vector<uint64_t>>(more);
    if (ids == nullptr || (*ids)[i] >= static_cast<uint64_t>(tokens)) {
      return Bad(fmt::format("{} names no token of the vocabulary of {}",
                             file.wording().Key(kEndIds), tokens));
    }
    ends.insert(static_cast<int32_t>((*ids)[i]));
  }
  int32_t end_mark = -1;
  bool harmony = false;  // gpt-oss: <|end|> ends a message, <|return|> the answer
  for (int i = 0; i < spec.token_types_size(); ++i) {
    if (spec.token_types(i) != kControl) continue;
    const std::string_view text = spec.tokens(i);
    if (std::find(kEndTexts.begin(), kEndTexts.end(), text) == kEndTexts.end()) continue;
    if (text == "<|end|>") end_mark = i;
    if (text == "<|return|>") harmony = true;
    ends.insert(i);
  }
  if (harmony && end_mark != eos) ends.erase(end_mark);
  spec.mutable_end_of_generation_ids()->Assign(ends.begin(), ends.end());
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<internal::v1::TokenizerSpec> TokenizerSpecOf(const ModelFile& file) {
  RETURN_IF_ERROR(file.contents().tokenizer_obstacle);
  internal::v1::TokenizerSpec spec;
  const auto model = file.GetString("tokenizer.ggml.model");
  if (!model.ok()) return Bad(std::string(model.status().message()));
  if (*model != "gpt2") {
    return Bad(
        fmt::format("GGUF key tokenizer.ggml.model is \"{}\"{}: only \"gpt2\" (byte-level "
                    "BPE) is supported",
                    *model, *model == "llama" ? " (SentencePiece)" : ""));
  }
  const auto pre_name = file.GetString("tokenizer.ggml.pre");
  if (absl::IsNotFound(pre_name.status())) {
    return Bad(
        "GGUF key tokenizer.ggml.pre is missing: the file is older than May 2024 and would be "
        "tokenised wrongly; convert the model again");
  }
  RETURN_IF_ERROR(pre_name.status());
  const auto pre = PreTokenizerNamed(*pre_name);
  if (!pre.has_value()) {
    return Bad(
        fmt::format("GGUF key tokenizer.ggml.pre is \"{}\": only gpt-2, smollm, llama-bpe and "
                    "qwen2 are supported",
                    *pre_name));
  }
  spec.set_model(*model);
  spec.set_pre(std::string(NameOf(*pre)));
  RETURN_IF_ERROR(CopyStrings(file, "tokenizer.ggml.tokens", *spec.mutable_tokens()));
  RETURN_IF_ERROR(CopyTypes(file, spec));
  RETURN_IF_ERROR(CopyStrings(file, "tokenizer.ggml.merges", *spec.mutable_merges()));
  RETURN_IF_ERROR(FillIds(file, spec));
  // Llama 3's files often lack the key; its tokenizer.json always adds the token.
  const bool bos_wanted = *pre == PreTokenizer::kLlamaBpe && spec.has_bos_id();
  ASSIGN_OR_RETURN(const bool add_bos, file.GetBoolOr("tokenizer.ggml.add_bos_token", bos_wanted));
  ASSIGN_OR_RETURN(const bool add_eos, file.GetBoolOr("tokenizer.ggml.add_eos_token", false));
  if (add_bos && !spec.has_bos_id()) {
    return Bad(
        "GGUF key tokenizer.ggml.add_bos_token is true and tokenizer.ggml.bos_token_id is "
        "missing");
  }
  spec.set_add_bos(add_bos);
  spec.set_add_eos(add_eos);
  return spec;
}

}  // namespace antiphon::model
