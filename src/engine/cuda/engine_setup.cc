#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/cuda/engine.h"

namespace antiphon::engine::cuda {
namespace {

constexpr size_t kPieceBytes = size_t{32} << 20;     // of weights on their way
constexpr size_t kPartialBytes = size_t{192} << 20;  // of attention's partial results
constexpr size_t kAttentionTableBytes = size_t{8} << 20;
constexpr size_t kReserveBytes = size_t{512} << 20;  // graphs, the libraries' own
constexpr uint32_t kLogitsRows = 64;                 // at a time, where all rows are wanted
constexpr uint32_t kTunedLayers = 6;

size_t RoundUp(size_t n, size_t to) { return (n + to - 1) / to * to; }

Error Shape(const EngineConfig& c) {
  const auto refuse = [](const std::string& what) { return Error{kFailedPrecondition, what}; };
  if (!AttentionServes(c.head_dim)) {
    return refuse("head_dim is " + std::to_string(c.head_dim) +
                  "; the CUDA engine serves 64 and 128");
  }
  const auto aligned = [](uint32_t v) { return v % 8 == 0 && v > 0; };
  if (!aligned(c.hidden) || !aligned(c.feed_forward) || !aligned(c.heads * c.head_dim)) {
    return refuse(
        "embedding_length, feed_forward_length and heads x head_dim must be multiples of 8");
  }
  if (c.kv_heads == 0 || c.heads % c.kv_heads != 0)
    return refuse("heads is no multiple of kv heads");
  if (c.rope_dims % 4 != 0 || c.rope_dims > c.head_dim) {
    return refuse("rope.dimension_count is " + std::to_string(c.rope_dims) +
                  "; the CUDA engine serves multiples of 4");
  }
  const uint32_t block_heads = c.block_kv_heads == 0 ? c.kv_heads : c.block_kv_heads;
  if (block_heads < c.kv_heads || c.first_kv_head > block_heads - c.kv_heads) {
    return refuse("the rank's kv heads are not in the block");
  }
  const uint64_t half = uint64_t{c.block_tokens} * block_heads * c.head_dim * 2;
  if (!ChecksumServes(size_t{c.kv_heads} * c.head_dim * 2)) {
    return refuse("kv heads x head_dim is " + std::to_string(c.kv_heads * c.head_dim) +
                  "; the CUDA engine serves multiples of 64");
  }
  if (c.block_tokens == 0 || c.layer_bytes < 2 * half || c.layer_bytes % 16 != 0 ||
      c.layer_bytes / 2 * c.layers > 0xffffffffu) {
    return refuse("the block's layout does not fit a device page");
  }
  if (c.vocab > kDrawVocabMax) {
    return refuse("the vocabulary has " + std::to_string(c.vocab) +
                  " tokens; the CUDA engine serves " + std::to_string(kDrawVocabMax));
  }
  if (c.step_tokens_max == 0 || c.rows_max == 0 || c.layers == 0 || c.vocab == 0) {
    return refuse("layers, vocab, step_tokens_max and rows_max must be positive");
  }
  return {};
}

}  // namespace

// ---- StepTables

Error StepTables::Allocate(uint32_t rows, uint32_t chunks, uint32_t pages) {
  rows_ = rows;
  chunks_ = chunks;
  size_t bytes = 0;
  Place(nullptr, &bytes);
  bytes += size_t{pages} * 4;
  MODULE_RETURN_IF_ERROR(pinned_.Allocate(bytes));
  MODULE_RETURN_IF_ERROR(memory_.Allocate(bytes));
  host = Place(pinned_.data(), &bytes);
  device = Place(memory_.data(), &bytes);
  return {};
}

StepTables::View StepTables::Place(std::byte* base, size_t* bytes) const {
  size_t at = 0;
  const auto take = [&](size_t count, size_t size) {
    at = RoundUp(at, 16);
    std::byte* place = base == nullptr ? nullptr : base + at;
    at += count * size;
    return place;
  };
  View v;
  v.targets = reinterpret_cast<uint64_t*>(take(rows_, 8));
  v.tokens = reinterpret_cast<uint32_t*>(take(rows_, 4));
  v.positions = reinterpret_cast<uint32_t*>(take(rows_, 4));
  v.row_pages = reinterpret_cast<int32_t*>(take(rows_, 4));
  v.output_rows = reinterpret_cast<uint32_t*>(take(std::max(rows_, chunks_), 4));
  v.query_starts = reinterpret_cast<int32_t*>(take(chunks_ + 1, 4));
  v.page_starts = reinterpret_cast<int32_t*>(take(chunks_ + 1, 4));
  v.last_page_tokens = reinterpret_cast<int32_t*>(take(chunks_, 4));
  // A chunk writes no more blocks than it has tokens.
  v.checksummed = reinterpret_cast<FilledPage*>(take(rows_, sizeof(FilledPage)));
  v.pages = reinterpret_cast<int32_t*>(take(0, 4));
  *bytes = RoundUp(at, 16);
  return v;
}

Error StepTables::Upload(uint32_t pages_used, cudaStream_t stream) {
  const size_t bytes =
      static_cast<size_t>(reinterpret_cast<std::byte*>(host.pages + pages_used) - pinned_.data());
  CUDA_RETURN_IF_ERROR(
      cudaMemcpyAsync(memory_.data(), pinned_.data(), bytes, cudaMemcpyHostToDevice, stream));
  return {};
}

// ---- Creation

Error Engine::Create(const EngineConfig& config, const WeightSource& source,
                     void (*progress)(void*, double), void* progress_context,
                     std::unique_ptr<Engine>* out) {
  MODULE_RETURN_IF_ERROR(Shape(config));
  CUDA_RETURN_IF_ERROR(cudaSetDevice(config.device));
  std::unique_ptr<Engine> engine(new Engine(config));
  MODULE_RETURN_IF_ERROR(engine->Init(source, progress, progress_context));
  *out = std::move(engine);
  return {};
}

Engine::Engine(const EngineConfig& config)
    : config_(config),
      qkv_width_((config.heads + 2 * config.kv_heads) * config.head_dim),
      sliced_(config.block_kv_heads != 0 && config.block_kv_heads != config.kv_heads),
      block_layer_bytes_(config.layer_bytes),
      page_layer_bytes_(sliced_ ? size_t{2} * config.block_tokens * config.kv_heads *
                                      config.head_dim * sizeof(uint16_t)
                                : config.layer_bytes),
      page_bytes_(page_layer_bytes_ * config.layers) {}

Engine::~Engine() {
  cudaSetDevice(config_.device);
  cudaDeviceSynchronize();
  for (const Region& region : regions_) cudaHostUnregister(region.begin);
  graphs_.clear();
}

Error Engine::Init(const WeightSource& source, void (*progress)(void*, double), void* context) {
  int major = 0;
  CUDA_RETURN_IF_ERROR(
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, config_.device));
  dependent_launch_ = major >= 9;
  const auto make_stream = [](Stream& stream, int priority) -> Error {
    CUDA_RETURN_IF_ERROR(
        cudaStreamCreateWithPriority(stream.address(), cudaStreamNonBlocking, priority));
    return {};
  };
  int lowest = 0, highest = 0;
  CUDA_RETURN_IF_ERROR(cudaDeviceGetStreamPriorityRange(&lowest, &highest));
  MODULE_RETURN_IF_ERROR(make_stream(compute_, highest));
  MODULE_RETURN_IF_ERROR(make_stream(copy_, lowest));
  MODULE_RETURN_IF_ERROR(make_stream(load_, lowest));
  const auto make_event = [](Event& event) -> Error {
    CUDA_RETURN_IF_ERROR(cudaEventCreateWithFlags(event.address(), cudaEventDisableTiming));
    return {};
  };
  for (std::vector<Event>* events : {&computed_, &copied_, &loaded_}) {
    events->resize(config_.layers);
    for (Event& event : *events) MODULE_RETURN_IF_ERROR(make_event(event));
  }
  for (Event* event : {&step_begun_, &step_done_, &forked_}) {
    MODULE_RETURN_IF_ERROR(make_event(*event));
  }
  MODULE_RETURN_IF_ERROR(gemm_.Init(compute_.get()));
  if (config_.ranks > 0 && config_.sum == nullptr) {
    MODULE_RETURN_IF_ERROR(NcclGroup::Join(config_.group, config_.rank, config_.ranks, &group_));
  }

