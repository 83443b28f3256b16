#include "model/gguf.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "common/status_macros.h"
#include "model/gguf_types.h"

namespace antiphon::model {
namespace {

constexpr uint64_t kKeysMax = 1u << 16;
constexpr uint64_t kTensorsMax = 1u << 20;
constexpr uint64_t kKeyBytesMax = 65'535;      // gguf.md
constexpr uint64_t kTensorNameBytesMax = 256;  // gguf.md says 64; some converters write more
constexpr uint64_t kStringBytesMax = 64u << 20;
constexpr uint32_t kDimsMax = 4;  // GGML_MAX_DIMS
constexpr uint64_t kAlignmentMax = 1u << 20;
// A number costs eight bytes here and possibly one in the file: this bounds what a hostile file can
// make us allocate. The largest real vocabularies have about 1.5 million values.
constexpr uint64_t kArrayElementsMax = 8u << 20;

enum ValueType : uint32_t {
  kU8,
  kI8,
  kU16,
  kI16,
  kU32,
  kI32,
  kF32,
  kBool,
  kString,
  kArray,
  kU64,
  kI64,
  kF64,
  kValueTypes
};
constexpr uint8_t kValueBytes[kValueTypes] = {1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8};
constexpr const char* kValueNames[kValueTypes] = {"uint8",  "int8",    "uint16", "int16",  "uint32",
                                                  "int32",  "float32", "bool",   "string", "array",
                                                  "uint64", "int64",   "float64"};

absl::Status Corrupt(std::string message) { return absl::DataLossError(std::move(message)); }

// Reads little-endian fields; every read is checked against what remains.
class Reader {
 public:
  explicit Reader(std::string_view bytes) : bytes_(bytes) {}

  size_t at() const { return at_; }
  size_t remaining() const { return bytes_.size() - at_; }

  template <typename T>
  absl::StatusOr<T> Number(const std::string& what) {
    if (remaining() < sizeof(T)) return CutShort(what, sizeof(T));
    T value;
    std::memcpy(&value, bytes_.data() + at_, sizeof(T));
    at_ += sizeof(T);
    return value;
  }

  absl::StatusOr<std::string_view> String(const std::string& what, uint64_t bytes_max) {
    ASSIGN_OR_RETURN(const uint64_t size, Number<uint64_t>("the length of " + what));
    if (size > remaining()) return CutShort(what, size);
    if (size > bytes_max) {
      return Corrupt(
          fmt::format("GGUF: {} has {} bytes, at most {} are accepted", what, size, bytes_max));
    }
    const std::string_view s = bytes_.substr(at_, size);
    at_ += size;
    return s;
  }

  absl::Status CutShort(const std::string& what, uint64_t needed) const {
    return Corrupt(fmt::format(
        "GGUF: {} at offset {} needs {} bytes and only {} are left: the file is cut short (an "
        "unfinished download?) or corrupt",
        what, at_, needed, remaining()));
  }

 private:
  std::string_view bytes_;
  size_t at_ = 0;
};

class Parser {
 public:
  explicit Parser(std::string_view bytes) : reader_(bytes) {}

  absl::StatusOr<Value> Scalar(uint32_t type, const std::string& what) {
    switch (type) {
      case kU8:
        return Widen<uint8_t, uint64_t>(what);
      case kU16:
        return Widen<uint16_t, uint64_t>(what);
      case kU32:
        return Widen<uint32_t, uint64_t>(what);
      case kU64:
        return Widen<uint64_t, uint64_t>(what);
      case kI8:
        return Widen<int8_t, int64_t>(what);
      case kI16:
        return Widen<int16_t, int64_t>(what);
      case kI32:
        return Widen<int32_t, int64_t>(what);
      case kI64:
        return Widen<int64_t, int64_t>(what);
      case kF32:
        return Widen<float, double>(what);
      case kF64:
        return Widen<double, double>(what);
      case kBool: {
        ASSIGN_OR_RETURN(const uint8_t b, reader_.Number<uint8_t>(what));
        if (b > 1) return Corrupt(fmt::format("GGUF: {} is a bool of value {}", what, b));
        return Value{b == 1};
      }
      case kString: {
        ASSIGN_OR_RETURN(const std::string_view s, reader_.String(what, kStringBytesMax));
        return Value{std::string(s)};
      }
      default:
        return Corrupt(fmt::format("GGUF: {} has value type {}, which does not exist", what, type));
    }
  }

