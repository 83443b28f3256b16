#include "model/safetensors.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <boost/json/basic_parser_impl.hpp>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "common/status_macros.h"
#include "model/gguf_types.h"

namespace antiphon::model {
namespace {

using boost::json::error_code;
using boost::json::string_view;

constexpr size_t kTensorsMax = 1u << 20;
constexpr size_t kNameBytesMax = 1024;
constexpr size_t kDimsMax = 8;
constexpr size_t kDepthMax = 4;

struct Dtype {
  const char* name;
  TensorType type;
  uint32_t bytes;
};
constexpr Dtype kDtypes[] = {
    {"F32", TensorType::kF32, 4},         {"F16", TensorType::kF16, 2},
    {"BF16", TensorType::kBF16, 2},       {"F64", TensorType::kF64, 8},
    {"BOOL", TensorType::kBool, 1},       {"U8", TensorType::kU8, 1},
    {"I8", TensorType::kI8, 1},           {"U16", TensorType::kU16, 2},
    {"I16", TensorType::kI16, 2},         {"U32", TensorType::kU32, 4},
    {"I32", TensorType::kI32, 4},         {"U64", TensorType::kU64, 8},
    {"I64", TensorType::kI64, 8},         {"F8_E4M3", TensorType::kF8_E4M3, 1},
    {"F8_E5M2", TensorType::kF8_E5M2, 1},
};

absl::Status Corrupt(std::string message) {
  return absl::DataLossError("safetensors: " + std::move(message));
}

struct Entry {
  std::string name;
  std::string dtype;
  std::vector<uint64_t> shape;
  std::vector<uint64_t> offsets;  // in the data: of its first byte and behind its last
  bool has_dtype = false, has_shape = false, has_offsets = false;
};

// What the JSON parser calls, in the order of the text. Entries are all there is in a header, but
// for __metadata__, whose texts are skipped.
class HeaderHandler {
 public:
  static constexpr size_t max_object_size = kTensorsMax + 1;
  static constexpr size_t max_array_size = kDimsMax;
  static constexpr size_t max_key_size = kNameBytesMax;
  static constexpr size_t max_string_size = kSafetensorsHeaderBytesMax;

  std::vector<Entry>& entries() { return entries_; }
  const std::string& problem() const { return problem_; }

  bool on_document_begin(error_code&) { return true; }
  bool on_document_end(error_code&) { return true; }

  bool on_object_begin(error_code& ec) {
    if (in_array_ || depth_ > 1) return Refuse("an object where none belongs", ec);
    ++depth_;
    return true;
  }
  bool on_object_end(size_t, error_code& ec) {
    --depth_;
    if (depth_ != 1 || in_metadata_) return true;
    const Entry& entry = entries_.back();
    if (entry.has_dtype && entry.has_shape && entry.has_offsets) return true;
    return Refuse("no dtype, shape or data_offsets", ec);
  }
  bool on_array_begin(error_code& ec) {
    if (depth_ != 2 || in_array_ || in_metadata_ || field_ == Field::kDtype) {
      return Refuse("an array where none belongs", ec);
    }
    in_array_ = true;
    (field_ == Field::kShape ? entries_.back().has_shape : entries_.back().has_offsets) = true;
    return true;
  }
  bool on_array_end(size_t, error_code&) {
    in_array_ = false;
    return true;
  }

  bool on_key_part(string_view part, size_t, error_code&) {
    text_.append(part.data(), part.size());
    return true;
  }
  bool on_key(string_view part, size_t, error_code& ec) {
    text_.append(part.data(), part.size());
    const std::string key = std::exchange(text_, {});
    return depth_ == 1 ? Name(key, ec) : FieldOf(key, ec);
  }
  bool on_string_part(string_view part, size_t, error_code&) {
    if (!in_metadata_) text_.append(part.data(), part.size());
    return true;
  }
  bool on_string(string_view part, size_t, error_code& ec) {
    if (in_metadata_ && depth_ == 2) return true;
    text_.append(part.data(), part.size());
    if (depth_ != 2 || field_ != Field::kDtype) return Refuse("a text where none belongs", ec);
    entries_.back().dtype = std::exchange(text_, {});
    entries_.back().has_dtype = true;
    return true;
  }

