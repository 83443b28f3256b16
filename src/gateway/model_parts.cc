#include <spdlog/fmt/fmt.h>

#include "common/block_key.h"
#include "common/status_macros.h"
#include "gateway/conductor_client.h"

namespace antiphon::gateway {
namespace {

template <typename Parts>
auto FindPart(const Parts& parts, const std::string& digest) {
  for (const auto& [key, part] : parts) {
    if (key == digest) return part;
  }
  return typename Parts::value_type::second_type();
}

absl::Status CheckDigest(const std::string& digest, const std::string& content) {
  const std::string actual = Sha256Hex(content);
  if (actual == digest) return absl::OkStatus();
  return absl::DataLossError(
      fmt::format("a blob of {} bytes has the digest {}, not {}", content.size(), actual, digest));
}

}  // namespace

std::vector<std::string> ModelParts::Missing(const wire::ModelCard& card) const {
  std::vector<std::string> missing;
  if (FindPart(tokenizers_, card.tokenizer_digest()) == nullptr) {
    missing.push_back(card.tokenizer_digest());
  }
  if (!card.chat_template_digest().empty() &&
      FindPart(templates_, card.chat_template_digest()) == nullptr) {
    missing.push_back(card.chat_template_digest());
  }
  return missing;
}

absl::Status ModelParts::AddTokenizer(const std::string& digest, const std::string& content) {
  RETURN_IF_ERROR(CheckDigest(digest, content));
  wire::TokenizerSpec spec;
  if (!spec.ParseFromString(content)) return absl::DataLossError("not a tokenizer");
  ASSIGN_OR_RETURN(auto tokenizer, model::Tokenizer::Create(spec));
  tokenizers_.emplace_back(digest, std::move(tokenizer));
  return absl::OkStatus();
}

absl::Status ModelParts::AddTemplate(const std::string& digest, const std::string& content) {
  RETURN_IF_ERROR(CheckDigest(digest, content));
  ASSIGN_OR_RETURN(auto parsed, model::ChatTemplate::Parse(content));
  templates_.emplace_back(digest, std::move(parsed));
  return absl::OkStatus();
}

ServedModelPtr ModelParts::Build(const wire::ModelCard& card) const {
  auto model = std::make_shared<ServedModel>();
  model->card = card;
  model->tokenizer = FindPart(tokenizers_, card.tokenizer_digest());
  if (model->tokenizer == nullptr) return nullptr;
  if (!card.chat_template_digest().empty()) {
    model->chat_template = FindPart(templates_, card.chat_template_digest());
    if (model->chat_template == nullptr) return nullptr;
  }
  return model;
}

}  // namespace antiphon::gateway
