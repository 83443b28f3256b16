#include "model/unicode.h"

#include <algorithm>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "model/unicode_tables.h"

namespace antiphon::model {
namespace {

constexpr uint32_t kCodePoints = 0x110000;
constexpr uint32_t kPageBits = 8;

// The range tables spread out: one page of 256 entries for each distinct content.
template <typename T>
class PagedTable {
 public:
  template <typename Ranges, typename ValueOf>
  PagedTable(const Ranges* ranges, size_t count, ValueOf value_of) {
    index_.assign(kCodePoints >> kPageBits, 0);
    pages_.assign(1u << kPageBits, T{});
    for (size_t r = 0; r < count; ++r) {
      for (uint32_t c = ranges[r].first; c <= ranges[r].last; ++c) {
        uint16_t& page = index_[c >> kPageBits];
        if (page == 0) {
          page = static_cast<uint16_t>(pages_.size() >> kPageBits);
          pages_.resize(pages_.size() + (1u << kPageBits), T{});
        }
        pages_[(page << kPageBits) + (c & ((1u << kPageBits) - 1))] = value_of(ranges[r]);
      }
    }
  }
  T operator[](uint32_t c) const {
    return pages_[(index_[c >> kPageBits] << kPageBits) + (c & ((1u << kPageBits) - 1))];
  }

 private:
  std::vector<uint16_t> index_;
  std::vector<T> pages_;
};

// The Unicode Standard, section 3.12: conjoining jamo.
constexpr uint32_t kSBase = 0xAC00, kLBase = 0x1100, kVBase = 0x1161, kTBase = 0x11A7;
constexpr uint32_t kLCount = 19, kVCount = 21, kTCount = 28, kSCount = 11172;

struct NormalForms {
  NormalForms()
      : combining(kCombiningRanges, kCombiningRangesCount,
                  [](const CombiningRange& r) { return r.combining_class; }) {
    for (size_t i = 0; i < kDecompositionsCount; ++i) {
      const Decomposition& d = kDecompositions[i];
      decompose.emplace(d.composed, &d);
      if (d.composes) {
        compose.emplace(static_cast<uint64_t>(d.first) << 32 | d.second, d.composed);
      }
    }
  }

  void Decompose(uint32_t c, std::u32string& out) const {
    if (c >= kSBase && c < kSBase + kSCount) {
      const uint32_t s = c - kSBase;
      out.push_back(kLBase + s / (kVCount * kTCount));
      out.push_back(kVBase + s % (kVCount * kTCount) / kTCount);
      if (s % kTCount != 0) out.push_back(kTBase + s % kTCount);
      return;
    }
    const auto it = decompose.find(c);
    if (it == decompose.end()) {
      out.push_back(c);
      return;
    }
    Decompose(it->second->first, out);  // at most four levels deep in the tables
    if (it->second->second != 0) Decompose(it->second->second, out);
  }

  // 0 when the two do not compose.
  uint32_t Compose(uint32_t a, uint32_t b) const {
    if (a >= kLBase && a < kLBase + kLCount && b >= kVBase && b < kVBase + kVCount) {
      return kSBase + ((a - kLBase) * kVCount + (b - kVBase)) * kTCount;
    }
    if (a >= kSBase && a < kSBase + kSCount && (a - kSBase) % kTCount == 0 && b > kTBase &&
        b < kTBase + kTCount) {
      return a + (b - kTBase);
    }
    const auto it = compose.find(static_cast<uint64_t>(a) << 32 | b);
    return it == compose.end() ? 0 : it->second;
  }

