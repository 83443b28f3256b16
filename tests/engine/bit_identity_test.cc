// The real model under random schedules: whatever the chunks of a prompt, the company in a step,
// the blocks that were there already, and the times a sequence lost its blocks and was computed
// again, it gets the tokens, log-probabilities and KV bytes that it gets alone.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/cpu/isa.h"
#include "tests/engine/golden.h"
#include "tests/engine/harness.h"
#include "tests/engine/random.h"

namespace antiphon::engine {
namespace {

struct Request {
  std::vector<uint32_t> prompt;
  SamplingParams params;
  uint32_t generated = 0;  // tokens to draw
  size_t tokens() const { return prompt.size() + generated; }
};

// A request that ran to its end.
struct Answer {
  std::vector<SampledToken> tokens;
  std::unique_ptr<TestCache> cache;  // every token's K and V but the last's
};

SamplingParams Ask(SamplingParams params) {
  params.logprobs = true;
  params.top_logprobs = 4;
  return params;
}

// Slices of real text; some share a beginning. Greedy and seeded, with all that a sampler keeps.
std::vector<Request> Requests() {
  static const Golden* const golden = new Golden(ReadGolden());
  const auto text = [&](size_t at, size_t n) {
    const auto begin = golden->tokens.begin() + static_cast<ptrdiff_t>(at);
    return std::vector<uint32_t>(begin, begin + static_cast<ptrdiff_t>(n));
  };
  std::vector<Request> requests;
  const auto add = [&](std::vector<uint32_t> prompt, uint32_t generated, SamplingParams params) {
    requests.push_back({std::move(prompt), Ask(std::move(params)), generated});
  };
  add(text(0, 1), 20, {.temperature = 0});
  add(text(0, 15), 20, {.temperature = 1, .seed = 1});
  add(text(0, 16), 20, {.temperature = 1, .seed = 2});
  add(text(0, 200), 24, {.temperature = 0});
  add(text(0, 200), 24, {.temperature = 0.8f, .top_p = 0.95f, .seed = 3});
  add(text(0, 277), 16, {.temperature = 1.2f, .top_k = 40, .min_p = 0.02f, .seed = 4});
  add(text(700, 64), 40, {.temperature = 0, .repetition_penalty = 1.2f});
  add(text(700, 129), 30, {.temperature = 0.9f, .presence_penalty = 0.5f, .seed = 5});
  add(text(1000, 333), 16, {.temperature = 1, .frequency_penalty = 0.4f, .seed = 6});
  add(text(1400, 37), 50, {.temperature = 0.7f, .logit_bias = {{30, 4}, {28, -6}}, .seed = 7});
  add(text(1400, 600), 8, {.temperature = 0});
  add(text(1500, 97), 33, {.temperature = 1.5f, .seed = 8});
  return requests;
}

std::vector<uint32_t> Ids(const std::vector<SampledToken>& tokens) {
  std::vector<uint32_t> ids;
  for (const SampledToken& token : tokens) ids.push_back(token.id);
  return ids;
}

// A sequence somewhere on its way.
struct Sequence {
  const Request* request;
  std::vector<SampledToken> drawn;
  std::vector<uint32_t> emitted;
  std::vector<uint32_t> tokens;  // prompt and emitted
  uint32_t computed = 0;         // tokens whose K and V are in the blocks
  std::unique_ptr<TestCache> own;
  std::vector<std::byte*> blocks;  // borrowed ones first, then its own

  bool done() const { return drawn.size() == request->generated; }

  // Fresh blocks, all of them unwritten but the first `borrowed` ones of `donor`.
  void Start(const KvLayout& layout, const TestCache* donor, size_t borrowed) {
    own = std::make_unique<TestCache>(layout, request->tokens());
    blocks.assign(own->blocks().begin(), own->blocks().end());
    for (size_t b = 0; b < borrowed; ++b) blocks[b] = donor->blocks()[b];
    computed = static_cast<uint32_t>(borrowed * layout.block_tokens);
  }

  // The next `count` tokens; with the last of all a token is drawn.
  SequenceChunk Chunk(uint32_t count) const {
    SequenceChunk chunk;
    chunk.tokens = absl::MakeConstSpan(tokens).subspan(computed, count);
    chunk.start = computed;
    chunk.blocks = blocks;
    if (computed + count == tokens.size()) {
      chunk.sample = SampleRequest{
          .params = &request->params, .prompt_ids = request->prompt, .emitted_ids = emitted};
    }
    return chunk;
  }

