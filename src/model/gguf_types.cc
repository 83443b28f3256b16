#include "model/gguf_types.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "model/model_file.h"

namespace antiphon::model {
namespace {

struct TypeRow {
  uint32_t type;
  const char* name;
  TypeTraits traits;  // {0, 0}: we know the name only
};

// ggml/include/ggml.h (enum ggml_type) and ggml/src/ggml-common.h (block structs).
constexpr TypeRow kTypes[] = {
    {0, "F32", {1, 4}},       {1, "F16", {1, 2}},       {2, "Q4_0", {32, 18}},
    {3, "Q4_1", {32, 20}},    {6, "Q5_0", {32, 22}},    {7, "Q5_1", {32, 24}},
    {8, "Q8_0", {32, 34}},    {9, "Q8_1", {32, 36}},    {10, "Q2_K", {256, 84}},
    {11, "Q3_K", {256, 110}}, {12, "Q4_K", {256, 144}}, {13, "Q5_K", {256, 176}},
    {14, "Q6_K", {256, 210}}, {15, "Q8_K", {256, 292}}, {30, "BF16", {1, 2}},
    {16, "IQ2_XXS", {}},      {17, "IQ2_XS", {}},       {18, "IQ3_XXS", {}},
    {19, "IQ1_S", {}},        {20, "IQ4_NL", {}},       {21, "IQ3_S", {}},
    {22, "IQ2_S", {}},        {23, "IQ4_XS", {}},       {24, "I8", {}},
    {25, "I16", {}},          {26, "I32", {}},          {27, "I64", {}},
    {28, "F64", {}},          {29, "IQ1_M", {}},        {34, "TQ1_0", {}},
    {35, "TQ2_0", {}},        {39, "MXFP4", {}},        {1 << 16, "BOOL", {}},
    {65537, "U8", {}},        {65538, "U16", {}},       {65539, "U32", {}},
    {65540, "U64", {}},       {65541, "F8_E4M3", {}},   {65542, "F8_E5M2", {}},
};

bool StartsWith(std::string_view s, std::string_view prefix) {
  return s.substr(0, prefix.size()) == prefix;
}

bool StartsWithIgnoringCase(std::string_view s, std::string_view lower) {
  if (s.size() < lower.size()) return false;
  for (size_t i = 0; i < lower.size(); ++i) {
    const char c = s[i] >= 'A' && s[i] <= 'Z' ? static_cast<char>(s[i] + 32) : s[i];
    if (c != lower[i]) return false;
  }
  return true;
}

}  // namespace

const char* GuessForeignFile(std::string_view b) {
  std::string_view text = b.substr(0, 512);
  while (!text.empty() &&
         (text[0] == ' ' || text[0] == '\n' || text[0] == '\r' || text[0] == '\t')) {
    text.remove_prefix(1);
  }
  if (StartsWith(b, "PK\x03\x04")) return "a zip archive (a PyTorch checkpoint or a wheel?)";
  if (StartsWith(b, "\x80\x02") || StartsWith(b, "\x80\x04")) return "a pickled PyTorch checkpoint";
  if (StartsWith(b, "\x1f\x8b")) return "a gzip archive: unpack it first";
  if (StartsWith(b, "\x28\xb5\x2f\xfd")) return "a zstd archive: unpack it first";
  if (StartsWith(b, "tjgg") || StartsWith(b, "lmgg") || StartsWith(b, "fmgg") ||
      StartsWith(b, "algg")) {
    return "a GGML file from before GGUF: convert the model again";
  }
  if (StartsWith(b, "FUGG")) return "a GGUF with swapped bytes";
  if (StartsWith(b, "version https://git-lfs")) {
    return "a Git LFS pointer: the model itself was not downloaded (run git lfs pull)";
  }
  if (StartsWithIgnoringCase(text, "<!doctype") || StartsWithIgnoringCase(text, "<html")) {
    return "an HTML page: the download brought a web page instead of the model";
  }
  if (b.size() > 9 && b[8] == '{') {
    uint64_t header = 0;
    std::memcpy(&header, b.data(), 8);
    if (header < (100u << 20)) {
      return "a safetensors file: name the folder that holds it, with its config.json";
    }
  }
  if (StartsWith(text, "{")) {
    return "JSON (of a model in safetensors? name the folder that holds it)";
  }
  return nullptr;
}

std::string TensorTypeName(TensorType type) {
  for (const TypeRow& row : kTypes) {
    if (row.type == static_cast<uint32_t>(type)) return row.name;
  }
  return fmt::format("type {}", static_cast<uint32_t>(type));
}

TypeTraits TraitsOf(TensorType type) {
  for (const TypeRow& row : kTypes) {
    if (row.type == static_cast<uint32_t>(type)) return row.traits;
  }
  return {};
}

std::string DescribeForeignFile(std::string_view bytes) {
  if (bytes.empty()) return "it is empty";
  std::string hex;
  for (size_t i = 0; i < std::min<size_t>(bytes.size(), 8); ++i) {
    hex += fmt::format("{}{:02x}", i == 0 ? "" : " ", static_cast<unsigned char>(bytes[i]));
  }
  const char* guess = GuessForeignFile(bytes);
  if (guess == nullptr) return fmt::format("it starts with {} instead of \"GGUF\"", hex);
  return fmt::format("it starts with {}; that looks like {}", hex, guess);
}

}  // namespace antiphon::model