  const uint32_t attended = config_.heads * config_.head_dim;
  vocab_stride_ = static_cast<uint32_t>(RoundUp(config_.vocab, 8));
  qkv_ = {.n = qkv_width_, .k = config_.hidden, .y_stride = qkv_width_};
  attention_output_ = {.n = config_.hidden,
                       .k = attended,
                       .float_output = true,
                       .accumulate = config_.rank == 0,
                       .y_stride = config_.hidden};
  gate_up_ = {
      .n = 2 * config_.feed_forward, .k = config_.hidden, .y_stride = 2 * config_.feed_forward};
  down_ = {.n = config_.hidden,
           .k = config_.feed_forward,
           .float_output = true,
           .accumulate = config_.rank == 0,
           .y_stride = config_.hidden};
  logits_product_ = {
      .n = config_.vocab, .k = config_.hidden, .float_output = true, .y_stride = vocab_stride_};
  attention_ = {.heads = config_.heads,
                .kv_heads = config_.kv_heads,
                .head_dim = config_.head_dim,
                .page_tokens = config_.block_tokens,
                .page_stride = static_cast<uint32_t>(page_bytes_ / 2),
                .query_stride = qkv_width_};

  size_t free_bytes = 0, total_bytes = 0;
  CUDA_RETURN_IF_ERROR(cudaMemGetInfo(&free_bytes, &total_bytes));
  const size_t free_at_start = free_bytes;
  MODULE_RETURN_IF_ERROR(LoadWeights(source, progress, context));
  MODULE_RETURN_IF_ERROR(AllocateStep());