  void Advance(uint32_t count, const ChunkResult& result) {
    computed += count;
    EXPECT_EQ(result.sampled.has_value(), computed == tokens.size());
    if (!result.sampled.has_value()) return;
    drawn.push_back(*result.sampled);
    emitted.push_back(result.sampled->id);
    tokens.push_back(result.sampled->id);
  }
};

Sequence NewSequence(const Request& request) {
  Sequence sequence{.request = &request};
  sequence.tokens = request.prompt;
  return sequence;
}

// Alone, the prompt in one piece, then token by token.
Answer RunAlone(ModelRunner& runner, const Request& request) {
  Sequence sequence = NewSequence(request);
  sequence.Start(runner.layout(), nullptr, 0);
  while (!sequence.done()) {
    const uint32_t count = static_cast<uint32_t>(sequence.tokens.size()) - sequence.computed;
    const StepResult result = RunStep(runner, Step{{sequence.Chunk(count)}});
    sequence.Advance(count, result.chunks[0]);
  }
  return {std::move(sequence.drawn), std::move(sequence.own)};
}

std::vector<Answer> RunAllAlone(ModelRunner& runner, const std::vector<Request>& requests) {
  std::vector<Answer> answers;
  for (const Request& request : requests) answers.push_back(RunAlone(runner, request));
  return answers;
}

struct Happened {
  int steps = 0, chunks = 0, mixed = 0, hits = 0, preempted = 0;
};

// Sequences arrive, borrow what others have computed, advance by random chunks in random company,
// and lose their blocks, until all are done. `answers` lend their blocks.
std::vector<Sequence> RunSchedule(ModelRunner& runner, const std::vector<Request>& requests,
                                  const std::vector<Answer>& answers, uint64_t seed,
                                  Happened& happened) {
  TestRandom random(seed);
  const uint32_t block_tokens = runner.layout().block_tokens;
  std::vector<Sequence> sequences;
  const auto start = [&](Sequence& s, size_t request) {
    // Full blocks of another's cache that hold this sequence's first tokens; one token at least is
    // left to compute.
    const size_t lender =
        random.Below(2) == 0 ? request : random.Below(static_cast<uint32_t>(answers.size()));
    std::vector<uint32_t> lent = requests[lender].prompt;
    const std::vector<uint32_t> said = Ids(answers[lender].tokens);
    lent.insert(lent.end(), said.begin(), said.end() - 1);
    size_t same = 0;
    while (same < lent.size() && same + 1 < s.tokens.size() && lent[same] == s.tokens[same]) ++same;
    const uint32_t blocks = static_cast<uint32_t>(same / block_tokens);
    const uint32_t borrowed = blocks == 0 ? 0 : random.Below(blocks + 1);
    s.Start(runner.layout(), answers[lender].cache.get(), borrowed);
    happened.hits += borrowed > 0;
  };
  for (const Request& request : requests) sequences.push_back(NewSequence(request));
  std::vector<size_t> waiting(requests.size());
  for (size_t i = 0; i < waiting.size(); ++i) waiting[i] = i;
  std::vector<size_t> running;
  while (!waiting.empty() || !running.empty()) {
    while (!waiting.empty() && (running.empty() || random.Below(3) == 0)) {
      const size_t pick = random.Below(static_cast<uint32_t>(waiting.size()));
      running.push_back(waiting[pick]);
      waiting.erase(waiting.begin() + static_cast<ptrdiff_t>(pick));
      start(sequences[running.back()], running.back());
    }
    if (random.Below(12) == 0) {
      const size_t pick = random.Below(static_cast<uint32_t>(running.size()));
      sequences[running[pick]].own.reset();
      waiting.push_back(running[pick]);
      running.erase(running.begin() + static_cast<ptrdiff_t>(pick));
      ++happened.preempted;
      continue;
    }
    // A random company in a random order.
    for (size_t i = running.size(); i > 1; --i) {
      std::swap(running[i - 1], running[random.Below(static_cast<uint32_t>(i))]);
    }
    const size_t company = 1 + random.Below(static_cast<uint32_t>(running.size()));
    uint32_t room = runner.shape().step_tokens_max;
    Step step;
    std::vector<uint32_t> counts;
    bool prefills = false, decodes = false;
    for (size_t i = 0; i < company && room > 0; ++i) {
      const Sequence& s = sequences[running[i]];
      const uint32_t left = static_cast<uint32_t>(s.tokens.size()) - s.computed;
      const uint32_t most = random.Below(2) == 0 ? 20 : 200;
      counts.push_back(std::min({left, room, 1 + random.Below(most)}));
      room -= counts.back();
      step.chunks.push_back(s.Chunk(counts.back()));
      (left > 1 ? prefills : decodes) = true;
    }
    ++happened.steps;
    happened.chunks += static_cast<int>(counts.size());
    happened.mixed += prefills && decodes;
    const StepResult result = RunStep(runner, std::move(step));
    for (size_t i = 0; i < counts.size(); ++i) {
      sequences[running[i]].Advance(counts[i], result.chunks[i]);
    }
    running.erase(std::remove_if(running.begin(), running.end(),
                                 [&](size_t i) { return sequences[i].done(); }),
                  running.end());
  }
  return sequences;
}

void ExpectSameTokens(const std::vector<SampledToken>& got, const std::vector<SampledToken>& want) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_EQ(got[i].id, want[i].id) << "token " << i;
    EXPECT_EQ(got[i].logprob, want[i].logprob) << "token " << i;
    EXPECT_EQ(got[i].top, want[i].top) << "token " << i;
  }
}

