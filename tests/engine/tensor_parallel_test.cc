// Models shared out over ranks, against the same models on one.
#include <gtest/gtest.h>
#include <sched.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/clock.h"
#include "common/shared_memory.h"
#include "common/status_macros.h"
#include "engine/shm_comm.h"
#include "tests/engine/harness.h"
#include "tests/engine/ranks.h"
#include "tests/engine/tiny_model.h"

namespace antiphon::engine {
namespace {

using model::TensorType;

constexpr absl::Duration kLong = absl::Seconds(60);
constexpr absl::Duration kSoon = absl::Seconds(10);

// ||a - b|| / ||b|| of one rank and several: sums of floats in another order (1.1e-6 at most here),
// and the roundings to int8 and bf16 that those turn over (mostly below 5e-5, once 2e-3).
constexpr double kFloatError = 2e-6;
constexpr double kFastError = 5e-3;

double RelativeError(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  if (a.size() != b.size() || b.empty()) return INFINITY;
  double error = 0, size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    error += (double{a[i]} - double{b[i]}) * (double{a[i]} - double{b[i]});
    size += double{b[i]} * double{b[i]};
  }
  return std::sqrt(error / size);
}

std::vector<uint32_t> Tokens(size_t n) {
  TestRandom random(7);
  std::vector<uint32_t> tokens(n);
  for (uint32_t& t : tokens) t = random.Below(model::kTinyVocabulary);
  return tokens;
}

// What divides by two and by four: heads of 32, a vocabulary of 17 groups, which does not.
TinyOptions Even() { return {.heads = 8, .kv_heads = 4}; }

struct TinyFile {
  explicit TinyFile(const TinyOptions& options) : bytes(TinyModelFile(options)) {
    auto parsed = model::ParseGguf(bytes);
    EXPECT_TRUE(parsed.ok()) << parsed.status().ToString();
    file = *std::move(parsed);
  }
  const model::ModelFile* get() const { return file.get(); }
  std::string bytes;
  std::unique_ptr<model::ModelFile> file;
};

// Blocks that other processes can map. Every byte starts as NaN.
class SharedCache {
 public:
  SharedCache(const KvLayout& layout, size_t tokens)
      : memory_(*SharedMemory::Create("cache", layout.BlocksFor(tokens) * layout.payload_bytes())) {
    std::memset(memory_.data(), 0xff, memory_.bytes());
    for (size_t i = 0; i < layout.BlocksFor(tokens); ++i) {
      blocks_.push_back(memory_.data() + i * layout.payload_bytes());
    }
  }
  PoolMemory pool() const { return {memory_.data(), memory_.bytes(), memory_.fd()}; }
  absl::Span<std::byte* const> blocks() const { return blocks_; }
  std::vector<std::byte> Bytes() const {
    return std::vector<std::byte>(memory_.data(), memory_.data() + memory_.bytes());
  }