  CUDA_RETURN_IF_ERROR(cudaMemGetInfo(&free_bytes, &total_bytes));
  const size_t granted = config_.memory_bytes != 0
                             ? std::min<size_t>(config_.memory_bytes, free_at_start)
                             : free_at_start / 10 * 9;
  // Other processes may load on the device at the same time: what is gone is not ours alone.
  const size_t beside = DeviceBytes() + kReserveBytes;
  const size_t left = std::min(granted - std::min(granted, beside),
                               free_bytes - std::min(free_bytes, kReserveBytes));
  const size_t page_count = left / page_bytes_;
  // One page is for the rows that only fill a graph's bucket.
  const size_t context_pages =
      RoundUp(config_.context, config_.block_tokens) / config_.block_tokens;
  if (page_count < 2 || (page_count - 1) * config_.block_tokens < config_.step_tokens_max) {
    return {kResourceExhausted, "device memory: " + std::to_string(granted >> 20) +
                                    " MiB are granted; weights and the "
                                    "step's buffers take " +
                                    std::to_string(beside >> 20) +
                                    " MiB, and too little is left "
                                    "for KV pages of " +
                                    std::to_string(page_bytes_ >> 10) + " KiB"};
  }
  const size_t wanted = size_t{config_.rows_max} * context_pages + 1;
  const auto pages = static_cast<uint32_t>(std::min({page_count, wanted, size_t{1} << 24}));
  MODULE_RETURN_IF_ERROR(kv_.Allocate(pages * page_bytes_));
  CUDA_RETURN_IF_ERROR(cudaMemsetAsync(kv_.data(), 0, pages * page_bytes_, compute_.get()));
  pages_ = std::make_unique<PageTable>(1, pages - 1, config_.block_tokens);
  page_layout_ = {.base = kv_.data(),
                  .page_bytes = page_bytes_,
                  .layer_bytes = page_layer_bytes_,
                  .block_tokens = config_.block_tokens,
                  .kv_heads = config_.kv_heads,
                  .head_dim = config_.head_dim,
                  .host_layer_bytes = block_layer_bytes_};
  const size_t head_bytes = size_t{config_.head_dim} * sizeof(uint16_t);
  page_layout_.host_token_bytes =
      (sliced_ ? config_.block_kv_heads : config_.kv_heads) * head_bytes;
  page_layout_.host_offset = sliced_ ? config_.first_kv_head * head_bytes : 0;
  MODULE_RETURN_IF_ERROR(mixed_.Allocate(config_.step_tokens_max, config_.step_tokens_max, pages));
  MODULE_RETURN_IF_ERROR(decode_.Allocate(RowBucket(config_.rows_max), RowBucket(config_.rows_max),
                                          pages + RowBucket(config_.rows_max)));
  MODULE_RETURN_IF_ERROR(TuneProducts());
  MODULE_RETURN_IF_ERROR(CaptureGraphs());
  CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(compute_.get()));
  return {};
}

