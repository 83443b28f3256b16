#include "model/tokenizer.h"

#include <spdlog/fmt/fmt.h>
#include <xxhash.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "antiphon/v1/model.pb.h"
#include "common/status_macros.h"
#include "model/added_tokens.h"
#include "model/bpe.h"
#include "model/byte_alphabet.h"
#include "model/pre_tokenizer.h"
#include "model/unicode.h"

namespace antiphon::model {
namespace {

constexpr int kTokensMax = 4 << 20;
constexpr size_t kVocabularyBytesMax = 1u << 30;
constexpr int kControl = 3;  // GGUF token types
constexpr int kUserDefined = 4;

// The bytes of every token, back to back.
class TokenBytesTable {
 public:
  void Append(std::string_view bytes) {
    bytes_.append(bytes);
    ends_.push_back(static_cast<uint32_t>(bytes_.size()));
  }
  size_t size() const { return ends_.size(); }
  size_t total_bytes() const { return bytes_.size(); }
  std::string_view operator[](uint32_t id) const {
    const uint32_t begin = id == 0 ? 0 : ends_[id - 1];
    return std::string_view(bytes_).substr(begin, ends_[id] - begin);
  }

 private:
  std::string bytes_;
  std::vector<uint32_t> ends_;
};

// Bytes to the id of the normal token that consists of them.
class WordIndex {
 public:
  void Build(const TokenBytesTable& bytes, const std::vector<uint32_t>& ids) {
    bytes_ = &bytes;
    entries_.assign(std::bit_ceil(ids.size() * 2 + 2), {});
    for (const uint32_t id : ids) {
      longest_ = std::max(longest_, bytes[id].size());
      const uint64_t hash = Hash(bytes[id]);
      Entry& entry = entries_[Slot(bytes[id], hash)];
      entry = {static_cast<uint32_t>(hash >> 32), static_cast<int32_t>(id)};
    }
  }
  int64_t Find(std::string_view word) const {
    if (word.size() > longest_) return -1;
    return entries_[Slot(word, Hash(word))].id;
  }

 private:
  struct Entry {
    uint32_t hash_high = 0;
    int32_t id = -1;
  };
  static uint64_t Hash(std::string_view s) { return XXH3_64bits(s.data(), s.size()); }
  size_t Slot(std::string_view word, uint64_t hash) const {
    const size_t mask = entries_.size() - 1;
    size_t slot = hash & mask;
    for (; entries_[slot].id >= 0; slot = (slot + 1) & mask) {
      if (entries_[slot].hash_high == static_cast<uint32_t>(hash >> 32) &&
          (*bytes_)[static_cast<uint32_t>(entries_[slot].id)] == word) {
        break;
      }
    }
    return slot;
  }

  const TokenBytesTable* bytes_ = nullptr;
  std::vector<Entry> entries_;
  size_t longest_ = 0;
};

// Whether merging a token's own bytes gives that token back: learnt at its first use. Threads that
// race learn the same.
enum Whole : uint8_t { kUnknown = 0, kYes = 1, kNo = 2 };

absl::Status Bad(std::string message) { return absl::InvalidArgumentError(std::move(message)); }

}  // namespace

struct Tokenizer::State {
  absl::Status LoadTokens(const internal::v1::TokenizerSpec& spec);
  absl::Status LoadMerges(const internal::v1::TokenizerSpec& spec);
  absl::Status LoadIds(const internal::v1::TokenizerSpec& spec);
  void EncodePlain(std::string_view text, std::vector<uint32_t>& out) const;
  void EncodePiece(std::string_view piece, std::vector<uint32_t>& out) const;
  bool IsControl(uint32_t id) const { return id < types.size() && types[id] == kControl; }