 private:
  SharedMemory memory_;
  std::vector<std::byte*> blocks_;
};

enum class Ranks { kProcesses, kThreads };
enum class Ends { kWell, kBadly };  // how the other ranks are to end

// Rank 0's runner here and the other ranks elsewhere. They end with it.
class TestGroup {
 public:
  TestGroup(const model::ModelFile* file, int size, CpuRunnerOptions options = {},
            Ranks how = Ranks::kProcesses, Ends ends = Ends::kWell)
      : ends_(ends), group_(*ShmComm::MakeGroup({.size = size, .piece_bytes = 64 << 10})) {
    options.step_tokens_max = 64;
    for (int rank = 1; rank < size; ++rank) {
      int sockets[2];
      EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets), 0);
      sockets_.push_back(sockets[0]);
      theirs_.push_back(sockets[1]);
      const auto serve = [this, file, options, rank, socket = sockets[1]]() mutable {
        auto comm = ShmComm::Join(group_.fd(), rank, kLong);
        EXPECT_TRUE(comm.ok()) << comm.status().ToString();
        if (!comm.ok()) return;
        options.group.comm = comm->get();
        options.group.sockets = {socket};
        const absl::Status status = ServeCpuRank(file, options);
        EXPECT_EQ(status.ok(), ends_ == Ends::kWell) << status.ToString();
      };
      if (how == Ranks::kThreads) {
        threads_.emplace_back("rank", serve);
      } else {
        processes_.push_back(ForkRank(serve));
      }
    }
    auto comm = ShmComm::Join(group_.fd(), 0, kLong);
    EXPECT_TRUE(comm.ok()) << comm.status().ToString();
    comm_ = *std::move(comm);
    options.group.comm = comm_.get();
    options.group.sockets = sockets_;
    if (!options.group.fence) options.group.fence = [this] { fenced_.fetch_add(1); };
    auto runner = MakeCpuRunner(file, options);
    status_ = runner.status();
    if (runner.ok()) runner_ = *std::move(runner);
  }
  // How the ranks ended; 0 is well.
  std::vector<int> End() {
    runner_ = nullptr;
    comm_ = nullptr;
    std::vector<int> codes;
    for (pid_t pid : std::exchange(processes_, {})) codes.push_back(WaitForRank(pid));
    threads_.clear();
    return codes;
  }
  ~TestGroup() {
    for (int code : End()) EXPECT_TRUE(code == 0 || ends_ == Ends::kBadly) << code;
    for (int fd : sockets_) close(fd);
    for (int fd : theirs_) close(fd);
  }

  const absl::Status& status() const { return status_; }
  ModelRunner& runner() {
    EXPECT_TRUE(status_.ok()) << status_.ToString();
    return *runner_;
  }
  pid_t process(size_t rank) const { return processes_[rank - 1]; }
  int fenced() const { return fenced_.load(); }

 private:
  const Ends ends_;
  SharedMemory group_;
  std::vector<int> sockets_, theirs_;
  std::vector<pid_t> processes_;
  std::vector<Thread> threads_;
  std::unique_ptr<ShmComm> comm_;
  absl::Status status_;
  std::atomic<int> fenced_{0};
  std::unique_ptr<ModelRunner> runner_;
};

std::vector<float> LogitsOf(ModelRunner& runner, const std::vector<uint32_t>& tokens,
                            const std::vector<size_t>& chunks, const SharedCache& cache) {
  EXPECT_TRUE(runner.UsePool(cache.pool()).ok());
  return AllLogits(runner, tokens, chunks, cache.blocks());
}

struct Alone {
  Alone(const TinyFile& file, CpuRunnerOptions options, const std::vector<uint32_t>& tokens) {
    options.step_tokens_max = 64;
    const auto runner = MakeRunner(file.get(), options);
    EXPECT_EQ(runner->tp_degree(), 1u);
    SharedCache cache(runner->layout(), tokens.size());
    logits = LogitsOf(*runner, tokens, {64}, cache);
    bytes = cache.Bytes();
    layout = runner->layout();
  }
  std::vector<float> logits;
  std::vector<std::byte> bytes;
  KvLayout layout;
};

void ExpectEqualToOneRank(const TinyOptions& model, int size, CpuRunnerOptions options,
                          double bound) {
  const TinyFile file(model);
  const std::vector<uint32_t> tokens = Tokens(70);
  const Alone alone(file, options, tokens);
  TestGroup group(file.get(), size, options);
  ModelRunner& runner = group.runner();
  EXPECT_EQ(runner.tp_degree(), static_cast<uint32_t>(size));
  ASSERT_EQ(runner.layout(), alone.layout);
  SharedCache cache(runner.layout(), tokens.size());
  const double error = RelativeError(LogitsOf(runner, tokens, {13, 1, 50, 1}, cache), alone.logits);
  EXPECT_LE(error, bound);
  // The first layer's K and V are made before any sum over ranks: there every byte must be equal,
  // and so in its place.
  const std::vector<std::byte> bytes = cache.Bytes();
  for (size_t b = 0; b < alone.layout.BlocksFor(tokens.size()); ++b) {
    const size_t at = b * alone.layout.payload_bytes();
    EXPECT_EQ(std::memcmp(&bytes[at], &alone.bytes[at], alone.layout.layer_bytes()), 0)
        << "block " << b;
  }
}

TEST(TensorParallelTest, FloatsAreThoseOfOneRankButForRounding) {
  for (int size : {2, 4}) {
    SCOPED_TRACE(size);
    ExpectEqualToOneRank(Even(), size, {.activations = Activations::kFloat}, kFloatError);
  }
  ExpectEqualToOneRank(Even(), 1, {.activations = Activations::kFloat}, 0);
}

