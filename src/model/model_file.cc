#include "model/model_file.h"

#include <spdlog/fmt/fmt.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "common/status_macros.h"
#include "model/sha256.h"

namespace antiphon::model {
namespace {

// An absent key gives `otherwise`, a wrong type stays an error.
template <typename T>
absl::StatusOr<T> OrElse(absl::StatusOr<T> value, T otherwise) {
  if (absl::IsNotFound(value.status())) return otherwise;
  return value;
}

std::string Bytes(uint64_t number) {
  std::string bytes(sizeof(number), '\0');
  std::memcpy(bytes.data(), &number, sizeof(number));
  return bytes;
}

}  // namespace

uint64_t Tensor::elements() const {
  uint64_t n = 1;
  for (const uint64_t d : dims) n *= d;
  return n;
}

void Texts::Add(std::string_view text) {
  bytes_.append(text);
  CHECK(bytes_.size() <= std::numeric_limits<uint32_t>::max());
  ends_.push_back(static_cast<uint32_t>(bytes_.size()));
}

size_t SizeOf(const Array& array) {
  return std::visit([](const auto& list) { return list.size(); }, array);
}

absl::StatusOr<std::unique_ptr<ModelFile>> ModelFile::Create(ModelContents contents) {
  CHECK(contents.wording != nullptr);
  std::unique_ptr<ModelFile> file(new ModelFile(std::move(contents)));
  const std::vector<Tensor>& tensors = file->tensors();
  file->tensor_index_.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!file->tensor_index_.emplace(tensors[i].name, i).second) {
      return absl::DataLossError(
          fmt::format("{} appears twice", file->wording().Tensor(tensors[i].name)));
    }
  }
  return file;
}

const Tensor* ModelFile::FindTensor(std::string_view name) const {
  const auto it = tensor_index_.find(std::string(name));
  return it == tensor_index_.end() ? nullptr : &contents_.tensors[it->second];
}

const Value* ModelFile::Find(std::string_view key) const {
  const auto it = contents_.metadata.find(std::string(key));
  return it == contents_.metadata.end() ? nullptr : &it->second;
}

absl::Status ModelFile::Absent(std::string_view key) const {
  return absl::NotFoundError(fmt::format("{} is missing", wording().Key(key)));
}

absl::Status ModelFile::WrongType(std::string_view key, const char* wanted) const {
  return absl::InvalidArgumentError(fmt::format("{} is not {}", wording().Key(key), wanted));
}

absl::StatusOr<std::string> ModelFile::GetString(std::string_view key) const {
  const Value* value = Find(key);
  if (value == nullptr) return Absent(key);
  if (const auto* s = std::get_if<std::string>(&value->v)) return *s;
  return WrongType(key, "a string");
}

absl::StatusOr<uint64_t> ModelFile::GetUint(std::string_view key) const {
  const Value* value = Find(key);
  if (value == nullptr) return Absent(key);
  if (const auto* u = std::get_if<uint64_t>(&value->v)) return *u;
  if (const auto* i = std::get_if<int64_t>(&value->v); i != nullptr && *i >= 0) {
    return static_cast<uint64_t>(*i);
  }
  return WrongType(key, "an integer of at least 0");
}

absl::StatusOr<double> ModelFile::GetDouble(std::string_view key) const {
  const Value* value = Find(key);
  if (value == nullptr) return Absent(key);
  if (const auto* d = std::get_if<double>(&value->v)) {
    if (!std::isfinite(*d)) return WrongType(key, "a finite number");
    return *d;
  }
  if (const auto* u = std::get_if<uint64_t>(&value->v)) return static_cast<double>(*u);
  if (const auto* i = std::get_if<int64_t>(&value->v)) return static_cast<double>(*i);
  return WrongType(key, "a number");
}

absl::StatusOr<bool> ModelFile::GetBool(std::string_view key) const {
  const Value* value = Find(key);
  if (value == nullptr) return Absent(key);
  if (const auto* b = std::get_if<bool>(&value->v)) return *b;
  return WrongType(key, "a bool");
}

absl::StatusOr<std::string> ModelFile::GetStringOr(std::string_view key,
                                                   std::string_view otherwise) const {
  return OrElse(GetString(key), std::string(otherwise));
}
absl::StatusOr<uint64_t> ModelFile::GetUintOr(std::string_view key, uint64_t otherwise) const {
  return OrElse(GetUint(key), otherwise);
}
absl::StatusOr<double> ModelFile::GetDoubleOr(std::string_view key, double otherwise) const {
  return OrElse(GetDouble(key), otherwise);
}
absl::StatusOr<bool> ModelFile::GetBoolOr(std::string_view key, bool otherwise) const {
  return OrElse(GetBool(key), otherwise);
}

std::string ModelFile::identity() const {
  if (contents_.parts.size() == 1) return contents_.parts[0].mapping.identity();
  Sha256 all;
  bool mapped = false;
  for (const ModelPart& part : contents_.parts) {
    mapped = mapped || !part.mapping.identity().empty();
    all.Add(part.name).Add(Bytes(0)).Add(part.mapping.identity()).Add(Bytes(0));
  }
  return mapped ? all.Hex() : "";
}

std::string ModelFile::Digest() const {
  if (contents_.parts.size() == 1) return Sha256Hex(contents_.parts[0].bytes);
  Sha256 all;
  for (const ModelPart& part : contents_.parts) {
    all.Add(part.name).Add(std::string_view("", 1)).Add(Bytes(part.bytes.size())).Add(part.bytes);
  }
  return all.Hex();
}

uint64_t ModelFile::size_bytes() const {
  uint64_t sum = 0;
  for (const ModelPart& part : contents_.parts) sum += part.bytes.size();
  return sum;
}

void ModelFile::DropPages() const {
  for (const ModelPart& part : contents_.parts) part.mapping.DropPages();
}

}  // namespace antiphon::model
