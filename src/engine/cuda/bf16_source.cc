#include "engine/cuda/bf16_source.h"

#include <algorithm>
#include <cstring>

#include "common/thread.h"
#include "engine/cpu/dequantize.h"
#include "engine/cpu/weights.h"
#include "engine/cuda/arithmetic.h"

namespace antiphon::engine::cuda {
namespace {

// One row of `columns` values that begin at `from`.
void RowAsBf16(const model::Tensor& tensor, const std::byte* from, uint64_t columns,
               std::vector<float>& values, uint16_t* to) {
  if (tensor.type == model::TensorType::kBF16) {
    std::memcpy(to, from, columns * 2);
    return;
  }
  values.resize(columns);
  cpu::Dequantize(tensor.type, from, columns, values.data());
  for (uint64_t i = 0; i < columns; ++i) to[i] = ToBf16(values[i]);
}

}  // namespace

WeightSource Bf16Source::Face() {
  WeightSource face;
  face.context = this;
  face.matrix = [](void* context, Weight weight, uint32_t layer, uint64_t first, uint64_t rows,
                   uint16_t* out) {
    static_cast<Bf16Source*>(context)->Fill(weight, layer, first, rows, out);
    return 0;
  };
  face.vector = [](void* context, Weight weight, uint32_t layer, float* out) {
    static_cast<Bf16Source*>(context)->Vector(weight, layer, out);
    return 0;
  };
  return face;
}

// Matrices that the engine has as one.
std::vector<const cpu::Matrix*> Bf16Source::Parts(Weight weight, uint32_t layer) const {
  const cpu::LayerWeights& l = weights_.layers[layer];
  switch (weight) {
    case Weight::kQkv:
      return {&l.q, &l.k, &l.v};
    case Weight::kAttentionOutput:
      return {&l.attention_output};
    case Weight::kGateUp:
      return {&l.gate, &l.up};
    case Weight::kDown:
      return {&l.down};
    default:
      return {&weights_.output};
  }
}

void Bf16Source::Fill(Weight weight, uint32_t layer, uint64_t first, uint64_t rows,
                      uint16_t* out) const {
  const uint64_t threads = std::min<uint64_t>(static_cast<uint64_t>(threads_), rows);
  std::vector<Thread> others;
  const auto part = [&](uint64_t i) {
    FillRows(weight, layer, first + rows * i / threads, first + rows * (i + 1) / threads, first,
             out);
  };
  for (uint64_t i = 1; i < threads; ++i) others.emplace_back("weights", [&part, i] { part(i); });
  part(0);
}

void Bf16Source::FillRows(Weight weight, uint32_t layer, uint64_t begin, uint64_t end,
                          uint64_t first, uint16_t* out) const {
  std::vector<float> values;
  if (weight == Weight::kEmbedding) {
    const model::Tensor& tensor = *weights_.embedding;
    const uint64_t columns = weights_.shape.hidden;
    const model::TypeTraits traits = model::TraitsOf(tensor.type);
    const uint64_t row_bytes = columns / traits.block_elements * traits.block_bytes;
    for (uint64_t row = begin; row < end; ++row) {
      RowAsBf16(tensor, tensor.data + row * row_bytes, columns, values,
                out + (row - first) * columns);
    }
    return;
  }
  uint64_t base = 0;
  for (const cpu::Matrix* matrix : Parts(weight, layer)) {
    for (uint64_t row = std::max(begin, base); row < std::min(end, base + matrix->rows); ++row) {
      RowAsBf16(*matrix->tensor, matrix->SourceData(static_cast<uint32_t>(row - base)),
                matrix->columns, values, out + (row - first) * matrix->columns);
    }
    base += matrix->rows;
  }
}

void Bf16Source::Vector(Weight weight, uint32_t layer, float* out) const {
  const model::LlamaShape& s = weights_.shape;
  const auto copy = [&out](const std::vector<float>& from, size_t size) {
    if (from.empty()) {
      std::fill(out, out + size, 0.0f);
    } else {
      std::copy(from.begin(), from.begin() + static_cast<ptrdiff_t>(size), out);
    }
    out += size;
  };
  switch (weight) {
    case Weight::kAttentionNorm:
      return copy(weights_.layers[layer].attention_norm, s.hidden);
    case Weight::kFeedForwardNorm:
      return copy(weights_.layers[layer].feed_forward_norm, s.hidden);
    case Weight::kOutputNorm:
      return copy(weights_.output_norm, s.hidden);
    case Weight::kQkvBias:
      copy(weights_.layers[layer].q_bias, size_t{s.heads} * s.head_dim);
      copy(weights_.layers[layer].k_bias, size_t{s.kv_heads} * s.head_dim);
      return copy(weights_.layers[layer].v_bias, size_t{s.kv_heads} * s.head_dim);
    default:
      return copy(weights_.rope_frequencies, weights_.rope_frequencies.size());
  }
}

}  // namespace antiphon::engine::cuda
