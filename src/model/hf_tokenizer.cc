#include "model/hf_tokenizer.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "common/status_macros.h"
#include "model/hf_json.h"
#include "model/pre_tokenizer.h"

namespace antiphon::model {
namespace {

// GGUF's token types.
constexpr uint64_t kNormal = 1;
constexpr uint64_t kControl = 3;
constexpr uint64_t kUserDefined = 4;
constexpr uint64_t kUnused = 5;
// Ids that no token has, below the highest one: bounds what a small file can make us allocate.
constexpr uint64_t kHolesMax = 1u << 16;

constexpr std::string_view kGpt2Split =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr std::string_view kLlamaSplit =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3})"
    R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kQwen2Split =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N})"
    R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

absl::Status Bad(std::string_view field, std::string_view what) {
  return absl::InvalidArgumentError(fmt::format("tokenizer.json field \"{}\" {}", field, what));
}

std::string_view TypeOf(const JsonObject& object) { return FindText(object, "type"); }

// The steps of a section that may be a Sequence of them; empty when the section is absent.
std::vector<const JsonObject*> StepsOf(const JsonObject& tokenizer, const char* section,
                                       const char* steps) {
  const JsonObject* object = FindObject(tokenizer, section);
  if (object == nullptr) return {};
  if (TypeOf(*object) != "Sequence") return {object};
  std::vector<const JsonObject*> out;
  const JsonArray* array = FindArray(*object, steps);
  for (size_t i = 0; array != nullptr && i < array->size(); ++i) {
    static const JsonObject* const empty = new JsonObject;
    out.push_back((*array)[i].is_object() ? &(*array)[i].get_object() : empty);
  }
  return out;
}

// ByteLevel without a space before the text; `regex`: it cuts as GPT-2's did.
bool IsByteLevel(const JsonObject& step, bool regex) {
  const Json* use = FindMember(step, "use_regex");
  const bool cuts = use == nullptr || (use->is_bool() && use->get_bool());
  const Json* space = FindMember(step, "add_prefix_space");
  return TypeOf(step) == "ByteLevel" && cuts == regex && space != nullptr && space->is_bool() &&
         !space->get_bool();
}

bool IsSplit(const JsonObject& step, std::string_view regex) {
  const JsonObject* pattern = FindObject(step, "pattern");
  return TypeOf(step) == "Split" && pattern != nullptr && FindText(*pattern, "Regex") == regex &&
         FindText(step, "behavior") == "Isolated" && !IsTrue(step, "invert");
}

std::optional<PreTokenizer> PreTokenizerOf(const std::vector<const JsonObject*>& steps) {
  if (steps.size() == 1 && IsByteLevel(*steps[0], true)) return PreTokenizer::kGpt2;
  if (steps.size() != 2) return std::nullopt;
  if (IsByteLevel(*steps[1], true) && TypeOf(*steps[0]) == "Digits" &&
      IsTrue(*steps[0], "individual_digits")) {
    return PreTokenizer::kSmolLm;
  }
  if (!IsByteLevel(*steps[1], false)) return std::nullopt;
  if (IsSplit(*steps[0], kGpt2Split)) return PreTokenizer::kGpt2;
  if (IsSplit(*steps[0], kLlamaSplit)) return PreTokenizer::kLlamaBpe;
  if (IsSplit(*steps[0], kQwen2Split)) return PreTokenizer::kQwen2;
  return std::nullopt;
}

class TokenizerReader {
 public:
  TokenizerReader(const HfTokenizerFiles& files, ModelContents& contents)
      : files_(files), metadata_(contents.metadata) {}

  absl::Status Read() {
    if (files_.tokenizer == nullptr) {
      return absl::InvalidArgumentError(
          "the folder has no tokenizer.json: transformers' save_pretrained of the fast tokenizer "
          "writes one");
    }
    RETURN_IF_ERROR(CheckModel());
    RETURN_IF_ERROR(ReadPreTokenizer());
    RETURN_IF_ERROR(ReadVocabulary());
    RETURN_IF_ERROR(ReadAddedTokens());
    StoreTokens();
    RETURN_IF_ERROR(ReadMerges());
    RETURN_IF_ERROR(ReadSpecialIds());
    RETURN_IF_ERROR(ReadPostProcessor());
    return absl::OkStatus();
  }

 private:
  struct Token {
    std::string text;
    uint64_t type = kUnused;
  };

