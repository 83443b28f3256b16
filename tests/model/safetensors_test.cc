#include "model/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "tests/model/hf_builder.h"

namespace antiphon::model {
namespace {

using ::testing::HasSubstr;

TEST(SafetensorsTest, TensorsPointIntoTheFile) {
  const std::string bytes = SafetensorsBuilder()
                                .Tensor("a", "F32", {2, 3}, std::string(24, 'a'))
                                .Tensor("b", "BF16", {4}, std::string(8, 'b'))
                                .Tensor("scalar", "I64", {}, std::string(8, 'c'))
                                .Tensor("none", "F16", {0, 7}, "")
                                .Build();
  const auto tensors = ParseSafetensors(bytes);
  ASSERT_TRUE(tensors.ok()) << tensors.status().ToString();
  ASSERT_EQ(tensors->size(), 4u);
  const auto find = [&](const std::string& name) {
    for (const Tensor& tensor : *tensors) {
      if (tensor.name == name) return tensor;
    }
    return Tensor();
  };
  EXPECT_EQ(find("a").dims, (std::vector<uint64_t>{3, 2}));  // contiguous dimension first
  EXPECT_EQ(find("a").type, TensorType::kF32);
  EXPECT_EQ(static_cast<char>(find("a").data[0]), 'a');
  EXPECT_EQ(find("b").bytes, 8u);
  EXPECT_EQ(static_cast<char>(find("b").data[7]), 'b');
  EXPECT_EQ(find("scalar").dims, (std::vector<uint64_t>{1}));
  EXPECT_EQ(TensorTypeName(find("scalar").type), "I64");
  EXPECT_EQ(find("none").bytes, 0u);
}

TEST(SafetensorsTest, EveryPrefixIsRefused) {
  const std::string bytes = SafetensorsBuilder()
                                .Tensor("a", "F32", {2}, std::string(8, 'a'))
                                .Tensor("b", "U8", {3}, std::string(3, 'b'))
                                .Build();
  for (size_t size = 0; size < bytes.size(); ++size) {
    const std::string cut = bytes.substr(0, size);
    EXPECT_EQ(ParseSafetensors(cut).status().code(), absl::StatusCode::kDataLoss) << size;
  }
  EXPECT_TRUE(ParseSafetensors(bytes).ok());
  EXPECT_EQ(ParseSafetensors(bytes + "x").status().code(), absl::StatusCode::kDataLoss);
}

TEST(SafetensorsTest, AHugeHeaderIsRefusedBeforeItIsRead) {
  std::string bytes(16, '\xff');
  EXPECT_THAT(std::string(ParseSafetensors(bytes).status().message()), HasSubstr("at most"));
  const uint64_t claimed = 90'000'000;
  std::memcpy(bytes.data(), &claimed, 8);
  EXPECT_THAT(std::string(ParseSafetensors(bytes).status().message()), HasSubstr("cut short"));
  EXPECT_THAT(
      std::string(
          ParseSafetensors("version https://git-lfs.github.com/spec/v1\n").status().message()),
      HasSubstr("git lfs pull"));
}

struct Malformed {
  const char* name;
  std::string header;
  size_t data_bytes;
  const char* says;
};

std::string Entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
  return "\"" + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" +
         offsets + "}";
}

std::vector<Malformed> Cases() {
  const std::string a = Entry("a", "F32", "[2]", "[0,8]");
  return {
      {"empty", "", 0, "does not begin"},
      {"no object", "[1]", 0, "does not begin"},
      {"space first", " {}", 0, "does not begin"},
      {"no JSON", "{]", 0, "no JSON"},
      {"text behind", "{} x", 0, "goes on"},
      {"twice", "{" + a + "," + a + "}", 8, "appears twice"},
      {"backwards", "{" + Entry("a", "F32", "[2]", "[8,0]") + "}", 8, "ends before it begins"},
      {"overlap", "{" + a + "," + Entry("b", "F32", "[1]", "[4,8]") + "}", 8, "begins at byte 4"},
      {"gap", "{" + Entry("a", "F32", "[1]", "[4,8]") + "}", 8, "begins at byte 4"},
      {"beyond", "{" + Entry("a", "F32", "[3]", "[0,12]") + "}", 8, "cut short"},
      {"not all of the data", "{" + a + "}", 9, "the tensors end"},
      {"size and shape", "{" + Entry("a", "F32", "[3]", "[0,8]") + "}", 8, "8 bytes by its"},
      {"overflow", "{" + Entry("a", "F32", "[4294967296,4294967296]", "[0,8]") + "}", 8,
       "overflows"},
      {"overflow of zero", "{" + Entry("a", "F32", "[18446744073709551615,0]", "[0,0]") + "}", 0,
       "overflows"},
      {"dtype", "{" + Entry("a", "F31", "[2]", "[0,8]") + "}", 8, "F31"},
      {"negative", "{" + Entry("a", "F32", "[-2]", "[0,8]") + "}", 8, "below 0"},
      {"fraction", "{" + Entry("a", "F32", "[2.0]", "[0,8]") + "}", 8, "no integer"},
      {"large number", "{" + Entry("a", "F32", "[2]", "[0,18446744073709551616]") + "}", 8,
       "no integer"},
      {"one offset", "{" + Entry("a", "F32", "[2]", "[8]") + "}", 8, "1 data_offsets"},
      {"three offsets", "{" + Entry("a", "F32", "[2]", "[0,8,9]") + "}", 8, "3 data_offsets"},
      {"many dimensions", "{" + Entry("a", "F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]") + "}", 4, "JSON"},
      {"no offsets", R"({"a":{"dtype":"F32","shape":[2]}})", 8, "no dtype"},
      {"unknown field", R"({"a":{"dtype":"F32","strides":[2]}})", 8, "does not know"},
      {"shape twice", R"({"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}})", 8,
       "shape twice"},
      {"a number", R"({"a":5})", 8, "where none belongs"},
      {"null", R"({"a":null})", 8, "where none belongs"},
      {"a text as shape", R"({"a":{"dtype":"F32","shape":"2","data_offsets":[0,8]}})", 8,
       "where none belongs"},
      {"nested", R"({"a":{"dtype":{"x":1}}})", 8, "where none belongs"},
      {"nested arrays", R"({"a":{"shape":[[[[1]]]]}})", 8, "where none belongs"},
      {"deep", std::string(R"({"a":)") + std::string(100'000, '['), 8, "where none belongs"},
      {"metadata of objects", R"({"__metadata__":{"a":{"b":"c"}}})", 0, "where none belongs"},
      {"not UTF-8", "{\"\xff\":{}}", 0, "JSON"},
      {"a long name", "{" + Entry(std::string(2000, 'n'), "F32", "[2]", "[0,8]") + "}", 8, "JSON"},
  };
}

TEST(SafetensorsTest, WhatIsMalformedIsRefusedAndSaid) {
  for (const Malformed& c : Cases()) {
    SCOPED_TRACE(c.name);
    const auto tensors = ParseSafetensors(SafetensorsOf(c.header, std::string(c.data_bytes, 'x')));
    ASSERT_FALSE(tensors.ok());
    EXPECT_EQ(tensors.status().code(), absl::StatusCode::kDataLoss);
    EXPECT_THAT(std::string(tensors.status().message()), HasSubstr(c.says));
  }
}

}  // namespace
}  // namespace antiphon::model
