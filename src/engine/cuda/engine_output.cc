// What a step gives: best and drawn tokens, and logits for whoever asked.
#include <algorithm>
#include <cstring>

#include "engine/cuda/engine.h"

namespace antiphon::engine::cuda {

Error Engine::PlaceOutputs() {
  size_t logits_rows = 0, edit_count = 0;
  uint32_t last_rows = 0;
  draw_count_ = 0;
  for (Work& work : work_) {
    const ChunkView& chunk = *work.chunk;
    const bool last = WantsLastRow(chunk.output);
    // Graphs have a best token for each row, wanted or not.
    if (last || by_graph_) work.best_row = last_rows++;
    work.logits_row = logits_rows;
    if (chunk.output == Output::kAllLogits) logits_rows += chunk.token_count;
    if (chunk.output == Output::kLogits || chunk.output == Output::kDraw) ++logits_rows;
    if (chunk.output == Output::kDraw) edit_count += chunk.draw->edit_count;
  }
  // The step before is over, and with it the use of what is replaced.
  if (logits_rows * config_.vocab > logits_host_.size()) {
    logits_host_ = {};
    MODULE_RETURN_IF_ERROR(logits_host_.Allocate(logits_rows * config_.vocab));
  }
  if (edit_count > edits_.size()) {
    edits_host_ = {};
    edits_ = {};
    originals_ = {};
    MODULE_RETURN_IF_ERROR(edits_host_.Allocate(edit_count));
    MODULE_RETURN_IF_ERROR(edits_.Allocate(edit_count));
    MODULE_RETURN_IF_ERROR(originals_.Allocate(edit_count));
  }
  uint32_t edit = 0;
  for (const Work& work : work_) {
    if (work.chunk->output != Output::kDraw) continue;
    const Draw& draw = *work.chunk->draw;
    DrawRow& row = draws_host_[draw_count_++];
    row = {.draw = draw,
           .row = work.best_row % output_rows_max_,
           .first_edit = edit,
           .token = best_.data() + work.best_row,
           .undecided = logits_host_.data() + work.logits_row * config_.vocab};
    if (draw.edit_count == 0) continue;
    std::memcpy(edits_host_.data() + edit, draw.edits, draw.edit_count * sizeof(LogitEdit));
    edit += draw.edit_count;
  }
  if (draw_count_ == 0) return {};
  CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(draws_.data(), draws_host_.data(),
                                       draw_count_ * sizeof(DrawRow), cudaMemcpyHostToDevice,
                                       compute_.get()));
  if (edit == 0) return {};
  CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(edits_.data(), edits_host_.data(), edit * sizeof(LogitEdit),
                                       cudaMemcpyHostToDevice, compute_.get()));
  return {};
}

Error Engine::SendLogits(uint32_t row, uint32_t count, size_t logits_row) {
  CUDA_RETURN_IF_ERROR(cudaMemcpy2DAsync(
      logits_host_.data() + logits_row * config_.vocab, config_.vocab * sizeof(float),
      logits_.data() + size_t{row} * vocab_stride_, vocab_stride_ * sizeof(float),
      config_.vocab * sizeof(float), count, cudaMemcpyDeviceToHost, compute_.get()));
  return {};
}

Error Engine::FinishRows(uint32_t first, uint32_t end) {
  uint32_t draws_before = 0, draws = 0;
  for (const Work& work : work_) {
    const Output output = work.chunk->output;
    if (!WantsLastRow(output) || work.best_row >= end) continue;
    if (output == Output::kDraw) ++(work.best_row < first ? draws_before : draws);
    if (output == Output::kLogits && work.best_row >= first) {
      MODULE_RETURN_IF_ERROR(SendLogits(work.best_row - first, 1, work.logits_row));
    }
  }
  if (draws == 0) return {};
  CUDA_RETURN_IF_ERROR(DrawTokens(draws_.data() + draws_before, draws, edits_.data(),
                                  originals_.data(), logits_.data(), config_.vocab, vocab_stride_,
                                  compute_.get()));
  return {};
}

Error Engine::SendBest(uint32_t rows) {
  CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(best_host_.data(), best_.data(), rows * sizeof(uint32_t),
                                       cudaMemcpyDeviceToHost, compute_.get()));
  return {};
}

// Of a step with chunks of several rows.
Error Engine::RunOutput(const StepTables& tables) {
  uint32_t last_rows = 0;
  for (const Work& work : work_) last_rows += WantsLastRow(work.chunk->output);
  for (uint32_t first = 0; first < last_rows; first += output_rows_max_) {
    const uint32_t rows = std::min(output_rows_max_, last_rows - first);
    CUDA_RETURN_IF_ERROR(RmsNorm(x_.data(), output_norm_, tables.device.output_rows + first, rows,
                                 config_.hidden, config_.rms_eps, normed_.data(), compute_.get()));
    MODULE_RETURN_IF_ERROR(
        gemm_.Run(logits_product_, rows, output_, normed_.data(), logits_.data()));
    CUDA_RETURN_IF_ERROR(Argmax(logits_.data(), rows, config_.vocab, vocab_stride_,
                                best_.data() + first, compute_.get()));
    MODULE_RETURN_IF_ERROR(FinishRows(first, first + rows));
  }
  MODULE_RETURN_IF_ERROR(SendBest(last_rows));
  for (const Work& work : work_) {
    if (work.chunk->output != Output::kAllLogits) continue;
    const uint32_t count = work.chunk->token_count;
    for (uint32_t i = 0; i < count; i += output_rows_max_) {
      const uint32_t rows = std::min(output_rows_max_, count - i);
      CUDA_RETURN_IF_ERROR(RmsNorm(x_.data() + size_t{work.first_row + i} * config_.hidden,
                                   output_norm_, nullptr, rows, config_.hidden, config_.rms_eps,
                                   normed_.data(), compute_.get()));
      MODULE_RETURN_IF_ERROR(
          gemm_.Run(logits_product_, rows, output_, normed_.data(), logits_.data()));
      MODULE_RETURN_IF_ERROR(SendLogits(0, rows, work.logits_row + i));
    }
  }
  return {};
}

ChunkOutput Engine::OutputOf(const Work& work) const {
  const Output output = work.chunk->output;
  ChunkOutput out;
  if (WantsLastRow(output)) out.token = best_host_[work.best_row];
  if (output == Output::kLogits || output == Output::kAllLogits ||
      (output == Output::kDraw && out.token == kUndecided)) {
    out.logits = logits_host_.data() + work.logits_row * config_.vocab;
  }
  return out;
}

}  // namespace antiphon::engine::cuda