  bool on_number_part(string_view, error_code&) { return true; }
  bool on_int64(int64_t number, string_view text, error_code& ec) {
    if (number < 0) return Refuse("a number below 0", ec);
    return on_uint64(static_cast<uint64_t>(number), text, ec);
  }
  bool on_uint64(uint64_t number, string_view, error_code& ec) {
    if (!in_array_) return Refuse("a number where none belongs", ec);
    auto& numbers = field_ == Field::kShape ? entries_.back().shape : entries_.back().offsets;
    numbers.push_back(number);
    return true;
  }
  bool on_double(double, string_view, error_code& ec) {
    return Refuse("a number that is no integer", ec);
  }
  bool on_bool(bool, error_code& ec) { return Refuse("true or false where none belongs", ec); }
  bool on_null(error_code& ec) { return Refuse("null where none belongs", ec); }
  bool on_comment_part(string_view, error_code&) { return true; }
  bool on_comment(string_view, error_code&) { return true; }

 private:
  enum class Field { kDtype, kShape, kOffsets };

  bool Refuse(std::string_view problem, error_code& ec) {
    problem_ = entries_.empty() ? fmt::format("the header has {}", problem)
                                : fmt::format("the header's entry of tensor {} has {}",
                                              entries_.back().name, problem);
    ec = boost::json::error::syntax;
    return false;
  }

  bool Name(const std::string& name, error_code& ec) {
    in_metadata_ = name == "__metadata__";
    if (!in_metadata_ && entries_.size() == kTensorsMax) return Refuse("too many after it", ec);
    if (!names_.insert(name).second) {
      problem_ = fmt::format("{} appears twice in the header", name);
      ec = boost::json::error::syntax;
      return false;
    }
    if (!in_metadata_) entries_.emplace_back().name = name;
    return true;
  }

  bool FieldOf(const std::string& key, error_code& ec) {
    if (in_metadata_) return true;
    const Entry& entry = entries_.back();
    bool seen = false;
    if (key == "dtype") {
      field_ = Field::kDtype;
      seen = entry.has_dtype;
    } else if (key == "shape") {
      field_ = Field::kShape;
      seen = entry.has_shape;
    } else if (key == "data_offsets") {
      field_ = Field::kOffsets;
      seen = entry.has_offsets;
    } else {
      return Refuse("a field that the format does not know", ec);
    }
    return seen ? Refuse(key + " twice", ec) : true;
  }