TEST(TensorParallelTest, EveryFormatIsThatOfOneRankButForRounding) {
  for (TensorType type : {TensorType::kF16, TensorType::kBF16, TensorType::kQ8_0, TensorType::kQ4_0,
                          TensorType::kQ4_1, TensorType::kQ5_0, TensorType::kQ5_1}) {
    for (int size : {2, 4}) {
      SCOPED_TRACE(std::string(model::TensorTypeName(type)) + " on " + std::to_string(size));
      TinyOptions model = Even();
      model.type = type;
      ExpectEqualToOneRank(model, size, {.activations = Activations::kFloat}, kFloatError);
      ExpectEqualToOneRank(model, size, {}, kFastError);
    }
  }
}

TEST(TensorParallelTest, FamiliesAndOddSizesAreSharedOut) {
  const CpuRunnerOptions floats = {.activations = Activations::kFloat};
  ExpectEqualToOneRank({.architecture = "qwen2", .heads = 8, .kv_heads = 4}, 2, floats,
                       kFloatError);
  ExpectEqualToOneRank({.architecture = "qwen2", .heads = 8, .kv_heads = 4, .tied = false}, 4,
                       floats, kFloatError);
  ExpectEqualToOneRank({.heads = 8, .kv_heads = 4, .rope_freqs = true, .rope_dims = 16}, 2, floats,
                       kFloatError);
  // Heads of 20, shares of 20 and 34 columns: no multiple of 16 anywhere.
  ExpectEqualToOneRank({.hidden = 60, .feed_forward = 102, .heads = 3, .kv_heads = 3}, 3, floats,
                       kFloatError);
}

TEST(TensorParallelTest, ChunksAndThreadsChangeNoBit) {
  TinyOptions model = Even();
  model.type = TensorType::kQ8_0;
  const TinyFile file(model);
  const std::vector<uint32_t> tokens = Tokens(70);
  std::vector<float> want;
  std::vector<std::byte> want_bytes;
  for (int threads : {1, 2}) {
    TestGroup group(file.get(), 2, {.threads = threads});
    for (const std::vector<size_t>& chunks :
         std::vector<std::vector<size_t>>{{64, 6}, {1}, {13, 1, 50}, {7}, {33, 1, 1, 1, 34}}) {
      SharedCache cache(group.runner().layout(), tokens.size());
      const std::vector<float> logits = LogitsOf(group.runner(), tokens, chunks, cache);
      if (want.empty()) {
        want = logits;
        want_bytes = cache.Bytes();
      }
      EXPECT_TRUE(logits == want) << threads << " threads, first chunk " << chunks[0];
      EXPECT_TRUE(cache.Bytes() == want_bytes);
    }
  }
}

// A prompt chunk and decode rows in one step, drawn from: what every row gets alone.
TEST(TensorParallelTest, MixedStepsDrawWhatTheirRowsDrawAlone) {
  const TinyFile file(Even());
  TestGroup group(file.get(), 4, {.activations = Activations::kFloat});
  ModelRunner& runner = group.runner();
  const std::vector<uint32_t> tokens = Tokens(64);
  SharedCache pool(runner.layout(), 64 * 6);
  ASSERT_TRUE(runner.UsePool(pool.pool()).ok());
  const auto blocks_of = [&](size_t sequence) { return pool.blocks().subspan(4 * sequence, 4); };
  const SamplingParams greedy{.temperature = 0};
  const auto chunk = [&](size_t sequence, size_t begin, size_t count) {
    SequenceChunk c;
    c.sequence = sequence;
    c.tokens = absl::MakeConstSpan(tokens).subspan(begin, count);
    c.start = static_cast<uint32_t>(begin);
    c.blocks = blocks_of(sequence);
    c.sample = SampleRequest{.params = &greedy};
    return c;
  };
  const StepResult whole = RunStep(runner, Step{{chunk(0, 0, 41)}});
  for (size_t sequence : {1, 2, 3}) RunStep(runner, Step{{chunk(sequence, 0, 40)}});
  const StepResult mixed =
      RunStep(runner, Step{{chunk(1, 40, 1), chunk(4, 0, 41), chunk(2, 40, 1), chunk(3, 40, 1)}});
  ASSERT_EQ(mixed.chunks.size(), 4u);
  ASSERT_TRUE(whole.chunks[0].sampled.has_value());
  for (const ChunkResult& result : mixed.chunks) {
    ASSERT_TRUE(result.sampled.has_value());
    EXPECT_EQ(result.sampled->id, whole.chunks[0].sampled->id);
    EXPECT_EQ(result.sampled->logprob, whole.chunks[0].sampled->logprob);
  }
}

