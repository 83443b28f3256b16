// What a step consists of, before a thread runs any of it.
#include <algorithm>
#include <utility>

#include "engine/cpu/forward.h"

namespace antiphon::engine::cpu {
namespace {

// Tiles of a piece of a long context, at least.
constexpr uint32_t kPieceTilesMin = 8;

}  // namespace

void Forward::Prepare(Step step) {
  step_ = std::move(step);
  result_.chunks.clear();
  result_.chunks.resize(step_.chunks.size());
  rows_.clear();
  attention_tasks_.clear();
  output_rows_.clear();
  wanted_sums_.clear();
  for (uint32_t c = 0; c < step_.chunks.size(); ++c) {
    const SequenceChunk& chunk = step_.chunks[c];
    const uint32_t first = static_cast<uint32_t>(rows_.size());
    const uint32_t count = static_cast<uint32_t>(chunk.tokens.size());
    for (uint32_t i = 0; i < count; ++i) {
      rows_.push_back({chunk.tokens[i], chunk.start + i, c});
      const bool last = i + 1 == count;
      if (chunk.want_logits || (last && chunk.sample.has_value())) {
        output_rows_.push_back({first + i, c, last});
      }
    }
    for (uint32_t i = 0; i < count; i += kAttentionRows) {
      attention_tasks_.push_back({c, first + i, std::min(kAttentionRows, count - i)});
    }
    if (comm_ == nullptr && !chunk.checksums.empty()) PlanSums(chunk, first);
    result_.chunks[c].sequence = chunk.sequence;
    if (chunk.want_logits && weights_->shard.rank == 0) {
      result_.chunks[c].logits.resize(size_t{count} * weights_->shape.vocab);
    }
  }
  // A row alone in its chunk reads no other row's keys.
  writes_apart_ = rows_.size() != step_.chunks.size() || padded_dim_ != weights_->shape.head_dim;
  PlanStrips();
  if (strips_.empty()) PlanAttention();
}

void Forward::PlanSums(const SequenceChunk& chunk, size_t first_row) {
  const uint32_t size = layout_.block_tokens, first = chunk.start / size;
  const uint32_t end = chunk.start + static_cast<uint32_t>(chunk.tokens.size());
  for (uint32_t block = first; block < layout_.BlocksFor(end); ++block) {
    const uint32_t filled_to = std::min(end, (block + 1) * size);
    wanted_sums_.push_back({.payload = chunk.blocks[block],
                            .sums = &chunk.checksums[(block - first) * size_t{layout_.layers}],
                            .tokens = filled_to - block * size,
                            .last_row = first_row + filled_to - 1 - chunk.start});
  }
}

// A strip ends where a task does. No bit of the result depends on where.
void Forward::PlanStrips() {
  splits_.clear();
  strips_.clear();
  const size_t rows = rows_.size();
  // A sum over ranks is of all rows, and dequantising is done once for all of them.
  if (comm_ != nullptr || any_raw_) return;
  if (rows < kStripRows * static_cast<size_t>(threads_)) return;
  writes_apart_ = true;
  Strip strip{};
  for (size_t task = 0; task < attention_tasks_.size(); ++task) {
    strip.rows += attention_tasks_[task].rows;
    strip.end_task = task + 1;
    const size_t end = strip.first_row + strip.rows;
    if (strip.rows < kStripRows && end < rows) continue;
    const auto shown = std::ranges::lower_bound(output_rows_, strip.first_row, {}, &OutputRow::row);
    strip.shown = shown == output_rows_.end() ? rows : shown->row;
    strips_.push_back(strip);
    strip = {.first_row = end, .rows = 0, .first_task = task + 1};
  }
  for (size_t i = 0; i < strips_.size(); ++i) written_[i].store(0, std::memory_order_relaxed);
  for (std::atomic<uint32_t>& left : unwritten_) {
    left.store(static_cast<uint32_t>(strips_.size()), std::memory_order_relaxed);
  }
}

// How a context is cut changes no bit of the result, so the number of threads may decide it.
void Forward::PlanAttention() {
  const model::LlamaShape& s = weights_->shape;
  const size_t wanted = kTasksOfAThread * static_cast<size_t>(threads_);
  const size_t tasks = attention_tasks_.size() * s.kv_heads;
  const bool few = threads_ > 1 && tasks < wanted;
  const size_t pieces_max = few ? (wanted + tasks - 1) / tasks : 1;
  // So few tasks that a thread might wait for another's last one: even short contexts are halved.
  const uint32_t pieces_min =
      few && 2 * tasks <= wanted && tasks % static_cast<size_t>(threads_) != 0 ? 2 : 1;
  const size_t tile_floats = s.heads / s.kv_heads * AttentionPartialFloats(padded_dim_);
  size_t floats = 0;
  for (size_t i = 0, end = attention_tasks_.size(); i < end; ++i) {
    const AttentionTask task = attention_tasks_[i];
    if (task.rows != 1) continue;
    const uint32_t tiles = rows_[task.first_row].position / kAttentionTile + 1;
    const uint32_t pieces =
        std::max({static_cast<uint32_t>(std::min<size_t>(pieces_max, tiles / kPieceTilesMin)),
                  std::min(pieces_min, tiles), (tiles + piece_tiles_ - 1) / piece_tiles_});
    if (pieces < 2) continue;
    for (uint32_t piece = 0; piece < pieces; ++piece) {
      AttentionTask part = task;
      part.split = static_cast<int>(splits_.size());
      part.first_tile = tiles * piece / pieces;
      part.end_tile = tiles * (piece + 1) / pieces;
      if (piece == 0) {
        attention_tasks_[i] = part;
      } else {
        attention_tasks_.push_back(part);
      }
    }
    for (uint32_t h = 0; h < s.kv_heads; ++h) {
      pieces_left_[splits_.size() * s.kv_heads + h].store(static_cast<int>(pieces),
                                                          std::memory_order_relaxed);
    }
    splits_.push_back({.partials = floats,
                       .partials_of_head = tiles * tile_floats,
                       .pieces = static_cast<int>(pieces)});
    floats += s.kv_heads * tiles * tile_floats;
  }
  if (partials_.size() < floats) partials_.resize(floats);
}

}  // namespace antiphon::engine::cpu