  absl::Status CheckModel() {
    model_ = FindObject(*files_.tokenizer, "model");
    if (model_ == nullptr) return Bad("model", "is missing");
    if (TypeOf(*model_) != "BPE") {
      return Bad("model.type", fmt::format("is \"{}\": \"BPE\" is served", TypeOf(*model_)));
    }
    if (IsTrue(*model_, "byte_fallback")) {
      return Bad("model.byte_fallback", "is true (SentencePiece): byte-level BPE is served");
    }
    for (const char* affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
      const Json* member = FindMember(*model_, affix);
      if (member != nullptr && !FindText(*model_, affix).empty()) {
        return Bad(fmt::format("model.{}", affix),
                   fmt::format("is {}: none is served", Shown(*member)));
      }
    }
    const Json* dropout = FindMember(*model_, "dropout");
    if (dropout != nullptr && !(dropout->is_number() && dropout->to_number<double>() == 0)) {
      return Bad("model.dropout", fmt::format("is {}: none is served", Shown(*dropout)));
    }
    const auto decoders = StepsOf(*files_.tokenizer, "decoder", "decoders");
    if (decoders.size() != 1 || TypeOf(*decoders[0]) != "ByteLevel") {
      return Bad("decoder", "is not ByteLevel, which alone is served");
    }
    return absl::OkStatus();
  }

  absl::Status ReadPreTokenizer() {
    const auto pre = PreTokenizerOf(StepsOf(*files_.tokenizer, "pre_tokenizer", "pretokenizers"));
    if (!pre.has_value()) {
      return Bad("pre_tokenizer",
                 "is none that is served: those of GPT-2, SmolLM, Llama 3 and "
                 "Qwen2 are recognised by their steps and expressions");
    }
    const auto normalizers = StepsOf(*files_.tokenizer, "normalizer", "normalizers");
    const bool nfc = normalizers.size() == 1 && TypeOf(*normalizers[0]) == "NFC";
    if (*pre == PreTokenizer::kQwen2 ? !nfc : !normalizers.empty()) {
      return Bad("normalizer",
                 fmt::format("does not go with the pre-tokenizer {}: {} is served", NameOf(*pre),
                             *pre == PreTokenizer::kQwen2 ? "NFC" : "none"));
    }
    const bool ignores = IsTrue(*model_, "ignore_merges");
    if (ignores != (*pre == PreTokenizer::kLlamaBpe)) {
      return Bad("model.ignore_merges", fmt::format("is {} with the pre-tokenizer {}: {} is served",
                                                    ignores, NameOf(*pre), !ignores));
    }
    metadata_["tokenizer.ggml.model"].v = std::string("gpt2");
    metadata_["tokenizer.ggml.pre"].v = std::string(NameOf(*pre));
    return absl::OkStatus();
  }

  // Puts a token at its id. Two may not share one.
  absl::Status Place(std::string_view field, std::string_view text, const Json& id, uint64_t type,
                     uint64_t ids_max) {
    const uint64_t* number = id.if_uint64();
    const int64_t* small = id.if_int64();
    if (number == nullptr && (small == nullptr || *small < 0)) {
      return Bad(field, fmt::format("has the id {}", Shown(id)));
    }
    const uint64_t at = number != nullptr ? *number : static_cast<uint64_t>(*small);
    if (at >= ids_max) {
      return Bad(field, fmt::format("has the id {}, far beyond the number of its tokens", at));
    }
    if (at >= tokens_.size()) tokens_.resize(at + 1);
    Token& token = tokens_[at];
    if (token.type != kUnused && token.text != text) {
      return Bad(field, fmt::format("gives the id {} to two tokens", at));
    }
    token = {std::string(text), type};
    ids_[token.text] = at;
    return absl::OkStatus();
  }

  absl::Status ReadVocabulary() {
    const JsonObject* vocabulary = FindObject(*model_, "vocab");
    if (vocabulary == nullptr || vocabulary->empty()) {
      return Bad("model.vocab", "is missing, empty or no object");
    }
    const JsonArray* added = FindArray(*files_.tokenizer, "added_tokens");
    ids_max_ = vocabulary->size() + (added == nullptr ? 0 : added->size()) + kHolesMax;
    for (const auto& [text, id] : *vocabulary) {
      RETURN_IF_ERROR(Place("model.vocab", {text.data(), text.size()}, id, kNormal, ids_max_));
    }
    return absl::OkStatus();
  }

