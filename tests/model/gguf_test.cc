#include "model/gguf.h"

#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/model/gguf_builder.h"

namespace antiphon::model {
namespace {

using ::testing::HasSubstr;

TEST(GgufTest, ReadsKeysOfEveryType) {
  const std::string bytes = GgufBuilder()
                                .String("s", "text")
                                .U32("u", 7)
                                .U64("big", UINT64_MAX)
                                .I32("i", -3)
                                .F32("f", 0.5f)
                                .F64("d", 0.25)
                                .Bool("b", true)
                                .Strings("list", {"a", "", "ccc"})
                                .Build();
  const auto file = ParseGguf(bytes);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((*file)->format(), "GGUF version 3");
  EXPECT_EQ(*(*file)->GetString("s"), "text");
  EXPECT_EQ(*(*file)->GetUint("u"), 7u);
  EXPECT_EQ(*(*file)->GetUint("big"), UINT64_MAX);
  EXPECT_EQ(*(*file)->GetDouble("i"), -3);
  EXPECT_EQ(*(*file)->GetDouble("f"), 0.5);
  EXPECT_EQ(*(*file)->GetDouble("d"), 0.25);
  EXPECT_EQ(*(*file)->GetBool("b"), true);
  const auto& list = std::get<Texts>(std::get<Array>((*file)->metadata().at("list").v));
  ASSERT_EQ(list.size(), 3u);
  EXPECT_EQ(list[0], "a");
  EXPECT_EQ(list[1], "");
  EXPECT_EQ(list[2], "ccc");
}

TEST(GgufTest, KeepsArraysOfNumbersInTheWidestType) {
  const std::string bytes = GgufBuilder()
                                .I32s("signed", {-1, 2})
                                .ArrayOf("unsigned", GgufType::kU8, 2, "\x07\xff")
                                .ArrayOf("floats", GgufType::kF32, 1, GgufBuilder::Raw(0.5f))
                                .ArrayOf("bools", GgufType::kBool, 3, std::string_view("\0\1\0", 3))
                                .ArrayOf("none", GgufType::kI64, 0, "")
                                .Build();
  const auto file = ParseGguf(bytes);
  ASSERT_TRUE(file.ok()) << file.status();
  const auto array = [&](const char* key) {
    return std::get<Array>((*file)->metadata().at(key).v);
  };
  EXPECT_EQ(array("signed"), Array(std::vector<int64_t>{-1, 2}));
  EXPECT_EQ(array("unsigned"), Array(std::vector<uint64_t>{7, 255}));
  EXPECT_EQ(array("floats"), Array(std::vector<double>{0.5}));
  EXPECT_EQ(array("bools"), Array(std::vector<bool>{false, true, false}));
  EXPECT_EQ(SizeOf(array("none")), 0u);
  EXPECT_EQ(SizeOf(array("bools")), 3u);
}

TEST(GgufTest, NamesTheKeyThatIsMissingOrOfAnotherType) {
  const std::string bytes =
      GgufBuilder().String("s", "text").I32("i", -3).F32("nan", std::nanf("")).Build();
  const auto file = ParseGguf(bytes);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((*file)->GetUint("absent").status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string((*file)->GetUint("absent").status().message()), HasSubstr("absent"));
  for (const absl::Status& status :
       {(*file)->GetUint("s").status(), (*file)->GetUint("i").status(),
        (*file)->GetBool("s").status(), (*file)->GetString("i").status(),
        (*file)->GetUintOr("s", 1).status(), (*file)->GetDouble("nan").status()}) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  }
  EXPECT_EQ(*(*file)->GetUintOr("absent", 5), 5u);
  EXPECT_EQ(*(*file)->GetStringOr("absent", "x"), "x");
  EXPECT_EQ(*(*file)->GetBoolOr("absent", true), true);
  EXPECT_EQ(*(*file)->GetDoubleOr("absent", 2), 2);
}

TEST(GgufTest, PointsTensorsIntoTheFile) {
  for (const uint32_t alignment : {32u, 256u}) {
    const std::string bytes = GgufBuilder(2)
                                  .Alignment(alignment)
                                  .Tensor("a", TensorType::kF32, {3, 2}, std::string(24, 'a'))
                                  .Tensor("b", TensorType::kQ4_1, {32, 2}, std::string(40, 'b'))
                                  .Build();
    const auto file = ParseGguf(bytes);
    ASSERT_TRUE(file.ok()) << file.status();
    ASSERT_EQ((*file)->tensors().size(), 2u);
    const Tensor* b = (*file)->FindTensor("b");
    ASSERT_NE(b, nullptr);
    EXPECT_EQ(b->elements(), 64u);
    EXPECT_EQ(b->bytes, 40u);
    EXPECT_EQ(std::string(reinterpret_cast<const char*>(b->data), b->bytes), std::string(40, 'b'));
    EXPECT_EQ((reinterpret_cast<const char*>(b->data) - bytes.data()) % alignment, 0);
    EXPECT_EQ((*file)->FindTensor("c"), nullptr);
  }
}

TEST(GgufTest, AcceptsAFileOfKeysAlone) {
  const std::string bytes = GgufBuilder().String("tokenizer.ggml.model", "gpt2").Build();
  EXPECT_TRUE(ParseGguf(bytes).ok());
}

TEST(GgufTest, KeepsTensorsOfATypeItDoesNotKnow) {
  const std::string bytes =
      GgufBuilder().RawTensor("odd", 99, {32}, 0).Data(std::string(8, 'x')).Build();
  const auto file = ParseGguf(bytes);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(TensorTypeName((*file)->tensors()[0].type), "type 99");
  EXPECT_EQ((*file)->tensors()[0].bytes, 0u);
}

TEST(GgufTest, OpensAFileFromDisk) {
  const std::filesystem::path path = std::filesystem::temp_directory_path() /
                                     ("antiphon_gguf_test_" + std::to_string(getpid()) + ".gguf");
  std::ofstream(path, std::ios::binary) << TinyLlama().Build();
  const auto file = OpenGguf(path.string());
  EXPECT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((*file)->size_bytes(), std::filesystem::file_size(path));
  std::ofstream(path, std::ios::binary | std::ios::trunc);
  EXPECT_EQ(OpenGguf(path.string()).status().code(), absl::StatusCode::kInvalidArgument);
  std::filesystem::remove(path);
  EXPECT_EQ(OpenGguf(path.string()).status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(OpenGguf("/").status().message()), HasSubstr("folder"));
}

TEST(GgufTest, CutAnywhereIsAnErrorAndNeverACrash) {
  const std::string bytes = TinyLlama({.layers = 1}).Build();
  const size_t data_from = bytes.size() - 2000;
  for (size_t size = 0; size < bytes.size(); size += size < 3000 || size > data_from ? 1 : 97) {
    const std::string cut = bytes.substr(0, size);  // its own allocation, for the sanitizers
    const auto file = ParseGguf(cut);
    ASSERT_FALSE(file.ok()) << size;
    EXPECT_EQ(file.status().code(),
              size < 4 ? absl::StatusCode::kInvalidArgument : absl::StatusCode::kDataLoss)
        << size << file.status();
  }
  EXPECT_TRUE(ParseGguf(bytes).ok());
}

}  // namespace
}  // namespace antiphon::model