  std::vector<Entry> entries_;
  absl::flat_hash_set<std::string> names_;
  std::string text_;
  std::string problem_;
  int depth_ = 0;
  bool in_array_ = false;
  bool in_metadata_ = false;
  Field field_ = Field::kDtype;
};

absl::StatusOr<std::vector<Entry>> ReadHeader(std::string_view header) {
  boost::json::parse_options options;
  options.max_depth = kDepthMax;
  boost::json::basic_parser<HeaderHandler> parser(options);
  error_code ec;
  const size_t used = parser.write_some(/*more=*/false, header.data(), header.size(), ec);
  if (!parser.handler().problem().empty()) return Corrupt(parser.handler().problem());
  if (ec) return Corrupt(fmt::format("the header is no JSON of tensors: {}", ec.message()));
  if (header.find_first_not_of(' ', used) != std::string_view::npos) {
    return Corrupt("the header goes on after its JSON object");
  }
  return std::move(parser.handler().entries());
}

// Everything but the place in the file.
absl::StatusOr<Tensor> TensorOf(const Entry& entry) {
  Tensor tensor;
  tensor.name = entry.name;
  const Dtype* dtype = std::find_if(std::begin(kDtypes), std::end(kDtypes),
                                    [&](const Dtype& d) { return entry.dtype == d.name; });
  if (dtype == std::end(kDtypes)) {
    return Corrupt(fmt::format("tensor {} has the dtype {}, which is not known", entry.name,
                               entry.dtype.substr(0, 20)));
  }
  tensor.type = dtype->type;
  unsigned __int128 bytes = dtype->bytes;
  for (const uint64_t dim : entry.shape) {
    bytes *= dim;
    if (bytes > std::numeric_limits<int64_t>::max()) {
      return Corrupt(fmt::format("the shape of tensor {} overflows 63 bits", entry.name));
    }
  }
  tensor.bytes = static_cast<uint64_t>(bytes);
  tensor.dims.assign(entry.shape.rbegin(), entry.shape.rend());
  if (tensor.dims.empty()) tensor.dims = {1};
  if (entry.offsets[0] > entry.offsets[1]) {
    return Corrupt(fmt::format("tensor {} ends before it begins", entry.name));
  }
  if (entry.offsets[1] - entry.offsets[0] != tensor.bytes) {
    return Corrupt(
        fmt::format("tensor {} has {} bytes by its data_offsets and {} by its dtype and "
                    "shape",
                    entry.name, entry.offsets[1] - entry.offsets[0], tensor.bytes));
  }
  return tensor;
}

absl::StatusOr<std::string_view> HeaderOf(std::string_view bytes) {
  const auto foreign = [&](std::string message) {
    const char* guess = GuessForeignFile(bytes);
    if (guess != nullptr) message += fmt::format("; the file looks like {}", guess);
    return Corrupt(std::move(message));
  };
  uint64_t size = 0;
  if (bytes.size() < sizeof(size)) return foreign("the file is shorter than its header's length");
  std::memcpy(&size, bytes.data(), sizeof(size));
  if (size > kSafetensorsHeaderBytesMax) {
    return foreign(fmt::format("the header claims {} bytes, at most {} are accepted", size,
                               kSafetensorsHeaderBytesMax));
  }
  if (size > bytes.size() - sizeof(size)) {
    return foreign(
        fmt::format("the header claims {} bytes and the file has {}: it is cut short (an "
                    "unfinished download?) or corrupt",
                    size, bytes.size()));
  }
  const std::string_view header = bytes.substr(sizeof(size), size);
  if (header.empty() || header[0] != '{') return foreign("the header does not begin with {");
  return header;
}

}  // namespace

absl::StatusOr<std::vector<Tensor>> ParseSafetensors(std::string_view bytes) {
  ASSIGN_OR_RETURN(const std::string_view header, HeaderOf(bytes));
  const std::string_view data = bytes.substr(sizeof(uint64_t) + header.size());
  ASSIGN_OR_RETURN(std::vector<Entry> entries, ReadHeader(header));
  for (const Entry& entry : entries) {
    if (entry.offsets.size() != 2) {
      return Corrupt(
          fmt::format("tensor {} has {} data_offsets", entry.name, entry.offsets.size()));
    }
  }
  std::sort(entries.begin(), entries.end(),
            [](const Entry& a, const Entry& b) { return a.offsets < b.offsets; });
  std::vector<Tensor> tensors;
  tensors.reserve(entries.size());
  uint64_t end = 0;
  for (const Entry& entry : entries) {
    ASSIGN_OR_RETURN(Tensor tensor, TensorOf(entry));
    const uint64_t begin = entry.offsets[0];
    if (begin != end) {
      return Corrupt(
          fmt::format("tensor {} begins at byte {} of the data and the one before it ends "
                      "at {}",
                      entry.name, begin, end));
    }
    end = entry.offsets[1];
    if (end > data.size()) {
      return Corrupt(
          fmt::format("tensor {} ends at byte {} of the data and the file holds {}: it is "
                      "cut short (an unfinished download?) or corrupt",
                      entry.name, end, data.size()));
    }
    tensor.data = reinterpret_cast<const std::byte*>(data.data()) + begin;
    tensors.push_back(std::move(tensor));
  }
  if (end != data.size()) {
    return Corrupt(
        fmt::format("the tensors end at byte {} of the data and the file at {}", end, data.size()));
  }
  return tensors;
}

}  // namespace antiphon::model
