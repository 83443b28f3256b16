#include <cstring>
#include <utility>

#include "model/tokenizer.h"
#include "model/unicode.h"

namespace antiphon::model {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

// Moves what is complete from the front of `pending` to the end of `out`.
void TakeComplete(std::string& pending, std::string& out) {
  size_t at = 0;
  while (at < pending.size()) {
    const Utf8Step step = StepUtf8(pending, at);
    if (step.kind == Utf8Step::Kind::kUnfinished) break;
    if (step.kind == Utf8Step::Kind::kValid) {
      out.append(pending, at, step.bytes);
    } else {
      out.append(kReplacement);
    }
    at += step.bytes;
  }
  pending.erase(0, at);
}

}  // namespace

std::string Detokenizer::Push(uint32_t id) {
  if (skip_special_ && tokenizer_->IsControl(id)) return {};
  pending_.append(tokenizer_->TokenBytes(id));
  std::string out;
  TakeComplete(pending_, out);
  return out;
}

std::string Detokenizer::Finish() {
  if (std::exchange(pending_, {}).empty()) return {};
  return std::string(kReplacement);  // the beginning of one character is one U+FFFD
}

std::string Tokenizer::Decode(absl::Span<const uint32_t> ids, bool skip_special) const {
  std::string bytes;
  for (const uint32_t id : ids) {
    if (!(skip_special && IsControl(id))) bytes.append(TokenBytes(id));
  }
  std::string out;
  out.reserve(bytes.size());
  TakeComplete(bytes, out);
  if (!bytes.empty()) out.append(kReplacement);
  return out;
}

size_t FindInvalidUtf8(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    if (text.size() - at >= 8) {
      uint64_t word;
      std::memcpy(&word, text.data() + at, 8);
      if ((word & 0x8080808080808080ull) == 0) {
        at += 8;
        continue;
      }
    }
    const Utf8Step step = StepUtf8(text, at);
    if (step.kind != Utf8Step::Kind::kValid) return at;
    at += step.bytes;
  }
  return std::string_view::npos;
}

}  // namespace antiphon::model
