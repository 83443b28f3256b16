// Packed weights that processes share: the layout has a number, and whoever gets a finished image
// uses it as if it had packed.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "engine/cpu/pack.h"
#include "engine/cpu/weights.h"
#include "tests/engine/tiny_model.h"

namespace antiphon::engine::cpu {
namespace {

using model::TensorType;

// FNV-1a.
uint64_t HashOf(const std::vector<std::byte>& bytes) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const std::byte b : bytes) hash = (hash ^ static_cast<uint64_t>(b)) * 0x100000001b3;
  return hash;
}

// Fifteen rows of arbitrary bits, and one that is not there.
uint64_t PackedHash(TensorType type) {
  constexpr size_t kColumns = 512;
  const model::TypeTraits traits = model::TraitsOf(type);
  const size_t row_bytes = kColumns / traits.block_elements * traits.block_bytes;
  std::vector<std::byte> source(15 * row_bytes);
  TestRandom random(7);
  for (std::byte& b : source) b = static_cast<std::byte>(random.Bits());
  const std::byte* rows[kGroupRows] = {};
  for (size_t lane = 0; lane < 15; ++lane) rows[lane] = source.data() + lane * row_bytes;
  const PackedType packed = PackedTypeOf(type).value();
  std::vector<std::byte> out(PackedGroupBytes(packed, kColumns));
  PackGroup(packed, rows, kColumns, out.data());
  return HashOf(out);
}

// When this is red because the packing was changed on purpose, kPackedLayout goes up with it.
TEST(SharedImageTest, APackingThatChangesHasAnotherNumber) {
  ASSERT_EQ(kPackedLayout, 1);
  const std::map<TensorType, uint64_t> kHashes = {
      {TensorType::kF32, 0x66d136a9195821e1},  {TensorType::kF16, 0xddda521e4e287880},
      {TensorType::kBF16, 0xddda521e4e287880}, {TensorType::kQ8_0, 0xbeda8b5d747f1e21},
      {TensorType::kQ4_0, 0xa237284adac1a9b2}, {TensorType::kQ4_1, 0xa39a5b951a9efa91},
      {TensorType::kQ5_0, 0x728ca19208210cd0}, {TensorType::kQ5_1, 0x413e7289c5f6b385},
      {TensorType::kQ4_K, 0x79a86c10074b2761}, {TensorType::kQ5_K, 0x68c1d75844105ede},
      {TensorType::kQ6_K, 0x32ae8032bd91846f},
  };
  ASSERT_EQ(kHashes.size(), size_t{kPackedTypes});
  for (const auto& [type, hash] : kHashes) {
    EXPECT_EQ(PackedHash(type), hash) << model::TensorTypeName(type) << " is packed otherwise: 0x"
                                      << std::hex << PackedHash(type);
  }
}

// Keeps images as the store does.
class FakeSource final : public ImageSource {
 public:
  absl::StatusOr<std::unique_ptr<SharedImage>> Open(const std::string& name,
                                                    size_t bytes) override {
    ++opened;
    if (refuse) return absl::UnavailableError("no store");
    const bool fresh = !images.contains(name);
    auto& bytes_of = images[name];
    if (fresh) bytes_of.resize(bytes);
    EXPECT_EQ(bytes_of.size(), bytes);
    return std::make_unique<Image>(bytes_of, fresh);
  }
  bool refuse = false;
  int opened = 0;
  std::map<std::string, std::vector<std::byte>> images;

 private:
  struct Image final : SharedImage {
    Image(std::vector<std::byte>& b, bool f) : bytes(b), fresh(f) {}
    std::byte* fill() override { return fresh ? bytes.data() : nullptr; }
    absl::Status Finish() override {
      fresh = false;
      return absl::OkStatus();
    }
    const std::byte* data() const override { return bytes.data(); }
    std::vector<std::byte>& bytes;
    bool fresh;
  };
};

std::vector<const Matrix*> MatricesOf(const Weights& weights) {
  std::vector<const Matrix*> all = {&weights.output};
  for (const LayerWeights& l : weights.layers) {
    for (const Matrix* m : {&l.q, &l.k, &l.v, &l.attention_output, &l.gate, &l.up, &l.down}) {
      all.push_back(m);
    }
  }
  return all;
}

void ExpectSameMatrices(const Weights& a, const Weights& b) {
  const auto left = MatricesOf(a), right = MatricesOf(b);
  for (size_t i = 0; i < left.size(); ++i) {
    const Matrix& m = *left[i];
    ASSERT_TRUE(m.packed.has_value());
    const size_t bytes = PackedGroupBytes(*m.packed, m.columns) * static_cast<size_t>(m.groups());
    EXPECT_EQ(std::memcmp(m.image, right[i]->image, bytes), 0) << i;
  }
}

class LoadTest : public testing::Test {
 protected:
  std::unique_ptr<Weights> Load(ImageSource* images, Activations activations = Activations::kFast,
                                Shard shard = {}) {
    steps_ = 0;
    auto weights = LoadWeights(
        *file_, activations, 2, [this](double) { ++steps_; }, shard, images);
    EXPECT_TRUE(weights.ok()) << weights.status();
    return *std::move(weights);
  }
  const std::string bytes_ = TinyModelFile({.type = TensorType::kQ4_0});
  const std::unique_ptr<model::ModelFile> file_ = model::ParseGguf(bytes_).value();
  FakeSource source_;
  int steps_ = 0;  // of the packing
};

TEST_F(LoadTest, TheSecondWorkerUsesWhatTheFirstPacked) {
  const auto own = Load(nullptr);
  const auto first = Load(&source_);
  EXPECT_GT(steps_, 1);
  ExpectSameMatrices(*own, *first);
  const auto second = Load(&source_);
  EXPECT_EQ(steps_, 1);  // "done"
  ExpectSameMatrices(*own, *second);
  EXPECT_EQ(second->output.image, first->output.image);
}

TEST_F(LoadTest, ImagesThatDifferHaveOtherNames) {
  Load(&source_);
  Load(&source_, Activations::kFast, {.rank = 0, .size = 2});
  Load(&source_, Activations::kFast, {.rank = 1, .size = 2});
  EXPECT_EQ(source_.images.size(), 3u);
  // Nothing of this model is packed for float activations.
  Load(&source_, Activations::kFloat);
  EXPECT_EQ(source_.images.size(), 3u);
}

TEST_F(LoadTest, WithoutASourceItPacksItsOwn) {
  source_.refuse = true;
  const auto weights = Load(&source_);
  EXPECT_EQ(source_.opened, 1);
  EXPECT_GT(steps_, 1);
  ExpectSameMatrices(*Load(nullptr), *weights);
}

}  // namespace
}  // namespace antiphon::engine::cpu
