#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <limits>
#include <set>
#include <utility>

#include "common/status_macros.h"
#include "model/card.h"
#include "model/model_file.h"

namespace antiphon::model {
namespace {

absl::Status Unservable(std::string message) {
  return absl::FailedPreconditionError(std::move(message));
}

// Absent and ill-typed keys are what keeps a file from being served, with the key's name.
template <typename T>
absl::StatusOr<T> Needed(absl::StatusOr<T> value) {
  if (value.ok()) return value;
  return Unservable(std::string(value.status().message()));
}

bool IsServedType(TensorType type) {
  switch (type) {
    case TensorType::kF32:
    case TensorType::kF16:
    case TensorType::kBF16:
    case TensorType::kQ8_0:
    case TensorType::kQ4_0:
    case TensorType::kQ4_1:
    case TensorType::kQ5_0:
    case TensorType::kQ5_1:
    case TensorType::kQ4_K:
    case TensorType::kQ5_K:
    case TensorType::kQ6_K:
      return true;
    default:
      return false;
  }
}

class ShapeReader {
 public:
  explicit ShapeReader(const ModelFile& file) : file_(file) {}

  absl::StatusOr<LlamaShape> Read() {
    RETURN_IF_ERROR(file_.contents().model_obstacle);
    RETURN_IF_ERROR(ReadArchitecture());
    RETURN_IF_ERROR(ReadSizes());
    RETURN_IF_ERROR(ReadRope());
    RETURN_IF_ERROR(RefuseVariants());
    if (file_.tensors().empty()) {
      return Unservable("the file has no tensors: it is only a vocabulary");
    }
    RETURN_IF_ERROR(CheckTensors());
    return shape_;
  }

 private:
  std::string Key(const char* name) const { return shape_.architecture + "." + name; }
  // As messages call it.
  std::string Text(const char* name) const { return file_.wording().Key(Key(name)); }

  absl::Status Size(const char* name, uint64_t max, uint32_t& out) {
    ASSIGN_OR_RETURN(const uint64_t value, Needed(file_.GetUint(Key(name))));
    return Bounded(name, value, max, out);
  }
  absl::Status SizeOr(const char* name, uint64_t otherwise, uint64_t max, uint32_t& out) {
    ASSIGN_OR_RETURN(const uint64_t value, Needed(file_.GetUintOr(Key(name), otherwise)));
    return Bounded(name, value, max, out);
  }
  absl::Status Bounded(const char* name, uint64_t value, uint64_t max, uint32_t& out) {
    if (value == 0 || value > max) {
      return Unservable(fmt::format("{} is {}, 1 to {} are served", Text(name), value, max));
    }
    out = static_cast<uint32_t>(value);
    return absl::OkStatus();
  }

  absl::Status ReadArchitecture() {
    ASSIGN_OR_RETURN(shape_.architecture, Needed(file_.GetString("general.architecture")));
    if (shape_.architecture != "llama" && shape_.architecture != "qwen2") {
      return Unservable(fmt::format("{} is \"{}\": llama and qwen2 are served",
                                    file_.wording().Key("general.architecture"),
                                    shape_.architecture));
    }
    ASSIGN_OR_RETURN(const uint64_t parts, Needed(file_.GetUintOr("split.count", 1)));
    if (parts > 1) {
      return Unservable(
          fmt::format("GGUF key split.count is {}: this file is one part of a model; "
                      "merge them with llama-gguf-split --merge",
                      parts));
    }
    return absl::OkStatus();
  }

  absl::Status ReadSizes() {
    RETURN_IF_ERROR(Size("block_count", 1024, shape_.layers));
    RETURN_IF_ERROR(Size("embedding_length", 1u << 20, shape_.hidden));
    RETURN_IF_ERROR(Size("feed_forward_length", 1u << 22, shape_.feed_forward));
    RETURN_IF_ERROR(Size("attention.head_count", 4096, shape_.heads));
    RETURN_IF_ERROR(SizeOr("attention.head_count_kv", shape_.heads, 4096, shape_.kv_heads));
    RETURN_IF_ERROR(Size("context_length", 1u << 30, shape_.context));
    if (shape_.heads % shape_.kv_heads != 0) {
      return Unservable(fmt::format("{} ({}) is no multiple of {} ({})",
                                    Text("attention.head_count"), shape_.heads,
                                    Text("attention.head_count_kv"), shape_.kv_heads));
    }
    const bool given = file_.metadata().contains(Key("attention.key_length"));
    if (!given && shape_.hidden % shape_.heads != 0) {
      return Unservable(fmt::format("{} is missing and {} is no multiple of {}",
                                    Text("attention.key_length"), Text("embedding_length"),
                                    Text("attention.head_count")));
    }
    RETURN_IF_ERROR(SizeOr("attention.key_length", std::max(1u, shape_.hidden / shape_.heads), 4096,
                           shape_.head_dim));
    uint32_t value_dim = 0;
    RETURN_IF_ERROR(SizeOr("attention.value_length", shape_.head_dim, 4096, value_dim));
    if (value_dim != shape_.head_dim) {
      return Unservable(fmt::format("{} ({}) differs from the key length ({})",
                                    Text("attention.value_length"), value_dim, shape_.head_dim));
    }
    ASSIGN_OR_RETURN(const double eps,
                     Needed(file_.GetDouble(Key("attention.layer_norm_rms_epsilon"))));
    if (!(eps > 0 && eps < 1)) {
      return Unservable(fmt::format("{} is {}", Text("attention.layer_norm_rms_epsilon"), eps));
    }
    shape_.rms_eps = static_cast<float>(eps);
    return absl::OkStatus();
  }

