// Strong identifiers. A RequestId names one generation; a BlockKey names the content of a KV block
// and all that precedes it; a NodeId is a process of the cluster as operators write it.
#ifndef ANTIPHON_COMMON_IDS_H_
#define ANTIPHON_COMMON_IDS_H_

#include <array>
#include <compare>
#include <cstdint>
#include <cstring>
#include <optional>
#include <ostream>
#include <string>
#include <string_view>
#include <utility>

namespace antiphon {

// 128 bits with value semantics; Tag makes two kinds of id two types.
template <typename Tag>
class Id128 {
 public:
  static constexpr size_t kBytes = 16;

  constexpr Id128() = default;
  constexpr explicit Id128(const std::array<uint8_t, kBytes>& bytes) : bytes_(bytes) {}

  // From the wire; nullopt unless exactly 16 bytes.
  static std::optional<Id128> FromBytes(std::string_view bytes) {
    if (bytes.size() != kBytes) return std::nullopt;
    Id128 id;
    std::memcpy(id.bytes_.data(), bytes.data(), kBytes);
    return id;
  }
  // The first 16 bytes of a longer digest.
  static Id128 Truncate(const uint8_t* digest) {
    Id128 id;
    std::memcpy(id.bytes_.data(), digest, kBytes);
    return id;
  }

  std::string ToBytes() const {
    return std::string(reinterpret_cast<const char*>(bytes_.data()), kBytes);
  }
  std::string Hex() const {
    static constexpr char kDigits[] = "0123456789abcdef";
    std::string out;
    out.reserve(2 * kBytes);
    for (uint8_t b : bytes_) {
      out += kDigits[b >> 4];
      out += kDigits[b & 15];
    }
    return out;
  }
  const std::array<uint8_t, kBytes>& bytes() const { return bytes_; }
  bool empty() const { return *this == Id128(); }

  friend bool operator==(const Id128&, const Id128&) = default;
  friend auto operator<=>(const Id128&, const Id128&) = default;
  template <typename H>
  friend H AbslHashValue(H h, const Id128& id) {
    return H::combine_contiguous(std::move(h), id.bytes_.data(), kBytes);
  }
  friend std::ostream& operator<<(std::ostream& os, const Id128& id) { return os << id.Hex(); }

 private:
  std::array<uint8_t, kBytes> bytes_{};
};

using RequestId = Id128<struct RequestIdTag>;
using BlockKey = Id128<struct BlockKeyTag>;
using FingerprintId = Id128<struct FingerprintIdTag>;

// A node's name, e.g. "decode-0@host". Ordered, so that decisions can break ties by it.
class NodeId {
 public:
  NodeId() = default;
  explicit NodeId(std::string value) : value_(std::move(value)) {}
  const std::string& value() const { return value_; }
  bool empty() const { return value_.empty(); }
  friend bool operator==(const NodeId&, const NodeId&) = default;
  friend auto operator<=>(const NodeId&, const NodeId&) = default;
  template <typename H>
  friend H AbslHashValue(H h, const NodeId& id) {
    return H::combine(std::move(h), id.value_);
  }
  friend std::ostream& operator<<(std::ostream& os, const NodeId& id) { return os << id.value_; }

 private:
  std::string value_;
};

// A slot of one store's pool at one point of its life. The generation grows each time the slot is
// freed; whoever acts on a slot names the generation that it means.
struct SlotId {
  uint32_t slot = 0;
  uint64_t generation = 0;
  friend bool operator==(const SlotId&, const SlotId&) = default;
  friend auto operator<=>(const SlotId&, const SlotId&) = default;
  template <typename H>
  friend H AbslHashValue(H h, const SlotId& s) {
    return H::combine(std::move(h), s.slot, s.generation);
  }
};

}  // namespace antiphon

#endif  // ANTIPHON_COMMON_IDS_H_
