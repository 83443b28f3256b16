// The engine on a device against a plain forward pass in double precision: prompts whole and in
// chunks, steps of single rows as graphs, contexts that come from the host's blocks, pages that are
// taken away, memory that is not pinned; and the checksums of what it writes, against the host's
// bytes.
#include <algorithm>
#include <cstring>
#include <ctime>
#include <map>
#include <memory>
#include <thread>

#include "engine/cuda/engine.h"
#include "tests/engine/cuda/check.h"
#include "tests/engine/cuda/serial_checksum.h"

namespace antiphon::engine::cuda {
namespace {

// A model of random weights in the host's memory.
struct Model {
  EngineConfig config;
  std::map<std::pair<Weight, uint32_t>, std::vector<float>> values;

  Model(uint32_t head_dim, uint32_t heads, uint32_t kv_heads, bool bias, uint64_t seed) {
    config.layers = 3;
    config.hidden = 256;
    config.feed_forward = 512;
    config.heads = heads;
    config.kv_heads = kv_heads;
    config.head_dim = head_dim;
    config.vocab = 1003;
    config.context = 1024;
    config.rope_dims = head_dim;
    config.rms_eps = 1e-5f;
    config.tied_output = !bias;
    config.qkv_bias = bias;
    config.block_tokens = 16;
    const uint64_t half = uint64_t{config.block_tokens} * kv_heads * head_dim * 2;
    config.layer_bytes = (2 * half + 4095) / 4096 * 4096;
    config.step_tokens_max = 256;
    config.rows_max = 24;
    const uint32_t qkv = (heads + 2 * kv_heads) * head_dim;
    const auto matrix = [&](Weight w, uint32_t layer, size_t rows, size_t columns) {
      auto x = Randoms(rows * columns, ++seed, 1.7f / std::sqrt(static_cast<float>(columns)));
      for (float& v : x) v = FromBf16(ToBf16(v));
      values[{w, layer}] = std::move(x);
    };
    const auto vector = [&](Weight w, uint32_t layer, size_t size, float mean, float spread) {
      auto x = Randoms(size, ++seed, spread);
      for (float& v : x) v += mean;
      values[{w, layer}] = std::move(x);
    };
    matrix(Weight::kEmbedding, 0, config.vocab, config.hidden);
    matrix(Weight::kOutput, 0, config.vocab, config.hidden);
    vector(Weight::kOutputNorm, 0, config.hidden, 1, 0.2f);
    for (uint32_t l = 0; l < config.layers; ++l) {
      matrix(Weight::kQkv, l, qkv, config.hidden);
      matrix(Weight::kAttentionOutput, l, config.hidden, heads * head_dim);
      matrix(Weight::kGateUp, l, 2 * config.feed_forward, config.hidden);
      matrix(Weight::kDown, l, config.hidden, config.feed_forward);
      vector(Weight::kAttentionNorm, l, config.hidden, 1, 0.2f);
      vector(Weight::kFeedForwardNorm, l, config.hidden, 1, 0.2f);
      vector(Weight::kQkvBias, l, qkv, 0, 0.5f);
    }
    auto& frequencies = values[{Weight::kRopeFrequencies, 0}];
    for (uint32_t i = 0; i < head_dim / 2; ++i) {
      frequencies.push_back(static_cast<float>(std::pow(10000.0, -2.0 * i / head_dim)));
    }
  }

  const std::vector<float>& Of(Weight w, uint32_t layer = 0) const { return values.at({w, layer}); }
  WeightSource Source() {
    WeightSource source;
    source.context = this;
    source.matrix = [](void* context, Weight w, uint32_t layer, uint64_t first, uint64_t rows,
                       uint16_t* out) {
      const auto& m = *static_cast<Model*>(context);
      const auto& x = m.Of(w, layer);
      const size_t columns = w == Weight::kDown              ? m.config.feed_forward
                             : w == Weight::kAttentionOutput ? m.config.heads * m.config.head_dim
                                                             : m.config.hidden;
      for (size_t i = 0; i < rows * columns; ++i) out[i] = ToBf16(x[first * columns + i]);
      return 0;
    };
    source.vector = [](void* context, Weight w, uint32_t layer, float* out) {
      const auto& x = static_cast<Model*>(context)->Of(w, layer);
      std::copy(x.begin(), x.end(), out);
      return 0;
    };
    return source;
  }