size_t Engine::DeviceBytes() const {
  size_t bytes = 0;
  const auto add = [&bytes](const auto&... arrays) {
    ((bytes += arrays.size() * sizeof(*arrays.data())), ...);
  };
  for (const DeviceArray<std::byte>& array : weights_) add(array);
  add(cosines_, sines_, x_, normed_, qkv_out_, attended_, gate_up_out_, activated_, logits_, best_,
      draws_, attention_partials_, attention_tables_);
  return bytes;
}

Error Engine::LoadWeights(const WeightSource& source, void (*progress)(void*, double),
                          void* context) {
  const EngineConfig& c = config_;
  const uint32_t attended = c.heads * c.head_dim;
  const uint64_t bytes_all =
      2 * (uint64_t{c.vocab} * c.hidden * (c.tied_output || c.rank != 0 ? 1 : 2) +
           c.layers * (uint64_t{qkv_width_} * c.hidden + uint64_t{c.hidden} * attended +
                       3 * uint64_t{c.feed_forward} * c.hidden));
  uint64_t bytes_done = 0;
  PinnedArray<uint16_t> pieces[2];
  Event sent[2];
  for (int i = 0; i < 2; ++i) {
    MODULE_RETURN_IF_ERROR(pieces[i].Allocate(kPieceBytes / 2));
    CUDA_RETURN_IF_ERROR(cudaEventCreateWithFlags(sent[i].address(), cudaEventDisableTiming));
  }
  int turn = 0;
  const auto allocate = [&](size_t bytes, void** out) -> Error {
    weights_.emplace_back();
    MODULE_RETURN_IF_ERROR(weights_.back().Allocate(RoundUp(bytes, 256)));
    *out = weights_.back().data();
    return {};
  };
  const auto matrix = [&](Weight weight, uint32_t layer, uint64_t rows, uint64_t columns,
                          uint16_t** out) -> Error {
    MODULE_RETURN_IF_ERROR(allocate(rows * columns * 2, reinterpret_cast<void**>(out)));
    const uint64_t rows_piece = std::max<uint64_t>(1, kPieceBytes / 2 / columns);
    for (uint64_t row = 0; row < rows; row += rows_piece) {
      const uint64_t count = std::min(rows_piece, rows - row);
      turn ^= 1;
      CUDA_RETURN_IF_ERROR(cudaEventSynchronize(sent[turn].get()));
      if (const int code =
              source.matrix(source.context, weight, layer, row, count, pieces[turn].data());
          code != 0) {
        return {code, "the weights' source failed"};
      }
      CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(*out + row * columns, pieces[turn].data(),
                                           count * columns * 2, cudaMemcpyHostToDevice,
                                           load_.get()));
      CUDA_RETURN_IF_ERROR(cudaEventRecord(sent[turn].get(), load_.get()));
      bytes_done += count * columns * 2;
      if (progress != nullptr) {
        progress(context, static_cast<double>(bytes_done) / static_cast<double>(bytes_all));
      }
    }
    return {};
  };
  // Benchmarks have no file: the weights are random on the device.
  uint64_t seed = 1;
  const auto random = [&](uint64_t rows, uint64_t columns, uint16_t** out) -> Error {
    MODULE_RETURN_IF_ERROR(allocate(rows * columns * 2, reinterpret_cast<void**>(out)));
    CUDA_RETURN_IF_ERROR(RandomBf16(*out, rows * columns, seed++,
                                    1.7f / std::sqrt(static_cast<float>(columns)), load_.get()));
    return {};
  };
  const auto any = [&](Weight weight, uint32_t layer, uint64_t rows, uint64_t columns,
                       uint16_t** out) {
    return source.matrix == nullptr ? random(rows, columns, out)
                                    : matrix(weight, layer, rows, columns, out);
  };
  std::vector<float> values;
  const auto vector = [&](Weight weight, uint32_t layer, uint32_t size, float** out) -> Error {
    MODULE_RETURN_IF_ERROR(allocate(size * sizeof(float), reinterpret_cast<void**>(out)));
    values.assign(size, 1.0f);
    if (source.vector != nullptr) {
      if (const int code = source.vector(source.context, weight, layer, values.data()); code != 0) {
        return {code, "the weights' source failed"};
      }
    }
    CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(*out, values.data(), size * sizeof(float),
                                         cudaMemcpyHostToDevice, load_.get()));
    CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(load_.get()));  // `values` is used again
    return {};
  };
  MODULE_RETURN_IF_ERROR(any(Weight::kEmbedding, 0, c.vocab, c.hidden, &embedding_));
  output_ = embedding_;
  if (!c.tied_output && c.rank == 0) {
    MODULE_RETURN_IF_ERROR(any(Weight::kOutput, 0, c.vocab, c.hidden, &output_));
  }
  MODULE_RETURN_IF_ERROR(vector(Weight::kOutputNorm, 0, c.hidden, &output_norm_));
  layers_.resize(c.layers);
  for (uint32_t i = 0; i < c.layers; ++i) {
    Layer& l = layers_[i];
    MODULE_RETURN_IF_ERROR(any(Weight::kQkv, i, qkv_width_, c.hidden, &l.qkv));
    MODULE_RETURN_IF_ERROR(
        any(Weight::kAttentionOutput, i, c.hidden, attended, &l.attention_output));
    MODULE_RETURN_IF_ERROR(any(Weight::kGateUp, i, 2 * c.feed_forward, c.hidden, &l.gate_up));
    MODULE_RETURN_IF_ERROR(any(Weight::kDown, i, c.hidden, c.feed_forward, &l.down));
    MODULE_RETURN_IF_ERROR(vector(Weight::kAttentionNorm, i, c.hidden, &l.attention_norm));
    MODULE_RETURN_IF_ERROR(vector(Weight::kFeedForwardNorm, i, c.hidden, &l.feed_forward_norm));
    if (c.qkv_bias) MODULE_RETURN_IF_ERROR(vector(Weight::kQkvBias, i, qkv_width_, &l.qkv_bias));
  }

  const uint32_t pairs = c.rope_dims / 2;
  std::vector<float> frequencies(pairs);
  for (uint32_t i = 0; i < pairs; ++i) {
    frequencies[i] = static_cast<float>(std::pow(10000.0, -2.0 * i / c.rope_dims));
  }
  if (source.vector != nullptr) {
    if (const int code =
            source.vector(source.context, Weight::kRopeFrequencies, 0, frequencies.data());
        code != 0) {
      return {code, "the weights' source failed"};
    }
  }
  // As the CPU engine does it: the angle is rounded to float, its cosine is computed in double.
  std::vector<float> cosines(size_t{c.context} * pairs), sines(cosines.size());
  for (size_t position = 0; position < c.context; ++position) {
    for (uint32_t i = 0; i < pairs; ++i) {
      const double angle = double{static_cast<float>(position) * frequencies[i]};
      cosines[position * pairs + i] = static_cast<float>(std::cos(angle));
      sines[position * pairs + i] = static_cast<float>(std::sin(angle));
    }
  }
  const auto table = [&](const std::vector<float>& from, DeviceArray<float>& to) -> Error {
    MODULE_RETURN_IF_ERROR(to.Allocate(std::max<size_t>(from.size(), 1)));
    CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(to.data(), from.data(), from.size() * sizeof(float),
                                         cudaMemcpyHostToDevice, load_.get()));
    return {};
  };
  MODULE_RETURN_IF_ERROR(table(cosines, cosines_));
  MODULE_RETURN_IF_ERROR(table(sines, sines_));
  CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(load_.get()));
  return {};
}

