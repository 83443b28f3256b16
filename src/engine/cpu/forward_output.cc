// From the last layer to logits and tokens.
#include <algorithm>
#include <cstring>
#include <utility>

#include "engine/cpu/forward.h"

namespace antiphon::engine::cpu {

bool Forward::FineOutput() const {
  return weights_->output.packed.has_value() && UsesQuantisedActivations(*weights_->output.packed);
}

void Forward::Output(Team& team, int thread) {
  const model::LlamaShape& s = weights_->shape;
  for (size_t first = 0; first < output_rows_.size(); first += kOutputRows) {
    const size_t rows = std::min(kOutputRows, output_rows_.size() - first);
    const Operand operand = OperandOf(thread, rows);
    ForRows(team, rows, [&](size_t i) {
      const float* x = &x_[output_rows_[first + i].row * hidden_stride_];
      float* input = operand.input + i * input_stride_;
      kernels_->rms_norm(x, weights_->output_norm.data(), hidden_stride_, s.hidden, s.rms_eps,
                         input);
      if (!FineOutput()) return;
      const size_t tile = 2 * i / kRowTile;
      const size_t tile_rows = std::min<size_t>(kRowTile, 2 * rows - tile * kRowTile);
      kernels_->quantize_row_fine(input, s.hidden, static_cast<int>(2 * i % kRowTile),
                                  static_cast<int>(tile_rows),
                                  operand.quant + tile * QuantTileBytes(kRowTile, s.hidden));
    });
    const bool whole = comm_ == nullptr;
    Multiply(team, thread, operand, rows,
             {{.matrix = &weights_->output,
               .out = whole ? logits_.data() : shard_logits_.data(),
               .out_stride = whole ? vocab_stride_ : shard_stride_,
               .add = false,
               .fine = FineOutput()}});
    if (!whole) {
      if (!GatherLogits(team, thread, rows)) return;
      if (weights_->shard.rank != 0) continue;
    }
    team.ForEach(static_cast<int>(rows), 1,
                 [&](int begin, int) { Sample(thread, first, static_cast<size_t>(begin)); });
  }
}

bool Forward::GatherLogits(Team& team, int thread, size_t rows) {
  const size_t ranks = weights_->shard.size;
  const size_t floats = rows * shard_stride_;
  if (thread == 0) {
    absl::Status status = comm_->Gather(
        absl::MakeConstSpan(reinterpret_cast<const std::byte*>(shard_logits_.data()),
                            floats * sizeof(float)),
        absl::MakeSpan(reinterpret_cast<std::byte*>(gathered_logits_.data()),
                       weights_->shard.rank == 0 ? ranks * floats * sizeof(float) : 0),
        0, timeout_);
    if (!status.ok()) Fail(std::move(status));
  }
  team.Barrier();
  if (failed_.load(std::memory_order_relaxed)) return false;
  if (weights_->shard.rank != 0) return true;
  const uint32_t groups = static_cast<uint32_t>(vocab_stride_ / kGroupRows);
  team.ForEach(static_cast<int>(rows), 1, [&](int begin, int) {
    const size_t i = static_cast<size_t>(begin);
    for (uint32_t r = 0; r < ranks; ++r) {
      const Shard shard{.rank = r, .size = weights_->shard.size};
      const size_t first = shard.Begin(groups) * kGroupRows, end = shard.End(groups) * kGroupRows;
      std::memcpy(&logits_[i * vocab_stride_ + first],
                  &gathered_logits_[r * floats + i * shard_stride_], (end - first) * sizeof(float));
    }
  });
  return true;
}

void Forward::Sample(int thread, size_t first, size_t index) {
  const OutputRow& row = output_rows_[first + index];
  const SequenceChunk& chunk = step_.chunks[row.chunk];
  ChunkResult& result = result_.chunks[row.chunk];
  const uint32_t vocab = weights_->shape.vocab;
  float* logits = &logits_[index * vocab_stride_];
  if (chunk.want_logits) {
    const size_t in_chunk = rows_[row.row].position - chunk.start;
    std::memcpy(&result.logits[in_chunk * vocab], logits, vocab * sizeof(float));
  }
  if (row.last && chunk.sample.has_value()) {
    result.sampled = scratch_[static_cast<size_t>(thread)].sampler.Sample(
        absl::MakeSpan(logits, vocab), *chunk.sample);
  }
}

}  // namespace antiphon::engine::cpu