  PagedTable<uint8_t> combining;
  absl::flat_hash_map<uint32_t, const Decomposition*> decompose;
  absl::flat_hash_map<uint64_t, uint32_t> compose;
};

const NormalForms& Forms() {
  static const NormalForms* forms = new NormalForms;
  return *forms;
}

void SortMarks(const NormalForms& forms, std::u32string& s) {
  for (size_t i = 0; i < s.size();) {
    if (forms.combining[s[i]] == 0) {
      ++i;
      continue;
    }
    size_t end = i;
    while (end < s.size() && forms.combining[s[end]] != 0) ++end;
    std::stable_sort(s.begin() + i, s.begin() + end, [&](char32_t a, char32_t b) {
      return forms.combining[a] < forms.combining[b];
    });
    i = end;
  }
}

// The Unicode Standard, definition D117, in place.
void ComposeAll(const NormalForms& forms, std::u32string& s) {
  size_t out = 0;
  size_t starter = std::u32string::npos;
  int last_class = -1;  // of the previous kept character after the starter; -1: none kept
  for (size_t i = 0; i < s.size(); ++i) {
    const uint32_t c = s[i];
    const int klass = forms.combining[c];
    if (starter != std::u32string::npos && last_class < klass) {
      if (const uint32_t composed = forms.Compose(s[starter], c); composed != 0) {
        s[starter] = composed;
        continue;
      }
    }
    if (klass == 0) {
      starter = out;
      last_class = -1;
    } else {
      last_class = klass;
    }
    s[out++] = c;
  }
  s.resize(out);
}

}  // namespace

CharClass ClassOf(uint32_t code_point) {
  static const PagedTable<CharClass>* table = new PagedTable<CharClass>(
      kClassRanges, kClassRangesCount, [](const ClassRange& r) { return r.char_class; });
  return (*table)[code_point];
}

Utf8Step StepUtf8(std::string_view text, size_t at) {
  using Kind = Utf8Step::Kind;
  const uint8_t lead = static_cast<uint8_t>(text[at]);
  if (lead < 0x80) return {Kind::kValid, 1};
  if (lead < 0xC2 || lead > 0xF4) return {Kind::kInvalid, 1};
  const uint32_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  for (uint32_t i = 1; i < length; ++i) {
    if (at + i >= text.size()) return {Kind::kUnfinished, i};
    const uint8_t b = static_cast<uint8_t>(text[at + i]);
    uint8_t low = 0x80;
    uint8_t high = 0xBF;
    if (i == 1) {
      if (lead == 0xE0) low = 0xA0;   // overlong
      if (lead == 0xED) high = 0x9F;  // surrogates
      if (lead == 0xF0) low = 0x90;   // overlong
      if (lead == 0xF4) high = 0x8F;  // beyond U+10FFFF
    }
    if (b < low || b > high) return {Kind::kInvalid, i};
  }
  return {Kind::kValid, length};
}

void AppendUtf8(uint32_t c, std::string& out) {
  if (c < 0x80) {
    out.push_back(static_cast<char>(c));
  } else if (c < 0x800) {
    out.push_back(static_cast<char>(0xC0 | c >> 6));
    out.push_back(static_cast<char>(0x80 | (c & 0x3F)));
  } else if (c < 0x10000) {
    out.push_back(static_cast<char>(0xE0 | c >> 12));
    out.push_back(static_cast<char>(0x80 | (c >> 6 & 0x3F)));
    out.push_back(static_cast<char>(0x80 | (c & 0x3F)));
  } else {
    out.push_back(static_cast<char>(0xF0 | c >> 18));
    out.push_back(static_cast<char>(0x80 | (c >> 12 & 0x3F)));
    out.push_back(static_cast<char>(0x80 | (c >> 6 & 0x3F)));
    out.push_back(static_cast<char>(0x80 | (c & 0x3F)));
  }
}

std::string NormalizeNfc(std::string_view text) {
  // Nothing below U+0300 decomposes into something that does not compose back, reorders or
  // combines with what follows: bytes below 0xCC start all of it.
  const bool plain =
      std::all_of(text.begin(), text.end(), [](char c) { return static_cast<uint8_t>(c) < 0xCC; });
  if (plain) return std::string(text);
  const NormalForms& forms = Forms();
  std::u32string s;
  s.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const CodePoint c = DecodeUtf8(text, at);
    forms.Decompose(c.value, s);
    at += c.bytes;
  }
  SortMarks(forms, s);
  ComposeAll(forms, s);
  std::string out;
  out.reserve(text.size());
  for (const char32_t c : s) AppendUtf8(c, out);
  return out;
}

}  // namespace antiphon::model