  // [token][vocab]
  std::vector<double> Logits(const std::vector<uint32_t>& tokens) const {
    const size_t n = tokens.size(), h = config.hidden, d = config.head_dim, f = config.feed_forward;
    const size_t width = (config.heads + 2 * config.kv_heads) * d;
    std::vector<double> x;
    for (uint32_t t : tokens) {
      for (size_t i = 0; i < h; ++i) x.push_back(Of(Weight::kEmbedding)[t * h + i]);
    }
    const auto norm = [&](const std::vector<double>& in, const std::vector<float>& w) {
      std::vector<double> out(in.size());
      for (size_t t = 0; t < n; ++t) {
        double squares = 0;
        for (size_t i = 0; i < h; ++i) squares += in[t * h + i] * in[t * h + i];
        const double scale = 1 / std::sqrt(squares / double(h) + double(config.rms_eps));
        for (size_t i = 0; i < h; ++i) out[t * h + i] = in[t * h + i] * scale * w[i];
      }
      return out;
    };
    const auto linear = [&](const std::vector<double>& in, const std::vector<float>& w,
                            size_t columns) {
      const size_t rows = w.size() / columns;
      std::vector<double> out(n * rows);
      for (size_t t = 0; t < n; ++t) {
        for (size_t r = 0; r < rows; ++r) {
          double sum = 0;
          for (size_t c = 0; c < columns; ++c) sum += w[r * columns + c] * in[t * columns + c];
          out[t * rows + r] = sum;
        }
      }
      return out;
    };
    const auto& frequencies = Of(Weight::kRopeFrequencies);
    for (uint32_t l = 0; l < config.layers; ++l) {
      auto qkv = linear(norm(x, Of(Weight::kAttentionNorm, l)), Of(Weight::kQkv, l), h);
      for (size_t t = 0; t < n; ++t) {
        for (size_t i = 0; i < width && config.qkv_bias; ++i) {
          qkv[t * width + i] += Of(Weight::kQkvBias, l)[i];
        }
        for (size_t head = 0; head < config.heads + config.kv_heads; ++head) {
          for (size_t i = 0; i < d / 2; ++i) {
            double& a = qkv[t * width + head * d + i];
            double& b = qkv[t * width + head * d + i + d / 2];
            const double angle = double(t) * frequencies[i];
            const double turned = a * std::cos(angle) - b * std::sin(angle);
            b = b * std::cos(angle) + a * std::sin(angle);
            a = turned;
          }
        }
      }
      std::vector<double> mixed(n * config.heads * d);
      for (size_t t = 0; t < n; ++t) {
        for (size_t head = 0; head < config.heads; ++head) {
          const size_t kv = config.heads + head / (config.heads / config.kv_heads);
          std::vector<double> weight(t + 1);
          double total = 0;
          for (size_t s = 0; s <= t; ++s) {
            double score = 0;
            for (size_t i = 0; i < d; ++i) {
              score += qkv[t * width + head * d + i] * qkv[s * width + kv * d + i];
            }
            total += weight[s] = std::exp(score / std::sqrt(double(d)));
          }
          for (size_t s = 0; s <= t; ++s) {
            for (size_t i = 0; i < d; ++i) {
              mixed[(t * config.heads + head) * d + i] +=
                  weight[s] / total * qkv[s * width + (kv + config.kv_heads) * d + i];
            }
          }
        }
      }
      const auto o = linear(mixed, Of(Weight::kAttentionOutput, l), config.heads * d);
      for (size_t i = 0; i < x.size(); ++i) x[i] += o[i];
      const auto gate_up =
          linear(norm(x, Of(Weight::kFeedForwardNorm, l)), Of(Weight::kGateUp, l), h);
      std::vector<double> activated(n * f);
      for (size_t t = 0; t < n; ++t) {
        for (size_t i = 0; i < f; ++i) {
          const double g = gate_up[t * 2 * f + i];
          activated[t * f + i] = g / (1 + std::exp(-g)) * gate_up[t * 2 * f + f + i];
        }
      }
      const auto down = linear(activated, Of(Weight::kDown, l), f);
      for (size_t i = 0; i < x.size(); ++i) x[i] += down[i];
    }
    return linear(norm(x, Of(Weight::kOutputNorm)),
                  Of(config.tied_output ? Weight::kEmbedding : Weight::kOutput), h);
  }
};

// Blocks of a sequence in the host's memory, poisoned with NaN, on pages of their own.
struct Blocks {
  Blocks(const EngineConfig& c, uint32_t tokens)
      : count((tokens + c.block_tokens - 1) / c.block_tokens),
        bytes((count * c.layers * c.layer_bytes + 4095) / 4096 * 4096),
        memory(static_cast<std::byte*>(std::aligned_alloc(4096, bytes)), &std::free) {
    std::memset(memory.get(), 0xff, bytes);
    for (size_t i = 0; i < count; ++i) {
      pointers.push_back(memory.get() + i * c.layers * c.layer_bytes);
    }
  }
  void CopyFrom(const Blocks& other) { std::memcpy(memory.get(), other.memory.get(), bytes); }
  size_t count;
  size_t bytes;
  std::unique_ptr<std::byte, void (*)(void*)> memory;
  std::vector<std::byte*> pointers;
};

struct Result {
  uint32_t token;
  std::vector<float> logits;
};

std::vector<Result> Run(Engine& engine, const EngineConfig& config,
                        const std::vector<ChunkView>& chunks) {
  OK(engine.Submit(chunks.data(), chunks.size()));
  uint32_t layers = 0;
  while (true) {
    const EngineProgress progress = engine.Poll();
    Expect(progress.layers_done >= layers, "progress never goes back");
    layers = progress.layers_done;
    if (progress.finished) break;
    std::this_thread::yield();
  }
  Expect(layers == config.layers, "a finished step has all its layers");
  std::vector<ChunkOutput> outputs(chunks.size());
  OK(engine.Take(outputs.data()));
  std::vector<Result> results;
  for (size_t i = 0; i < chunks.size(); ++i) {
    Result result{.token = outputs[i].token};
    const size_t rows = chunks[i].output == Output::kAllLogits ? chunks[i].token_count
                        : chunks[i].output == Output::kLogits  ? 1
                                                               : 0;
    result.logits.assign(outputs[i].logits, outputs[i].logits + rows * config.vocab);
    results.push_back(std::move(result));
  }
  return results;
}

ChunkView Chunk(uint64_t sequence, const std::vector<uint32_t>& tokens, uint32_t start,
                uint32_t count, const Blocks& blocks, Output output) {
  return {.sequence = sequence,
          .tokens = tokens.data() + start,
          .token_count = count,
          .start = start,
          .blocks = blocks.pointers.data(),
          .output = output};
}

std::vector<uint32_t> Tokens(size_t n, uint32_t vocab, uint64_t seed) {
  std::vector<uint32_t> tokens;
  for (float x : Randoms(n, seed, 1)) {
    tokens.push_back(static_cast<uint32_t>((x + 1) / 2.0001f * static_cast<float>(vocab)));
  }
  return tokens;
}

// Runs a step and looks at its checksums layer by layer: as soon as a layer is said to be done,
// they are those of the bytes in the host's blocks. Every chunk wants them but those in `without`.
// Returns them.
std::vector<std::vector<uint64_t>> RunForChecksums(Engine& engine, const EngineConfig& config,
                                                   std::vector<ChunkView> chunks,
                                                   const std::vector<size_t>& without,
                                                   const std::string& what) {
  constexpr uint64_t kPoison = 0xdeadbeefdeadbeef;
  const size_t token_bytes = size_t{config.kv_heads} * config.head_dim * 2;
  const uint32_t block_tokens = config.block_tokens;
  const auto end_of = [&](const ChunkView& chunk) { return chunk.start + chunk.token_count; };
  const auto first_of = [&](const ChunkView& chunk) { return chunk.start / block_tokens; };
  const auto written = [&](const ChunkView& chunk) {
    return (end_of(chunk) + block_tokens - 1) / block_tokens - first_of(chunk);
  };
  std::vector<std::vector<uint64_t>> rooms;
  for (size_t c = 0; c < chunks.size(); ++c) {
    // One more than there is room for.
    rooms.emplace_back(written(chunks[c]) * config.layers + 1, kPoison);
    const bool wanted = std::find(without.begin(), without.end(), c) == without.end();
    chunks[c].checksums = wanted ? rooms[c].data() : nullptr;
  }
  uint32_t seen = 0;
  const auto look = [&](uint32_t layers_done) {
    for (size_t c = 0; c < chunks.size() && config.copy_out; ++c) {
      if (chunks[c].checksums == nullptr) continue;
      for (uint32_t i = 0; i < written(chunks[c]); ++i) {
        const uint32_t block = first_of(chunks[c]) + i;
        const uint32_t filled = std::min(block_tokens, end_of(chunks[c]) - block * block_tokens);
        for (uint32_t layer = seen; layer < layers_done; ++layer) {
          const uint64_t want = SerialChecksum(chunks[c].blocks[block] + layer * config.layer_bytes,
                                               block_tokens * token_bytes, filled * token_bytes);
          Expect(rooms[c][i * config.layers + layer] == want,
                 what + ": chunk " + std::to_string(c) + ", block " + std::to_string(block) +
                     " with " + std::to_string(filled) + " tokens, layer " + std::to_string(layer));
        }
      }
    }
    seen = layers_done;
  };
  OK(engine.Submit(chunks.data(), chunks.size()));
  for (bool finished = false; !finished; std::this_thread::yield()) {
    const EngineProgress progress = engine.Poll();
    look(progress.layers_done);
    finished = progress.finished;
  }
  std::vector<ChunkOutput> outputs(chunks.size());
  OK(engine.Take(outputs.data()));
  for (size_t c = 0; c < chunks.size(); ++c) {
    Expect(rooms[c].back() == kPoison, what + ": nothing is written behind the checksums");
    rooms[c].pop_back();
    const bool none = chunks[c].checksums == nullptr;
    const auto poisoned = std::count(rooms[c].begin(), rooms[c].end(), kPoison);
    Expect(static_cast<size_t>(poisoned) == (none ? rooms[c].size() : 0),
           what + ": exactly the wanted checksums are made");
  }
  std::printf("%s: checksums looked at\n", what.c_str());
  return rooms;
}

// The blocks are added to `kept`: they must outlive the engine, which pins them.
void TestChecksums(Engine& engine, const EngineConfig& config, const std::vector<uint32_t>& tokens,
                   const Blocks& filled, bool pinned, std::vector<std::unique_ptr<Blocks>>& kept) {
  const auto n = static_cast<uint32_t>(tokens.size());
  const auto fresh = [&](bool copy) -> const Blocks& {
    kept.push_back(std::make_unique<Blocks>(config, n));
    if (copy) kept.back()->CopyFrom(filled);
    if (pinned) OK(engine.RegisterMemory(kept.back()->memory.get(), kept.back()->bytes));
    return *kept.back();
  };
  uint64_t sequence = 5000;
  const auto chunk = [&](uint64_t of, uint32_t start, uint32_t end, const Blocks& blocks) {
    return Chunk(of, tokens, start, end - start, blocks, Output::kGreedy);
  };
  (void)RunForChecksums(engine, config, {chunk(++sequence, 0, n, fresh(false))}, {},
                        "a whole prompt");
  // Cuts inside of blocks: a block of three chunks, chunks that lie within one block, two rows that
  // leave by rows.
  const Blocks& cut = fresh(false);
  ++sequence;
  uint32_t start = 0;
  for (uint32_t end : {20u, 22u, 27u, 32u, 33u, 37u, 100u, n}) {
    (void)RunForChecksums(engine, config, {chunk(sequence, start, end, cut)}, {},
                          "tokens " + std::to_string(start) + " to " + std::to_string(end));
    start = end;
  }
  // Rows as a graph, behind contexts that have to be loaded: some fill their block, some leave it
  // partly filled, some want nothing. Then the next rows, behind resident ones.
  std::vector<ChunkView> rows;
  for (uint32_t position : {0u, 15u, 31u, 40u, 47u, 111u, 127u}) {
    rows.push_back(chunk(++sequence, position, position + 1, fresh(true)));
  }
  (void)RunForChecksums(engine, config, rows, {2, 3}, "rows in a graph");
  for (ChunkView& row : rows) {
    ++row.start;
    ++row.tokens;
  }
  (void)RunForChecksums(engine, config, rows, {1}, "the next rows in a graph");
  (void)RunForChecksums(engine, config, {rows[0], rows[1]}, {0, 1}, "rows that want none");
  // Prompts, chunks behind a loaded prefix, and rows.
  std::vector<ChunkView> mixed = {
      chunk(++sequence, 15, 16, fresh(true)), chunk(++sequence, 0, 90, fresh(false)),
      chunk(++sequence, 70, 75, fresh(true)), chunk(++sequence, 63, 65, fresh(true)),
      chunk(++sequence, 33, 90, fresh(true))};
  (void)RunForChecksums(engine, config, mixed, {2}, "rows and prompts in one step");
}

// Nothing goes to the host: the same prompt has the same checksums twice, and another has others.
void TestChecksumsWithoutCopies(uint64_t seed) {
  std::printf("-- checksums without copies\n");
  Model model(64, 4, 2, false, seed);
  EngineConfig config = model.config;
  config.copy_out = false;
  std::unique_ptr<Engine> engine;
  OK(Engine::Create(config, model.Source(), nullptr, nullptr, &engine));
  const auto tokens = Tokens(40, config.vocab, seed + 1),
             other = Tokens(40, config.vocab, seed + 2);
  std::vector<std::vector<uint64_t>> sums;
  std::vector<std::unique_ptr<Blocks>> blocks;
  for (const auto* ids : {&tokens, &tokens, &other}) {
    blocks.push_back(std::make_unique<Blocks>(config, 40));
    OK(engine->RegisterMemory(blocks.back()->memory.get(), blocks.back()->bytes));
    const ChunkView chunk = Chunk(blocks.size(), *ids, 0, 40, *blocks.back(), Output::kNone);
    sums.push_back(RunForChecksums(*engine, config, {chunk}, {}, "without copies")[0]);
  }
  Expect(sums[0] == sums[1], "the same prompt has the same checksums");
  for (size_t i = 0; i < sums[0].size(); ++i) {
    Expect(sums[0][i] != sums[2][i], "another prompt has others");
  }
  engine = nullptr;  // before the memory that it has pinned
}

enum class As { kAlone, kNccl, kSlice };

void TestModel(uint32_t head_dim, uint32_t heads, uint32_t kv_heads, bool bias, bool pinned,
               uint64_t seed, As as = As::kAlone) {
  const std::string name = "dim " + std::to_string(head_dim) + (bias ? ", bias" : "") +
                           (pinned ? ", pinned" : ", pageable") +
                           (as == As::kNccl    ? ", NCCL with one rank"
                            : as == As::kSlice ? ", in blocks with others' heads"
                                               : "");
  std::printf("-- %s\n", name.c_str());
  Model model(head_dim, heads, kv_heads, bias, seed);
  uint32_t block_heads = kv_heads, first_head = 0, sums = 0;
  if (as == As::kSlice) {
    // As a rank whose sums are its own parts.
    first_head = 2;
    block_heads = kv_heads + 5;
    model.config.ranks = 1;
    model.config.block_kv_heads = block_heads;
    model.config.first_kv_head = first_head;
    model.config.layer_bytes = size_t{2} * 16 * block_heads * head_dim * 2 + 4096;
    model.config.sum_context = &sums;
    model.config.sum = [](void* context, float*, size_t) {
      ++*static_cast<uint32_t*>(context);
      return 0;
    };
  }
  if (as == As::kNccl) {
    model.config.ranks = 1;
    if (const Error error = NcclGroup::MakeId(&model.config.group)) {
      std::printf("not run: %s\n", error.message.c_str());
      return;
    }
  }
  const EngineConfig& config = model.config;
  std::unique_ptr<Engine> engine;
  OK(Engine::Create(config, model.Source(), nullptr, nullptr, &engine));
  const uint32_t vocab = config.vocab, n = 150;
  const auto tokens = Tokens(n, vocab, seed + 1000);
  const auto want = model.Logits(tokens);
  const auto last = [&](uint32_t position) {
    return std::vector<double>(want.begin() + position * vocab,
                               want.begin() + (position + 1) * vocab);
  };
  Blocks whole(config, n), parts(config, n);
  const auto pin = [&](Blocks& blocks) {
    if (pinned) OK(engine->RegisterMemory(blocks.memory.get(), blocks.bytes));
  };
  pin(whole);
  pin(parts);
  constexpr double kBound = 1.5e-2;

  auto result = Run(*engine, config, {Chunk(1, tokens, 0, n, whole, Output::kAllLogits)});
  ExpectClose(Distance(result[0].logits, want), kBound, "a whole prompt");

  // In chunks that cut blocks, the last one beside another sequence's.
  std::vector<float> cut;
  for (uint32_t start = 0; start < n;) {
    const uint32_t count = std::min<uint32_t>(start == 0 ? 23 : 55, n - start);
    result = Run(*engine, config, {Chunk(2, tokens, start, count, parts, Output::kAllLogits)});
    cut.insert(cut.end(), result[0].logits.begin(), result[0].logits.end());
    start += count;
  }
  ExpectClose(Distance(cut, want), kBound, "a prompt in chunks");

  // The host's blocks hold the same K and V either way, up to rounding, and no poison where tokens
  // are.
  double error = 0, size = 0;
  size_t touched = 0;
  const size_t token_bytes = size_t{kv_heads} * head_dim * 2;
  const size_t block_token_bytes = size_t{block_heads} * head_dim * 2;
  const size_t half = block_token_bytes * 16, own = size_t{first_head} * head_dim * 2;
  for (uint32_t t = 0; t < n; ++t) {
    for (uint32_t layer = 0; layer < config.layers; ++layer) {
      for (size_t which = 0; which < 2; ++which) {
        const size_t at = layer * config.layer_bytes + which * half + t % 16 * block_token_bytes;
        const auto foreign = [&](size_t i) { return i < own || i >= own + token_bytes; };
        for (size_t i = 0; i < block_token_bytes; ++i) {
          if (foreign(i) && whole.pointers[t / 16][at + i] != std::byte{0xff}) ++touched;
        }
        for (size_t i = 0; i < token_bytes; i += 2) {
          uint16_t a, b;
          std::memcpy(&a, whole.pointers[t / 16] + at + own + i, 2);
          std::memcpy(&b, parts.pointers[t / 16] + at + own + i, 2);
          const double d = double(FromBf16(a)) - FromBf16(b);
          error += d * d;
          size += double(FromBf16(a)) * FromBf16(a);
        }
      }
    }
  }
  ExpectClose(std::sqrt(error / size), kBound, "K and V in the host's blocks");
  Expect(touched == 0, "heads of others are not touched");

  // Single rows: the graph of one row, fed from the other sequence's blocks, which are loaded.
  for (uint32_t position : {n - 3, n - 2, n - 1}) {
    result = Run(*engine, config, {Chunk(3, tokens, position, 1, whole, Output::kLogits)});
    ExpectClose(Distance(result[0].logits, last(position)), kBound,
                "a single row at " + std::to_string(position));
    const auto best = std::max_element(result[0].logits.begin(), result[0].logits.end());
    Expect(result[0].token == static_cast<uint32_t>(best - result[0].logits.begin()),
           "the best token is that of the logits");
  }

  // Many rows of different contexts in one graph, greedy and with logits, some of them new.
  std::vector<Blocks> many;
  many.reserve(20);
  std::vector<ChunkView> rows;
  for (uint32_t i = 0; i < 20; ++i) {
    many.emplace_back(config, n);
    many.back().CopyFrom(whole);
    pin(many.back());
  }
  for (uint32_t i = 0; i < 20; ++i) {
    rows.push_back(
        Chunk(100 + i, tokens, i * 7, 1, many[i], i % 3 == 0 ? Output::kGreedy : Output::kLogits));
  }
  for (int turn = 0; turn < 2; ++turn) {
    const auto results = Run(*engine, config, rows);
    std::vector<float> got;
    std::vector<double> all;
    for (uint32_t i = 0; i < 20; ++i) {
      const auto at = last(rows[i].start);
      if (rows[i].output == Output::kGreedy) {
        Expect(want[rows[i].start * vocab + results[i].token] >=
                   *std::max_element(at.begin(), at.end()) - 0.1,
               "a greedy row's token is near the best");
        continue;
      }
      got.insert(got.end(), results[i].logits.begin(), results[i].logits.end());
      all.insert(all.end(), at.begin(), at.end());
    }
    ExpectClose(Distance(got, all), kBound, "20 rows in one graph, turn " + std::to_string(turn));
  }

  // Prompt and rows in one step.
  Blocks fresh(config, n);
  pin(fresh);
  std::vector<ChunkView> mixed = {rows[1], rows[4],
                                  Chunk(7, tokens, 0, 100, fresh, Output::kLogits),
                                  Chunk(8, tokens, 64, 40, whole, Output::kGreedy)};
  const auto results = Run(*engine, config, mixed);
  ExpectClose(Distance(results[0].logits, last(rows[1].start)), kBound, "a row beside prompts");
  ExpectClose(Distance(results[1].logits, last(rows[4].start)), kBound, "another");
  ExpectClose(Distance(results[2].logits, last(99)), kBound, "a prompt beside rows");
  const auto at = last(103);
  Expect(want[103 * vocab + results[3].token] >= *std::max_element(at.begin(), at.end()) - 0.1,
         "a chunk behind a loaded prefix");

  // A sequence that starts again elsewhere does not see its old pages.
  const auto other = Tokens(60, vocab, seed + 2000);
  Blocks again(config, n);
  pin(again);
  result = Run(*engine, config, {Chunk(1, other, 0, 60, again, Output::kLogits)});
  const auto other_want = model.Logits(other);
  ExpectClose(
      Distance(result[0].logits, std::vector<double>(other_want.end() - vocab, other_want.end())),
      kBound, "a handle's second life");
  // The same blocks with another content: the handle is another, so nothing old is used.
  again.CopyFrom(whole);
  result = Run(*engine, config, {Chunk(1000, tokens, 90, 1, again, Output::kLogits)});
  ExpectClose(Distance(result[0].logits, last(90)), kBound, "blocks that were used before");
  std::vector<std::unique_ptr<Blocks>> kept;
  if (as == As::kSlice) {
    // Two sums a layer of each step, and those of the graphs' first runs.
    Expect(sums % (2 * config.layers) == 0 && sums > 0, "sums are made");
  } else {
    TestChecksums(*engine, config, tokens, whole, pinned, kept);
  }
  engine = nullptr;  // before the memory that it has pinned
}

void TestEviction(uint64_t seed) {
  std::printf("-- few pages\n");
  Model model(64, 4, 2, false, seed);
  EngineConfig config = model.config;
  config.rows_max = 4;
  config.context = 256;
  std::unique_ptr<Engine> engine;
  OK(Engine::Create(config, model.Source(), nullptr, nullptr, &engine));
  // 4 rows x 16 pages are there; six sequences of 150 tokens take 60, then turns go round.
  std::printf("%llu pages\n", static_cast<unsigned long long>(engine->pages_total()));
  const auto tokens = Tokens(200, config.vocab, seed + 5);
  const auto want = model.Logits(tokens);
  std::vector<std::unique_ptr<Blocks>> blocks;
  for (uint32_t i = 0; i < 9; ++i) {
    blocks.push_back(std::make_unique<Blocks>(config, 200));
    OK(engine->RegisterMemory(blocks[i]->memory.get(), blocks[i]->bytes));
    (void)Run(*engine, config, {Chunk(i, tokens, 0, 150, *blocks[i], Output::kNone)});
  }
  for (uint32_t turn = 0; turn < 3; ++turn) {
    for (uint32_t i = 0; i < 9; ++i) {
      const uint32_t position = 150 + turn;
      const auto result =
          Run(*engine, config, {Chunk(i, tokens, position, 1, *blocks[i], Output::kLogits)});
      const std::vector<double> row(want.begin() + position * config.vocab,
                                    want.begin() + (position + 1) * config.vocab);
      ExpectClose(Distance(result[0].logits, row), 1.5e-2, "a row whose pages were taken");
    }
  }
  // More chunks than a graph has rows go the long way, more tokens than fit are refused.
  Blocks big(config, 256);
  std::vector<ChunkView> small;
  for (uint32_t i = 0; i < 30; ++i)
    small.push_back(Chunk(50 + i, tokens, 0, 2, big, Output::kLogits));
  const auto results = Run(*engine, config, small);
  for (const Result& result : results) {
    const std::vector<double> row(want.begin() + config.vocab, want.begin() + 2 * config.vocab);
    Expect(Distance(result.logits, row) < 1.5e-2, "thirty chunks where a graph has four rows");
  }
  std::vector<ChunkView> many(200, Chunk(50, tokens, 0, 2, big, Output::kGreedy));
  Expect(engine->Submit(many.data(), many.size()).code == kInvalidArgument,
         "more tokens than fit are refused");
  many.clear();
  for (uint32_t i = 0; i < 200; ++i)
    many.push_back(Chunk(300 + i, tokens, 0, 1, big, Output::kNone));
  Expect(engine->Submit(many.data(), many.size()).code == kResourceExhausted,
         "more pages than there are are refused");
  (void)Run(*engine, config, {Chunk(60, tokens, 0, 1, big, Output::kGreedy)});
  engine = nullptr;  // before the memory that it has pinned
}

void TestRefusals(uint64_t seed) {
  Model model(64, 4, 2, false, seed);
  const auto refused = [&](auto change, const char* word) {
    EngineConfig config = model.config;
    change(config);
    std::unique_ptr<Engine> engine;
    const Error error = Engine::Create(config, model.Source(), nullptr, nullptr, &engine);
    std::printf("refused: %s\n", error.message.c_str());
    Expect(error.code != 0 && error.message.find(word) != std::string::npos, word);
  };
  refused([](EngineConfig& c) { c.head_dim = 80; }, "head_dim");
  refused([](EngineConfig& c) { c.memory_bytes = 1 << 20; }, "device memory");
  refused([](EngineConfig& c) { c.device = 99; }, "invalid device");
  refused([](EngineConfig& c) { c.rope_dims = 66; }, "rope");
}

int Main() {
  NeedDevice();
  const uint64_t seed = static_cast<uint64_t>(std::time(nullptr)) * 100;
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  TestModel(64, 4, 2, false, true, seed);
  TestModel(128, 4, 1, true, true, seed + 1);
  TestModel(64, 9, 3, false, false, seed + 2);
  TestModel(64, 4, 2, false, true, seed + 5, As::kNccl);
  TestModel(64, 4, 2, false, true, seed + 7, As::kSlice);
  TestModel(128, 4, 1, true, false, seed + 8, As::kSlice);
  TestChecksumsWithoutCopies(seed + 6);
  TestEviction(seed + 3);
  TestRefusals(seed + 4);
  return Verdict();
}

}  // namespace
}  // namespace antiphon::engine::cuda

int main() { return antiphon::engine::cuda::Main(); }
