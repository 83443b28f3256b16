#include "engine/cpu/weights.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "common/logging.h"
#include "common/memory.h"
#include "common/status_macros.h"
#include "common/thread.h"
#include "engine/cpu/dequantize.h"
#include "engine/cpu/pack.h"

namespace antiphon::engine::cpu {
namespace {

using model::LlamaShape;
using model::ModelFile;
using model::Tensor;

constexpr size_t kImageAlign = 4096;
// Scratch of a step, tables and the process itself, beside the weights.
constexpr uint64_t kMemoryBeside = 128 << 20;

size_t RoundUp(size_t n, size_t to) { return (n + to - 1) / to * to; }

size_t RowBytes(const Tensor& tensor, size_t columns) {
  const model::TypeTraits traits = model::TraitsOf(tensor.type);
  return columns / traits.block_elements * traits.block_bytes;
}

absl::StatusOr<const Tensor*> Find(const ModelFile& file, const std::string& name,
                                   const std::vector<uint64_t>& dims) {
  const Tensor* tensor = file.FindTensor(name);
  if (tensor == nullptr) {
    return absl::FailedPreconditionError(file.wording().Tensor(name) + " is missing");
  }
  std::vector<uint64_t> have = tensor->dims;
  while (have.size() > dims.size() && have.back() == 1) have.pop_back();
  if (have != dims) {
    return absl::FailedPreconditionError(
        fmt::format("{} is {}, expected {}", file.wording().Tensor(name),
                    file.wording().Dims(tensor->dims), file.wording().Dims(dims)));
  }
  if (!CanDequantize(tensor->type)) {
    return absl::FailedPreconditionError(
        fmt::format("{} has type {}, which the CPU engine cannot read", file.wording().Tensor(name),
                    model::TensorTypeName(tensor->type)));
  }
  if (dims[0] % model::TraitsOf(tensor->type).block_elements != 0) {
    return absl::FailedPreconditionError(fmt::format("{}: rows of {} are not whole blocks of {}",
                                                     file.wording().Tensor(name), dims[0],
                                                     model::TensorTypeName(tensor->type)));
  }
  return tensor;
}

absl::StatusOr<std::vector<float>> LoadVector(const ModelFile& file, const std::string& name,
                                              uint32_t size) {
  ASSIGN_OR_RETURN(const Tensor* tensor, Find(file, name, {size}));
  std::vector<float> values(RoundUp(size, kGroupRows), 0.0f);
  Dequantize(tensor->type, tensor->data, size, values.data());
  return values;
}

enum class Cut { kRows, kColumns };  // what a shard has a part of

// `rows` and `columns` are the whole tensor's.
absl::StatusOr<Matrix> FindMatrix(const ModelFile& file, const std::string& name, uint32_t rows,
                                  uint32_t columns, Activations activations, Shard shard, Cut cut) {
  ASSIGN_OR_RETURN(const Tensor* tensor, Find(file, name, {columns, rows}));
  Matrix matrix;
  matrix.tensor = tensor;
  matrix.first_row = cut == Cut::kRows ? shard.Begin(rows) : 0;
  matrix.rows = cut == Cut::kRows ? shard.End(rows) - matrix.first_row : rows;
  matrix.first_column = cut == Cut::kColumns ? shard.Begin(columns) : 0;
  matrix.columns = cut == Cut::kColumns ? shard.End(columns) - matrix.first_column : columns;
  const uint32_t block = model::TraitsOf(tensor->type).block_elements;
  if (matrix.first_column % block != 0 || matrix.columns % block != 0) {
    return absl::FailedPreconditionError(
        fmt::format("{}: tensor_parallel {} would cut blocks of {} columns of {} ({} columns)",
                    file.wording().Tensor(name), shard.size, block,
                    model::TensorTypeName(tensor->type), columns));
  }
  matrix.packed = PackedTypeOf(tensor->type);
  if (activations == Activations::kFloat && matrix.packed.has_value() &&
      UsesQuantisedActivations(*matrix.packed)) {
    matrix.packed.reset();
  }
  return matrix;
}

// `shape` is the whole model's.
absl::StatusOr<LayerWeights> FindLayer(const ModelFile& file, const LlamaShape& shape,
                                       uint32_t layer, Activations activations, Shard shard) {
  const std::string prefix = fmt::format("blk.{}.", layer);
  const uint32_t q_rows = shape.heads * shape.head_dim;
  const uint32_t kv_rows = shape.kv_heads * shape.head_dim;
  LayerWeights w;
  ASSIGN_OR_RETURN(w.attention_norm, LoadVector(file, prefix + "attn_norm.weight", shape.hidden));
  ASSIGN_OR_RETURN(w.feed_forward_norm, LoadVector(file, prefix + "ffn_norm.weight", shape.hidden));
  const auto matrix = [&](const char* name, uint32_t rows, uint32_t columns, Cut cut = Cut::kRows) {
    return FindMatrix(file, prefix + name + ".weight", rows, columns, activations, shard, cut);
  };
  ASSIGN_OR_RETURN(w.q, matrix("attn_q", q_rows, shape.hidden));
  ASSIGN_OR_RETURN(w.k, matrix("attn_k", kv_rows, shape.hidden));
  ASSIGN_OR_RETURN(w.v, matrix("attn_v", kv_rows, shape.hidden));
  ASSIGN_OR_RETURN(w.attention_output, matrix("attn_output", shape.hidden, q_rows, Cut::kColumns));
  ASSIGN_OR_RETURN(w.gate, matrix("ffn_gate", shape.feed_forward, shape.hidden));
  ASSIGN_OR_RETURN(w.up, matrix("ffn_up", shape.feed_forward, shape.hidden));
  ASSIGN_OR_RETURN(w.down, matrix("ffn_down", shape.hidden, shape.feed_forward, Cut::kColumns));
  if (shape.rope_interleaved) {
    w.q.interleaved_dims = w.k.interleaved_dims = shape.rope_dims;
    w.q.head_dim = w.k.head_dim = shape.head_dim;
  }
  const auto bias = [&](const char* name, const Matrix& matrix, uint32_t rows,
                        std::vector<float>& out) -> absl::Status {
    const std::string full = prefix + name + ".bias";
    if (!shape.qkv_bias && file.FindTensor(full) == nullptr) return absl::OkStatus();
    ASSIGN_OR_RETURN(std::vector<float> values, LoadVector(file, full, rows));
    out.assign(RoundUp(matrix.rows, kGroupRows), 0.0f);
    for (uint32_t row = 0; row < matrix.rows; ++row) out[row] = values[matrix.SourceRow(row)];
    return absl::OkStatus();
  };
  RETURN_IF_ERROR(bias("attn_q", w.q, q_rows, w.q_bias));
  RETURN_IF_ERROR(bias("attn_k", w.k, kv_rows, w.k_bias));
  RETURN_IF_ERROR(bias("attn_v", w.v, kv_rows, w.v_bias));
  return w;
}

absl::Status FindRopeFrequencies(const ModelFile& file, Weights& weights) {
  const LlamaShape& shape = weights.shape;
  const uint32_t pairs = shape.rope_dims / 2;
  std::vector<float> divisors(pairs, 1.0f);
  if (shape.has_rope_freqs) {
    ASSIGN_OR_RETURN(divisors, LoadVector(file, "rope_freqs.weight", pairs));
  }
  weights.rope_frequencies.resize(pairs);
  for (uint32_t i = 0; i < pairs; ++i) {
    const double exponent = 2.0 * i / shape.rope_dims;
    const float base = static_cast<float>(1.0 / std::pow(double{shape.rope_base}, exponent));
    weights.rope_frequencies[i] = base / divisors[i] / shape.rope_scale;
  }
  return absl::OkStatus();
}

// Leaves a shard's part in `shape`.
absl::Status ShareOut(Shard shard, LlamaShape& shape) {
  const auto share = [&](const char* name, uint32_t& count) {
    if (count % shard.size != 0) {
      return absl::FailedPreconditionError(fmt::format(
          "tensor_parallel {} does not divide the model's {}, {}", shard.size, name, count));
    }
    count /= shard.size;
    return absl::OkStatus();
  };
  RETURN_IF_ERROR(share("attention.head_count", shape.heads));
  RETURN_IF_ERROR(share("attention.head_count_kv", shape.kv_heads));
  return share("feed_forward_length", shape.feed_forward);
}

// Every matrix that is to be packed, with its place in the image.
struct Packing {
  Matrix* matrix;
  size_t offset;
};

void PackOne(const Matrix& matrix, int group, std::byte* out) {
  const std::byte* rows[kGroupRows];
  for (uint32_t lane = 0; lane < kGroupRows; ++lane) {
    const uint32_t row = static_cast<uint32_t>(group) * kGroupRows + lane;
    rows[lane] = row < matrix.rows ? matrix.SourceData(row) : nullptr;
  }
  PackGroup(*matrix.packed, rows, matrix.columns, out);
}

// Gives every matrix its place; returns the bytes of all of them.
size_t Place(Weights& weights, std::vector<Packing>& packings) {
  size_t bytes = 0;
  const auto place = [&](Matrix& matrix) {
    if (!matrix.packed.has_value()) return;
    packings.push_back({&matrix, bytes});
    bytes += RoundUp(
        PackedGroupBytes(*matrix.packed, matrix.columns) * static_cast<size_t>(matrix.groups()),
        kImageAlign);
  };
  for (LayerWeights& layer : weights.layers) {
    for (Matrix* matrix : {&layer.q, &layer.k, &layer.v, &layer.attention_output, &layer.gate,
                           &layer.up, &layer.down}) {
      place(*matrix);
    }
  }
  place(weights.output);
  return bytes;
}

// Fills `image`, which is zero. `progress` hears 0 before anything is packed: how much of the rest
// this thread packs, and so reports, is chance.
void Pack(const std::vector<Packing>& packings, std::byte* image, int threads,
          const std::function<void(double)>& progress) {
  std::vector<std::pair<size_t, int>> tasks;  // (packing, group)
  for (size_t i = 0; i < packings.size(); ++i) {
    for (int group = 0; group < packings[i].matrix->groups(); ++group) tasks.emplace_back(i, group);
  }
  std::atomic<size_t> next{0};
  constexpr size_t kGrain = 16;
  const auto work = [&](bool report) {
    while (true) {
      const size_t begin = next.fetch_add(kGrain);
      if (begin >= tasks.size()) return;
      for (size_t t = begin; t < std::min(begin + kGrain, tasks.size()); ++t) {
        const auto [index, group] = tasks[t];
        const Matrix& matrix = *packings[index].matrix;
        PackOne(matrix, group,
                image + packings[index].offset +
                    PackedGroupBytes(*matrix.packed, matrix.columns) * static_cast<size_t>(group));
      }
      if (report && progress) {
        progress(static_cast<double>(begin) / static_cast<double>(tasks.size()));
      }
    }
  };
  if (progress) progress(0.0);
  std::vector<Thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back("pack", [&work] { work(false); });
  work(true);
}

absl::Status CheckMemory(size_t bytes) {
  const uint64_t available = MemoryAvailableBytes();
  if (bytes + kMemoryBeside <= available) return absl::OkStatus();
  const auto gib = [](uint64_t n) { return static_cast<double>(n) / (1 << 30); };
  return absl::ResourceExhaustedError(
      fmt::format("the weights need about {:.1f} GiB of memory; {:.1f} GiB can be had (the KV "
                  "store's pool is counted already)",
                  gib(bytes + kMemoryBeside), gib(available)));
}

// Packs, unless another process of this host did.
absl::Status MakeImage(Weights& weights, Activations activations, int threads,
                       const std::function<void(double)>& progress, ImageSource* images) {
  std::vector<Packing> packings;
  const size_t bytes = Place(weights, packings);
  const std::byte* image = nullptr;
  if (images != nullptr && bytes > 0) {
    const std::string name = fmt::format("image {} {} {} of {}", kPackedLayout,
                                         activations == Activations::kFloat ? "float" : "fast",
                                         weights.shard.rank, weights.shard.size);
    auto shared = images->Open(name, bytes);
    if (!shared.ok()) {
      LogInfo("the packed weights are this process's own: {}",
              std::string(shared.status().message()));
    } else {
      if (std::byte* out = (*shared)->fill(); out != nullptr) {
        RETURN_IF_ERROR(CheckMemory(bytes));
        Pack(packings, out, threads, progress);
        RETURN_IF_ERROR((*shared)->Finish());
        LogInfo("packed {} MiB of weights, which this host's workers share", bytes >> 20);
      } else {
        LogInfo("the {} MiB of packed weights were shared by another worker", bytes >> 20);
      }
      weights.shared_image = *std::move(shared);
      image = weights.shared_image->data();
    }
  }
  if (image == nullptr) {
    RETURN_IF_ERROR(CheckMemory(bytes));
    ASSIGN_OR_RETURN(weights.image, Arena::Create(bytes));
    Pack(packings, weights.image.data(), threads, progress);
    image = weights.image.data();
  }
  for (const Packing& packing : packings) packing.matrix->image = image + packing.offset;
  if (progress) progress(1.0);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Arena> Arena::Create(size_t bytes) {
  Arena arena;
  arena.bytes_ = RoundUp(std::max(bytes, size_t{1}), size_t{2} << 20);
  void* data =
      mmap(nullptr, arena.bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    arena.bytes_ = 0;
    return absl::FailedPreconditionError(
        fmt::format("no memory for {} MiB of weights", bytes >> 20));
  }
  arena.data_ = static_cast<std::byte*>(data);
  madvise(data, arena.bytes_, MADV_HUGEPAGE);  // a hint: without it the pages are small
  return arena;
}

Arena::Arena(Arena&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Arena& Arena::operator=(Arena&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Arena::~Arena() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

// Shards begin at whole heads, so that the permutation stays inside them.
uint32_t Matrix::SourceRow(uint32_t row) const {
  row += first_row;
  if (interleaved_dims == 0) return row;
  const uint32_t within = row % head_dim;
  if (within >= interleaved_dims) return row;
  const uint32_t pairs = interleaved_dims / 2;
  return row - within + (within < pairs ? 2 * within : 2 * (within - pairs) + 1);
}

const std::byte* Matrix::SourceData(uint32_t row) const {
  return tensor->data + SourceRow(row) * RowBytes(*tensor, tensor->dims[0]) +
         RowBytes(*tensor, first_column);
}

void Matrix::DequantizeGroup(int group, float* scratch, float* out) const {
  for (uint32_t lane = 0; lane < kGroupRows; ++lane) {
    const uint32_t row = static_cast<uint32_t>(group) * kGroupRows + lane;
    if (row < rows) {
      Dequantize(tensor->type, SourceData(row), columns, scratch);
    } else {
      std::memset(scratch, 0, columns * sizeof(float));
    }
    for (size_t k = 0; k < columns; ++k) out[k * kGroupRows + lane] = scratch[k];
  }
}

absl::Status CheckShards(const ModelFile& file, uint32_t shards) {
  ASSIGN_OR_RETURN(const LlamaShape shape, model::LlamaShapeOf(file));
  const Shard shard{.rank = 0, .size = shards};
  LlamaShape share = shape;
  RETURN_IF_ERROR(ShareOut(shard, share));
  for (uint32_t layer = 0; layer < shape.layers; ++layer) {
    const auto check = [&](const char* name, uint32_t columns) {
      return FindMatrix(file, fmt::format("blk.{}.{}.weight", layer, name), shape.hidden, columns,
                        Activations::kFast, shard, Cut::kColumns)
          .status();
    };
    RETURN_IF_ERROR(check("attn_output", shape.heads * shape.head_dim));
    RETURN_IF_ERROR(check("ffn_down", shape.feed_forward));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Weights>> FindWeights(const ModelFile& file, Activations activations,
                                                     Shard shard) {
  auto weights = std::make_unique<Weights>();
  ASSIGN_OR_RETURN(const LlamaShape shape, model::LlamaShapeOf(file));
  weights->shape = shape;
  weights->shard = shard;
  RETURN_IF_ERROR(ShareOut(shard, weights->shape));
  ASSIGN_OR_RETURN(weights->embedding,
                   Find(file, "token_embd.weight", {shape.hidden, shape.vocab}));
  weights->layers.reserve(shape.layers);
  for (uint32_t layer = 0; layer < shape.layers; ++layer) {
    ASSIGN_OR_RETURN(LayerWeights w, FindLayer(file, shape, layer, activations, shard));
    weights->layers.push_back(std::move(w));
  }
  ASSIGN_OR_RETURN(weights->output_norm, LoadVector(file, "output_norm.weight", shape.hidden));
  ASSIGN_OR_RETURN(weights->output,
                   FindMatrix(file, shape.tied_output ? "token_embd.weight" : "output.weight",
                              shape.vocab, shape.hidden, activations, {}, Cut::kRows));
  // Whole groups of rows, so that no row is padded away inside of the vocabulary.
  const uint32_t groups = static_cast<uint32_t>(weights->output.groups());
  weights->output.first_row = shard.Begin(groups) * kGroupRows;
  weights->output.rows =
      std::min(shape.vocab, shard.End(groups) * kGroupRows) - weights->output.first_row;
  RETURN_IF_ERROR(FindRopeFrequencies(file, *weights));
  return weights;
}

absl::StatusOr<std::unique_ptr<Weights>> LoadWeights(const ModelFile& file, Activations activations,
                                                     int threads,
                                                     const std::function<void(double)>& progress,
                                                     Shard shard, ImageSource* images) {
  ASSIGN_OR_RETURN(std::unique_ptr<Weights> weights, FindWeights(file, activations, shard));
  RETURN_IF_ERROR(MakeImage(*weights, activations, threads, progress, images));
  return weights;
}

}  // namespace antiphon::engine::cpu
