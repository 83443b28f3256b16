// The small real model through whole workers: tokens do not depend on where, beside whom and in
// which pieces they are computed. Needs $ANTIPHON_MODEL.
#include <cstdlib>
#include <fstream>

#include "common/philox.h"
#include "engine/cpu/cpu_runner.h"
#include "engine/wire_sampling.h"
#include "model/model_file.h"
#include "tests/kvstore/store_process.h"
#include "tests/worker/test_worker.h"

namespace antiphon::worker {
namespace {

constexpr uint32_t kMaxTokens = 24;

class RealModelTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    const char* path = std::getenv("ANTIPHON_MODEL");
    CHECK(path != nullptr);
    auto file = model::OpenModelFile(path);
    CHECK(file.ok());
    file_ = file->release();
  }

  static std::unique_ptr<engine::ModelRunner> Runner(uint32_t step_tokens_max) {
    auto runner = engine::MakeCpuRunner(file_, {.step_tokens_max = step_tokens_max, .threads = 1});
    CHECK(runner.ok());
    return *std::move(runner);
  }

  static wire::Start Request(uint32_t number, uint32_t tokens) {
    wire::Start start;
    start.set_id(std::string(15, 'i') + static_cast<char>(number));
    start.set_epoch(1);
    for (uint32_t i = 0; i < tokens; ++i)
      start.add_prompt_ids(Philox4x32(number % 3, i)[0] % 40000);
    start.mutable_stop()->set_max_tokens(kMaxTokens);
    start.mutable_sampling()->set_temperature(number % 2 == 0 ? 0 : 0.8);
    start.mutable_sampling()->set_seed(number);
    start.mutable_sampling()->set_top_p(0.9);
    start.mutable_sampling()->set_logprobs(true);
    start.set_root_key(std::string(16, 'r'));
    start.mutable_placement()->set_prefill_node("prefill");
    return start;
  }

  // One sequence alone, its prompt in one step.
  static std::vector<uint32_t> Reference(engine::ModelRunner& runner, const wire::Start& start) {
    const auto params = *engine::SamplingFromProto(start.sampling(), runner.shape().vocab);
    std::vector<uint32_t> ids(start.prompt_ids().begin(), start.prompt_ids().end());
    const size_t prompt = ids.size();
    const uint32_t blocks = runner.layout().BlocksFor(prompt + kMaxTokens);
    std::vector<std::vector<std::byte>> memory(blocks);
    std::vector<std::byte*> payloads;
    for (auto& block : memory) {
      block.resize(runner.layout().payload_bytes());
      payloads.push_back(block.data());
    }
    size_t done = 0;
    while (ids.size() < prompt + kMaxTokens) {
      const auto all = absl::MakeConstSpan(ids);
      engine::Step step;
      step.chunks.push_back({.tokens = all.subspan(done),
                             .start = static_cast<uint32_t>(done),
                             .blocks = payloads,
                             .sample = engine::SampleRequest{.params = &params,
                                                             .prompt_ids = all.first(prompt),
                                                             .emitted_ids = all.subspan(prompt)}});
      CHECK(runner.Submit(std::move(step)).ok());
      engine::StepProgress progress;
      while (!progress.finished) progress = runner.Await(progress, absl::Seconds(1));
      const uint32_t id = runner.Take()->chunks[0].sampled->id;
      done = ids.size();
      ids.push_back(id);
    }
    return {ids.begin() + prompt, ids.end()};
  }

  // All requests at once; the tokens of each.
  static void ExpectReference(TestWorker& prefill, TestWorker& decode,
                              const std::vector<wire::Start>& requests,
                              const std::vector<std::vector<uint32_t>>& expected) {
    ASSERT_TRUE(prefill.AwaitAttached(true) && decode.AwaitAttached(true));
    Gateway gateway(decode.address());
    for (wire::Start start : requests) {
      start.mutable_placement()->set_prefill_address(prefill.address());
      gateway.Start(start);
    }
    std::map<std::string, std::vector<uint32_t>> got;
    for (size_t ends = 0; ends < requests.size();) {
      const auto update = gateway.Next();
      ASSERT_TRUE(update.has_value());
      ASSERT_FALSE(update->has_error()) << update->error().message();
      EXPECT_EQ(update->logprobs_size(), update->ids_size());
      auto& ids = got[update->id()];
      ids.insert(ids.end(), update->ids().begin(), update->ids().end());
      if (update->has_finish()) ++ends;
    }
    for (size_t i = 0; i < requests.size(); ++i) EXPECT_EQ(got[requests[i].id()], expected[i]) << i;
    EXPECT_TRUE(prefill.AwaitIdle() && decode.AwaitIdle());
  }

  static model::ModelFile* file_;
};

model::ModelFile* RealModelTest::file_ = nullptr;

TEST_F(RealModelTest, TokensAreTheSameInOneHostTwoHostsAnyChunksAndWithAPrefixHit) {
  std::vector<wire::Start> requests;
  std::vector<std::vector<uint32_t>> expected;
  auto alone = Runner(256);
  uint32_t number = 1;
  for (const uint32_t tokens : {1, 16, 47, 100, 130, 200}) {
    requests.push_back(Request(number++, tokens));
    expected.push_back(Reference(*alone, requests.back()));
  }
  alone = nullptr;
  const std::vector<std::string> flags = {"--kvstore.pool=128MiB"};
  {
    SCOPED_TRACE("one host");
    kvstore::StoreProcess store(flags);
    TestWorker prefill("prefill", store.socket_path(), Runner(128), {.chunk_tokens = 48});
    TestWorker decode("decode", store.socket_path(), Runner(128));
    ExpectReference(prefill, decode, requests, expected);
    SCOPED_TRACE("with a prefix hit");
    for (auto& start : requests) start.set_epoch(2);
    ExpectReference(prefill, decode, requests, expected);
    EXPECT_GT(prefill.Metric("antiphon_prefill_tokens_total{daemon=\"worker\",source=\"dram\"}"),
              0);
  }
  {
    SCOPED_TRACE("two hosts");
    kvstore::StoreProcess one(flags), two(flags);
    TestWorker prefill("prefill", one.socket_path(), Runner(128), {.chunk_tokens = 112});
    TestWorker decode("decode", two.socket_path(), Runner(128));
    ExpectReference(prefill, decode, requests, expected);
  }
}

}  // namespace
}  // namespace antiphon::worker

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  if (std::getenv("ANTIPHON_MODEL") == nullptr) return 77;
  return RUN_ALL_TESTS();
}
