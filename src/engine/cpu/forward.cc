#include "engine/cpu/forward.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "common/status_macros.h"
#include "engine/cpu/dequantize.h"

namespace antiphon::engine::cpu {
namespace {

// Rows of a product that stay in a core's second-level cache while the weights pass by. A multiple
// of kRowTile.
constexpr size_t kProductRows = 128;

}  // namespace

Forward::Forward(const Weights* weights, const Kernels* kernels, const KvLayout& layout,
                 uint32_t rows_max, int threads, Comm* comm, absl::Duration timeout)
    : weights_(weights),
      kernels_(kernels),
      layout_(layout),
      threads_(threads),
      comm_(comm),
      timeout_(timeout),
      pieces_left_(rows_max * weights->shape.kv_heads),
      piece_tiles_(static_cast<uint32_t>(
          std::max<size_t>(kPieceBytes / (2 * kAttentionTile * layout.token_bytes()), 1))) {
  const model::LlamaShape& s = weights->shape;
  const size_t q_columns = size_t{s.heads} * s.head_dim;
  const size_t kv_columns = RoundUp(size_t{s.kv_heads} * s.head_dim, kGroupRows);
  hidden_stride_ = RoundUp(s.hidden, kGroupRows);
  gate_stride_ = RoundUp(s.feed_forward, kGroupRows);
  input_stride_ = RoundUp(std::max({size_t{s.hidden}, q_columns, size_t{s.feed_forward}}), 32);
  k_column_ = RoundUp(q_columns, kGroupRows);
  v_column_ = k_column_ + kv_columns;
  qkv_stride_ = v_column_ + kv_columns;
  vocab_stride_ = RoundUp(s.vocab, kGroupRows);
  padded_dim_ = RoundUp(s.head_dim, kGroupRows);

  x_.Allocate(rows_max * hidden_stride_);
  qkv_.Allocate(rows_max * qkv_stride_);
  // Operands of all rows, or of a strip on each thread.
  const size_t output_rows = std::min<size_t>(rows_max, kOutputRows);
  const size_t operand_rows =
      std::max<size_t>(rows_max, kStripRowsMax * static_cast<size_t>(threads));
  input_.Allocate(operand_rows * input_stride_);
  quant_.Allocate(QuantTileBytes(std::max(operand_rows, 2 * output_rows), input_stride_) /
                      sizeof(CacheLine) +
                  1);
  gate_up_.Allocate(operand_rows * 2 * gate_stride_);
  cos_.Allocate(rows_max * (s.rope_dims / 2));
  sin_.Allocate(cos_.size());
  if (comm_ == nullptr) {
    logits_.Allocate(output_rows * vocab_stride_);
  } else {
    partial_.Allocate(x_.size());
    // The last group of the vocabulary is padded, so every share is of whole groups.
    const size_t size = weights->shard.size, groups = vocab_stride_ / kGroupRows;
    shard_stride_ = (groups + size - 1) / size * kGroupRows;
    shard_logits_.Allocate(output_rows * shard_stride_);
    if (weights->shard.rank == 0) {
      gathered_logits_.Allocate(size * output_rows * shard_stride_);
      logits_.Allocate(output_rows * vocab_stride_);
    }
  }
  rows_.reserve(rows_max);
  attention_tasks_.reserve(rows_max);
  const size_t strips_max = rows_max / kStripRows + 1;
  strips_.reserve(strips_max);
  written_ = std::vector<std::atomic<uint32_t>>(strips_max);
  unwritten_ = std::vector<std::atomic<uint32_t>>(s.layers);
  output_rows_.reserve(rows_max);
  wanted_sums_.reserve(rows_max);

  const auto quantised = [](const Matrix& m) {
    return m.packed.has_value() && UsesQuantisedActivations(*m.packed);
  };
  const auto raw = [](const Matrix& m) { return !m.packed.has_value(); };
  size_t raw_columns = 0;
  const auto see = [&](const Matrix& m) {
    any_quantised_ = any_quantised_ || quantised(m);
    any_raw_ = any_raw_ || raw(m);
    if (raw(m)) raw_columns = std::max<size_t>(raw_columns, m.columns);
  };
  for (const LayerWeights& w : weights->layers) {
    for (const Matrix* m : {&w.q, &w.k, &w.v, &w.attention_output, &w.gate, &w.up, &w.down}) {
      see(*m);
    }
  }
  see(weights->output);

  const size_t queries = size_t{kAttentionRows} * (s.heads / s.kv_heads);
  scratch_.resize(static_cast<size_t>(threads));
  for (Scratch& scratch : scratch_) {
    scratch.input.resize(kOwnRows * input_stride_);
    scratch.quant.resize(QuantTileBytes(2 * kOwnRows, input_stride_) / sizeof(CacheLine) + 1);
    scratch.queries.resize(queries * padded_dim_);
    scratch.attended.resize(queries * padded_dim_);
    scratch.attention.resize(AttentionScratchFloats(queries, padded_dim_));
    CHECK(BeginsAtALine(scratch.attention.data()));
    scratch.limits.resize(queries);
    scratch.dequantized.resize(raw_columns * kGroupRows);
    scratch.dequantized_row.resize(raw_columns);
  }
}

void Forward::ReleaseScratch() {
  quant_.Release();
  for (Zeroed<float>* floats : {&x_, &input_, &qkv_, &gate_up_, &cos_, &sin_, &logits_, &partial_,
                                &shard_logits_, &gathered_logits_}) {
    floats->Release();
  }
}

void Forward::Run(Team& team, int thread, const std::function<void(uint32_t)>& on_layer) {
  Embed(team);
  if (failed_.load(std::memory_order_relaxed)) return;
  if (!strips_.empty()) {
    RunStrips(team, thread, on_layer);
  } else {
    const uint32_t layers = weights_->shape.layers;
    const std::function<void(uint32_t)> later = [](uint32_t) {};
    for (uint32_t layer = 0; layer < layers; ++layer) {
      if (!RunLayer(team, thread, layer, wanted_sums_.empty() ? on_layer : later)) return;
    }
    if (!wanted_sums_.empty()) {
      const int sums = static_cast<int>(wanted_sums_.size() * layers);
      team.ForEach(sums, 8, [&](int begin, int end) {
        for (int i = begin; i < end; ++i) {
          const auto at = static_cast<uint32_t>(i);
          SumBlock(at % layers, at / layers);
        }
      });
      if (thread == 0) on_layer(layers);
    }
  }
  Output(team, thread);
}

void Forward::SumBlock(uint32_t layer, size_t index) {
  const WantedSums& wanted = wanted_sums_[index];
  wanted.sums[layer] =
      LayerChecksum(layout_, wanted.payload + layer * layout_.layer_bytes(), wanted.tokens);
}

void Forward::Fail(absl::Status why) {
  if (status_.ok()) status_ = std::move(why);
  failed_.store(true, std::memory_order_relaxed);
}

void Forward::Embed(Team& team) {
  const model::LlamaShape& s = weights_->shape;
  const model::Tensor& table = *weights_->embedding;
  const model::TypeTraits traits = model::TraitsOf(table.type);
  const size_t row_bytes = size_t{s.hidden} / traits.block_elements * traits.block_bytes;
  const size_t pairs = s.rope_dims / 2;
  team.ForEach(static_cast<int>(rows_.size()), 4, [&](int begin, int end) {
    for (size_t row = static_cast<size_t>(begin); row < static_cast<size_t>(end); ++row) {
      float* x = &x_[row * hidden_stride_];
      Dequantize(table.type, table.data + rows_[row].token * row_bytes, s.hidden, x);
      std::fill(x + s.hidden, x + hidden_stride_, 0.0f);
      // The angle is rounded to float before its cosine, as the reference implementations do; the
      // cosine itself is computed in double so that it does not depend on the C library's float
      // one.
      const float position = static_cast<float>(rows_[row].position);
      for (size_t i = 0; i < pairs; ++i) {
        const double angle = double{position * weights_->rope_frequencies[i]};
        cos_[row * pairs + i] = static_cast<float>(std::cos(angle));
        sin_[row * pairs + i] = static_cast<float>(std::sin(angle));
      }
    }
  });
}

Forward::Operand Forward::OperandOf(int thread, size_t rows) {
  if (rows > kOwnRows) return {input_.data(), quant_.data()->bytes};
  Scratch& scratch = scratch_[static_cast<size_t>(thread)];
  return {scratch.input.data(), scratch.quant.data()->bytes};
}

void Forward::Quantise(const float* input, const Operand& operand, size_t row, size_t rows,
                       size_t columns) {
  if (!any_quantised_) return;
  const size_t tile = row / kRowTile;
  const size_t tile_rows = std::min<size_t>(kRowTile, rows - tile * kRowTile);
  kernels_->quantize_row(input, columns, static_cast<int>(row % kRowTile),
                         static_cast<int>(tile_rows),
                         operand.quant + tile * QuantTileBytes(kRowTile, columns));
}

void Forward::Normalise(Team& team, const Operand& operand, const float* x,
                        const std::vector<float>& weight, size_t rows) {
  ForRows(team, rows, [&](size_t row) { NormaliseRow(operand, x, weight, row, rows); });
}

void Forward::NormaliseRow(const Operand& operand, const float* x, const std::vector<float>& weight,
                           size_t row, size_t rows) {
  const model::LlamaShape& s = weights_->shape;
  float* input = operand.input + row * input_stride_;
  kernels_->rms_norm(x + row * hidden_stride_, weight.data(), hidden_stride_, s.hidden, s.rms_eps,
                     input);
  Quantise(input, operand, row, rows, s.hidden);
}

void Forward::ActivateRow(const Operand& operand, const float* gate, size_t row, size_t rows) {
  const float* g = gate + row * 2 * gate_stride_;
  float* input = operand.input + row * input_stride_;
  kernels_->silu_mul(g, g + gate_stride_, gate_stride_, input);
  Quantise(input, operand, row, rows, weights_->shape.feed_forward);
}

void Forward::MultiplyGroups(int thread, const Operand& operand, const Product& product,
                             size_t first_row, size_t rows, int group, int groups) {
  const Matrix& matrix = *product.matrix;
  MatMul m;
  m.columns = matrix.columns;
  m.groups = groups;
  m.x = operand.input + first_row * input_stride_;
  m.x_stride = input_stride_;
  const size_t first_place = product.fine ? 2 * first_row : first_row;
  m.x_quant = operand.quant + first_place / kRowTile * QuantTileBytes(kRowTile, matrix.columns);
  m.rows = static_cast<int>(rows);
  m.out = product.out;
  m.out_stride = product.out_stride;
  m.add = product.add;
  m.fine = product.fine;
  if (matrix.packed.has_value()) {
    m.weights = matrix.image +
                PackedGroupBytes(*matrix.packed, matrix.columns) * static_cast<size_t>(group);
    kernels_->matmul[static_cast<int>(*matrix.packed)](m);
    return;
  }
  Scratch& scratch = scratch_[static_cast<size_t>(thread)];
  m.weights = reinterpret_cast<const std::byte*>(scratch.dequantized.data());
  m.groups = 1;
  for (int g = group; g < group + groups; ++g, m.out += kGroupRows) {
    matrix.DequantizeGroup(g, scratch.dequantized_row.data(), scratch.dequantized.data());
    kernels_->matmul[static_cast<int>(PackedType::kF32)](m);
  }
}

void Forward::Multiply(Team& team, int thread, const Operand& operand, size_t rows,
                       std::initializer_list<Product> products) {
  int groups = 0;
  bool raw = false;
  size_t run = 1;  // groups
  for (const Product& product : products) {
    const Matrix& matrix = *product.matrix;
    groups += matrix.groups();
    raw = raw || !matrix.packed.has_value();
    if (!raw) run = std::max(run, RunGroups(matrix));
  }
  // Dequantising is what the slow path costs: it does so once for all rows.
  const size_t block_rows = raw ? rows : kProductRows;
  const int blocks = static_cast<int>((rows + block_rows - 1) / block_rows);
  const auto multiply = [&](int begin, int end) {
    for (int stop; begin < end; begin = stop) {
      const int block = begin / groups;
      stop = std::min(end, (block + 1) * groups);
      const size_t first_row = static_cast<size_t>(block) * block_rows;
      int first = block * groups;  // group of the product at hand
      for (const Product& product : products) {
        const int from = std::max(begin, first);
        const int to = std::min(stop, first + product.matrix->groups());
        if (from < to) {
          Product part = product;
          part.out += first_row * part.out_stride + static_cast<size_t>(from - first) * kGroupRows;
          MultiplyGroups(thread, operand, part, first_row, std::min(block_rows, rows - first_row),
                         from - first, to - from);
        }
        first += product.matrix->groups();
      }
    }
  };
  LookAhead& ahead = scratch_[static_cast<size_t>(thread)].ahead;
  team.ForRuns(thread, blocks * groups, static_cast<int>(raw ? 1 : run), multiply,
               [&] { return ahead.Fetch(kLinesALook); });
}

size_t Forward::RunGroups(const Matrix& packed) {
  return std::max(kRunBytes / PackedGroupBytes(*packed.packed, packed.columns), kRunGroups);
}

void Forward::ExpectProduct(int thread, std::initializer_list<const Matrix*> matrices) {
  int groups = 0;
  for (const Matrix* matrix : matrices) groups += matrix->groups();
  int group = Shares::PartOf(thread, threads_, groups).begin;
  for (const Matrix* matrix : matrices) {
    if (group >= matrix->groups()) {
      group -= matrix->groups();
      continue;
    }
    if (!matrix->packed.has_value()) return;
    const size_t group_bytes = PackedGroupBytes(*matrix->packed, matrix->columns);
    const size_t left = group_bytes * static_cast<size_t>(matrix->groups() - group);
    scratch_[static_cast<size_t>(thread)].ahead.Add(
        matrix->image + group_bytes * static_cast<size_t>(group), std::min(left, kProductAhead));
    return;
  }
}

bool Forward::AddProduct(Team& team, int thread, const Operand& operand, const Matrix& matrix,
                         float* x, size_t rows) {
  if (comm_ == nullptr) {
    Multiply(team, thread, operand, rows, {{&matrix, x, hidden_stride_, true}});
    return true;
  }
  Multiply(team, thread, operand, rows, {{&matrix, partial_.data(), hidden_stride_, false}});
  if (thread == 0) {
    absl::Status status =
        comm_->AllReduceSum(absl::MakeSpan(partial_.data(), rows * hidden_stride_), timeout_);
    if (!status.ok()) Fail(std::move(status));
  }
  team.Barrier();
  if (failed_.load(std::memory_order_relaxed)) return false;
  team.ForEach(static_cast<int>(rows), 4, [&](int begin, int end) {
    for (size_t row = static_cast<size_t>(begin); row < static_cast<size_t>(end); ++row) {
      kernels_->add(x + row * hidden_stride_, &partial_[row * hidden_stride_], hidden_stride_);
    }
  });
  return true;
}

bool Forward::RunLayer(Team& team, int thread, uint32_t layer,
                       const std::function<void(uint32_t)>& on_layer) {
  const model::LlamaShape& s = weights_->shape;
  const LayerWeights& w = weights_->layers[layer];
  const size_t rows = rows_.size();
  const bool tells = thread == 0;
  float* x = x_.data();
  float* qkv = qkv_.data();

  LookAhead& ahead = scratch_[static_cast<size_t>(thread)].ahead;

  const Operand operand = OperandOf(thread, rows);
  Normalise(team, operand, x, w.attention_norm, rows);
  ahead.Clear();
  BeginCache(thread);
  ExpectCache(thread, layer);
  Multiply(team, thread, operand, rows,
           {{&w.q, qkv, qkv_stride_, false},
            {&w.k, qkv + k_column_, qkv_stride_, false},
            {&w.v, qkv + v_column_, qkv_stride_, false}});
  if (writes_apart_) {
    team.ForEach(static_cast<int>(rows), 4, [&](int begin, int end) {
      for (int row = begin; row < end; ++row) WriteCache(layer, static_cast<size_t>(row));
    });
    if (tells && comm_ == nullptr) on_layer(layer + 1);
  }

  const int tasks = HeadTasks();
  team.ForRuns(
      thread, tasks, 1,
      [&](int index, int) {
        const HeadTask task = HeadTaskAt(index);
        const HeadTask next = index + 1 < tasks ? HeadTaskAt(index + 1) : HeadTask{};
        AttendTask(thread, layer, task, next, &input_[task.task->first_row * input_stride_]);
      },
      [&] { return ahead.Fetch(kLinesALook); });
  if (!writes_apart_ && tells && comm_ == nullptr) on_layer(layer + 1);
  const Operand attended{input_.data(), operand.quant};
  ForRows(team, rows, [&](size_t row) {
    Quantise(&input_[row * input_stride_], attended, row, rows, size_t{s.heads} * s.head_dim);
  });
  ahead.Clear();
  ExpectProduct(thread, {&w.gate, &w.up});
  if (!AddProduct(team, thread, attended, w.attention_output, x, rows)) return false;
  // Whoever has come to the sum has written its heads.
  if (tells && comm_ != nullptr) on_layer(layer + 1);

  Normalise(team, operand, x, w.feed_forward_norm, rows);
  ahead.Clear();
  ExpectProduct(thread, {&w.down});
  Multiply(team, thread, operand, rows,
           {{&w.gate, gate_up_.data(), 2 * gate_stride_, false},
            {&w.up, gate_up_.data() + gate_stride_, 2 * gate_stride_, false}});
  ForRows(team, rows, [&](size_t row) { ActivateRow(operand, gate_up_.data(), row, rows); });
  ahead.Clear();
  if (layer + 1 < s.layers) {
    const LayerWeights& after = weights_->layers[layer + 1];
    ExpectProduct(thread, {&after.q, &after.k, &after.v});
  } else {
    ExpectProduct(thread, {&weights_->output});
  }
  return AddProduct(team, thread, operand, w.down, x, rows);
}

}  // namespace antiphon::engine::cpu