  PreTokenizer pre = PreTokenizer::kGpt2;
  bool ignore_merges = false;
  TokenBytesTable bytes;
  std::vector<uint8_t> types;
  WordIndex words;
  std::unique_ptr<std::atomic<uint8_t>[]> whole;  // by id
  MergeTable merges;
  AddedTokens added;
  int64_t bos_id = -1;
  int64_t eos_id = -1;
  bool add_bos = false;
  std::vector<uint32_t> end_ids;
};

absl::Status Tokenizer::State::LoadTokens(const internal::v1::TokenizerSpec& spec) {
  const int count = spec.tokens_size();
  if (count == 0) return Bad("tokenizer: the vocabulary is empty");
  if (count > kTokensMax) {
    return Bad(fmt::format("tokenizer: {} tokens, at most {} are accepted", count, kTokensMax));
  }
  if (spec.token_types_size() != 0 && spec.token_types_size() != count) {
    return Bad(
        fmt::format("tokenizer: {} token types for {} tokens", spec.token_types_size(), count));
  }
  std::vector<uint32_t> normal;
  for (int i = 0; i < count; ++i) {
    const std::string& text = spec.tokens(i);
    const int type = spec.token_types_size() == 0 ? 1 : spec.token_types(i);
    if (type < 0 || type > 6) {
      return Bad(fmt::format("tokenizer: token {} has type {}, which does not exist", i, type));
    }
    if (bytes.total_bytes() + text.size() > kVocabularyBytesMax) {
      return Bad(
          fmt::format("tokenizer: the vocabulary's texts exceed {} bytes", kVocabularyBytesMax));
    }
    const uint32_t id = static_cast<uint32_t>(i);
    types.push_back(static_cast<uint8_t>(type));
    if (type == kControl || type == kUserDefined) {
      if (text.size() > AddedTokens::kTextBytesMax) {
        return Bad(fmt::format("tokenizer: added token {} has {} bytes, at most {} are accepted", i,
                               text.size(), AddedTokens::kTextBytesMax));
      }
      bytes.Append(text);
      added.Add(text, id);
    } else if (const auto decoded = FromByteAlphabet(text); decoded.has_value()) {
      bytes.Append(*decoded);
      if (decoded->size() == 1) merges.SetByte(static_cast<uint8_t>((*decoded)[0]), id);
      normal.push_back(id);
    } else {
      bytes.Append(text);  // cannot come out of any input; shown as it is written
    }
  }
  words.Build(bytes, normal);
  whole = std::make_unique<std::atomic<uint8_t>[]>(static_cast<size_t>(count));
  return absl::OkStatus();
}

absl::Status Tokenizer::State::LoadMerges(const internal::v1::TokenizerSpec& spec) {
  absl::flat_hash_map<std::string_view, uint32_t> id_of;
  id_of.reserve(static_cast<size_t>(spec.tokens_size()));
  for (int i = 0; i < spec.tokens_size(); ++i) id_of[spec.tokens(i)] = static_cast<uint32_t>(i);
  const auto find = [&](std::string_view text) -> int64_t {
    const auto it = id_of.find(text);
    return it == id_of.end() ? -1 : static_cast<int64_t>(it->second);
  };
  std::string joined;
  for (int i = 0; i < spec.merges_size(); ++i) {
    const std::string_view rule = spec.merges(i);
    const size_t space = rule.find(' ');
    if (space == 0 || space == std::string_view::npos || space + 1 == rule.size() ||
        rule.find(' ', space + 1) != std::string_view::npos) {
      return Bad(fmt::format("tokenizer: merge {} is not two tokens with a space between them", i));
    }
    const std::string_view left = rule.substr(0, space);
    const std::string_view right = rule.substr(space + 1);
    joined.assign(left).append(right);
    const int64_t left_id = find(left);
    const int64_t right_id = find(right);
    const int64_t joined_id = find(joined);
    if (left_id < 0 || right_id < 0 || joined_id < 0) {
      return Bad(fmt::format("tokenizer: merge {} needs a token that is not in the vocabulary ({})",
                             i,
                             left_id < 0    ? "left side"
                             : right_id < 0 ? "right side"
                                            : "result"));
    }
    merges.Add(static_cast<uint32_t>(left_id), static_cast<uint32_t>(right_id),
               {static_cast<uint32_t>(i), static_cast<uint32_t>(joined_id)});
  }
  return absl::OkStatus();
}

absl::Status Tokenizer::State::LoadIds(const internal::v1::TokenizerSpec& spec) {
  const auto check = [&](const char* name, int64_t id) {
    if (id >= 0 && id < static_cast<int64_t>(bytes.size())) return absl::OkStatus();
    return Bad(fmt::format("tokenizer: {} {} is outside the vocabulary of {} tokens", name, id,
                           bytes.size()));
  };
  if (spec.has_bos_id()) {
    RETURN_IF_ERROR(check("bos_id", spec.bos_id()));
    bos_id = spec.bos_id();
  }
  if (spec.has_eos_id()) {
    RETURN_IF_ERROR(check("eos_id", spec.eos_id()));
    eos_id = spec.eos_id();
  }
  for (const int32_t id : spec.end_of_generation_ids()) {
    RETURN_IF_ERROR(check("end_of_generation_ids:", id));
    end_ids.push_back(static_cast<uint32_t>(id));
  }
  std::sort(end_ids.begin(), end_ids.end());
  end_ids.erase(std::unique(end_ids.begin(), end_ids.end()), end_ids.end());
  add_bos = spec.add_bos();
  if (add_bos && bos_id < 0) {
    return Bad("tokenizer: the model asks for a BOS token and names none (bos_id)");
  }
  return absl::OkStatus();
}

void Tokenizer::State::EncodePiece(std::string_view piece, std::vector<uint32_t>& out) const {
  const int64_t word = words.Find(piece);
  if (word < 0) {
    merges.Encode(piece, out);
    return;
  }
  const uint32_t id = static_cast<uint32_t>(word);
  const uint8_t known =
      ignore_merges ? static_cast<uint8_t>(kYes) : whole[id].load(std::memory_order_relaxed);
  if (known == kYes) {
    out.push_back(id);
    return;
  }
  const size_t before = out.size();
  merges.Encode(piece, out);
  if (known == kUnknown) {
    const bool same = out.size() == before + 1 && out.back() == id;
    whole[id].store(same ? kYes : kNo, std::memory_order_relaxed);
  }
}

void Tokenizer::State::EncodePlain(std::string_view text, std::vector<uint32_t>& out) const {
  std::string normal;
  if (pre == PreTokenizer::kQwen2) {
    normal = NormalizeNfc(text);
    text = normal;
  }
  for (size_t at = 0; at < text.size();) {
    const size_t end = PieceEnd(pre, text, at);
    EncodePiece(text.substr(at, end - at), out);
    at = end;
  }
}

Tokenizer::Tokenizer() : state_(std::make_unique<State>()) {}
Tokenizer::~Tokenizer() = default;

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Create(
    const internal::v1::TokenizerSpec& spec) {
  if (spec.model() != "gpt2") {
    return Bad(fmt::format(
        "tokenizer: model \"{}\" is not supported, only \"gpt2\" (byte-level BPE)", spec.model()));
  }
  const auto pre = PreTokenizerNamed(spec.pre());
  if (!pre.has_value()) {
    return Bad(
        fmt::format("tokenizer: pre-tokenizer \"{}\" is not supported, only gpt-2, smollm, "
                    "llama-bpe and qwen2",
                    spec.pre()));
  }
  std::unique_ptr<Tokenizer> tokenizer(new Tokenizer);
  State& state = *tokenizer->state_;
  state.pre = *pre;
  state.ignore_merges = *pre == PreTokenizer::kLlamaBpe;
  state.merges = MergeTable(static_cast<size_t>(spec.merges_size()));
  RETURN_IF_ERROR(state.LoadTokens(spec));
  RETURN_IF_ERROR(state.LoadMerges(spec));
  RETURN_IF_ERROR(state.LoadIds(spec));
  return tokenizer;
}

absl::StatusOr<std::vector<uint32_t>> Tokenizer::Encode(std::string_view text,
                                                        EncodeOptions options) const {
  if (const size_t at = FindInvalidUtf8(text); at != std::string_view::npos) {
    return Bad(fmt::format("the text is not valid UTF-8 at byte {}", at));
  }
  std::vector<uint32_t> ids;
  ids.reserve(text.size() / 4 + 2);
  size_t plain_from = 0;
  for (size_t from = 0;;) {
    const auto match = state_->added.FindFrom(text, from);
    if (!match.has_value()) break;
    from = match->end;
    if (!options.parse_special && state_->IsControl(match->id)) continue;
    state_->EncodePlain(text.substr(plain_from, match->begin - plain_from), ids);
    ids.push_back(match->id);
    plain_from = match->end;
  }
  state_->EncodePlain(text.substr(plain_from), ids);
  if (options.add_bos && state_->add_bos) {
    const uint32_t bos = static_cast<uint32_t>(state_->bos_id);
    if (ids.empty() || ids.front() != bos) ids.insert(ids.begin(), bos);
  }
  return ids;
}

std::string_view Tokenizer::TokenBytes(uint32_t id) const {
  return id < state_->bytes.size() ? state_->bytes[id] : std::string_view();
}
bool Tokenizer::IsControl(uint32_t id) const { return state_->IsControl(id); }
uint32_t Tokenizer::vocab_size() const { return static_cast<uint32_t>(state_->bytes.size()); }
const std::vector<uint32_t>& Tokenizer::end_of_generation_ids() const { return state_->end_ids; }

std::string_view Tokenizer::bos_text() const {
  return state_->bos_id < 0 ? std::string_view()
                            : TokenBytes(static_cast<uint32_t>(state_->bos_id));
}
std::string_view Tokenizer::eos_text() const {
  return state_->eos_id < 0 ? std::string_view()
                            : TokenBytes(static_cast<uint32_t>(state_->eos_id));
}

int64_t Tokenizer::FindToken(std::string_view text) const {
  const int64_t added = state_->added.Find(text);
  return added >= 0 ? added : state_->words.Find(text);
}

}  // namespace antiphon::model