  absl::Status ReadAddedTokens() {
    constexpr const char* kField = "added_tokens";
    const JsonArray* added = FindArray(*files_.tokenizer, kField);
    for (size_t i = 0; added != nullptr && i < added->size(); ++i) {
      const JsonObject* token = (*added)[i].if_object();
      const std::string_view text = token == nullptr ? "" : FindText(*token, "content");
      const Json* id = token == nullptr ? nullptr : FindMember(*token, "id");
      if (text.empty() || id == nullptr) return Bad(kField, "has an entry without content or id");
      for (const char* flag : {"single_word", "lstrip", "rstrip"}) {
        if (IsTrue(*token, flag)) {
          return Bad(kField, fmt::format("has {} with \"{}\", which is not served",
                                         Shown(*FindMember(*token, "content")), flag));
        }
      }
      const auto known = ids_.find(std::string(text));
      const uint64_t before = known == ids_.end() ? UINT64_MAX : known->second;
      const uint64_t type = IsTrue(*token, "special") ? kControl : kUserDefined;
      RETURN_IF_ERROR(Place(kField, text, *id, type, ids_max_));
      if (before != UINT64_MAX && ids_[std::string(text)] != before) {
        return Bad(kField,
                   fmt::format("gives {} a second id", Shown(*FindMember(*token, "content"))));
      }
    }
    return absl::OkStatus();
  }

  void StoreTokens() {
    Texts texts;
    std::vector<uint64_t> types;
    types.reserve(tokens_.size());
    for (size_t id = 0; id < tokens_.size(); ++id) {
      const Token& token = tokens_[id];
      texts.Add(token.type == kUnused ? fmt::format("[PAD{}]", id) : token.text);
      types.push_back(token.type);
    }
    metadata_["tokenizer.ggml.tokens"].v = Array(std::move(texts));
    metadata_["tokenizer.ggml.token_type"].v = Array(std::move(types));
  }

  absl::Status ReadMerges() {
    constexpr const char* kField = "model.merges";
    const JsonArray* merges = FindArray(*model_, "merges");
    if (merges == nullptr) return Bad(kField, "is missing or no list");
    Texts rules;
    const auto text = [](const Json& json) {
      return std::string_view(json.get_string().data(), json.get_string().size());
    };
    for (const Json& merge : *merges) {
      if (merge.is_string()) {
        rules.Add(text(merge));
        continue;
      }
      const JsonArray* pair = merge.if_array();
      if (pair == nullptr || pair->size() != 2 || !(*pair)[0].is_string() ||
          !(*pair)[1].is_string()) {
        return Bad(kField, "has an entry that is neither \"a b\" nor [\"a\", \"b\"]");
      }
      rules.Add(fmt::format("{} {}", text((*pair)[0]), text((*pair)[1])));
    }
    metadata_["tokenizer.ggml.merges"].v = Array(std::move(rules));
    return absl::OkStatus();
  }

  // "bos_token": a text or an object with "content".
  absl::Status ReadNamedToken(const char* name, const char* key) {
    const Json* member = FindMember(*files_.tokenizer_config, name);
    if (member == nullptr) return absl::OkStatus();
    const std::string_view text = member->is_object() ? FindText(member->get_object(), "content")
                                                      : FindText(*files_.tokenizer_config, name);
    const auto it = ids_.find(std::string(text));
    if (it == ids_.end()) {
      return absl::InvalidArgumentError(fmt::format(
          "tokenizer_config.json field \"{}\" is {}, which is no token of tokenizer.json", name,
          Shown(*member)));
    }
    metadata_[key].v = uint64_t{it->second};
    return absl::OkStatus();
  }

  // An id or a list of them, of the first file that has the field.
  std::vector<const Json*> ConfiguredIds(const char* name) const {
    const Json* member = FindMember(*files_.generation, name);
    if (member == nullptr) member = FindMember(*files_.config, name);
    if (member == nullptr) return {};
    if (!member->is_array()) return {member};
    std::vector<const Json*> ids;
    for (const Json& id : member->get_array()) ids.push_back(&id);
    return ids;
  }

  absl::Status ReadSpecialIds() {
    constexpr const char* kBos = "tokenizer.ggml.bos_token_id";
    constexpr const char* kEos = "tokenizer.ggml.eos_token_id";
    RETURN_IF_ERROR(ReadNamedToken("bos_token", kBos));
    RETURN_IF_ERROR(ReadNamedToken("eos_token", kEos));
    std::set<uint64_t> ends;
    for (const Json* id : ConfiguredIds("eos_token_id")) {
      const int64_t* number = id->if_int64();
      if (number == nullptr || *number < 0) {
        return absl::InvalidArgumentError(
            fmt::format("eos_token_id of generation_config.json or config.json is {}", Shown(*id)));
      }
      if (ends.empty()) metadata_.try_emplace(kEos, Value{static_cast<uint64_t>(*number)});
      ends.insert(static_cast<uint64_t>(*number));
    }
    if (!ends.empty()) {
      metadata_["antiphon.end_token_ids"].v = Array(std::vector(ends.begin(), ends.end()));
    }
    // tokenizer_config.json says null where the model has no BOS; config.json often names one then.
    const auto bos = ConfiguredIds("bos_token_id");
    if (!files_.tokenizer_config->contains("bos_token") && !bos.empty() && bos[0]->is_int64() &&
        bos[0]->get_int64() >= 0) {
      metadata_.try_emplace(kBos, Value{static_cast<uint64_t>(bos[0]->get_int64())});
    }
    return absl::OkStatus();
  }