  absl::Status ReadRope() {
    shape_.rope_interleaved =
        shape_.architecture == "llama" && file_.contents().llama_rows_interleaved;
    ASSIGN_OR_RETURN(const double base, Needed(file_.GetDoubleOr(Key("rope.freq_base"), 10'000)));
    if (!(base >= 1 && base <= 1e12)) {
      return Unservable(fmt::format("{} is {}", Text("rope.freq_base"), base));
    }
    shape_.rope_base = static_cast<float>(base);
    RETURN_IF_ERROR(SizeOr("rope.dimension_count", shape_.head_dim, 4096, shape_.rope_dims));
    if (shape_.rope_dims % 2 != 0 || shape_.rope_dims > shape_.head_dim) {
      return Unservable(fmt::format("{} is {}: an even number up to the head's {} is served",
                                    Text("rope.dimension_count"), shape_.rope_dims,
                                    shape_.head_dim));
    }
    const auto type = Needed(file_.GetStringOr(Key("rope.scaling.type"), "none"));
    RETURN_IF_ERROR(type.status());
    if (*type != "none" && *type != "linear") {
      return Unservable(
          fmt::format("{} is \"{}\": none, linear and Llama 3's "
                      "rope_freqs.weight are served",
                      Text("rope.scaling.type"), *type));
    }
    // Files from before 2024 write the factor alone, under another name.
    ASSIGN_OR_RETURN(const double old, Needed(file_.GetDoubleOr(Key("rope.scale_linear"), 1)));
    ASSIGN_OR_RETURN(double factor, Needed(file_.GetDoubleOr(Key("rope.scaling.factor"), old)));
    if (*type == "none" && !file_.metadata().contains(Key("rope.scale_linear"))) factor = 1;
    if (!(factor >= 1 && factor <= 1e6)) {
      return Unservable(fmt::format("{} is {}", Text("rope.scaling.factor"), factor));
    }
    shape_.rope_scale = static_cast<float>(factor);
    return absl::OkStatus();
  }

  // Keys of the two architectures that change the arithmetic in ways we do not compute.
  absl::Status RefuseVariants() {
    ASSIGN_OR_RETURN(const uint64_t experts, Needed(file_.GetUintOr(Key("expert_count"), 0)));
    if (experts > 0) {
      return Unservable(fmt::format("{} is {}: mixtures of experts are not served",
                                    Text("expert_count"), experts));
    }
    ASSIGN_OR_RETURN(const uint64_t window,
                     Needed(file_.GetUintOr(Key("attention.sliding_window"), 0)));
    if (window > 0 && window < shape_.context) {
      return Unservable(fmt::format("{} is {}: sliding windows are not served",
                                    Text("attention.sliding_window"), window));
    }
    for (const char* name : {"attention.clamp_kqv", "attention.scale", "logit_scale",
                             "residual_scale", "embedding_scale"}) {
      ASSIGN_OR_RETURN(const double value, Needed(file_.GetDoubleOr(Key(name), 0)));
      if (value != 0) return Unservable(fmt::format("{} is {}", Text(name), value));
    }
    return absl::OkStatus();
  }

  absl::Status Tensor(const std::string& name, std::vector<uint64_t> dims) {
    known_.insert(name);
    const model::Tensor* tensor = file_.FindTensor(name);
    const std::string text = file_.wording().Tensor(name);
    if (tensor == nullptr) return Unservable(fmt::format("{} is missing", text));
    std::vector<uint64_t> have = tensor->dims;
    while (have.size() > dims.size() && have.back() == 1) have.pop_back();
    if (have != dims) {
      return Unservable(fmt::format("{} has dimensions {}, the keys of the file ask for {}", text,
                                    file_.wording().Dims(tensor->dims),
                                    file_.wording().Dims(dims)));
    }
    if (!IsServedType(tensor->type)) {
      return Unservable(
          fmt::format("{} has type {}, which is not served", text, TensorTypeName(tensor->type)));
    }
    return absl::OkStatus();
  }

  absl::Status CheckLayer(uint32_t layer) {
    const std::string prefix = fmt::format("blk.{}.", layer);
    const uint64_t q_rows = uint64_t{shape_.heads} * shape_.head_dim;
    const uint64_t kv_rows = uint64_t{shape_.kv_heads} * shape_.head_dim;
    const uint64_t hidden = shape_.hidden;
    const uint64_t feed_forward = shape_.feed_forward;
    RETURN_IF_ERROR(Tensor(prefix + "attn_norm.weight", {hidden}));
    RETURN_IF_ERROR(Tensor(prefix + "attn_q.weight", {hidden, q_rows}));
    RETURN_IF_ERROR(Tensor(prefix + "attn_k.weight", {hidden, kv_rows}));
    RETURN_IF_ERROR(Tensor(prefix + "attn_v.weight", {hidden, kv_rows}));
    RETURN_IF_ERROR(Tensor(prefix + "attn_output.weight", {q_rows, hidden}));
    RETURN_IF_ERROR(Tensor(prefix + "ffn_norm.weight", {hidden}));
    RETURN_IF_ERROR(Tensor(prefix + "ffn_gate.weight", {hidden, feed_forward}));
    RETURN_IF_ERROR(Tensor(prefix + "ffn_up.weight", {hidden, feed_forward}));
    RETURN_IF_ERROR(Tensor(prefix + "ffn_down.weight", {feed_forward, hidden}));
    if (shape_.qkv_bias) {
      RETURN_IF_ERROR(Tensor(prefix + "attn_q.bias", {q_rows}));
      RETURN_IF_ERROR(Tensor(prefix + "attn_k.bias", {kv_rows}));
      RETURN_IF_ERROR(Tensor(prefix + "attn_v.bias", {kv_rows}));
    }
    known_.insert(prefix + "attn_rot_embd.weight");  // old converters' rope table, used by nobody
    return absl::OkStatus();
  }

  absl::Status CheckTensors() {
    const model::Tensor* embedding = file_.FindTensor("token_embd.weight");
    if (embedding == nullptr) {
      return Unservable(file_.wording().Tensor("token_embd.weight") + " is missing");
    }
    const uint64_t rows = embedding->dims.size() > 1 ? embedding->dims[1] : 1;
    ASSIGN_OR_RETURN(const uint64_t vocab, Needed(file_.GetUintOr(Key("vocab_size"), rows)));
    if (vocab == 0 || vocab > (1u << 24)) {
      return Unservable(fmt::format("the vocabulary has {} tokens", vocab));
    }
    shape_.vocab = static_cast<uint32_t>(vocab);
    RETURN_IF_ERROR(CheckTokens());
    shape_.qkv_bias =
        shape_.architecture == "qwen2" || file_.FindTensor("blk.0.attn_q.bias") != nullptr;
    shape_.tied_output = file_.FindTensor("output.weight") == nullptr;
    shape_.has_rope_freqs = file_.FindTensor("rope_freqs.weight") != nullptr;
    RETURN_IF_ERROR(Tensor("token_embd.weight", {shape_.hidden, shape_.vocab}));
    for (uint32_t layer = 0; layer < shape_.layers; ++layer) RETURN_IF_ERROR(CheckLayer(layer));
    RETURN_IF_ERROR(Tensor("output_norm.weight", {shape_.hidden}));
    if (!shape_.tied_output) {
      RETURN_IF_ERROR(Tensor("output.weight", {shape_.hidden, shape_.vocab}));
    }
    if (shape_.has_rope_freqs) {
      RETURN_IF_ERROR(Tensor("rope_freqs.weight", {shape_.rope_dims / 2}));
    }
    for (const model::Tensor& tensor : file_.tensors()) {
      if (!known_.contains(tensor.name)) {
        return Unservable(
            fmt::format("{} is none that the architecture {} has here: ignoring it would change "
                        "the answers",
                        file_.wording().Tensor(tensor.name), shape_.architecture));
      }
    }
    return absl::OkStatus();
  }

  absl::Status CheckTokens() const {
    const auto it = file_.metadata().find("tokenizer.ggml.tokens");
    if (it == file_.metadata().end()) return absl::OkStatus();  // the tokenizer says so better
    const Array* tokens = std::get_if<Array>(&it->second.v);
    if (tokens != nullptr && SizeOf(*tokens) > shape_.vocab) {
      return Unservable(fmt::format("{} has {} tokens and {} {} rows",
                                    file_.wording().Key("tokenizer.ggml.tokens"), SizeOf(*tokens),
                                    file_.wording().Tensor("token_embd.weight"), shape_.vocab));
    }
    return absl::OkStatus();
  }

  const ModelFile& file_;
  LlamaShape shape_;
  std::set<std::string> known_;
};

}  // namespace

absl::StatusOr<LlamaShape> LlamaShapeOf(const ModelFile& file) { return ShapeReader(file).Read(); }

}  // namespace antiphon::model