TEST(TensorParallelTest, RanksMayBeThreads) {
  const TinyFile file(Even());
  const std::vector<uint32_t> tokens = Tokens(70);
  const Alone alone(file, {.activations = Activations::kFloat}, tokens);
  TestGroup group(file.get(), 2, {.threads = 2, .activations = Activations::kFloat},
                  Ranks::kThreads);
  SharedCache cache(group.runner().layout(), tokens.size());
  EXPECT_LE(RelativeError(LogitsOf(group.runner(), tokens, {64, 1}, cache), alone.logits),
            kFloatError);
}

TEST(TensorParallelTest, WhatDoesNotDivideIsNamed) {
  const auto refusal = [](const TinyOptions& model, int size) {
    const TinyFile file(model);
    TestGroup group(file.get(), size, {}, Ranks::kProcesses, Ends::kBadly);
    return group.status();
  };
  const auto expect = [&](const TinyOptions& model, int size, const std::string& text) {
    const absl::Status status = refusal(model, size);
    // A rank that found out first has said so.
    EXPECT_TRUE(absl::IsFailedPrecondition(status) || absl::IsUnavailable(status));
    EXPECT_NE(std::string(status.message()).find(text), std::string::npos) << status.ToString();
  };
  expect(Even(), 3, "tensor_parallel 3 does not divide the model's attention.head_count, 8");
  expect({.heads = 4, .kv_heads = 1}, 2,
         "tensor_parallel 2 does not divide the model's attention.head_count_kv, 1");
  expect({.feed_forward = 510, .heads = 8, .kv_heads = 4}, 4,
         "tensor_parallel 4 does not divide the model's feed_forward_length, 510");
  // Shares of 16 columns, half a block.
  expect({.type = TensorType::kQ8_0, .hidden = 64, .heads = 4, .kv_heads = 4}, 4,
         "attn_output.weight: tensor_parallel 4 would cut blocks of 32 columns of Q8_0");
  expect({.type = TensorType::kQ6_K, .heads = 8, .kv_heads = 4}, 2,
         "attn_output.weight: tensor_parallel 2 would cut blocks of 256 columns of Q6_K");
}

TEST(TensorParallelTest, BlocksOutsideOfThePoolAreRefusedAndHarmNothing) {
  const TinyFile file(Even());
  TestGroup group(file.get(), 2);
  ModelRunner& runner = group.runner();
  const std::vector<uint32_t> tokens = Tokens(20);
  SharedCache first(runner.layout(), 32), second(runner.layout(), 32);
  const auto submit = [&](absl::Span<std::byte* const> blocks) {
    SequenceChunk chunk;
    chunk.tokens = tokens;
    chunk.blocks = blocks;
    return runner.Submit(Step{{chunk}});
  };
  EXPECT_TRUE(absl::IsInvalidArgument(submit(first.blocks()))) << "no pool yet";
  const std::vector<float> want = LogitsOf(runner, tokens, {20}, first);
  EXPECT_TRUE(absl::IsInvalidArgument(submit(second.blocks())));
  std::vector<std::byte*> beyond = {first.blocks()[0], first.blocks()[1] + 4096};
  EXPECT_TRUE(absl::IsInvalidArgument(submit(beyond))) << "ends outside";
  std::vector<std::byte*> before = {first.blocks()[0] - 4096, first.blocks()[1]};
  EXPECT_TRUE(absl::IsInvalidArgument(submit(before)));
  EXPECT_TRUE(LogitsOf(runner, tokens, {20}, second) == want);
  EXPECT_TRUE(second.Bytes() == first.Bytes());
  ASSERT_TRUE(runner.UsePool({}).ok());
  EXPECT_TRUE(absl::IsInvalidArgument(submit(second.blocks())));
  EXPECT_TRUE(LogitsOf(runner, tokens, {20}, first) == want);
}

// A step's status once it has ended.
absl::Status StatusOfStep(ModelRunner& runner, const SharedCache& cache,
                          const std::vector<uint32_t>& tokens) {
  SequenceChunk chunk;
  chunk.tokens = tokens;
  chunk.blocks = cache.blocks();
  RETURN_IF_ERROR(runner.Submit(Step{{chunk}}));
  StepProgress progress;
  while (!progress.finished) progress = runner.Await(progress, kLong);
  return runner.Take().status();
}