  // TemplateProcessing's `single` is [BOS] A [EOS], where a token is there or not.
  absl::Status ReadPostProcessor() {
    bool add_bos = false, add_eos = false;
    for (const JsonObject* step : StepsOf(*files_.tokenizer, "post_processor", "processors")) {
      if (TypeOf(*step) == "ByteLevel") continue;
      if (TypeOf(*step) != "TemplateProcessing") {
        return Bad("post_processor", fmt::format("has a step \"{}\": ByteLevel and "
                                                 "TemplateProcessing are served",
                                                 TypeOf(*step)));
      }
      RETURN_IF_ERROR(ReadTemplate(*step, add_bos, add_eos));
    }
    metadata_["tokenizer.ggml.add_bos_token"].v = add_bos;
    metadata_["tokenizer.ggml.add_eos_token"].v = add_eos;
    return absl::OkStatus();
  }

  absl::Status ReadTemplate(const JsonObject& step, bool& add_bos, bool& add_eos) {
    const JsonArray* single = FindArray(step, "single");
    bool seen_text = false;
    for (size_t i = 0; single != nullptr && i < single->size(); ++i) {
      const JsonObject* piece = (*single)[i].if_object();
      const JsonObject* special = piece == nullptr ? nullptr : FindObject(*piece, "SpecialToken");
      bool& add = seen_text ? add_eos : add_bos;
      if (special == nullptr) {
        if (piece == nullptr || FindObject(*piece, "Sequence") == nullptr || seen_text) {
          return Bad("post_processor.single", "is not [BOS] A [EOS]");
        }
        seen_text = true;
        continue;
      }
      const std::string text(FindText(*special, "id"));
      const auto it = ids_.find(text);
      if (add || it == ids_.end() || !StandsForItself(step, text, it->second)) {
        return Bad(
            "post_processor.single",
            "has two tokens before or behind the text, or one that is not in the vocabulary");
      }
      add = true;
      const char* key = seen_text ? "tokenizer.ggml.eos_token_id" : "tokenizer.ggml.bos_token_id";
      metadata_[key].v = uint64_t{it->second};
    }
    if (seen_text) return absl::OkStatus();
    return Bad("post_processor.single", "is not [BOS] A [EOS]");
  }

  // `special_tokens` of the step could give a name other ids than the vocabulary does.
  static bool StandsForItself(const JsonObject& step, const std::string& text, uint64_t id) {
    const JsonObject* names = FindObject(step, "special_tokens");
    const JsonObject* name = names == nullptr ? nullptr : FindObject(*names, text);
    if (name == nullptr) return true;
    const JsonArray* ids = FindArray(*name, "ids");
    return ids != nullptr && ids->size() == 1 && (*ids)[0].is_int64() &&
           (*ids)[0].get_int64() == static_cast<int64_t>(id);
  }

  const HfTokenizerFiles& files_;
  std::map<std::string, Value>& metadata_;
  const JsonObject* model_ = nullptr;
  std::vector<Token> tokens_;
  absl::flat_hash_map<std::string, uint64_t> ids_;
  uint64_t ids_max_ = 0;
};

}  // namespace

absl::Status ReadHfTokenizer(const HfTokenizerFiles& files, ModelContents& contents) {
  return TokenizerReader(files, contents).Read();
}

void ReadHfChatTemplate(const HfTokenizerFiles& files, ModelContents& contents) {
  std::string_view text = files.chat_template.value_or("");
  if (text.empty()) text = FindText(*files.tokenizer_config, "chat_template");
  const JsonArray* several = FindArray(*files.tokenizer_config, "chat_template");
  for (size_t i = 0; text.empty() && several != nullptr && i < several->size(); ++i) {
    const JsonObject* one = (*several)[i].if_object();
    if (one != nullptr && FindText(*one, "name") == "default") text = FindText(*one, "template");
  }
  if (!text.empty()) contents.metadata["tokenizer.chat_template"] = Value{std::string(text)};
}

}  // namespace antiphon::model