Error Engine::AllocateStep() {
  const size_t rows = RowBucket(std::max(config_.step_tokens_max, RowBucket(config_.rows_max)));
  output_rows_max_ = std::max(RowBucket(config_.rows_max), kLogitsRows);
  MODULE_RETURN_IF_ERROR(x_.Allocate(rows * config_.hidden));
  MODULE_RETURN_IF_ERROR(normed_.Allocate(rows * config_.hidden));
  MODULE_RETURN_IF_ERROR(qkv_out_.Allocate(rows * qkv_width_));
  MODULE_RETURN_IF_ERROR(attended_.Allocate(rows * config_.heads * config_.head_dim));
  MODULE_RETURN_IF_ERROR(gate_up_out_.Allocate(rows * 2 * config_.feed_forward));
  MODULE_RETURN_IF_ERROR(activated_.Allocate(rows * config_.feed_forward));
  MODULE_RETURN_IF_ERROR(logits_.Allocate(size_t{output_rows_max_} * vocab_stride_));
  MODULE_RETURN_IF_ERROR(best_.Allocate(std::max(output_rows_max_, config_.step_tokens_max)));
  MODULE_RETURN_IF_ERROR(best_host_.Allocate(best_.size()));
  MODULE_RETURN_IF_ERROR(draws_host_.Allocate(best_.size()));
  MODULE_RETURN_IF_ERROR(draws_.Allocate(best_.size()));
  MODULE_RETURN_IF_ERROR(
      checksums_host_.Allocate(size_t{config_.step_tokens_max} * config_.layers));
  if (config_.sum != nullptr) MODULE_RETURN_IF_ERROR(sum_host_.Allocate(rows * config_.hidden));
  MODULE_RETURN_IF_ERROR(attention_partials_.Allocate(kPartialBytes));
  MODULE_RETURN_IF_ERROR(attention_tables_.Allocate(kAttentionTableBytes));
  MODULE_RETURN_IF_ERROR(attention_tables_pinned_.Allocate(kAttentionTableBytes));
  workspace_ = {.partials = attention_partials_.data(),
                .partial_bytes = kPartialBytes,
                .tables = attention_tables_.data(),
                .tables_pinned = attention_tables_pinned_.data(),
                .table_bytes = kAttentionTableBytes};
  return {};
}