  absl::StatusOr<Value> Any(const std::string& what) {
    ASSIGN_OR_RETURN(const uint32_t type, reader_.Number<uint32_t>("the type of " + what));
    if (type != kArray) return Scalar(type, what);
    ASSIGN_OR_RETURN(const uint32_t of, reader_.Number<uint32_t>("the element type of " + what));
    ASSIGN_OR_RETURN(const uint64_t count, reader_.Number<uint64_t>("the length of " + what));
    if (of == kArray) return Corrupt(fmt::format("GGUF: {} is an array of arrays", what));
    if (of >= kValueTypes) {
      return Corrupt(fmt::format("GGUF: {} has element type {}, which does not exist", what, of));
    }
    if (count > reader_.remaining() / kValueBytes[of]) {
      return Corrupt(fmt::format(
          "GGUF: {} claims {} elements of type {} and only {} bytes are left: the file is cut "
          "short or corrupt",
          what, count, kValueNames[of], reader_.remaining()));
    }
    array_elements_ += count;
    if (array_elements_ > kArrayElementsMax) {
      return Corrupt(
          fmt::format("GGUF: {} brings the metadata to {} array elements, at most {} are "
                      "accepted",
                      what, array_elements_, kArrayElementsMax));
    }
    ASSIGN_OR_RETURN(Array array, Elements(of, count, what));
    return Value{std::move(array)};
  }

  Reader& reader() { return reader_; }

 private:
  absl::StatusOr<Array> Elements(uint32_t type, uint64_t count, const std::string& what) {
    switch (type) {
      case kU8:
      case kU16:
      case kU32:
      case kU64:
        return List<uint64_t>(type, count, what);
      case kI8:
      case kI16:
      case kI32:
      case kI64:
        return List<int64_t>(type, count, what);
      case kF32:
      case kF64:
        return List<double>(type, count, what);
      case kBool:
        return List<bool>(type, count, what);
      default:
        return Strings(count, what);
    }
  }

  // `Wide` is what Scalar makes of `type`.
  template <typename Wide>
  absl::StatusOr<Array> List(uint32_t type, uint64_t count, const std::string& what) {
    std::vector<Wide> list;
    list.reserve(count);
    for (uint64_t i = 0; i < count; ++i) {
      ASSIGN_OR_RETURN(const Value v, Scalar(type, what));
      list.push_back(std::get<Wide>(v.v));
    }
    return Array(std::move(list));
  }

  absl::StatusOr<Array> Strings(uint64_t count, const std::string& what) {
    Texts texts;
    uint64_t bytes = 0;
    for (uint64_t i = 0; i < count; ++i) {
      ASSIGN_OR_RETURN(const std::string_view text, reader_.String(what, kStringBytesMax));
      bytes += text.size();
      if (bytes > std::numeric_limits<uint32_t>::max()) {
        return Corrupt(fmt::format("GGUF: the strings of {} have more than 4 GiB", what));
      }
      texts.Add(text);
    }
    return Array(std::move(texts));
  }

  template <typename Stored, typename Wide>
  absl::StatusOr<Value> Widen(const std::string& what) {
    ASSIGN_OR_RETURN(const Stored v, reader_.Number<Stored>(what));
    return Value{static_cast<Wide>(v)};
  }

