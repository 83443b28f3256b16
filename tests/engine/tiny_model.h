// Small models of random weights in any format, and their forward pass in double precision, written
// as plainly as can be: what the engine is compared with.
#ifndef ANTIPHON_TESTS_ENGINE_TINY_MODEL_H_
#define ANTIPHON_TESTS_ENGINE_TINY_MODEL_H_

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "engine/cpu/dequantize.h"
#include "model/card.h"
#include "model/gguf.h"
#include "tests/engine/random.h"
#include "tests/model/gguf_builder.h"

namespace antiphon::engine {

struct TinyOptions {
  std::string architecture = "llama";
  model::TensorType type = model::TensorType::kF32;
  uint32_t layers = 2;
  uint32_t hidden = 256;
  uint32_t feed_forward = 512;
  uint32_t heads = 4;
  uint32_t kv_heads = 2;
  bool tied = true;
  bool rope_freqs = false;
  float linear_scale = 1;
  uint32_t rope_dims = 0;  // 0: the whole head
};

// Bytes of `elements` weights of about +-`scale`.
inline std::string RandomTensor(model::TensorType type, size_t elements, float scale,
                                TestRandom& random) {
  using model::TensorType;
  const model::TypeTraits traits = model::TraitsOf(type);
  std::string bytes(elements / traits.block_elements * traits.block_bytes, '\0');
  const auto half = [](float x) {  // positive, normal
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<uint16_t>(((bits >> 23) - 112) << 10 | ((bits >> 13) & 0x3ff));
  };
  const auto put16 = [&](size_t at, uint16_t v) { std::memcpy(&bytes[at], &v, 2); };
  if (type == TensorType::kF32 || type == TensorType::kF16 || type == TensorType::kBF16) {
    for (size_t i = 0; i < elements; ++i) {
      const float x = scale * std::clamp(random.Normal(), -3.0f, 3.0f);
      const float magnitude = std::max(std::abs(x), 1e-3f);
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      if (type == TensorType::kF32) std::memcpy(&bytes[4 * i], &x, 4);
      if (type == TensorType::kBF16) put16(2 * i, static_cast<uint16_t>(bits >> 16));
      if (type == TensorType::kF16) {
        put16(2 * i, static_cast<uint16_t>(half(magnitude) | (x < 0 ? 0x8000 : 0)));
      }
    }
    return bytes;
  }
  for (char& byte : bytes) byte = static_cast<char>(random.Bits());
  for (size_t b = 0; b < bytes.size(); b += traits.block_bytes) {
    const float s = scale * (0.5f + static_cast<float>(random.Uniform()));
    const auto negative_half = [&](float x) { return static_cast<uint16_t>(half(x) | 0x8000); };
    switch (type) {
      case TensorType::kQ8_0:
        put16(b, half(s / 64));
        break;
      case TensorType::kQ4_0:
        put16(b, half(s / 4));
        break;
      case TensorType::kQ5_0:
        put16(b, half(s / 8));
        break;
      case TensorType::kQ4_1:
        put16(b, half(s / 4));
        put16(b + 2, negative_half(s * 1.9f));
        break;
      case TensorType::kQ5_1:
        put16(b, half(s / 8));
        put16(b + 2, negative_half(s * 1.9f));
        break;
      case TensorType::kQ4_K:
        put16(b, half(s / 128));
        put16(b + 2, half(s / 16));
        break;
      case TensorType::kQ5_K:
        put16(b, half(s / 256));
        put16(b + 2, half(s / 16));
        break;
      case TensorType::kQ6_K:
        put16(b + 208, half(std::max(s / 1024, 6.2e-5f)));
        break;
      default:
        break;
    }
  }
  return bytes;
}

// The file's bytes.
inline std::string TinyModelFile(const TinyOptions& o, uint64_t seed = 1) {
  using model::TensorType;
  TestRandom random(seed);
  model::GgufBuilder b;
  const std::string a = o.architecture + ".";
  b.String("general.architecture", o.architecture)
      .U32(a + "block_count", o.layers)
      .U32(a + "embedding_length", o.hidden)
      .U32(a + "feed_forward_length", o.feed_forward)
      .U32(a + "attention.head_count", o.heads)
      .U32(a + "attention.head_count_kv", o.kv_heads)
      .U32(a + "context_length", 2048)
      .F32(a + "attention.layer_norm_rms_epsilon", 1e-5f)
      .F32(a + "rope.freq_base", 10000.0f);
  if (o.rope_dims != 0) b.U32(a + "rope.dimension_count", o.rope_dims);
  if (o.linear_scale != 1) {
    b.String(a + "rope.scaling.type", "linear").F32(a + "rope.scaling.factor", o.linear_scale);
  }
  model::AddTinyTokenizer(b, "gpt-2");
  const auto matrix = [&](const std::string& name, uint64_t columns, uint64_t rows) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(columns));
    b.Tensor(name, o.type, {columns, rows}, RandomTensor(o.type, columns * rows, scale, random));
  };
  const auto vector = [&](const std::string& name, uint64_t size, float mean, float spread) {
    std::string bytes(size * 4, '\0');
    for (uint64_t i = 0; i < size; ++i) {
      const float x = mean + spread * random.Normal();
      std::memcpy(&bytes[4 * i], &x, 4);
    }
    b.Tensor(name, TensorType::kF32, {size}, bytes);
  };
  const uint64_t kv_rows = uint64_t{o.hidden} / o.heads * o.kv_heads;
  matrix("token_embd.weight", o.hidden, model::kTinyVocabulary);
  if (!o.tied) matrix("output.weight", o.hidden, model::kTinyVocabulary);
  for (uint32_t layer = 0; layer < o.layers; ++layer) {
    const std::string p = "blk." + std::to_string(layer) + ".";
    vector(p + "attn_norm.weight", o.hidden, 1, 0.2f);
    matrix(p + "attn_q.weight", o.hidden, o.hidden);
    matrix(p + "attn_k.weight", o.hidden, kv_rows);
    matrix(p + "attn_v.weight", o.hidden, kv_rows);
    matrix(p + "attn_output.weight", o.hidden, o.hidden);
    vector(p + "ffn_norm.weight", o.hidden, 1, 0.2f);
    matrix(p + "ffn_gate.weight", o.hidden, o.feed_forward);
    matrix(p + "ffn_up.weight", o.hidden, o.feed_forward);
    matrix(p + "ffn_down.weight", o.feed_forward, o.hidden);
    if (o.architecture == "qwen2") {
      vector(p + "attn_q.bias", o.hidden, 0, 0.5f);
      vector(p + "attn_k.bias", kv_rows, 0, 0.5f);
      vector(p + "attn_v.bias", kv_rows, 0, 0.5f);
    }
  }
  vector("output_norm.weight", o.hidden, 1, 0.2f);
  if (o.rope_freqs) {
    const uint32_t dims = o.rope_dims != 0 ? o.rope_dims : o.hidden / o.heads;
    vector("rope_freqs.weight", dims / 2, 3, 0.5f);
  }
  return b.Build();
}