TEST(TensorParallelTest, ADeadRankFailsTheStepAndAllThatFollow) {
  const TinyFile file(Even());
  const std::vector<uint32_t> tokens = Tokens(64);
  for (bool in_step : {false, true}) {
    TestGroup group(file.get(), 4, {}, Ranks::kProcesses, Ends::kBadly);
    ModelRunner& runner = group.runner();
    SharedCache cache(runner.layout(), tokens.size());
    ASSERT_TRUE(runner.UsePool(cache.pool()).ok());
    ASSERT_TRUE(StatusOfStep(runner, cache, tokens).ok());
    EXPECT_EQ(group.fenced(), 0);
    absl::Status status;
    Thread killer;
    if (in_step) {
      killer = Thread("killer", [&] { kill(group.process(2), SIGKILL); });
    } else {
      ASSERT_EQ(kill(group.process(2), SIGKILL), 0);
    }
    const absl::Time begin = Clock::Real().Now();
    while (status.ok()) status = StatusOfStep(runner, cache, tokens);
    killer.Join();
    EXPECT_LT(Clock::Real().Now() - begin, kSoon);
    EXPECT_TRUE(absl::IsUnavailable(status)) << status.ToString();
    EXPECT_NE(std::string(status.message()).find("rank 2"), std::string::npos);
    EXPECT_EQ(group.fenced(), 1);
    EXPECT_FALSE(StatusOfStep(runner, cache, tokens).ok());
    EXPECT_FALSE(runner.UsePool(cache.pool()).ok());
  }
}

TEST(TensorParallelTest, AStoppedRankFailsTheStepAtItsDeadlineBehindTheFence) {
  const TinyFile file(Even());
  const std::vector<uint32_t> tokens = Tokens(64);
  pid_t stopped = 0;
  std::atomic<bool> fenced{false};
  CpuRunnerOptions options;
  options.group.timeout = absl::Milliseconds(300);
  options.group.fence = [&] {
    kill(stopped, SIGKILL);  // what a worker does
    fenced = true;
  };
  TestGroup group(file.get(), 2, options, Ranks::kProcesses, Ends::kBadly);
  stopped = group.process(1);
  ModelRunner& runner = group.runner();
  SharedCache cache(runner.layout(), tokens.size());
  ASSERT_TRUE(runner.UsePool(cache.pool()).ok());
  ASSERT_TRUE(StatusOfStep(runner, cache, tokens).ok());
  ASSERT_EQ(kill(stopped, SIGSTOP), 0);
  const absl::Time begin = Clock::Real().Now();
  const absl::Status status = StatusOfStep(runner, cache, tokens);
  EXPECT_TRUE(absl::IsDeadlineExceeded(status)) << status.ToString();
  EXPECT_LT(Clock::Real().Now() - begin, kSoon);
  EXPECT_TRUE(fenced.load());
}

// A rank played by hand meets rank 0, and is given its steps.
std::unique_ptr<ShmComm> MeetRank0(const SharedMemory& memory) {
  auto comm = ShmComm::Join(memory.fd(), 1, kLong);
  EXPECT_TRUE(comm.ok()) << comm.status().ToString();
  std::vector<std::byte> model(512);
  EXPECT_TRUE((*comm)->Broadcast(absl::MakeSpan(model), 0, kLong).ok());
  EXPECT_TRUE((*comm)->Barrier(kLong).ok());
  return *std::move(comm);
}
constexpr KvLayout kEvenLayout{.block_tokens = 16, .layers = 2, .kv_heads = 4, .head_dim = 32};

// One that takes its time.
TEST(TensorParallelTest, ALayerIsToldOfWhenAllRanksHaveWrittenIt) {
  const TinyFile file(Even());
  const std::vector<uint32_t> tokens = Tokens(20);
  const SharedMemory memory = *ShmComm::MakeGroup({.size = 2});
  int sockets[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets), 0);
  std::atomic<int> go{0};
  Thread other("rank", [&] {
    const auto comm = MeetRank0(memory);
    const TensorGroup group{.comm = comm.get(), .sockets = {sockets[1]}};
    GroupMember member(group, kEvenLayout);
    ASSERT_TRUE(member.Next().ok());
    while (go < 1) sched_yield();
    std::vector<float> nothing(20 * 256);
    ASSERT_TRUE(comm->AllReduceSum(absl::MakeSpan(nothing), kLong).ok());
    while (go < 2) sched_yield();
  });
  {
    const auto comm = *ShmComm::Join(memory.fd(), 0, kLong);
    CpuRunnerOptions options;
    options.group = {.comm = comm.get(), .sockets = {sockets[0]}};
    const auto runner = MakeRunner(file.get(), options);
    SharedCache cache(runner->layout(), tokens.size());
    ASSERT_TRUE(runner->UsePool(cache.pool()).ok());
    SequenceChunk chunk;
    chunk.tokens = tokens;
    chunk.blocks = cache.blocks();
    ASSERT_TRUE(runner->Submit(Step{{chunk}}).ok());
    EXPECT_EQ(runner->Await({}, absl::Milliseconds(100)).layers_done, 0u);
    go = 1;
    const StepProgress progress = runner->Await({}, kLong);
    EXPECT_EQ(progress.layers_done, 1u);
    EXPECT_FALSE(progress.finished);
    go = 2;  // it leaves
    while (!runner->Await(progress, kLong).finished) {
    }
    EXPECT_TRUE(absl::IsUnavailable(runner->Take().status()));
  }
  other.Join();
  close(sockets[0]);
  close(sockets[1]);
}