void ExpectSameAnswers(const KvLayout& layout, const std::vector<Sequence>& got,
                       const std::vector<Answer>& want) {
  for (size_t r = 0; r < got.size(); ++r) {
    SCOPED_TRACE("request " + std::to_string(r));
    ExpectSameTokens(got[r].drawn, want[r].tokens);
    for (size_t b = 0; b < want[r].cache->blocks().size(); ++b) {
      EXPECT_EQ(std::memcmp(got[r].blocks[b], want[r].cache->blocks()[b], layout.payload_bytes()),
                0)
          << "block " << b;
    }
  }
}

std::unique_ptr<ModelRunner> Runner(CpuRunnerOptions options) {
  options.step_tokens_max = 640;
  return MakeRunner(ShippedModel(), options);
}

TEST(BitIdentityTest, SchedulesDoNotChangeABit) {
  const std::vector<Request> requests = Requests();
  const std::unique_ptr<ModelRunner> runner = Runner({.threads = 2});
  const std::vector<Answer> alone = RunAllAlone(*runner, requests);
  std::vector<std::vector<std::byte>> lent;
  for (const Answer& answer : alone) lent.push_back(answer.cache->memory());
  Happened happened;
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    SCOPED_TRACE("schedule " + std::to_string(seed));
    const std::vector<Sequence> got = RunSchedule(*runner, requests, alone, seed, happened);
    ExpectSameAnswers(runner->layout(), got, alone);
  }
  for (size_t r = 0; r < alone.size(); ++r) {
    EXPECT_EQ(alone[r].cache->memory(), lent[r]) << "borrowed blocks are read only, request " << r;
  }
  std::printf("%d steps, %d chunks, %d steps of prefill and decode, %d prefix hits, %d preempted\n",
              happened.steps, happened.chunks, happened.mixed, happened.hits, happened.preempted);
  // The schedules do what this test is about.
  EXPECT_GT(happened.chunks, 2 * happened.steps);
  EXPECT_GT(happened.mixed, 50);
  EXPECT_GT(happened.hits, 10);
  EXPECT_GT(happened.preempted, 20);
}

TEST(BitIdentityTest, FloatActivationsKeepThePromiseToo) {
  // Slow: each step unpacks all weights.
  std::vector<Request> requests = Requests();
  requests.resize(5);
  for (Request& request : requests) request.generated = 5;
  const std::unique_ptr<ModelRunner> runner =
      Runner({.threads = 2, .activations = Activations::kFloat});
  const std::vector<Answer> alone = RunAllAlone(*runner, requests);
  Happened happened;
  ExpectSameAnswers(runner->layout(), RunSchedule(*runner, requests, alone, 1, happened), alone);
}

// Workers of one fingerprint may differ in these.
TEST(BitIdentityTest, ThreadsAndInstructionSetsDoNotChangeABit) {
  const std::vector<Request> all = Requests();
  std::vector<Request> requests = {all[9], all[7], all[5]};
  for (Request& request : requests) request.generated = 6;
  const std::unique_ptr<ModelRunner> reference = Runner({.threads = 1});
  const std::vector<Answer> want = RunAllAlone(*reference, requests);
  std::vector<CpuRunnerOptions> others = {{.threads = 2}, {.threads = 3}};
  for (const cpu::Kernels* kernels : cpu::GrantedKernels()) {
    others.push_back({.threads = 2, .instruction_set = kernels->name});
  }
  for (const CpuRunnerOptions& options : others) {
    SCOPED_TRACE(options.instruction_set + ", threads " + std::to_string(options.threads));
    const std::unique_ptr<ModelRunner> runner = Runner(options);
    EXPECT_EQ(runner->kernel_class(), reference->kernel_class());
    for (size_t r = 0; r < requests.size(); ++r) {
      if (options.instruction_set == "scalar" && r > 0) continue;  // slow
      const Answer got = RunAlone(*runner, requests[r]);
      ExpectSameTokens(got.tokens, want[r].tokens);
      EXPECT_EQ(got.cache->memory(), want[r].cache->memory());
    }
  }
}

TEST(BitIdentityTest, TheSizeOfABlockDoesNotChangeTheTokens) {
  const std::vector<Request> all = Requests();
  const std::vector<Request> requests = {all[4], all[7]};
  const std::unique_ptr<ModelRunner> small = Runner({.threads = 2});
  const std::unique_ptr<ModelRunner> large = Runner({.block_tokens = 64, .threads = 2});
  for (const Request& request : requests) {
    ExpectSameTokens(RunAlone(*large, request).tokens, RunAlone(*small, request).tokens);
  }
}

TEST(BitIdentityTest, SeedsMatter) {
  const std::unique_ptr<ModelRunner> runner = Runner({.threads = 2});
  Request request = Requests()[4];
  const std::vector<uint32_t> first = Ids(RunAlone(*runner, request).tokens);
  ++request.params.seed;
  EXPECT_NE(Ids(RunAlone(*runner, request).tokens), first);
}

}  // namespace
}  // namespace antiphon::engine

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  if (std::getenv("ANTIPHON_MODEL") == nullptr) return 77;
  return RUN_ALL_TESTS();
}