class ReferenceModel {
 public:
  explicit ReferenceModel(const model::ModelFile& file)
      : file_(file), shape_(*model::LlamaShapeOf(file)) {}

  // [token][vocab], all positions from 0.
  std::vector<double> Logits(const std::vector<uint32_t>& tokens) const {
    const size_t n = tokens.size(), h = shape_.hidden, d = shape_.head_dim;
    std::vector<double> x(n * h);
    const std::vector<float> embedding = Values("token_embd.weight");
    for (size_t t = 0; t < n; ++t) {
      for (size_t i = 0; i < h; ++i) x[t * h + i] = double{embedding[tokens[t] * h + i]};
    }
    for (uint32_t layer = 0; layer < shape_.layers; ++layer) {
      const std::string p = "blk." + std::to_string(layer) + ".";
      const auto normed = Norm(x, p + "attn_norm.weight");
      auto q = Linear(normed, p + "attn_q", h), k = Linear(normed, p + "attn_k", h);
      const auto v = Linear(normed, p + "attn_v", h);
      Rotate(q, shape_.heads, n);
      Rotate(k, shape_.kv_heads, n);
      std::vector<double> mixed(n * shape_.heads * d);
      for (size_t t = 0; t < n; ++t) {
        for (size_t head = 0; head < shape_.heads; ++head) {
          const size_t kv = head / (shape_.heads / shape_.kv_heads);
          std::vector<double> weight(t + 1);
          double total = 0;
          for (size_t s = 0; s <= t; ++s) {
            double score = 0;
            for (size_t i = 0; i < d; ++i) {
              score += q[(t * shape_.heads + head) * d + i] * k[(s * shape_.kv_heads + kv) * d + i];
            }
            total += weight[s] = std::exp(score / std::sqrt(static_cast<double>(d)));
          }
          for (size_t s = 0; s <= t; ++s) {
            for (size_t i = 0; i < d; ++i) {
              mixed[(t * shape_.heads + head) * d + i] +=
                  weight[s] / total * v[(s * shape_.kv_heads + kv) * d + i];
            }
          }
        }
      }
      Increase(x, Linear(mixed, p + "attn_output", shape_.heads * d));
      const auto normed2 = Norm(x, p + "ffn_norm.weight");
      auto gate = Linear(normed2, p + "ffn_gate", h);
      const auto up = Linear(normed2, p + "ffn_up", h);
      for (size_t i = 0; i < gate.size(); ++i) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
      Increase(x, Linear(gate, p + "ffn_down", shape_.feed_forward));
    }
    return Linear(Norm(x, "output_norm.weight"), shape_.tied_output ? "token_embd" : "output", h);
  }