// A rank that keeps copies of blocks needs both.
TEST(TensorParallelTest, RanksAreToldWhoseChunkItIsAndOfThePool) {
  const TinyFile file(Even());
  const std::vector<uint32_t> tokens = Tokens(20);
  const SharedMemory memory = *ShmComm::MakeGroup({.size = 2});
  int sockets[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets), 0);
  std::vector<std::pair<std::byte*, size_t>> pools;
  size_t pool_bytes = 0;
  Thread other("rank", [&] {
    const auto comm = MeetRank0(memory);
    const TensorGroup group{.comm = comm.get(), .sockets = {sockets[1]}};
    GroupMember member(group, kEvenLayout,
                       [&](std::byte* base, size_t bytes) { pools.emplace_back(base, bytes); });
    const auto step = member.Next();
    ASSERT_TRUE(step.ok() && step->has_value());
    ASSERT_EQ((*step)->chunks.size(), 1u);
    const SequenceChunk& chunk = (*step)->chunks[0];
    EXPECT_EQ(chunk.sequence, 77u);
    EXPECT_EQ(chunk.start, 0u);
    ASSERT_EQ(pools.size(), 1u);
    ASSERT_EQ(chunk.blocks.size(), 2u);
    EXPECT_EQ(chunk.blocks[0], pools[0].first);
  });
  {
    const auto comm = *ShmComm::Join(memory.fd(), 0, kLong);
    CpuRunnerOptions options;
    options.group = {.comm = comm.get(), .sockets = {sockets[0]}};
    const auto runner = MakeRunner(file.get(), options);
    SharedCache cache(runner->layout(), tokens.size());
    pool_bytes = cache.pool().bytes;
    ASSERT_TRUE(runner->UsePool(cache.pool()).ok());
    SequenceChunk chunk;
    chunk.sequence = 77;
    chunk.tokens = tokens;
    chunk.blocks = cache.blocks();
    ASSERT_TRUE(runner->Submit(Step{{chunk}}).ok());
    StepProgress progress;
    while (!progress.finished) progress = runner->Await(progress, kLong);
    EXPECT_TRUE(absl::IsUnavailable(runner->Take().status()));  // the other has left
  }
  other.Join();
  ASSERT_EQ(pools.size(), 2u);
  EXPECT_EQ(pools[0].second, pool_bytes);
  EXPECT_EQ(pools[1].first, nullptr);  // before it is unmapped
  close(sockets[0]);
  close(sockets[1]);
}

TEST(TensorParallelTest, RanksOfAnotherModelAreRefused) {
  const TinyFile file(Even());
  TinyOptions deeper = Even();
  deeper.layers = 3;
  const TinyFile other(deeper);
  auto memory = ShmComm::MakeGroup({.size = 2});
  ASSERT_TRUE(memory.ok());
  RunThreads(2, [&](int rank) {
    auto comm = ShmComm::Join(memory->fd(), rank, kLong);
    ASSERT_TRUE(comm.ok());
    CpuRunnerOptions options;
    options.group.comm = comm->get();
    const absl::Status status = rank == 0 ? MakeCpuRunner(file.get(), options).status()
                                          : ServeCpuRank(other.get(), options);
    EXPECT_FALSE(status.ok());
    EXPECT_NE(std::string(status.message()).find("rank 1 has loaded \"L3,"), std::string::npos)
        << status.ToString();
  });
}

}  // namespace
}  // namespace antiphon::engine
