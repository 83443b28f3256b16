// GGUF v2 and v3 model files (format: ggml/docs/gguf.md of the ggml project). Hostile input: every
// count and offset is checked against what remains of the file before it is used.
#ifndef ANTIPHON_MODEL_GGUF_H_
#define ANTIPHON_MODEL_GGUF_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"

namespace antiphon::model {

// Numbers are GGUF's ggml_type.
enum class TensorType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ8_1 = 9,
  kQ2_K = 10,
  kQ3_K = 11,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kQ8_K = 15,
  kBF16 = 30,
};
// "Q4_1"; "type 99" when unknown.
std::string TensorTypeName(TensorType type);
// Elements and bytes of one quantisation block; {0, 0} when the type is not known to us.
struct TypeTraits {
  uint32_t block_elements = 0;
  uint32_t block_bytes = 0;
};
TypeTraits TraitsOf(TensorType type);

// dims[0] is the contiguous dimension (GGUF order): a matrix [rows][columns] has dims
// {columns, rows}.
struct Tensor {
  std::string name;
  TensorType type = TensorType::kF32;
  std::vector<uint64_t> dims;
  const std::byte* data = nullptr;  // inside the mapping
  uint64_t bytes = 0;
  uint64_t elements() const;
};

// A typed metadata value. Integers are widened; arrays are homogeneous.
struct Value;
using Array = std::vector<Value>;
struct Value {
  std::variant<std::monostate, uint64_t, int64_t, double, bool, std::string, Array> v;
};

// Immutable after Open; thread-safe. Owns the mapping that Tensor::data points into.
class GgufFile {
 public:
  // NOT_FOUND when the file cannot be opened, INVALID_ARGUMENT when it is not a GGUF (with what it
  // looks like instead, where that helps), DATA_LOSS when it is cut short or inconsistent.
  static absl::StatusOr<std::unique_ptr<GgufFile>> Open(const std::string& path);
  // For tests and fuzzing: `bytes` must outlive the result.
  static absl::StatusOr<std::unique_ptr<GgufFile>> Parse(std::string_view bytes);
  ~GgufFile();

  uint32_t version() const;
  const std::map<std::string, Value>& metadata() const;
  const std::vector<Tensor>& tensors() const;
  const Tensor* FindTensor(std::string_view name) const;  // nullptr when absent

  // NOT_FOUND when the key is absent, INVALID_ARGUMENT when it has another type or does not fit;
  // both name the key.
  absl::StatusOr<std::string> GetString(std::string_view key) const;
  absl::StatusOr<uint64_t> GetUint(std::string_view key) const;
  absl::StatusOr<double> GetDouble(std::string_view key) const;
  absl::StatusOr<bool> GetBool(std::string_view key) const;
  // With a default for an absent key; a wrong type is still an error.
  absl::StatusOr<std::string> GetStringOr(std::string_view key, std::string_view otherwise) const;
  absl::StatusOr<uint64_t> GetUintOr(std::string_view key, uint64_t otherwise) const;
  absl::StatusOr<double> GetDoubleOr(std::string_view key, double otherwise) const;
  absl::StatusOr<bool> GetBoolOr(std::string_view key, bool otherwise) const;

  // Which file this is on this host: device, inode, size and the times of its last changes, as of
  // Open. A digest would say more and costs seconds a GiB. Empty after Parse.
  const std::string& identity() const;

  // Takes the file's pages out of this process's memory; what is read again comes from the page
  // cache, or from the disk.
  void DropPages() const;

  // The whole file, for its digest.
  std::string_view bytes() const;

 private:
  GgufFile();
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace antiphon::model

#endif  // ANTIPHON_MODEL_GGUF_H_