Error Engine::TuneProducts() {
  std::vector<uint32_t> buckets;
  for (uint32_t rows = 1; rows <= RowBucket(config_.rows_max); rows = RowBucket(rows + 1)) {
    buckets.push_back(rows);
  }
  for (uint32_t rows = 256; rows <= RowBucket(config_.step_tokens_max); rows *= 2) {
    if (std::find(buckets.begin(), buckets.end(), rows) == buckets.end()) buckets.push_back(rows);
  }
  // Zeros would run faster than what is computed later.
  CUDA_RETURN_IF_ERROR(RandomBf16(normed_.data(), normed_.size(), 7, 1.0f, compute_.get()));
  CUDA_RETURN_IF_ERROR(RandomBf16(activated_.data(), activated_.size(), 8, 1.0f, compute_.get()));
  CUDA_RETURN_IF_ERROR(RandomBf16(attended_.data(), attended_.size(), 9, 1.0f, compute_.get()));
  for (uint32_t rows : buckets) {
    const uint32_t count = std::min<uint32_t>(rows < 256 ? kTunedLayers : 2, config_.layers);
    const auto of = [&](uint16_t* Layer::*weight) {
      std::vector<const void*> all;
      for (uint32_t i = 0; i < count; ++i) all.push_back(layers_[i].*weight);
      return all;
    };
    // Outputs fall into buffers that hold nothing yet.
    MODULE_RETURN_IF_ERROR(
        gemm_.Tune(qkv_, rows, of(&Layer::qkv), normed_.data(), qkv_out_.data()));
    MODULE_RETURN_IF_ERROR(gemm_.Tune(attention_output_, rows, of(&Layer::attention_output),
                                      attended_.data(), x_.data()));
    MODULE_RETURN_IF_ERROR(
        gemm_.Tune(gate_up_, rows, of(&Layer::gate_up), normed_.data(), gate_up_out_.data()));
    MODULE_RETURN_IF_ERROR(gemm_.Tune(down_, rows, of(&Layer::down), activated_.data(), x_.data()));
    if (rows <= output_rows_max_ && config_.rank == 0) {
      MODULE_RETURN_IF_ERROR(
          gemm_.Tune(logits_product_, rows, {output_}, normed_.data(), logits_.data()));
    }
  }
  return {};
}

void Engine::LimitPages(uint64_t pages) {
  if (pages >= pages_total()) return;
  pages_ = std::make_unique<PageTable>(1, static_cast<uint32_t>(pages), config_.block_tokens);
}

uint32_t Engine::DecodeBucket(uint32_t rows) const {
  return rows <= config_.rows_max ? RowBucket(rows) : 0;
}

AttentionBatch Engine::BatchOf(const StepTables& tables, uint32_t chunks) const {
  return {.query_starts = tables.device.query_starts,
          .page_starts = tables.device.page_starts,
          .pages = tables.device.pages,
          .last_page_tokens = tables.device.last_page_tokens,
          .chunks = chunks};
}

}  // namespace antiphon::engine::cuda
