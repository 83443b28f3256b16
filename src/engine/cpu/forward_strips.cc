// Many rows through all layers, a strip of them at a time. A thread takes its strip from one
// layer's keys and values to the next one's without waiting for anybody: what lies between two
// products stays in the core's caches, and a thread that loses its core holds up the others only
// once they come to the next layer's attention behind its strip.
#include <algorithm>

#include "engine/cpu/forward.h"

namespace antiphon::engine::cpu {

// Each piece of work is the second half of a layer and the first half of the next, of one strip.
// They are taken in order, layer by layer, and a piece waits only for pieces ahead of it: somebody
// is always at work.
void Forward::RunStrips(Team& team, int thread, const std::function<void(uint32_t)>& on_layer) {
  const uint32_t layers = weights_->shape.layers;
  const int strips = static_cast<int>(strips_.size());
  team.ForEach(strips * static_cast<int>(layers + 1), 1, [&](int piece, int) {
    const uint32_t layer = static_cast<uint32_t>(piece / strips);
    const size_t index = static_cast<size_t>(piece % strips);
    const Strip& strip = strips_[index];
    const size_t end = strip.first_row + strip.rows;
    if (layer > 0) {
      AwaitStrips(layer, index);
      SumStrip(layer - 1, strip);
      if (unwritten_[layer - 1].fetch_sub(1, std::memory_order_acq_rel) == 1) on_layer(layer);
      // Behind the last layer's keys and values there are only the rows that are asked for.
      const size_t first = layer == layers ? strip.shown : strip.first_row;
      if (first >= end) return;
      BackHalf(thread, layer - 1, strip, first);
    }
    if (layer == layers) return;
    FrontHalf(thread, layer, strip);
    written_[index].store(layer + 1, std::memory_order_release);
    written_[index].notify_all();
  });
}

void Forward::AwaitStrips(uint32_t layers, size_t strip) {
  for (size_t i = 0; i <= strip; ++i) AwaitAtLeast(written_[i], layers);
}

void Forward::SumStrip(uint32_t layer, const Strip& strip) {
  const auto first =
      std::ranges::lower_bound(wanted_sums_, strip.first_row, {}, &WantedSums::last_row);
  for (auto it = first; it != wanted_sums_.end() && it->last_row < strip.first_row + strip.rows;
       ++it) {
    SumBlock(layer, static_cast<size_t>(it - wanted_sums_.begin()));
  }
}

void Forward::FrontHalf(int thread, uint32_t layer, const Strip& strip) {
  const LayerWeights& w = weights_->layers[layer];
  const Operand operand = StripOperand(thread);
  const float* x = &x_[strip.first_row * hidden_stride_];
  float* qkv = &qkv_[strip.first_row * qkv_stride_];
  for (size_t row = 0; row < strip.rows; ++row) {
    NormaliseRow(operand, x, w.attention_norm, row, strip.rows);
  }
  MultiplyStrip(thread, operand, {&w.q, qkv, qkv_stride_, false}, strip.rows);
  MultiplyStrip(thread, operand, {&w.k, qkv + k_column_, qkv_stride_, false}, strip.rows);
  MultiplyStrip(thread, operand, {&w.v, qkv + v_column_, qkv_stride_, false}, strip.rows);
  for (size_t row = 0; row < strip.rows; ++row) WriteCache(layer, strip.first_row + row);
}

void Forward::BackHalf(int thread, uint32_t layer, const Strip& strip, size_t first_row) {
  const model::LlamaShape& s = weights_->shape;
  const LayerWeights& w = weights_->layers[layer];
  const Operand operand = StripOperand(thread);
  const size_t rows = strip.first_row + strip.rows - first_row;
  for (size_t t = strip.first_task; t < strip.end_task; ++t) {
    AttentionTask task = attention_tasks_[t];
    if (task.first_row + task.rows <= first_row) continue;
    if (task.first_row < first_row) {
      task.rows -= static_cast<uint32_t>(first_row) - task.first_row;
      task.first_row = static_cast<uint32_t>(first_row);
    }
    const AttentionTask* const after = t + 1 < strip.end_task ? &attention_tasks_[t + 1] : nullptr;
    for (uint32_t head = 0; head < s.kv_heads; ++head) {
      const bool last = head + 1 == s.kv_heads;
      AttendTask(thread, layer, {&task, head},
                 last ? HeadTask{after, 0} : HeadTask{&task, head + 1},
                 operand.input + (task.first_row - first_row) * input_stride_);
    }
  }
  for (size_t row = 0; row < rows; ++row) {
    Quantise(operand.input + row * input_stride_, operand, row, rows, size_t{s.heads} * s.head_dim);
  }
  float* x = &x_[first_row * hidden_stride_];
  MultiplyStrip(thread, operand, {&w.attention_output, x, hidden_stride_, true}, rows);

  for (size_t row = 0; row < rows; ++row) NormaliseRow(operand, x, w.feed_forward_norm, row, rows);
  float* gate = &gate_up_[static_cast<size_t>(thread) * kStripRowsMax * 2 * gate_stride_];
  MultiplyStrip(thread, operand, {&w.gate, gate, 2 * gate_stride_, false}, rows);
  MultiplyStrip(thread, operand, {&w.up, gate + gate_stride_, 2 * gate_stride_, false}, rows);
  for (size_t row = 0; row < rows; ++row) ActivateRow(operand, gate, row, rows);
  MultiplyStrip(thread, operand, {&w.down, x, hidden_stride_, true}, rows);
}

void Forward::MultiplyStrip(int thread, const Operand& operand, const Product& product,
                            size_t rows) {
  MultiplyGroups(thread, operand, product, 0, rows, 0, product.matrix->groups());
}

Forward::Operand Forward::StripOperand(int thread) {
  const size_t first = static_cast<size_t>(thread) * kStripRowsMax;
  return {&input_[first * input_stride_],
          reinterpret_cast<std::byte*>(quant_.data()) + QuantTileBytes(first, input_stride_)};
}

}  // namespace antiphon::engine::cpu