 private:
  std::vector<float> Values(const std::string& name) const {
    const model::Tensor* tensor = file_.FindTensor(name);
    std::vector<float> out(tensor->elements());
    cpu::Dequantize(tensor->type, tensor->data, out.size(), out.data());
    return out;
  }
  std::vector<double> Norm(const std::vector<double>& x, const std::string& name) const {
    const std::vector<float> w = Values(name);
    std::vector<double> out(x.size());
    for (size_t t = 0; t < x.size(); t += w.size()) {
      double squares = 0;
      for (size_t i = 0; i < w.size(); ++i) squares += x[t + i] * x[t + i];
      const double scale =
          1 / std::sqrt(squares / static_cast<double>(w.size()) + double{shape_.rms_eps});
      for (size_t i = 0; i < w.size(); ++i) out[t + i] = x[t + i] * scale * double{w[i]};
    }
    return out;
  }
  std::vector<double> Linear(const std::vector<double>& x, const std::string& name,
                             size_t columns) const {
    const std::vector<float> w = Values(name + ".weight");
    const size_t rows = w.size() / columns, n = x.size() / columns;
    std::vector<float> bias(rows, 0.0f);
    if (file_.FindTensor(name + ".bias") != nullptr) bias = Values(name + ".bias");
    std::vector<double> out(n * rows);
    for (size_t t = 0; t < n; ++t) {
      for (size_t r = 0; r < rows; ++r) {
        double sum = double{bias[r]};
        for (size_t c = 0; c < columns; ++c) sum += double{w[r * columns + c]} * x[t * columns + c];
        out[t * rows + r] = sum;
      }
    }
    return out;
  }
  void Rotate(std::vector<double>& x, size_t heads, size_t n) const {
    const size_t pairs = shape_.rope_dims / 2;
    std::vector<float> divisors(pairs, 1.0f);
    if (shape_.has_rope_freqs) divisors = Values("rope_freqs.weight");
    for (size_t t = 0; t < n; ++t) {
      for (size_t head = 0; head < heads; ++head) {
        double* v = &x[(t * heads + head) * shape_.head_dim];
        for (size_t i = 0; i < pairs; ++i) {
          const double frequency =
              std::pow(double{shape_.rope_base}, -2.0 * static_cast<double>(i) / shape_.rope_dims) /
              double{divisors[i]} / double{shape_.rope_scale};
          const double angle = static_cast<double>(t) * frequency;
          double& a = v[shape_.rope_interleaved ? 2 * i : i];
          double& b = v[shape_.rope_interleaved ? 2 * i + 1 : i + pairs];
          const double rotated = a * std::cos(angle) - b * std::sin(angle);
          b = b * std::cos(angle) + a * std::sin(angle);
          a = rotated;
        }
      }
    }
  }
  static void Increase(std::vector<double>& x, const std::vector<double>& by) {
    for (size_t i = 0; i < x.size(); ++i) x[i] += by[i];
  }

  const model::ModelFile& file_;
  const model::LlamaShape shape_;
};

}  // namespace antiphon::engine

#endif  // ANTIPHON_TESTS_ENGINE_TINY_MODEL_H_
