// A model as its files hold it: metadata and tensors, whatever the format. The names are GGUF's
// (llama.block_count, blk.0.attn_q.weight); readers of other formats translate to them, and
// messages say things in the words of the files that the user has (KeyText, TensorText).
#ifndef ANTIPHON_MODEL_MODEL_FILE_H_
#define ANTIPHON_MODEL_MODEL_FILE_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "model/mapped_file.h"

namespace antiphon::model {

// Numbers are GGUF's ggml_type; from 1 << 16 on ours, for what only safetensors has.
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
  kI8 = 24,
  kI16 = 25,
  kI32 = 26,
  kI64 = 27,
  kF64 = 28,
  kBF16 = 30,
  kBool = 1 << 16,
  kU8,
  kU16,
  kU32,
  kU64,
  kF8_E4M3,
  kF8_E5M2,
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
  const std::byte* data = nullptr;  // inside a mapping or what the file owns; any alignment
  uint64_t bytes = 0;
  uint64_t elements() const;
};

// Texts that lie behind each other: a vocabulary has some hundred thousand of them. 4 GiB at most.
class Texts {
 public:
  void Add(std::string_view text);
  size_t size() const { return ends_.size(); }
  std::string_view operator[](size_t i) const {
    const size_t begin = i == 0 ? 0 : ends_[i - 1];
    return std::string_view(bytes_).substr(begin, ends_[i] - begin);
  }
  bool operator==(const Texts&) const = default;

 private:
  std::string bytes_;
  std::vector<uint32_t> ends_;
};

// A typed metadata value. Integers are widened; arrays are homogeneous.
using Array = std::variant<Texts, std::vector<uint64_t>, std::vector<int64_t>, std::vector<double>,
                           std::vector<bool>>;
size_t SizeOf(const Array& array);
struct Value {
  std::variant<std::monostate, uint64_t, int64_t, double, bool, std::string, Array> v;
};

// How messages call what a format holds. Implementations are stateless and live for ever.
class Wording {
 public:
  virtual ~Wording() = default;
  virtual std::string Key(std::string_view key) const = 0;      // "GGUF key llama.block_count"
  virtual std::string Tensor(std::string_view name) const = 0;  // "tensor blk.0.attn_q.weight"
  // "[576, 1536]", in the format's order.
  virtual std::string Dims(const std::vector<uint64_t>& dims) const = 0;
};

// One of the files that a model consists of.
struct ModelPart {
  std::string name;        // in its folder
  std::string_view bytes;  // of `mapping`, or of what a test lends
  MappedFile mapping;
};

// What a reader hands over.
struct ModelContents {
  std::string format;  // "GGUF version 3"
  const Wording* wording = nullptr;
  std::map<std::string, Value> metadata;
  std::vector<Tensor> tensors;
  // GGUF's converters reorder the rows of the llama architecture's q and k so that rope turns the
  // pairs (2i, 2i + 1). Where this is false its pairs are (i, i + dims/2), as the authors trained
  // it.
  bool llama_rows_interleaved = false;
  // What keeps the model or its tokenizer from being served, found while reading; OK: nothing.
  absl::Status model_obstacle;
  absl::Status tokenizer_obstacle;
  std::vector<ModelPart> parts;                    // in a fixed order
  std::vector<std::unique_ptr<std::byte[]>> made;  // data of tensors that no file has
};

// Immutable; thread-safe. Owns the mappings that Tensor::data points into.
class ModelFile {
 public:
  // DATA_LOSS when two tensors have one name.
  static absl::StatusOr<std::unique_ptr<ModelFile>> Create(ModelContents contents);

  const std::string& format() const { return contents_.format; }
  const std::map<std::string, Value>& metadata() const { return contents_.metadata; }
  const std::vector<Tensor>& tensors() const { return contents_.tensors; }
  const Tensor* FindTensor(std::string_view name) const;  // nullptr when absent
  const ModelContents& contents() const { return contents_; }
  const Wording& wording() const { return *contents_.wording; }

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

  // Which files these are on this host, as of opening (MappedFile::identity; its digest where there
  // are several). A digest of the contents would say more and costs seconds a GiB. Empty where
  // nothing is mapped.
  std::string identity() const;

  // SHA-256 in hexadecimal of everything, which takes seconds a GiB: of the file where there is
  // one, else of each part's name, a zero, its size (64 bits, little-endian) and its bytes.
  std::string Digest() const;

  uint64_t size_bytes() const;  // of all parts
  // Takes the files' pages out of this process's memory (MappedFile::DropPages).
  void DropPages() const;

 private:
  explicit ModelFile(ModelContents contents) : contents_(std::move(contents)) {}
  const Value* Find(std::string_view key) const;
  absl::Status Absent(std::string_view key) const;
  absl::Status WrongType(std::string_view key, const char* wanted) const;

  ModelContents contents_;
  absl::flat_hash_map<std::string, size_t> tensor_index_;
};

// A model by its path: a GGUF file, or a folder as Hugging Face has them (hf_folder.h). NOT_FOUND
// when it is not there, INVALID_ARGUMENT when it is neither (with what it looks like instead, where
// that helps), DATA_LOSS when it is cut short or inconsistent; all name the path.
absl::StatusOr<std::unique_ptr<ModelFile>> OpenModelFile(const std::string& path);

}  // namespace antiphon::model

#endif  // ANTIPHON_MODEL_MODEL_FILE_H_
