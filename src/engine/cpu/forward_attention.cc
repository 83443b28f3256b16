// What stands between a layer's first products and its attention output: queries are turned, keys
// and values stored, and rows attend to the cache.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/cpu/forward.h"

namespace antiphon::engine::cpu {

void Forward::BeginCache(int thread) {
  const Shares::Range part = Shares::PartOf(thread, threads_, HeadTasks());
  scratch_[static_cast<size_t>(thread)].cache = {
      .task = part.begin, .end = part.end, .product = true};
}

void Forward::ExpectCache(int thread, uint32_t layer) {
  Scratch& scratch = scratch_[static_cast<size_t>(thread)];
  LookAhead& ahead = scratch.ahead;
  CacheAhead& cache = scratch.cache;
  size_t bytes = ahead.bytes();
  const size_t token_bytes = layout_.token_bytes();
  // A rank's heads are but a part of each token.
  const model::LlamaShape& s = weights_->shape;
  const size_t own_bytes = size_t{s.kv_heads} * s.head_dim * layout_.element_bytes();
  const size_t own_offset = weights_->shard.rank * own_bytes;
  const size_t bytes_max = kCacheAhead * own_bytes / token_bytes;
  for (; cache.task < cache.end; ++cache.task) {
    const AttentionTask* task = HeadTaskAt(cache.task).task;
    if (task != cache.last) {  // else another head of the same tokens
      cache.last = task;
      cache.token = task->first_tile * kAttentionTile;
    }
    // The row's own keys are yet to be written.
    uint32_t end = rows_[task->first_row].position;
    if (task->split >= 0) end = std::min(end, task->end_tile * kAttentionTile);
    const SequenceChunk& chunk = step_.chunks[task->chunk];
    for (uint32_t stop; cache.token < end; cache.token = stop) {
      if (bytes >= bytes_max) return;
      const uint32_t block = cache.token / layout_.block_tokens;
      const uint32_t within = cache.token % layout_.block_tokens;
      stop = std::min(end, (block + 1) * layout_.block_tokens);
      const std::byte* keys =
          chunk.blocks[block] + layer * layout_.layer_bytes() + within * token_bytes;
      const size_t part = (stop - cache.token) * token_bytes;
      bytes += 2 * (stop - cache.token) * own_bytes;
      if (own_bytes < token_bytes) {
        for (const std::byte* token = keys + own_offset; token < keys + part;
             token += token_bytes) {
          ahead.Add(token, own_bytes);
          ahead.Add(token + layout_.half_bytes(), own_bytes);
        }
      } else if (part == layout_.half_bytes()) {
        ahead.Add(keys, 2 * part);
      } else {
        ahead.Add(keys, part);
        ahead.Add(keys + layout_.half_bytes(), part);
      }
    }
  }
  if (!cache.product) return;
  cache.product = false;
  ExpectProduct(thread, {&weights_->layers[layer].attention_output});
}

void Forward::RotateQueries(uint32_t layer, size_t row, uint32_t first_head, uint32_t heads,
                            float* q) {
  const model::LlamaShape& s = weights_->shape;
  const std::vector<float>& bias = weights_->layers[layer].q_bias;
  const size_t columns = size_t{heads} * s.head_dim;
  if (!bias.empty()) {
    kernels_->add(q, &bias[size_t{first_head} * s.head_dim], RoundUp(columns, kGroupRows));
  }
  const size_t pairs = s.rope_dims / 2;
  for (uint32_t head = 0; head < heads; ++head) {
    float* x = q + size_t{head} * s.head_dim;
    kernels_->rope(x, &cos_[row * pairs], &sin_[row * pairs], pairs, x);
  }
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
  for (size_t i = 0; i < columns; ++i) q[i] *= scale;
}

void Forward::StoreHeads(uint32_t layer, size_t row, uint32_t first_head, uint32_t heads) {
  const model::LlamaShape& s = weights_->shape;
  const LayerWeights& w = weights_->layers[layer];
  const size_t first_column = size_t{first_head} * s.head_dim;
  const size_t columns = size_t{heads} * s.head_dim;
  float* k = &qkv_[row * qkv_stride_] + k_column_ + first_column;
  float* v = &qkv_[row * qkv_stride_] + v_column_ + first_column;
  const size_t padded = RoundUp(columns, kGroupRows);
  if (!w.k_bias.empty()) kernels_->add(k, &w.k_bias[first_column], padded);
  if (!w.v_bias.empty()) kernels_->add(v, &w.v_bias[first_column], padded);
  const size_t pairs = s.rope_dims / 2;
  for (uint32_t head = 0; head < heads; ++head) {
    float* x = k + size_t{head} * s.head_dim;
    kernels_->rope(x, &cos_[row * pairs], &sin_[row * pairs], pairs, x);
  }
  const SequenceChunk& chunk = step_.chunks[rows_[row].chunk];
  const uint32_t position = rows_[row].position;
  const size_t column_of_model =
      size_t{weights_->shard.rank} * s.kv_heads * s.head_dim + first_column;
  std::byte* keys = chunk.blocks[position / layout_.block_tokens] + layer * layout_.layer_bytes() +
                    position % layout_.block_tokens * layout_.token_bytes() +
                    column_of_model * layout_.element_bytes();
  std::byte* values = keys + layout_.half_bytes();
  if (layout_.dtype == KvDtype::kF32) {
    std::memcpy(keys, k, columns * sizeof(float));
    std::memcpy(values, v, columns * sizeof(float));
  } else {
    kernels_->to_bf16(k, columns, reinterpret_cast<uint16_t*>(keys));
    kernels_->to_bf16(v, columns, reinterpret_cast<uint16_t*>(values));
  }
}

void Forward::WriteCache(uint32_t layer, size_t row) {
  RotateQueries(layer, row, 0, weights_->shape.heads, &qkv_[row * qkv_stride_]);
  StoreHeads(layer, row, 0, weights_->shape.kv_heads);
}

void Forward::AttendTask(int thread, uint32_t layer, const HeadTask& at, const HeadTask& next,
                         float* attended) {
  const model::LlamaShape& s = weights_->shape;
  const AttentionTask& task = *at.task;
  const uint32_t kv_head = at.kv_head;
  Scratch& scratch = scratch_[static_cast<size_t>(thread)];
  const SequenceChunk& chunk = step_.chunks[task.chunk];
  const uint32_t shared = s.heads / s.kv_heads;
  const size_t head_column = size_t{kv_head} * shared * s.head_dim;
  size_t n = 0;
  for (uint32_t r = 0; r < task.rows; ++r) {
    const float* q = &qkv_[(task.first_row + r) * qkv_stride_ + head_column];
    for (uint32_t h = 0; h < shared; ++h, ++n, q += s.head_dim) {
      float* query = &scratch.queries[n * padded_dim_];
      std::memcpy(query, q, s.head_dim * sizeof(float));
      std::fill(query + s.head_dim, query + padded_dim_, 0.0f);
      scratch.limits[n] = rows_[task.first_row + r].position + 1;
    }
  }
  if (!writes_apart_) {
    RotateQueries(layer, task.first_row, kv_head * shared, shared, scratch.queries.data());
    const bool sees_itself =
        task.split < 0 || task.end_tile * kAttentionTile > rows_[task.first_row].position;
    if (sees_itself) StoreHeads(layer, task.first_row, kv_head, 1);
  }
  Attention a;
  a.queries = scratch.queries.data();
  a.count = static_cast<int>(n);
  a.limits = scratch.limits.data();
  a.out = scratch.attended.data();
  a.head_dim = static_cast<int>(s.head_dim);
  a.padded_dim = static_cast<int>(padded_dim_);
  a.blocks = chunk.blocks.data();
  a.block_tokens = layout_.block_tokens;
  a.token_bytes = layout_.token_bytes();
  const size_t head_of_model = weights_->shard.rank * s.kv_heads + kv_head;
  a.key_offset =
      layer * layout_.layer_bytes() + head_of_model * s.head_dim * layout_.element_bytes();
  a.value_offset = a.key_offset + layout_.half_bytes();
  a.f32_cache = layout_.dtype == KvDtype::kF32;
  a.scratch = scratch.attention.data();
  if (strips_.empty()) {
    ExpectCache(thread, layer);
    a.ahead = scratch.ahead.ranges();
    a.ahead_count = scratch.ahead.count();
    // All heads of a piece are to be there before the first one is through it.
    a.ahead_twice = scratch.cache.begun++ < s.kv_heads;
  }
  if (next.task != nullptr) {
    const AttentionTask& t = *next.task;
    a.next_blocks = step_.chunks[t.chunk].blocks.data();
    const ptrdiff_t heads = ptrdiff_t{next.kv_head} - ptrdiff_t{kv_head};
    a.next_offset = heads * static_cast<ptrdiff_t>(s.head_dim * layout_.element_bytes());
    a.next_first = t.first_tile * kAttentionTile;
    a.next_end = rows_[t.first_row].position + 1;
  }
  if (task.split >= 0) {
    const Split& split = splits_[static_cast<size_t>(task.split)];
    a.partials = &partials_[split.partials + kv_head * split.partials_of_head];
    a.first_tile = task.first_tile;
    a.end_tile = task.end_tile;
    kernels_->attention(a);
    std::atomic<int>& left = pieces_left_[static_cast<size_t>(task.split) * s.kv_heads + kv_head];
    if (left.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    left.store(split.pieces, std::memory_order_relaxed);  // for the next layer
    kernels_->merge_attention(a);
  } else {
    kernels_->attention(a);
  }
  n = 0;
  for (uint32_t r = 0; r < task.rows; ++r) {
    float* out = attended + r * input_stride_ + head_column;
    for (uint32_t h = 0; h < shared; ++h, ++n, out += s.head_dim) {
      std::memcpy(out, &scratch.attended[n * padded_dim_], s.head_dim * sizeof(float));
    }
  }
}

int Forward::HeadTasks() const {
  return static_cast<int>(attention_tasks_.size() * weights_->shape.kv_heads);
}

Forward::HeadTask Forward::HeadTaskAt(int index) const {
  const size_t kv_heads = weights_->shape.kv_heads;
  const size_t at = attention_tasks_.size() * kv_heads - 1 - static_cast<size_t>(index);
  return {&attention_tasks_[at / kv_heads], static_cast<uint32_t>(at % kv_heads)};
}

}  // namespace antiphon::engine::cpu
