// A model shared out over ranks on GPUs. Every rank is a process of its own, and so is whoever asks
// for devices: a process that has used CUDA cannot fork.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/shared_memory.h"
#include "engine/cuda/cuda_runner.h"
#include "engine/shm_comm.h"
#include "tests/engine/harness.h"
#include "tests/engine/ranks.h"
#include "tests/engine/tiny_model.h"

namespace antiphon::engine {
namespace {

constexpr absl::Duration kLong = absl::Seconds(60);
constexpr int kNone = 77;

std::string Module() {
  const char* path = std::getenv("ANTIPHON_CUDA_MODULE");
  return path == nullptr ? "" : path;
}

// ||a - b|| / ||b||
double Distance(const std::vector<float>& a, const std::vector<double>& b) {
  if (a.size() != b.size()) return INFINITY;
  double error = 0, size = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    error += (double{a[i]} - b[i]) * (double{a[i]} - b[i]);
    size += b[i] * b[i];
  }
  return std::sqrt(error / size);
}

// Blocks that other processes can map. Every byte starts as NaN.
struct SharedCache {
  SharedCache(const KvLayout& layout, size_t tokens)
      : memory(*SharedMemory::Create("cache", layout.BlocksFor(tokens) * layout.payload_bytes())) {
    std::memset(memory.data(), 0xff, memory.bytes());
    for (size_t i = 0; i < layout.BlocksFor(tokens); ++i) {
      blocks.push_back(memory.data() + i * layout.payload_bytes());
    }
  }
  PoolMemory pool() const { return {memory.data(), memory.bytes(), memory.fd()}; }
  SharedMemory memory;
  std::vector<std::byte*> blocks;
};

class CudaRanksTest : public testing::Test {
 protected:
  void SetUp() override {
    const pid_t asking = ForkRank([] {
      std::string description;
      const absl::Status status = FindCudaDevice(Module(), 0, &description);
      if (!status.ok()) std::printf("%s\n", std::string(status.message()).c_str());
      std::fflush(nullptr);
      if (!status.ok()) _exit(kNone);
    });
    if (WaitForRank(asking) == kNone) GTEST_SKIP();
  }

  // `body` with rank 0's runner.
  void Run(int size, const model::ModelFile* file, const std::function<void(ModelRunner&)>& body) {
    const SharedMemory memory = *ShmComm::MakeGroup({.size = size});
    std::vector<int> ours, theirs;
    for (int rank = 1; rank < size; ++rank) {
      int sockets[2];
      ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets), 0);
      ours.push_back(sockets[0]);
      theirs.push_back(sockets[1]);
    }
    RunProcesses(size, [&](int rank) {
      const auto comm = *ShmComm::Join(memory.fd(), rank, kLong);
      CudaRunnerOptions options;
      options.module_path = Module();
      options.memory_fraction = 0.3;
      options.step_tokens_max = 128;
      options.group.comm = comm.get();
      options.group.sockets = rank == 0 ? ours : std::vector<int>{theirs[rank - 1]};
      if (rank > 0) {
        const absl::Status status = ServeCudaRank(file, options);
        EXPECT_TRUE(status.ok()) << status.ToString();
        return;
      }
      auto runner = MakeCudaRunner(file, options);
      ASSERT_TRUE(runner.ok()) << runner.status().ToString();
      EXPECT_EQ((*runner)->tp_degree(), static_cast<uint32_t>(size));
      body(**runner);
    });
    for (int fd : ours) close(fd);
    for (int fd : theirs) close(fd);
  }
};

TEST_F(CudaRanksTest, RanksTogetherMatchTheReference) {
  using model::TensorType;
  for (int size : {1, 2, 4}) {
    for (const char* family : {"llama", "qwen2"}) {
      SCOPED_TRACE(std::to_string(size) + " ranks of " + family);
      const std::string bytes =
          TinyModelFile({.architecture = family,
                         .type = size == 2 ? TensorType::kQ8_0 : TensorType::kBF16,
                         .hidden = 512,
                         .heads = 8,
                         .kv_heads = 4,
                         .tied = size != 4});
      const auto file = model::ParseGguf(bytes);
      ASSERT_TRUE(file.ok()) << file.status().ToString();
      std::vector<uint32_t> tokens;
      for (uint32_t i = 0; i < 70; ++i) tokens.push_back(i * 31 % model::kTinyVocabulary);
      const std::vector<double> want = ReferenceModel(**file).Logits(tokens);
      Run(size, file->get(), [&](ModelRunner& runner) {
        EXPECT_FALSE(size > 1 && runner.shape().makes_checksums);
        SharedCache cache(runner.layout(), 160);  // ten blocks, five for each sequence
        ASSERT_TRUE(runner.UsePool(cache.pool()).ok());
        const size_t half = cache.blocks.size() / 2;
        const auto first = absl::MakeConstSpan(cache.blocks).first(half);
        const auto second = absl::MakeConstSpan(cache.blocks).subspan(half);
        EXPECT_LE(Distance(AllLogits(runner, tokens, {33, 20, 1}, first), want), 2e-2);
        // All heads are in the blocks, wherever they were computed: another sequence reads them.
        std::memcpy(second[0], first[0], half * runner.layout().payload_bytes());
        const size_t vocab = runner.shape().vocab;
        SequenceChunk row;
        row.sequence = 1;
        row.tokens = absl::MakeConstSpan(tokens).last(1);
        row.start = static_cast<uint32_t>(tokens.size() - 1);
        row.blocks = second;
        row.want_logits = true;
        const StepResult result = RunStep(runner, Step{{row}});
        EXPECT_LE(
            Distance(result.chunks[0].logits,
                     std::vector<double>(want.end() - static_cast<ptrdiff_t>(vocab), want.end())),
            2e-2);
        // Greedy rows go as graphs.
        const SamplingParams greedy = {.temperature = 0};
        row.want_logits = false;
        row.sample = SampleRequest{.params = &greedy};
        const StepResult drawn = RunStep(runner, Step{{row}});
        ASSERT_TRUE(drawn.chunks[0].sampled.has_value());
        const double best =
            *std::max_element(want.end() - static_cast<ptrdiff_t>(vocab), want.end());
        EXPECT_GE(want[want.size() - vocab + drawn.chunks[0].sampled->id], best - 0.1);
        ASSERT_TRUE(runner.UsePool({}).ok());
      });
    }
  }
}

TEST_F(CudaRanksTest, BlocksOutsideOfThePoolAreRefused) {
  const std::string bytes = TinyModelFile({.hidden = 512, .heads = 8, .kv_heads = 4});
  const auto file = model::ParseGguf(bytes);
  ASSERT_TRUE(file.ok());
  const std::vector<uint32_t> tokens = {5, 9, 2};
  Run(2, file->get(), [&](ModelRunner& runner) {
    TestCache elsewhere(runner.layout(), 3);
    SharedCache cache(runner.layout(), 3);
    ASSERT_TRUE(runner.UsePool(cache.pool()).ok());
    SequenceChunk chunk{.tokens = tokens, .blocks = elsewhere.blocks()};
    EXPECT_TRUE(absl::IsInvalidArgument(runner.Submit(Step{{chunk}})));
    chunk.blocks = cache.blocks;  // and nothing broke
    (void)RunStep(runner, Step{{chunk}});
    EXPECT_TRUE(runner.Health().ok());
  });
}

}  // namespace
}  // namespace antiphon::engine