  Reader reader_;
  uint64_t array_elements_ = 0;
};

struct TensorEntry {
  Tensor tensor;
  uint64_t offset = 0;  // from the start of the data
};

absl::StatusOr<TensorEntry> ReadTensorEntry(Reader& reader, uint64_t index) {
  TensorEntry entry;
  Tensor& tensor = entry.tensor;
  const std::string ordinal = fmt::format("the name of tensor {}", index);
  ASSIGN_OR_RETURN(const std::string_view name, reader.String(ordinal, kTensorNameBytesMax));
  if (name.empty()) return Corrupt(fmt::format("GGUF: {} is empty", ordinal));
  tensor.name = std::string(name);
  const std::string of = " of tensor " + tensor.name;
  ASSIGN_OR_RETURN(const uint32_t rank, reader.Number<uint32_t>("the rank" + of));
  if (rank == 0 || rank > kDimsMax) {
    return Corrupt(fmt::format("GGUF: tensor {} has {} dimensions, 1 to {} are possible",
                               tensor.name, rank, kDimsMax));
  }
  unsigned __int128 elements = 1;
  for (uint32_t d = 0; d < rank; ++d) {
    ASSIGN_OR_RETURN(const uint64_t dim, reader.Number<uint64_t>("a dimension" + of));
    if (dim == 0) return Corrupt(fmt::format("GGUF: dimension {}{} is zero", d, of));
    elements *= dim;
    if (elements > std::numeric_limits<int64_t>::max()) {
      return Corrupt(fmt::format("GGUF: the dimensions{} overflow 63 bits", of));
    }
    tensor.dims.push_back(dim);
  }
  ASSIGN_OR_RETURN(const uint32_t type, reader.Number<uint32_t>("the type" + of));
  ASSIGN_OR_RETURN(entry.offset, reader.Number<uint64_t>("the offset" + of));
  tensor.type = static_cast<TensorType>(type);
  const TypeTraits traits = TraitsOf(tensor.type);
  if (traits.block_elements == 0) return entry;  // size unknown: whoever uses it refuses the type
  if (tensor.dims[0] % traits.block_elements != 0) {
    return Corrupt(
        fmt::format("GGUF: rows{} have {} elements, which is no multiple of {}'s block of "
                    "{}",
                    of, tensor.dims[0], TensorTypeName(tensor.type), traits.block_elements));
  }
  const unsigned __int128 bytes = elements / traits.block_elements * traits.block_bytes;
  if (bytes > std::numeric_limits<int64_t>::max()) {
    return Corrupt(fmt::format("GGUF: the size{} overflows 63 bits", of));
  }
  tensor.bytes = static_cast<uint64_t>(bytes);
  return entry;
}

// Points the tensors into the file: aligned, inside it, and none over another.
absl::Status PlaceTensors(std::string_view file, uint64_t data_start, uint64_t alignment,
                          std::vector<TensorEntry>& entries) {
  const uint64_t data_bytes = file.size() > data_start ? file.size() - data_start : 0;
  std::vector<const TensorEntry*> by_offset;
  for (TensorEntry& entry : entries) {
    Tensor& tensor = entry.tensor;
    if (entry.offset % alignment != 0) {
      return Corrupt(
          fmt::format("GGUF: tensor {} starts at offset {}, which is no multiple of the "
                      "alignment {}",
                      tensor.name, entry.offset, alignment));
    }
    if (entry.offset > data_bytes || tensor.bytes > data_bytes - entry.offset) {
      return Corrupt(fmt::format(
          "GGUF: tensor {} needs bytes {} to {} of the data and the file holds {}: the file is cut "
          "short (an unfinished download?) or corrupt",
          tensor.name, entry.offset, entry.offset + tensor.bytes, data_bytes));
    }
    tensor.data = reinterpret_cast<const std::byte*>(file.data()) + data_start + entry.offset;
    by_offset.push_back(&entry);
  }
  std::sort(by_offset.begin(), by_offset.end(),
            [](const TensorEntry* a, const TensorEntry* b) { return a->offset < b->offset; });
  for (size_t i = 1; i < by_offset.size(); ++i) {
    const TensorEntry& before = *by_offset[i - 1];
    if (before.offset + before.tensor.bytes > by_offset[i]->offset) {
      return Corrupt(fmt::format("GGUF: the data of tensors {} and {} overlap", before.tensor.name,
                                 by_offset[i]->tensor.name));
    }
  }
  return absl::OkStatus();
}

class GgufWording : public Wording {
 public:
  std::string Key(std::string_view key) const override { return fmt::format("GGUF key {}", key); }
  std::string Tensor(std::string_view name) const override {
    return fmt::format("tensor {}", name);
  }
  std::string Dims(const std::vector<uint64_t>& dims) const override {
    return fmt::format("[{}]", fmt::join(dims, ", "));
  }
};
constinit const GgufWording kWording;

const Value* Find(const ModelContents& contents, const std::string& key) {
  const auto it = contents.metadata.find(key);
  return it == contents.metadata.end() ? nullptr : &it->second;
}

absl::Status Read(std::string_view bytes, ModelContents& contents) {
  if (bytes.substr(0, 4) != "GGUF") {
    return absl::InvalidArgumentError("not a GGUF: " + DescribeForeignFile(bytes));
  }
  Parser parser(bytes);
  Reader& reader = parser.reader();
  RETURN_IF_ERROR(reader.Number<uint32_t>("the magic").status());
  ASSIGN_OR_RETURN(const uint32_t version, reader.Number<uint32_t>("the version"));
  if (version != 2 && version != 3) {
    const bool swapped = (version & 0xffff) == 0 && version != 0;
    return absl::InvalidArgumentError(
        swapped ? std::string("GGUF in big-endian order: convert it to little-endian")
                : fmt::format("GGUF version {}: versions 2 and 3 are supported", version));
  }
  ASSIGN_OR_RETURN(const uint64_t tensor_count, reader.Number<uint64_t>("the tensor count"));
  ASSIGN_OR_RETURN(const uint64_t key_count, reader.Number<uint64_t>("the key count"));
  // A key takes at least 13 bytes and a tensor entry 33.
  if (key_count > kKeysMax || key_count > reader.remaining() / 13) {
    return Corrupt(
        fmt::format("GGUF: the header claims {} keys in a file of {} bytes (at most {} "
                    "are accepted)",
                    key_count, bytes.size(), kKeysMax));
  }
  if (tensor_count > kTensorsMax || tensor_count > reader.remaining() / 33) {
    return Corrupt(
        fmt::format("GGUF: the header claims {} tensors in a file of {} bytes (at most "
                    "{} are accepted)",
                    tensor_count, bytes.size(), kTensorsMax));
  }
  for (uint64_t i = 0; i < key_count; ++i) {
    const std::string ordinal = fmt::format("the name of key {}", i);
    ASSIGN_OR_RETURN(const std::string_view key, reader.String(ordinal, kKeyBytesMax));
    if (key.empty()) return Corrupt(fmt::format("GGUF: {} is empty", ordinal));
    ASSIGN_OR_RETURN(Value value, parser.Any(fmt::format("key {}", key)));
    if (!contents.metadata.emplace(std::string(key), std::move(value)).second) {
      return Corrupt(fmt::format("GGUF: key {} appears twice", key));
    }
  }
  uint64_t alignment = 32;
  if (const Value* value = Find(contents, "general.alignment"); value != nullptr) {
    const uint64_t* given = std::get_if<uint64_t>(&value->v);
    if (given == nullptr || *given == 0 || (*given & (*given - 1)) != 0 || *given > kAlignmentMax) {
      return Corrupt(
          fmt::format("GGUF: key general.alignment must be an unsigned power of two up to "
                      "{}",
                      kAlignmentMax));
    }
    alignment = *given;
  }
  std::vector<TensorEntry> entries;
  entries.reserve(tensor_count);
  for (uint64_t i = 0; i < tensor_count; ++i) {
    ASSIGN_OR_RETURN(TensorEntry entry, ReadTensorEntry(reader, i));
    entries.push_back(std::move(entry));
  }
  const uint64_t data_start = (reader.at() + alignment - 1) / alignment * alignment;
  RETURN_IF_ERROR(PlaceTensors(bytes, data_start, alignment, entries));
  contents.tensors.reserve(entries.size());
  for (TensorEntry& entry : entries) contents.tensors.push_back(std::move(entry.tensor));
  contents.format = fmt::format("GGUF version {}", version);
  contents.wording = &kWording;
  contents.llama_rows_interleaved = true;
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<ModelFile>> Parse(ModelPart part) {
  ModelContents contents;
  RETURN_IF_ERROR(Read(part.bytes, contents));
  contents.parts.push_back(std::move(part));
  return ModelFile::Create(std::move(contents));
}

}  // namespace

absl::StatusOr<std::unique_ptr<ModelFile>> ParseGguf(std::string_view bytes) {
  return Parse({.name = "", .bytes = bytes, .mapping = {}});
}

absl::StatusOr<std::unique_ptr<ModelFile>> OpenGguf(const std::string& path) {
  ASSIGN_OR_RETURN(MappedFile mapping, MappedFile::Map(path));
  const std::string_view bytes = mapping.bytes();
  auto file = Parse({.name = "", .bytes = bytes, .mapping = std::move(mapping)});
  if (file.ok()) return file;
  return absl::Status(file.status().code(),
                      fmt::format("{}: {}", path, std::string(file.status().message())));
}

}  // namespace antiphon::model
