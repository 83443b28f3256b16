// Which engine a worker takes, and what it says when it cannot have it.
#include "worker/model_host.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <memory>
#include <string>

#include "antiphon/v1/config.pb.h"
#include "engine/cuda/cuda_runner.h"
#include "tests/engine/tiny_model.h"

namespace antiphon::worker {
namespace {

using ::testing::HasSubstr;

class ModelHostTest : public testing::Test {
 protected:
  ModelHostTest() {
    const std::string path = testing::TempDir() + "/model_host_test.gguf";
    std::ofstream(path, std::ios::binary) << engine::TinyModelFile({});
    config_.add_models()->set_path(path);
    auto& worker = *config_.mutable_worker();
    worker.set_block_tokens(16);
    worker.set_max_sequences(4);
    worker.set_chunk_tokens(64);
    worker.set_threads(1);
    worker.set_activations("fast");
    worker.set_instruction_set("auto");
    worker.set_tensor_parallel(1);
    worker.set_device("auto");
    worker.set_gpu_memory_fraction(0.3);
  }
  absl::StatusOr<LoadedModel> Load() {
    auto file = OpenModel(config_);
    if (!file.ok()) return file.status();
    file_ = *std::move(file);
    return LoadModel(*file_, config_, false, Clock::Real(), {}, nullptr, [](std::string) {});
  }
  static bool HasGpu() {
    std::string description;
    return engine::FindCudaDevice("", 0, &description).ok();
  }
  config::v1::Config config_;
  std::unique_ptr<model::ModelFile> file_;
};

TEST_F(ModelHostTest, TheCpuServesWhereThereIsNoGpu) {
  if (HasGpu()) GTEST_SKIP() << "there is one";
  const auto loaded = Load();
  ASSERT_TRUE(loaded.ok()) << loaded.status().ToString();
  EXPECT_THAT(loaded->fingerprint.kernel_class(), HasSubstr("cpu-"));
  EXPECT_EQ(loaded->fingerprint.tp_degree(), 1u);
}

TEST_F(ModelHostTest, AGpuThatIsDemandedAndNotThereIsRefusedWithTheReason) {
  if (HasGpu()) GTEST_SKIP() << "there is one";
  config_.mutable_worker()->set_device("cuda");
  const absl::Status status = Load().status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status.ToString();
  EXPECT_THAT(std::string(status.message()), HasSubstr("worker.device is cuda, but"));
}

TEST_F(ModelHostTest, WhatOnlyTheCpuCanDoIsNamed) {
  config_.mutable_worker()->set_device("cuda");
  config_.mutable_worker()->set_activations("float");
  const absl::Status status = Load().status();
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status.ToString();
  EXPECT_THAT(std::string(status.message()), HasSubstr("worker.activations"));
}

TEST_F(ModelHostTest, RanksWithoutGpusEnoughServeOnTheCpu) {
  config_.mutable_worker()->set_tensor_parallel(64);
  config_.mutable_worker()->set_device("auto");
  const absl::StatusOr<bool> cuda = UsesCuda(config_.worker());
  ASSERT_TRUE(cuda.ok()) << cuda.status().ToString();
  EXPECT_FALSE(*cuda);
  // Who demands GPUs gets those that there are.
  config_.mutable_worker()->set_device("cuda");
  EXPECT_EQ(UsesCuda(config_.worker()).ok(), HasGpu());
}

TEST_F(ModelHostTest, TheCpuServesOnDemand) {
  config_.mutable_worker()->set_device("cpu");
  const auto loaded = Load();
  ASSERT_TRUE(loaded.ok()) << loaded.status().ToString();
  EXPECT_THAT(loaded->fingerprint.kernel_class(), HasSubstr("cpu-"));
}

}  // namespace
}  // namespace antiphon::worker
