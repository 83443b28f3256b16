// Byte-pair merges: bytes of one piece to token ids, the pair of lowest rank first, leftmost among
// equals, as Hugging Face `tokenizers` does.
#ifndef ANTIPHON_MODEL_BPE_H_
#define ANTIPHON_MODEL_BPE_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace antiphon::model {

// Immutable once filled; thread-safe then.
class MergeTable {
 public:
  struct Merge {
    uint32_t rank;
    uint32_t id;  // what the pair becomes
  };
  static constexpr uint32_t kNoRank = UINT32_MAX;

  MergeTable() : byte_ids_(NoBytes()) {}
  explicit MergeTable(size_t merges);

  void SetByte(uint8_t byte, uint32_t id) { byte_ids_[byte] = id; }
  // A later rule for the same pair replaces the earlier one.
  void Add(uint32_t left, uint32_t right, Merge merge);
  // rank kNoRank when the pair does not merge.
  Merge Find(uint32_t left, uint32_t right) const;

  // Appends the ids of `piece`. Bytes without a token are dropped. O(n log n).
  void Encode(std::string_view piece, std::vector<uint32_t>& out) const;

 private:
  struct Entry {
    uint64_t pair = kEmpty;
    Merge merge{kNoRank, 0};
  };
  static constexpr uint64_t kEmpty = UINT64_MAX;
  static std::array<int64_t, 256> NoBytes() {
    std::array<int64_t, 256> none;
    none.fill(-1);
    return none;
  }
  size_t Slot(uint64_t pair) const;
  void EncodeShort(std::string_view piece, std::vector<uint32_t>& out) const;
  void EncodeLong(std::string_view piece, std::vector<uint32_t>& out) const;

  std::vector<Entry> entries_;  // open addressing, a power of two, never full
  size_t mask_ = 0;
  std::array<int64_t, 256> byte_ids_;
};

}  // namespace antiphon::model

#endif  // ANTIPHON_MODEL_BPE_H_
