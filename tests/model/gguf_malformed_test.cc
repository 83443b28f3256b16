// Files that are no GGUF, or a broken one: each refused with words that name what is wrong.
#include <cstdint>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/gguf.h"
#include "tests/model/gguf_builder.h"

namespace antiphon::model {
namespace {

using ::testing::HasSubstr;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kCorrupt = absl::StatusCode::kDataLoss;

struct Case {
  std::string name;
  std::string bytes;
  absl::StatusCode code;
  std::string says;
};

std::string Header(uint32_t version, uint64_t tensors, uint64_t keys) {
  return GgufBuilder(version).ClaimTensors(tensors).ClaimKeys(keys).Build();
}

// A key "k" of the type with bytes that follow as they are.
std::string OneKey(uint32_t type, const std::string& value) {
  return GgufBuilder().Key("k", static_cast<GgufType>(type), value).Build();
}

std::string OneTensor(uint32_t type, const std::vector<uint64_t>& dims, uint64_t offset,
                      size_t data_bytes = 64) {
  return GgufBuilder()
      .RawTensor("t", type, dims, offset)
      .Data(std::string(data_bytes, '\0'))
      .Build();
}

std::vector<Case> Cases() {
  const auto raw32 = [](uint32_t v) { return GgufBuilder::Raw(v); };
  const auto raw64 = [](uint64_t v) { return GgufBuilder::Raw(v); };
  const std::string padding(200, '\0');
  const std::string safetensors = raw64(40) + "{\"__metadata__\":{\"format\":\"pt\"}}" + padding;
  return {
      {"Empty", "", kInvalid, "it is empty"},
      {"ThreeBytes", "GGU", kInvalid, "it starts with 47 47 55"},
      {"Safetensors", safetensors, kInvalid, "safetensors"},
      {"Zip", "PK\x03\x04" + padding, kInvalid, "zip"},
      {"Pickle", "\x80\x02" + padding, kInvalid, "PyTorch"},
      {"Gzip", "\x1f\x8b\x08" + padding, kInvalid, "gzip"},
      {"Zstd", "\x28\xb5\x2f\xfd" + padding, kInvalid, "zstd"},
      {"Html", "<!DOCTYPE html><html><body>404", kInvalid, "web page"},
      {"HtmlInCapitals", "\n <HTML><BODY>", kInvalid, "HTML"},
      {"LfsPointer", "version https://git-lfs.github.com/spec/v1\noid sha256:0", kInvalid,
       "git lfs pull"},
      {"OldGgml", "tjgg" + padding, kInvalid, "before GGUF"},
      {"SwappedMagic", "FUGG" + padding, kInvalid, "swapped"},
      {"Json", "{\"a\": 1}", kInvalid, "JSON"},
      {"Zeros", padding, kInvalid, "00 00 00 00"},
      {"VersionOne", Header(1, 0, 0), kInvalid, "version 1"},
      {"VersionFour", Header(4, 0, 0), kInvalid, "version 4"},
      {"BigEndian", Header(0x03000000, 0, 0), kInvalid, "big-endian"},
      {"MagicAlone", "GGUF", kCorrupt, "the version"},
      {"CutInCounts", Header(3, 0, 0).substr(0, 12), kCorrupt, "the tensor count"},
      {"KeysWithoutEnd", Header(3, 0, UINT64_MAX), kCorrupt, "keys"},
      {"MoreKeysThanBytes", Header(3, 0, 5), kCorrupt, "5 keys"},
      {"TensorsWithoutEnd", Header(3, UINT64_MAX, 0), kCorrupt, "tensors"},
      {"MoreTensorsThanBytes", Header(3, 3, 0), kCorrupt, "3 tensors"},
      {"OneKeyTooFew", GgufBuilder().U32("a", 1).ClaimKeys(2).Data(padding).Build(), kCorrupt,
       "key 1 is empty"},
      {"EmptyKey", GgufBuilder().U32("", 1).Build(), kCorrupt, "key 0 is empty"},
      {"KeyLengthBeyondFile", GgufBuilder().RawKey(raw64(1 << 20) + padding).Build(), kCorrupt,
       "name of key 0"},
      {"KeyLengthOverflow", GgufBuilder().RawKey(raw64(UINT64_MAX) + padding).Build(), kCorrupt,
       "name of key 0"},
      {"KeyTooLong", GgufBuilder().U32(std::string(70'000, 'k'), 1).Build(), kCorrupt, "65535"},
      {"KeyTwice", GgufBuilder().U32("a", 1).U32("a", 1).Build(), kCorrupt, "key a appears twice"},
      {"UnknownValueType", OneKey(13, padding), kCorrupt, "value type 13"},
      {"HugeValueType", OneKey(UINT32_MAX, padding), kCorrupt, "which does not exist"},
      {"BoolOfTwo", OneKey(7, "\x02"), kCorrupt, "key k is a bool of value 2"},
      {"NumberCutShort", OneKey(10, "1234"), kCorrupt, "key k"},
      {"StringBeyondFile", OneKey(8, raw64(100) + "short"), kCorrupt, "key k"},
      {"StringLengthOverflow", OneKey(8, raw64(UINT64_MAX - 3) + padding), kCorrupt, "key k"},
      {"ArrayBeyondFile", OneKey(9, raw32(4) + raw64(1000) + padding), kCorrupt,
       "1000 elements of type uint32"},
      {"ArrayCountOverflow", OneKey(9, raw32(10) + raw64(UINT64_MAX / 4) + padding), kCorrupt,
       "elements of type uint64"},
      {"ArrayOfArrays", OneKey(9, raw32(9) + raw64(1) + padding), kCorrupt, "array of arrays"},
      {"ArrayOfUnknown", OneKey(9, raw32(77) + raw64(1) + padding), kCorrupt, "element type 77"},
      {"ArrayOfBrokenStrings", OneKey(9, raw32(8) + raw64(2) + raw64(500) + padding), kCorrupt,
       "key k"},
      {"ArrayOfBadBools", OneKey(9, raw32(7) + raw64(3) + "\x01\x00\x07"), kCorrupt, "bool"},
      {"TooManyArrayElements",
       OneKey(9, raw32(0) + raw64((8u << 20) + 1) + std::string((8u << 20) + 1, '\0')), kCorrupt,
       "array elements"},
      {"AlignmentZero", GgufBuilder().U32("general.alignment", 0).Build(), kCorrupt,
       "general.alignment"},
      {"AlignmentOdd", GgufBuilder().U32("general.alignment", 33).Build(), kCorrupt,
       "power of two"},
      {"AlignmentHuge", GgufBuilder().U32("general.alignment", 1u << 31).Build(), kCorrupt,
       "general.alignment"},
      {"AlignmentText", GgufBuilder().String("general.alignment", "32").Build(), kCorrupt,
       "general.alignment"},
      {"TensorWithoutName", GgufBuilder().RawTensor("", 0, {4}, 0).Data(padding).Build(), kCorrupt,
       "name of tensor 0 is empty"},
      {"TensorNameTooLong",
       GgufBuilder().RawTensor(std::string(300, 'n'), 0, {4}, 0).Data(padding).Build(), kCorrupt,
       "at most 256"},
      {"TensorTwice",
       GgufBuilder().Tensor("t", TensorType::kF32, {4}).Tensor("t", TensorType::kF32, {4}).Build(),
       kCorrupt, "tensor t appears twice"},
      {"NoDimensions", OneTensor(0, {}, 0), kCorrupt, "0 dimensions"},
      {"FiveDimensions", OneTensor(0, {1, 1, 1, 1, 1}, 0), kCorrupt, "5 dimensions"},
      {"ZeroDimension", OneTensor(0, {4, 0}, 0), kCorrupt, "dimension 1 of tensor t is zero"},
      {"DimensionsOverflow64", OneTensor(0, {1ull << 32, 1ull << 32}, 0), kCorrupt, "overflow"},
      {"DimensionsOverflow128", OneTensor(0, {UINT64_MAX, UINT64_MAX, UINT64_MAX, 2}, 0), kCorrupt,
       "overflow"},
      {"BytesOverflow", OneTensor(0, {1ull << 62}, 0), kCorrupt, "overflow"},
      {"RowNoMultipleOfBlock", OneTensor(3, {33, 2}, 0), kCorrupt, "no multiple of Q4_1's block"},
      {"DataBeyondFile", OneTensor(0, {1000}, 0), kCorrupt, "tensor t needs bytes 0 to 4000"},
      {"OffsetBeyondFile", OneTensor(0, {4}, 1 << 20), kCorrupt, "cut short"},
      {"OffsetOverflow", OneTensor(0, {4}, UINT64_MAX - 31), kCorrupt, "tensor t"},
      {"OffsetUnaligned", OneTensor(0, {4}, 7), kCorrupt, "no multiple of the alignment 32"},
      {"UnknownTypeBeyondFile", OneTensor(99, {4}, 1 << 20), kCorrupt, "tensor t"},
      {"TensorsOverlap",
       GgufBuilder()
           .RawTensor("a", 0, {16}, 0)
           .RawTensor("b", 0, {16}, 32)
           .Data(std::string(96, '\0'))
           .Build(),
       kCorrupt, "a and b overlap"},
      {"TensorsAtOnePlace",
       GgufBuilder()
           .RawTensor("a", 0, {8}, 0)
           .RawTensor("b", 0, {8}, 0)
           .Data(std::string(96, '\0'))
           .Build(),
       kCorrupt, "overlap"},
      {"NoDataAtAll", GgufBuilder().RawTensor("t", 0, {4}, 0).Build(), kCorrupt, "cut short"},
  };
}

class GgufMalformedTest : public ::testing::TestWithParam<Case> {};

TEST_P(GgufMalformedTest, IsRefusedInWordsThatNameIt) {
  const Case& c = GetParam();
  const auto file = ParseGguf(c.bytes);
  ASSERT_FALSE(file.ok());
  EXPECT_EQ(file.status().code(), c.code) << file.status();
  EXPECT_THAT(std::string(file.status().message()), HasSubstr(c.says));
}

INSTANTIATE_TEST_SUITE_P(Corpus, GgufMalformedTest, ::testing::ValuesIn(Cases()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace antiphon::model
